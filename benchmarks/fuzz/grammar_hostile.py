"""Grammars designed to overflow the stack or to use excessive time and memory."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

from ...scheduler.structured import StructuredOutput

SIMPLE_PATTERNS = (
    "^[a-z]{2,5}$",
    "^(ab|cd)*$",
    "[0-9]{3}-[0-9]{2}",
    "^x?y+z$",
    "^[A-Fa-f0-9]{8}$",
    "é+",
    "^[^a-z]{1,4}$",
)


def _chain_case(rng: Random) -> StructuredOutput:
    """Return a chain of references, each to the next."""
    length = rng.choice((2, 10, 30, 60, 100, 300, 1000, 2000))
    if rng.random() < 0.5:
        if rng.random() < 0.5:
            name, last = "r", '"a"'
        else:
            name, last = "R", "/a+/"
        more = rng.choice(["", ' "x"', "?", "*", " | /b/"])
        lines = [f"{name}{i}: {name}{i + 1}{more}" for i in range(length)]
        body = "\n".join(lines)
        return StructuredOutput(lark=f"start: {name}0\n{body}\n{name}{length}: {last}\n")
    links = {"items": lambda r: {"items": r}, "anyOf": lambda r: {"anyOf": [r, {"type": "null"}]},
             "ref": lambda r: r, "all": lambda r: {"allOf": [r, {"type": "object"}]},
             "properties": lambda r: {"properties": {"a": r}},
             "additional": lambda r: {"additionalProperties": r},
             "prefix": lambda r: {"prefixItems": [r]},
             "sibling": lambda r: {**r, "type": "object"}}  # fmt: skip
    chosen = rng.choices(list(links.values()), k=rng.randint(1, 3))
    defs = {str(i): rng.choice(chosen)({"$ref": f"#/$defs/{i + 1}"}) for i in range(length)}
    end = rng.choice([{"type": "null"}, {"$ref": "#/$defs/0"}, {"type": "object"}])
    defs[str(length)] = end
    return StructuredOutput(json_schema={"$defs": defs, "$ref": "#/$defs/0"})


def _nest_case(rng: Random) -> StructuredOutput:
    depth = rng.choice((5, 20, 40, 62, 64, 120, 300))
    choice = rng.randrange(4)
    if choice == 0:
        opened = rng.choice(["(a", "(a|", "(b*"])
        return StructuredOutput(regex=opened * depth + ")" * depth)
    if choice == 1:
        body = '"a"' + rng.choice(["", "?", "*"])
        return StructuredOutput(lark="start: " + "(" * depth + body + ")" * depth)
    inner: Any = {"type": "integer"}
    for _ in range(depth):
        inner = rng.choice([
            {"items": inner}, {"anyOf": [inner, {"type": "null"}]}, {"properties": {"a": inner}},
            {"allOf": [inner]}, {"additionalProperties": inner}, {"prefixItems": [inner]},
            {"patternProperties": {"^a": inner}}, {"oneOf": [inner]},
        ])  # fmt: skip
    return StructuredOutput(json_schema=inner)


def _bomb_case(rng: Random) -> StructuredOutput:
    """Return a grammar that is expensive to compile or to match."""
    count = int(10 ** rng.uniform(1, 4.3))
    size = min(count, 1500)
    numbers = (9, 101, 1009, 10007, 20011, 100003, 999983, 10**7 + 19, 99999989, 4 * 10**9)
    multiples = rng.choices(numbers, k=2)
    made: dict[str, Any] = rng.choice([
        {"json_schema": {"type": "integer", "multipleOf": multiples[0]}},
        {"json_schema": {"allOf": [{"multipleOf": each} for each in multiples]}},
        {"json_schema": {"type": "number", "multipleOf": multiples[0] / 1000, "minimum": 5}},
        {"regex": "a?" * count}, {"regex": "a?" * size + "a" * size}, {"regex": ".*" * size},
        {"regex": f"(a{{{size}}}){{{size}}}"}, {"regex": f"(?s:.{{0,{count}}})"},
        {"regex": "(" + "|".join(f"w{i}[a-z]*{i}" for i in range(size)) + ")+"},
        {"regex": rf"(.*a.{{{size % 40}}}|.*b.{{{size % 30}}})x"},
        {"regex": r"(\p{L}{3,30}\p{N}*|\p{Greek}+\p{L}.){1,50}"},
        {"json_schema": {"type": "string", "pattern": "^" + "a?" * count + "$"}},
        {"json_schema": {"type": "string", "minLength": count, "maxLength": 2 * count,
                         "pattern": rng.choice(SIMPLE_PATTERNS)}},
        {"json_schema": {"type": "array", "minItems": size, "maxItems": count * 50}},
        {"json_schema": {"type": "array", "items": {"type": "array", "maxItems": count},
                         "maxItems": count}},
        {"json_schema": {"enum": [f"w{i * 7919 % 100003}" for i in range(count)]}},
        {"json_schema": {"properties": {f"p{i}": {"type": "string"} for i in range(size)}}},
        {"json_schema": {"properties": {f"p{i}": {"format": "date-time"} for i in range(size)}}},
        {"json_schema": {"patternProperties": {f"^a{{{i}}}b": {} for i in range(size % 80)}}},
        {"json_schema": {"allOf": [{"anyOf": [{"minimum": i}, {"maximum": -i}]}
                                   for i in range(size % 40)]}},
        {"json_schema": {"allOf": [{"pattern": f"a.{{{i}}}b"} for i in range(size % 9)]}},
        {"json_schema": {"allOf": [{"properties": {f"p{i}": {"items": {}}}}
                                   for i in range(size % 200)]}},
        {"choice": [f"{i}-{'x' * (i % 50)}" for i in range(min(size, 1000))]},
        {"lark": "start: a\na: a a | a a a | /x*/ | " + " | ".join(f'"{i}"' for i in range(size))},
        {"lark": "start: " + " ".join(f"/[a-z]*{i}?/" for i in range(size))},
        {"lark": "start: A{0,%d}\nA: /a.{0,%d}/" % (count, size)},  # noqa: UP031
        {"lark": "start: A\nA: " + " & ".join(f"/.*a.{{{i}}}b.*/" for i in range(size % 10 + 1))},
        {"lark": f"start: (\"a\" | \"b\"){{{size},{count}}}"},
    ])  # fmt: skip
    return StructuredOutput(**made)


HOSTILE: dict[str, Callable[[Random], StructuredOutput]] = {
    "chain": _chain_case,
    "nest": _nest_case,
    "bomb": _bomb_case,
}
