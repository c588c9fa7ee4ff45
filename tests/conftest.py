"""Set-up of all tests."""

from __future__ import annotations

from octavo.tests.support import fork_server

fork_server.install()
