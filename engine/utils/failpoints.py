"""Named places in the code where a test can make a fault. Free when off.

OCTAVO_FAILPOINTS holds rules, separated by semicolons:

    worker.computed=raise             each time, on each rank
    worker.computed@1=kill#3          the third time that a process of rank 1 comes by, it is killed
    worker.computed=stop#3!/tmp/x     the same, once in all: whoever makes the file /tmp/x does it

Actions: kill (SIGKILL to the process itself), stop (SIGSTOP: it hangs), raise (RuntimeError), exit
(as a program that gives up), oom (MemoryError), cut (`CutOff`: the message is lost), wait (for
ever, as in a collective whose other ranks are gone).
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
    """A message is to be lost."""


@dataclass(frozen=True)
class Rule:
    name: str
    action: str
    rank: int | None  # None: every one
    at: int | None  # the how-manieth passing acts; None: each
    once: str | None = None  # the file whose making is the right to act


def parse(text: str) -> tuple[Rule, ...]:
    """Raises ValueError for what is no rule: a test that makes no fault would pass."""
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
    """A place where a fault may happen."""
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
