"""Replicas of one engine on Ray Serve (extra `octavo[ray]`), by `octavo.engine.replicas:app`.

Nothing else of Octavo imports this package, nor Ray.
"""

from .app import app

__all__ = ["app"]
