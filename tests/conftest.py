"""Set-up of all tests."""

from __future__ import annotations

import pytest

from octavo.tests.support import fork_server

fork_server.install()

# Files that take over half a minute. They start first, so that none is left at the end while the
# other process of `pytest -n 2 --dist loadfile` has nothing to do.
LONGEST = (
    "tests/kernels/test_interpreter.py",
    "tests/worker/test_faults.py",
    "tests/engine/test_exit.py",
    "tests/worker/test_remote_workers.py",
    "tests/engine/test_llm.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.nodeid.startswith(LONGEST))
