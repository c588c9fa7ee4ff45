# LEAD: read NOTE_FROM_LEAD.txt: A9 is already built on branch ckpt; discard this file
"""A sandbox for chat templates of untrusted checkpoints, bounded in work, memory and time.

Jinja's sandbox keeps a template from running code, but not from looping or from building a text of
gigabytes. Here loops, calls and filters count steps, and each value that they or an operator build
is checked before it is built, where its size follows from the operands, or else after.
"""

from __future__ import annotations

import functools
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from jinja2 import Environment, TemplateRuntimeError, nodes
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_STEPS = 1_000_000  # a conversation of 4,096 messages takes some 100,000
MAX_SIZE = 32 << 20  # characters of a text
MAX_ELEMENTS = 1 << 20  # of a list
MAX_ARGUMENT = 1 << 16  # of a number that may be a width or a count
MAX_BITS = 1 << 12  # of a number
MAX_SECONDS = 5.0  # of CPU time
LOOPS = "the chat template does not end: more than {}"
LARGE = f"the chat template builds more than {MAX_SIZE} characters or {MAX_ELEMENTS} elements"
PASSED = (Context, Environment, nodes.EvalContext)  # to some filters, before their arguments
WIDTH = re.compile(r"\d{5,}|%[^%a-zA-Z]*\*")  # in a format


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Raises `TemplateRuntimeError` for a template that exceeds its budget within `budget()`."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True)
        self._budget = threading.local()

    def bound_filters(self) -> None:
        """Bound the filters that are there now."""
        self.filters = {name: self._bounded(each) for name, each in self.filters.items()}
        self.filters[_LOOP], self.filters[_VALUE] = self._count_elements, self._checked

    @contextmanager
    def budget(self) -> Iterator[None]:
        """Give what this thread renders in it so many steps and so much time."""
        self._budget.steps, self._budget.deadline = 0, time.thread_time() + MAX_SECONDS
        try:
            yield
        finally:
            del self._budget.steps, self._budget.deadline

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        _wrap_values(tree)
        return tree

    def _step(self) -> None:
        steps = getattr(self._budget, "steps", None)
        if steps is None:  # while the template is compiled: constants are folded
            return
        self._budget.steps = steps + 1
        if steps >= MAX_STEPS:
            raise TemplateRuntimeError(LOOPS.format(f"{MAX_STEPS} steps"))
        if time.thread_time() > self._budget.deadline:
            raise TemplateRuntimeError(LOOPS.format(f"{MAX_SECONDS:.0f} s"))

    def _count_elements(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self._step()
            yield value

    def _checked(self, value: Any) -> Any:
        is_list = isinstance(value, list | tuple | dict)
        if (is_list and len(value) > MAX_ELEMENTS) or (
            isinstance(value, str) and len(value) > MAX_SIZE
        ):
            raise TemplateRuntimeError(LARGE)
        return value

    def _bounded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            self._check_arguments((*args, *kwargs.values()))
            self._check_growth(function.__name__, (*args, *kwargs.values()))
            return self._checked(function(*args, **kwargs))

        return bounded

    def _check_arguments(self, args: Iterable[Any]) -> None:
        self._step()
        args = tuple(args)
        if any(isinstance(each, int) and abs(each) > MAX_ARGUMENT for each in args[1:]):
            raise TemplateRuntimeError(f"the chat template uses a number over {MAX_ARGUMENT}")

    def _check_growth(self, name: str, args: tuple[Any, ...]) -> None:
        """A filter's text is at most as long as its input times another argument."""
        sizes = [_size(each) for each in args if not isinstance(each, PASSED)]
        most = max(sizes[1:], default=1)
        is_format = name == "do_format" and isinstance(args[0], str) and WIDTH.search(args[0])
        if is_format or (sizes and (sizes[0] + 1) * most > MAX_SIZE + most):
            raise TemplateRuntimeError(LARGE)

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(getattr(function, "__wrapped__", function), "__self__", None)
        if isinstance(owner, str):
            size = len(owner) + sum(len(each) for each in args if isinstance(each, str))
            if function.__name__.startswith("format") and WIDTH.search(owner):
                raise TemplateRuntimeError(LARGE)
            if function.__name__ in ("ljust", "rjust", "center", "zfill", "expandtabs"):
                self._check_growth(function.__name__, (owner, *args))
            if function.__name__ == "join":
                args = tuple(_listed(each) for each in args)
                size += len(owner) * sum(len(each) for each in args if isinstance(each, list))
            if function.__name__ == "replace" and len(args) > 1:
                size += (len(owner) + 1) * len(str(args[1]))
            if size > MAX_SIZE:
                raise TemplateRuntimeError(LARGE)
        if function is not self.globals.get("range"):  # which the sandbox bounds
            self._check_arguments((owner, *args, *kwargs.values()))
        return self._checked(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self._step()
        if operator == "%" and isinstance(left, str) and WIDTH.search(left):
            raise TemplateRuntimeError(LARGE)
        if operator in ("*", "**") and _product_size(operator, left, right) > MAX_SIZE:
            raise TemplateRuntimeError(LARGE)
        return self._checked(super().call_binop(context, operator, left, right))


_LOOP, _VALUE = "octavo loop", "octavo value"  # names that no template can write


def _wrap_values(tree: nodes.Template) -> None:
    """Count the elements of loops; check the values that `~` and `set` blocks build."""
    for loop in tree.find_all(nodes.For):
        loop.iter = nodes.Filter(loop.iter, _LOOP, [], [], None, None, lineno=loop.lineno)
    for parent in tree.find_all((nodes.Assign, nodes.Output, nodes.Concat)):
        for name, value in list(parent.iter_fields()):
            if isinstance(value, nodes.Concat):
                setattr(parent, name, _value(value))
            elif isinstance(value, list):
                value[:] = [_value(v) if isinstance(v, nodes.Concat) else v for v in value]
    for block in tree.find_all(nodes.AssignBlock):
        if block.filter is None:
            block.filter = _value(None, block.lineno)


def _value(node: Any, lineno: int = 0) -> nodes.Filter:
    return nodes.Filter(node, _VALUE, [], [], None, None, lineno=lineno or node.lineno)


def _listed(value: Any) -> Any:
    return value if isinstance(value, str) else list(value)


def _product_size(operator: str, left: Any, right: Any) -> float:
    """The size of a product, against MAX_SIZE; numbers of MAX_BITS count as that."""
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * abs(right) if operator == "**" else (left * right).bit_length()
        return MAX_SIZE * bits / MAX_BITS
    for text, count in ((left, right), (right, left)):
        if isinstance(text, str | list | tuple) and isinstance(count, int):
            size = len(text) * max(count, 0)
            return size if isinstance(text, str) else size * MAX_SIZE / MAX_ELEMENTS
    return 0


def _size(value: Any) -> int:
    if isinstance(value, int):
        return abs(value)
    return len(value) if isinstance(value, str | list | tuple | dict | range) else 1
