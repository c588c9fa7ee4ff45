"""The folder of a group's Unix sockets: private, and short enough for their addresses."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from ..errors import ConfigError

GROUP_FOLDER = "octavo-"  # a group's folder begins so
MAX_SOCKET_PATH = 107  # bytes of a Unix socket's address (unix(7))
LONGEST_NAME = len("/octavo-12345678/rank9999.sock")


def make_socket_folder() -> Path:
    """Create a folder with mode 0700 in TMPDIR, or in XDG_RUNTIME_DIR or /tmp where TMPDIR is too
    long for a socket's address. Raises `ConfigError`."""
    first = _temporary_folder()
    problems = []
    for base in dict.fromkeys((first, os.environ.get("XDG_RUNTIME_DIR") or "/tmp", "/tmp")):
        if len(os.fsencode(base)) + LONGEST_NAME > MAX_SOCKET_PATH:
            problems.append(f"{base} is too long for a Unix socket ({MAX_SOCKET_PATH} bytes)")
            continue
        try:
            return Path(tempfile.mkdtemp(prefix=GROUP_FOLDER, dir=base))
        except OSError as error:
            problems.append(f"{base}: {error.strerror}")
    raise ConfigError(
        f"TMPDIR: no folder for the workers' sockets: {'; '.join(problems)}; set TMPDIR to a short "
        "folder that can be written to"
    )


def _temporary_folder() -> str:
    """Raises `ConfigError` where no temporary folder can be written to."""
    try:
        return os.path.abspath(tempfile.gettempdir())
    except OSError as error:
        text = f"TMPDIR: {error.strerror}; set it to a folder that can be written to"
        raise ConfigError(text) from None
