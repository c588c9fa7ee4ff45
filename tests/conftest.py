"""Octavo first: it sets for gRPC, before any test imports it, what is true of a program of ours."""

from __future__ import annotations

import octavo  # noqa: F401
