"""Seccomp filter that allows a decoder only the system calls for computing and answering.

Call numbers are those of Linux's `asm/unistd_64.h` (x86_64) and `asm-generic/unistd.h` (aarch64),
structures those of `linux/filter.h` and `linux/seccomp.h`.
"""

from __future__ import annotations

import ctypes
import errno
import platform
import struct
from collections.abc import Iterator
from dataclasses import dataclass

# Allowed calls, with their numbers on x86_64 and aarch64. `open` is absent, because the engine
# opens all files; so are socket, exec, kill, ptrace and chmod.
ALLOWED = {
    "read": (0, 63),
    "write": (1, 64),  # only the socket and /dev/null are open for writing
    "close": (3, 57),
    "fstat": (5, 80),
    "poll": (7, None),
    "lseek": (8, 62),
    "munmap": (11, 215),
    "brk": (12, 214),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "pread64": (17, 67),
    "readv": (19, 65),
    "sched_yield": (24, 124),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "dup": (32, 23),
    "nanosleep": (35, 101),
    "getpid": (39, 172),
    "sendto": (44, 206),
    "recvfrom": (45, 207),
    "sendmsg": (46, 211),
    "recvmsg": (47, 212),
    "exit": (60, 93),
    "gettimeofday": (96, 169),
    "getrusage": (98, 165),
    "sysinfo": (99, 179),
    "sigaltstack": (131, 132),
    "gettid": (186, 178),
    "futex": (202, 98),
    "sched_getaffinity": (204, 123),
    "restart_syscall": (219, 128),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115),
    "exit_group": (231, 94),
    "ppoll": (271, 73),
    "set_robust_list": (273, 99),
    "getcpu": (309, 168),
    "getrandom": (318, 278),
    "rseq": (334, 293),
}


@dataclass(frozen=True)
class Check:
    """Condition on a call's argument: the lower 32 bits satisfy `argument & mask == value`."""

    argument: int  # index
    mask: int
    value: int
    is_upper: bool = False  # check the upper 32 bits instead


WHOLE, EXECUTE, THREAD = 0xFFFFFFFF, 4, 0x10000
DUP_CLOEXEC, EMPTY_PATH = 1030, 0x1000

CHECKED = {
    "mmap": ((9, 222), (Check(2, EXECUTE, 0),)),  # no new executable memory
    "mprotect": ((10, 226), (Check(2, EXECUTE, 0),)),
    "clone": ((56, 220), (Check(0, THREAD, THREAD),)),  # threads only, no processes
    "fcntl": ((72, 25), (Check(1, WHOLE, DUP_CLOEXEC),)),
    "newfstatat": ((262, 79), (Check(3, WHOLE, EMPTY_PATH),)),  # glibc implements fstat with it
    "prlimit64": (  # only reading its own limits
        (302, 261),
        (Check(0, WHOLE, 0), Check(2, WHOLE, 0), Check(2, WHOLE, 0, is_upper=True)),
    ),
}
# A filter cannot read the flags of clone3, so it fails with ENOSYS and libraries use clone instead.
CLONE3 = (435, 435)

ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column, AUDIT_ARCH
SECCOMP = (317, 277)  # call numbers
SET_MODE_FILTER, ALL_THREADS, NO_SLOWDOWN = 1, 1, 4

LOAD, AND, JUMP_EQUAL, RETURN = 0x20, 0x54, 0x15, 0x06
ALLOW, DENY, KILL = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x80000000
UNKNOWN_CALL = 0x00050000 | errno.ENOSYS
NUMBER_AT, ARCHITECTURE_AT, ARGUMENTS_AT = 0, 4, 16  # offsets in struct seccomp_data


def _op(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def program(machine: str) -> bytes:
    """Return the filter for a machine of `ARCHITECTURES`: an array of struct sock_filter."""
    return b"".join(_operations(*ARCHITECTURES[machine]))


def _operations(column: int, architecture: int) -> Iterator[bytes]:
    yield _op(LOAD, ARCHITECTURE_AT)
    yield _op(JUMP_EQUAL, architecture, 1, 0)
    yield _op(RETURN, KILL)  # call numbers of another architecture
    yield _op(LOAD, NUMBER_AT)
    for numbers in ALLOWED.values():
        number = numbers[column]
        if number is not None:
            yield _op(JUMP_EQUAL, number, 0, 1)
            yield _op(RETURN, ALLOW)
    yield _op(JUMP_EQUAL, CLONE3[column], 0, 1)
    yield _op(RETURN, UNKNOWN_CALL)
    for checked_numbers, checks in CHECKED.values():
        yield _op(JUMP_EQUAL, checked_numbers[column], 0, 4 * len(checks) + 1)
        for check in checks:
            yield _op(LOAD, ARGUMENTS_AT + 8 * check.argument + 4 * check.is_upper)
            yield _op(AND, check.mask)
            yield _op(JUMP_EQUAL, check.value, 1, 0)
            yield _op(RETURN, DENY)
        yield _op(RETURN, ALLOW)
    yield _op(RETURN, DENY)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("operations", ctypes.c_char_p))


def install(libc: ctypes.CDLL) -> bool:
    """Apply the filter to all threads of this process; return False if that is not supported.

    `PR_SET_NO_NEW_PRIVS` must be set. The filter cannot be removed.
    """
    machine = platform.machine()
    if machine not in ARCHITECTURES:
        return False
    operations = program(machine)
    filter_ = _Program(len(operations) // 8, operations)
    number = SECCOMP[ARCHITECTURES[machine][0]]
    flags = ALL_THREADS | NO_SLOWDOWN
    return libc.syscall(number, SET_MODE_FILTER, flags, ctypes.byref(filter_)) == 0
