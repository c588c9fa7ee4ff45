"""What a process gives up before it decodes a stranger's file. It cannot be taken back.

Limits of memory and CPU time hold always; the rest where the system has it: seccomp (no network,
no opening of files, no processes) and Landlock (no opening of files, no TCP).
"""

from __future__ import annotations

import ctypes
import resource
import struct

from . import seccomp

NO_NEW_PRIVS, DUMPABLE = 38, 4  # options of prctl
CREATE_RULESET, RESTRICT_SELF = 444, 446  # numbers of Landlock's calls, on all machines
VERSION = 1  # a flag of CREATE_RULESET
FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}  # how many Landlock knows, by its version; then 16
TCP, SCOPES = 0b11, 0b11  # bind and connect; abstract sockets and signals


def apply(memory_bytes: int, cpu_seconds: int, num_files: int) -> str:
    """Shuts this process in, and says how. All threads that there will be come after it.

    `memory_bytes` is of address space, `cpu_seconds` for a start: whoever started the process
    gives it more for each file.
    """
    for limit, value in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_NOFILE, num_files),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
    ):
        _lower(limit, value)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, hard))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(DUMPABLE, 0, 0, 0, 0)
    privileges_end = libc.prctl(NO_NEW_PRIVS, 1, 0, 0, 0) == 0
    has_landlock = privileges_end and _install_landlock(libc)
    has_seccomp = privileges_end and seccomp.install(libc)
    return f"memory {memory_bytes / 1e9:.1f} GB, {_describe(has_seccomp, has_landlock)}"


def _describe(has_seccomp: bool, has_landlock: bool) -> str:
    if has_seccomp:
        also = ", Landlock" if has_landlock else ""
        return f"no network, no processes (seccomp), no files but the one sent (seccomp{also})"
    if has_landlock:
        return "no files but the one sent (Landlock); network not shut off: no seccomp"
    return "network and files not shut off: this system has neither seccomp nor Landlock"


def _lower(limit: int, value: int) -> None:
    """Sets a limit for good, or leaves one that is lower yet."""
    hard = resource.getrlimit(limit)[1]
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    resource.setrlimit(limit, (value, value))


def _install_landlock(libc: ctypes.CDLL) -> bool:
    """Rules that handle every right and grant none: what is open stays so, nothing else opens."""
    version = libc.syscall(CREATE_RULESET, None, 0, VERSION)
    if version < 1:
        return False
    rights = (1 << FILE_RIGHTS.get(version, 16)) - 1
    attributes = struct.pack("=QQQ", rights, TCP, SCOPES)
    size = 8 if version < 4 else 16 if version < 6 else 24
    ruleset = libc.syscall(CREATE_RULESET, attributes, size, 0)
    if ruleset < 0:
        return False
    return libc.syscall(RESTRICT_SELF, ruleset, 0) == 0
