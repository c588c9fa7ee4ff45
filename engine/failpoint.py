"""Named places in the code where a test can make a fault. Free when off.

OCTAVO_FAILPOINTS holds rules, separated by semicolons:

    worker.computed@1=kill#3     the third time that rank 1 comes by, it is killed
    worker.computed=raise        each time on each rank

Actions: kill (SIGKILL to the process itself), stop (SIGSTOP: it hangs), raise (RuntimeError), exit
(as a program that gives up), oom (MemoryError).
"""

from __future__ import annotations

import os
import re
import signal
from collections import Counter
from dataclasses import dataclass

VARIABLE = "OCTAVO_FAILPOINTS"
RULE = re.compile(r"(?P<name>[\w.]+)(@(?P<rank>\d+))?=(?P<action>\w+)(#(?P<at>\d+))?")


@dataclass(frozen=True)
class Rule:
    name: str
    action: str
    rank: int | None  # None: every one
    at: int | None  # how many times it is passed before it acts; None: each time


def parse(text: str) -> tuple[Rule, ...]:
    """Raises ValueError for what is no rule: a test that makes no fault would pass."""
    rules = []
    for part in filter(None, text.split(";")):
        match = RULE.fullmatch(part.strip())
        if match is None or match["action"] not in ("kill", "stop", "raise", "exit", "oom"):
            raise ValueError(f"{VARIABLE}={part!r}: must be NAME[@RANK]=ACTION[#TIMES]")
        rank, at = match["rank"], match["at"]
        rules.append(
            Rule(
                match["name"], match["action"], int(rank) if rank else None, int(at) if at else None
            )
        )
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
        if rule.at in (None, _passed[rule]):
            _act(rule)


def _act(rule: Rule) -> None:
    if rule.action in ("kill", "stop"):
        os.kill(os.getpid(), signal.SIGKILL if rule.action == "kill" else signal.SIGSTOP)
    elif rule.action == "exit":
        os._exit(3)
    elif rule.action == "oom":
        raise MemoryError(f"failpoint {rule.name}")
    else:
        raise RuntimeError(f"failpoint {rule.name}")
