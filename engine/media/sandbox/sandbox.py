"""Irrevocable restrictions of a process that decodes untrusted files.

Memory and CPU time are always limited. Where the system supports them, seccomp (no network, no
opening of files, no new processes) and Landlock (no opening of files, no TCP) are applied too.
"""

from __future__ import annotations

import ctypes
import resource
import struct

from . import seccomp

NO_NEW_PRIVS, DUMPABLE = 38, 4  # options of prctl
CREATE_RULESET, RESTRICT_SELF = 444, 446  # Landlock system calls, the same on all architectures
VERSION = 1  # flag of CREATE_RULESET: return the ABI version
FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}  # number of file rights by ABI version; later ones: 16
TCP, SCOPES = 0b11, 0b11  # bind and connect; abstract sockets and signals


def apply(memory_bytes: int, cpu_seconds: int, num_files: int) -> str:
    """Restrict this process and return a description of the restrictions for the log.

    Must be called before other threads are started. `memory_bytes` limits the address space;
    `cpu_seconds` is the initial limit, which the parent process raises for each file.
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
    has_no_new_privs = libc.prctl(NO_NEW_PRIVS, 1, 0, 0, 0) == 0
    has_landlock = has_no_new_privs and _install_landlock(libc)
    has_seccomp = has_no_new_privs and seccomp.install(libc)
    return f"memory {memory_bytes / 1e9:.1f} GB, {_describe(has_seccomp, has_landlock)}"


def _describe(has_seccomp: bool, has_landlock: bool) -> str:
    if has_seccomp:
        also = ", Landlock" if has_landlock else ""
        return f"no network, no processes (seccomp), no files but the one sent (seccomp{also})"
    if has_landlock:
        return "no files but the one sent (Landlock); network not blocked: no seccomp"
    return "network and files not blocked: this system has neither seccomp nor Landlock"


def _lower(limit: int, value: int) -> None:
    """Set a soft and hard limit, unless the hard limit is lower already."""
    hard = resource.getrlimit(limit)[1]
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    resource.setrlimit(limit, (value, value))


def _install_landlock(libc: ctypes.CDLL) -> bool:
    """Restrict all access rights and grant none; files that are open already stay usable."""
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
