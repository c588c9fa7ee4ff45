"""The doors: gRPC in this release."""
