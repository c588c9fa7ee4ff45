"""Create the private folder of a group's Unix sockets, with a path short enough for addresses."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from ..errors import ConfigError

GROUP_FOLDER = "octavo-"  # prefix of the folder's name
MAX_SOCKET_PATH = 107  # maximum path of a Unix socket, bytes (unix(7))
MAX_NAME = len("/octavo-12345678/rank9999.sock")


def make_socket_folder() -> Path:
    """Create a folder with mode 0700 in TMPDIR, XDG_RUNTIME_DIR or /tmp, the first that works.

    Raises `ConfigError` if all of them are too long for a socket's address or not writable.
    """
    first = _temporary_folder()
    problems = []
    for base in dict.fromkeys((first, os.environ.get("XDG_RUNTIME_DIR") or "/tmp", "/tmp")):
        if len(os.fsencode(base)) + MAX_NAME > MAX_SOCKET_PATH:
            problems.append(f"{base} is too long for a Unix socket ({MAX_SOCKET_PATH} bytes)")
            continue
        try:
            return Path(tempfile.mkdtemp(prefix=GROUP_FOLDER, dir=base))
        except OSError as error:
            problems.append(f"{base}: {error.strerror}")
    raise ConfigError(
        f"TMPDIR: no folder for the workers' sockets: {'; '.join(problems)}; set TMPDIR to a "
        "writable folder with a short path"
    )


def _temporary_folder() -> str:
    """Return the system's temporary folder. Raises `ConfigError` if none is writable."""
    try:
        return os.path.abspath(tempfile.gettempdir())
    except OSError as error:
        text = f"TMPDIR: {error.strerror}; set it to a writable folder"
        raise ConfigError(text) from None
