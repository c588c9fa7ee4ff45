"""A jinja2 environment for chat templates, bounded in time and memory.

A template comes with the checkpoint and may be malicious or broken. jinja2's sandbox protects the
interpreter, but does not prevent endless loops or huge values. Here each loop iteration, call and
filter checks the CPU time of the rendering, and each operation that makes a value longer than its
operands checks the length first.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from typing import Any

from jinja2 import TemplateError, nodes, pass_context
from jinja2.compiler import CodeGenerator
from jinja2.filters import do_indent
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_SECONDS = 5.0  # CPU time of one rendering
MAX_LENGTH = 32 << 20  # characters of a string, or items of a list
MAX_BITS = 4096  # per integer
# Filters and methods that pad a value to any length, or format it.
UNBOUNDED_FILTERS = ("center", "format", "pprint", "random", "urlize", "wordwrap")
UNBOUNDED_METHODS = frozenset(
    ("center", "expandtabs", "format", "format_map", "ljust", "rjust", "translate", "zfill")
)


class TemplateLimitError(TemplateError):
    """The template exceeded its time or memory limit."""


def join_parts(parts: Iterable[Any]) -> str:
    """Join values, converted to text as by jinja2. Raises `TemplateLimitError`."""
    texts, length = [], 0
    for part in parts:
        texts.append(str(part))
        length += len(texts[-1])
        _check_length(length)
    return "".join(texts)


def join(value: Iterable[Any], d: str = "", attribute: str | None = None) -> str:
    """Implement jinja2's filter `join` for texts without markup."""
    if attribute is not None:
        raise TemplateLimitError("uses join(attribute=...); use map(attribute=...) and join")

    def parts() -> Iterable[Any]:
        for index, each in enumerate(value):
            if index:
                yield d
            yield each

    return join_parts(parts())


def replace(text: str, old: str, new: str, count: int | None = None) -> str:
    """Implement jinja2's filter `replace` and the method `str.replace`."""
    text, old, new = str(text), str(old), str(new)
    found = text.count(old)
    times = found if count is None or count < 0 else min(count, found)
    _check_length(len(text) + times * max(0, len(new) - len(old)))
    return text.replace(old, new, times)


def _join_by(separator: str, parts: Iterable[Any]) -> str:
    return join(parts, separator)


def indent(text: str, width: int = 4, first: bool = False, blank: bool = False) -> str:
    """Implement jinja2's filter `indent`."""
    _check_length(len(text) + (text.count("\n") + 1) * width)
    return do_indent(text, width, first, blank)


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str | bytes | list | tuple) else 0


def _check_length(length: int) -> None:
    if length > MAX_LENGTH:
        raise TemplateLimitError(f"makes a value of more than {MAX_LENGTH} characters or items")


def _check_bits(operator: str, left: int, right: int) -> None:
    bits = {
        "*": left.bit_length() + right.bit_length(),
        "**": left.bit_length() * max(0, right),
    }.get(operator, 0)
    if bits > MAX_BITS:
        raise TemplateLimitError(f"computes an integer of {bits} bits; at most {MAX_BITS}")


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Sandbox whose templates raise `TemplateLimitError` above a time or memory limit.

    Thread-safe. Render templates with `render`, which starts the clock.
    """

    intercepted_binops = frozenset(("*", "**", "+", "%"))
    concat = staticmethod(join_parts)  # used by blocks and macros

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True)
        self.code_generator_class = _BoundedCode
        self._clock = threading.local()
        for name in UNBOUNDED_FILTERS:
            del self.filters[name]
        del self.globals["lipsum"]
        self.filters |= {"join": join, "replace": replace, "indent": indent}
        self.filters |= {"_concat": join_parts, "_tick": self._tick}

    def render(self, template: Any, **variables: Any) -> str:
        """Render a template. Raises `TemplateError` and any error of its expressions."""
        self._clock.end = time.thread_time() + MAX_SECONDS
        try:
            return join_parts(template.generate(**variables))
        except RecursionError:
            raise TemplateLimitError("exceeds the recursion limit") from None

    @pass_context
    def _tick(self, context: Context, value: Any) -> Any:
        self.check_time()
        return value

    def check_time(self) -> None:
        if time.thread_time() > getattr(self._clock, "end", float("inf")):
            raise TemplateLimitError(f"takes more than {MAX_SECONDS:g} seconds")

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.check_time()
        owner = getattr(function, "__self__", None)
        if isinstance(owner, str) and function.__name__ in ("join", "replace"):
            bounded = replace if function.__name__ == "replace" else _join_by
            return bounded(owner, *args, **kwargs)
        return super().call(context, function, *args, **kwargs)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str | bytes) and attr in UNBOUNDED_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self.check_time()
        if operator == "%" and isinstance(left, str | bytes):
            raise TemplateLimitError("formats a string with '%'; use '~'")
        if isinstance(left, int) and isinstance(right, int):
            _check_bits(operator, left, right)
        elif operator == "*":
            _check_length(_length(left) * right if isinstance(right, int) else 0)
            _check_length(_length(right) * left if isinstance(left, int) else 0)
        elif operator == "+":
            _check_length(_length(left) + _length(right))
        return super().call_binop(context, operator, left, right)


class _BoundedCode(CodeGenerator):
    def visit_Template(self, node: nodes.Template, frame: Any = None) -> None:
        super().visit_Template(_AddChecks().visit(node), frame)


class _AddChecks(NodeTransformer):
    """Adds time checks to loops, macros and filters, and length checks to `~`."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_tick(nodes.Const(None)), lineno=node.lineno))
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Macro:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_tick(nodes.Const(None)), lineno=node.lineno))
        return node

    def visit_Filter(self, node: nodes.Filter) -> nodes.Expr:
        self.generic_visit(node)
        return node if node.node is None else _tick(node)  # None in a {% filter %} block

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
        self.generic_visit(node)
        parts = nodes.List([*node.nodes], lineno=node.lineno)
        return _tick(nodes.Filter(parts, "_concat", [], [], None, None, lineno=node.lineno))


def _tick(value: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(value, "_tick", [], [], None, None, lineno=value.lineno or 1)
