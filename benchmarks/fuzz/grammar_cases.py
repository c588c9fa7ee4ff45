"""Random structured outputs for `grammar.py`: schemas, regexes, Lark grammars and tools.

Most are ordinary; some are designed to overflow the stack or to use excessive time and memory.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from random import Random
from typing import Any

from ...engine.tool_calling.tool_choice import ToolUse
from ...scheduler.structured import StructuredOutput
from .grammar_hostile import HOSTILE, SIMPLE_PATTERNS

NAMES = (
    "a",
    "b",
    "id",
    "role",
    'q"t',
    "b\\s",
    "é",
    "ünï",
    "n\nl",
    "x y",
    "",
    "$ref",
    "日本",
    "/",
    "~",
)
TEXTS = ("red", "a b", 'say "x"', "back\\slash", "é👍", "tab\t", "", "0", "null", "\u2028")
FORMATS = (
    "date",
    "time",
    "date-time",
    "email",
    "hostname",
    "ipv4",
    "ipv6",
    "uuid",
    "uri",
    "duration",
)
NUMBERS = (
    0,
    1,
    -1,
    2,
    3,
    7,
    10,
    99,
    100,
    1000,
    -1000,
    0.5,
    0.1,
    2.5,
    -3.75,
    1e-3,
    2**31,
    2**53 - 1,
)
ATOMS = ("a", "b", "xyz", ".", "[a-f]", "[^x]", r"\d", r"\w", r"\s", r"\p{L}", r"\p{Greek}", "é")
LARGE = (2**53, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1, 10**25, 1e300, -(2**60) - 1)


@dataclass(frozen=True)
class Case:
    kind: str
    spec: StructuredOutput
    schema: dict[str, Any] | None = None  # schema of complete outputs


def random_case(seed: int) -> Case | None:
    """Return the case of a seed; None if the generated spec is invalid."""
    rng = Random(seed)
    kinds = {"schema": 40, "regex": 15, "lark": 15, "tools": 8, "chain": 8, "nest": 6, "bomb": 2}
    kind = rng.choices(list(kinds), list(kinds.values()))[0]
    try:
        spec = HOSTILE[kind](rng) if kind in HOSTILE else None
        if spec is not None:
            return Case(kind, spec)
        return {
            "schema": _schema_case,
            "regex": lambda rng: Case("regex", StructuredOutput(regex=regex(rng, 3) or "a")),
            "lark": lambda rng: Case("lark", StructuredOutput(lark=lark(rng))),
            "tools": _tools_case,
        }[kind](rng)
    except ValueError:  # over a size limit, or an invalid tool
        return None


def _schema_case(rng: Random) -> Case:
    made = schema(rng, rng.randint(1, 4))
    if rng.random() < 0.3:
        made["$defs"] = {name: schema(rng, 2) for name in "AB"}
    return Case("schema", StructuredOutput(json_schema=made), made)


def schema(rng: Random, depth: int) -> dict[str, Any]:
    kinds = ["string", "number", "constant", "boolean"]
    if depth > 0:
        kinds += ["object", "object", "array", "union", "all", "ref", "any"]
    kind = rng.choice(kinds)
    if kind == "string":
        return _string(rng)
    if kind == "number":
        return _number(rng)
    if kind == "constant":
        values = [_value(rng, 2) for _ in range(rng.randint(1, 4))]
        return {"enum": values} if rng.random() < 0.6 else {"const": values[0]}
    if kind == "object":
        return _record(rng, depth)
    if kind == "array":
        return _array(rng, depth)
    if kind == "union":
        found: dict[str, Any] = {
            "anyOf": [schema(rng, depth - 1) for _ in range(rng.randint(1, 3))]
        }
        return found | ({"type": "object"} if rng.random() < 0.1 else {})
    if kind == "all":
        return {"allOf": [schema(rng, depth - 1) for _ in range(rng.randint(1, 2))]}
    if kind == "ref":
        return {"$ref": rng.choice(["#/$defs/A", "#/$defs/B", "#"])}
    return rng.choice([{}, {"type": "null"}, {"type": ["string", "null"]}, {"type": "boolean"}])


def _string(rng: Random) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "string"}
    if rng.random() < 0.3:
        found["format"] = rng.choice(FORMATS)
    if rng.random() < 0.3:
        found["pattern"] = rng.choice(SIMPLE_PATTERNS)
    if rng.random() < 0.3:
        found["minLength"] = rng.randint(0, 6)
    if rng.random() < 0.3:
        found["maxLength"] = rng.randint(1, 60)
    return found


def _number(rng: Random) -> dict[str, Any]:
    found: dict[str, Any] = {"type": rng.choice(["integer", "number"])}
    for key in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
        if rng.random() < 0.25:
            found[key] = rng.choice(LARGE if rng.random() < 0.1 else NUMBERS)
    if rng.random() < 0.2:
        found["multipleOf"] = rng.choice((1, 2, 3, 7, 25, 100, 0.5, 0.25, 997))
    return found


def _record(rng: Random, depth: int) -> dict[str, Any]:
    names = rng.sample(NAMES, rng.randint(0, 5))
    found: dict[str, Any] = {
        "type": "object",
        "properties": {name: schema(rng, depth - 1) for name in names},
    }
    if names:
        found["required"] = rng.sample(names, rng.randint(0, len(names)))
    if rng.random() < 0.6:
        found["additionalProperties"] = rng.choice([False, False, True, {"type": "integer"}])
    if rng.random() < 0.15:
        found["patternProperties"] = {f"^{rng.choice('xyz')}_": schema(rng, depth - 1)}
    if rng.random() < 0.15:
        found["minProperties"] = rng.randint(0, 3)
    if rng.random() < 0.15:
        found["maxProperties"] = rng.randint(0, 4)
    return found


def _array(rng: Random, depth: int) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "array", "items": schema(rng, depth - 1)}
    if rng.random() < 0.3:
        found["minItems"] = rng.randint(0, 4)
    if rng.random() < 0.3:
        found["maxItems"] = rng.randint(0, 6)
    if rng.random() < 0.2:
        found["prefixItems"] = [schema(rng, depth - 1) for _ in range(rng.randint(1, 2))]
    return found


def _value(rng: Random, depth: int) -> Any:
    if depth and rng.random() < 0.25:
        if rng.random() < 0.5:
            return [_value(rng, depth - 1) for _ in range(rng.randint(0, 2))]
        return {name: _value(rng, depth - 1) for name in rng.sample(NAMES, 2)}
    if rng.random() < 0.03:
        return rng.choice(LARGE)
    return rng.choice([*TEXTS, *NUMBERS, True, False, None])


def regex(rng: Random, depth: int) -> str:
    parts = []
    for _ in range(rng.randint(1, 4)):
        atom = rng.choice(
            [
                "a",
                "b",
                "xyz",
                ".",
                "[a-f]",
                "[^x]",
                r"\d",
                r"\w",
                r"\s",
                r"\p{L}",
                r"\p{Greek}",
                "é",
            ]
        )
        if depth and rng.random() < 0.5:
            sides = [regex(rng, depth - 1) for _ in range(rng.randint(1, 3))]
            atom = f"({'|'.join(sides)})"
        times = rng.choice(["", "", "", "*", "+", "?", "{2}", "{1,9}", "{3,}", "*?"])
        if rng.random() < 0.03:
            times = f"{{{rng.choice((0, 10, 200, 1000))},{rng.choice((1000, 5000, 65535))}}}"
        parts.append(atom + times)
    return "".join(parts)


def lark(rng: Random) -> str:
    rules = [f"r{index}" for index in range(rng.randint(1, 6))]
    terms = [f"T{index}" for index in range(rng.randint(1, 5))]
    lines = [f"start: {_rule(rng, rules, terms, 2)}"]
    lines += [f"{name}: {_rule(rng, rules, terms, 2)}" for name in rules]
    lines += [f"{name}: {_term(rng, terms[index + 1 :])}" for index, name in enumerate(terms)]
    if rng.random() < 0.2:
        lines.append(r"%ignore /[ \t]+/")
    return "\n".join(lines) + "\n"


def _rule(rng: Random, rules: list[str], terms: list[str], depth: int) -> str:
    def atom() -> str:
        draw = rng.random()
        if draw < 0.3:
            return rng.choice(rules)
        if draw < 0.6:
            return rng.choice(terms)
        if draw < 0.7:
            return f"%json {json.dumps(schema(rng, 1))}"
        if draw < 0.75:
            return rng.choice(['%regex {"substring_chars": "abcdef"}', "<|im_end|>", "<[5-9]>"])
        if depth and draw < 0.9:
            return f"({_rule(rng, rules, terms, depth - 1)})"
        return json.dumps(rng.choice(["x", "yy", "if", "é", '"', "\\"]))

    sides = []
    for _ in range(rng.randint(1, 3)):
        parts = [atom() for _ in range(rng.randint(1, 3))]
        repeats = ["", "", "*", "+", "?", "{2,5}", "~3", "{0,300}"]
        sides.append(" ".join(part + rng.choice(repeats) for part in parts))
    return " | ".join(sides)


def _term(rng: Random, others: list[str]) -> str:
    found = rng.choice([f"/{regex(rng, 2)}/", json.dumps(rng.choice(TEXTS[:4])), '"a".."z"'])
    if others and rng.random() < 0.4:
        found += " " + rng.choice(others) + rng.choice(["", "+", "~2..4"])
    if rng.random() < 0.15:
        found += f" & {rng.choice(['', '~'])}/{regex(rng, 1)}/"
    return found


def _tools_case(rng: Random) -> Case:
    tools: list[dict[str, Any]] = []
    for index in range(rng.randint(1, 4)):
        parameters = _record(rng, 2)
        function = {"name": f"tool_{index}", "description": "A & B", "parameters": parameters}
        tools.append({"type": "function", "function": function})
    forced = ToolUse(tools, "required", is_parallel=rng.random() < 0.5)
    return Case("tools", StructuredOutput(lark=forced.grammar()))
