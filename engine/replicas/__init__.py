"""Replicas of one engine on Ray Serve (extra `octavo[ray]`), by `octavo.engine.replicas:app`.

Nothing else of Octavo imports this package, nor Ray.
"""

import os

# gRPC reads it when it is imported. Ray forks to start programs, and gRPC otherwise starts threads
# in the fork, which may end it before it becomes the other program (grpc/grpc#43055).
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

from .app import app

__all__ = ["app"]
