"""A rank's step: vision encoding, decoding and sampling."""
