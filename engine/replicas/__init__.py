"""Replicas of one engine on Ray Serve (extra `octavo[ray]`): `octavo.engine.replicas:app`.

No other part of Octavo imports this package or Ray.
"""

import os

# gRPC reads it on import. Ray forks to start programs. With fork support, gRPC starts threads in
# the forked process, which may crash it before exec (grpc/grpc#43055).
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

from .app import app

__all__ = ["app"]
