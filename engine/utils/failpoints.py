"""Fault injection at named points in the code, for tests. No cost when disabled.

OCTAVO_FAILPOINTS has rules, separated by semicolons:

    worker.computed=raise             on every hit, on every rank
    worker.computed@1=kill#3          on the third hit in a process of rank 1
    worker.computed=stop#3!/tmp/x     on the third hit, only in the process that creates /tmp/x

Actions: kill (SIGKILL to the process itself), stop (SIGSTOP: the process hangs), raise
(RuntimeError), exit (with status 3), oom (MemoryError), cut (`CutOff`: the message is lost), wait
(forever, as in a collective whose other ranks have died).
"""

from __future__ import annotations

import os
import re
import signal
import threading
from collections import Counter
from dataclasses import dataclass

VARIABLE = "OCTAVO_FAILPOINTS"
ACTIONS = ("kill", "stop", "raise", "exit", "oom", "cut", "wait")
RULE = re.compile(
    r"(?P<name>[\w.]+)(@(?P<rank>\d+))?=(?P<action>\w+)(#(?P<at>\d+))?(!(?P<once>[^;]+))?"
)


class CutOff(RuntimeError):
    """The message must be dropped."""


@dataclass(frozen=True)
class Rule:
    name: str
    action: str
    rank: int | None  # None: all ranks
    at: int | None  # fire on the n-th hit; None: on every hit
    once: str | None = None  # path of a file; only the process that creates it fires


def parse(text: str) -> tuple[Rule, ...]:
    """Parse rules. Raises ValueError for an invalid rule, which would test nothing."""
    rules = []
    for part in filter(None, text.split(";")):
        match = RULE.fullmatch(part.strip())
        if match is None or match["action"] not in ACTIONS:
            raise ValueError(f"{VARIABLE}={part!r}: must be NAME[@RANK]=ACTION[#TIMES][!FILE]")
        rank, at = (int(match[name]) if match[name] else None for name in ("rank", "at"))
        rules.append(Rule(match["name"], match["action"], rank, at, match["once"]))
    return tuple(rules)


_RULES = parse(os.environ.get(VARIABLE, ""))
_passed: Counter[Rule] = Counter()


def failpoint(name: str, rank: int | None = None) -> None:
    """Fire the rules for this point, if any."""
    if _RULES:
        _hit(name, rank)


def _hit(name: str, rank: int | None) -> None:
    for rule in _RULES:
        if rule.name != name or rule.rank not in (None, rank):
            continue
        _passed[rule] += 1
        if rule.at in (None, _passed[rule]) and _may_act(rule):
            _act(rule)


def _may_act(rule: Rule) -> bool:
    if rule.once is None:
        return True
    try:
        os.close(os.open(rule.once, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def _act(rule: Rule) -> None:
    if rule.action in ("kill", "stop"):
        os.kill(os.getpid(), signal.SIGKILL if rule.action == "kill" else signal.SIGSTOP)
    elif rule.action == "exit":
        os._exit(3)
    elif rule.action == "oom":
        raise MemoryError(f"failpoint {rule.name}")
    elif rule.action == "wait":
        threading.Event().wait()
    elif rule.action == "cut":
        raise CutOff(f"failpoint {rule.name}")
    else:
        raise RuntimeError(f"failpoint {rule.name}")
