"""Replace keywords that llguidance does not support by ones with the same meaning."""

from __future__ import annotations

from typing import Any

from ...scheduler.params import truncated_repr
from .formats import FORMATS, LIBRARY_FORMATS
from .subschemas import UnsupportedSchema, subschemas, target

ANNOTATIONS = {"title", "description", "default", "examples", "$comment", "deprecated"}
SHARED = "octavo-property"  # prefix of names in $defs for values of properties


def rewrite(schema: dict[str, Any]) -> bool:
    """Rewrite a schema in place; return whether it changed. Raises `UnsupportedSchema`."""
    is_changed = False
    for node in list(subschemas(schema)):
        if node.get("not") == {} or node.get("not") is True:
            del node["not"]
            node["enum"], is_changed = [], True
        if _is_annotation(node):
            del node["format"]
            is_changed = True
        if "propertyNames" in node:
            _replace_property_names(schema, node)
            is_changed = True
    return is_changed


def _is_annotation(node: dict[str, Any]) -> bool:
    """Return whether a format is unknown, and another keyword constrains the string."""
    name = node.get("format")
    is_unknown = isinstance(name, str) and name not in FORMATS and name not in LIBRARY_FORMATS
    return is_unknown and any(key in node for key in ("pattern", "enum", "const"))


def _replace_property_names(root: dict[str, Any], node: dict[str, Any]) -> None:
    rule = _resolved(root, node.pop("propertyNames"))
    keys = rule.keys() - ANNOTATIONS
    if "string" not in rule.get("type", "string") or not keys <= {"type", *_NAMING}:
        raise _unsupported(rule)
    naming = keys & _NAMING
    if not naming:
        return
    if len(naming) > 1 or node.get("patternProperties"):
        raise _unsupported(rule)
    others = node.get("additionalProperties", True)
    declared = node.get("properties", {})
    node["additionalProperties"] = False
    if "pattern" in rule:
        if declared:
            raise _unsupported(rule)
        node["patternProperties"] = {rule["pattern"]: others}
        return
    names = rule["enum"] if "enum" in rule else [rule["const"]]
    if not isinstance(names, list) or not isinstance(declared, dict):
        raise _unsupported(rule)
    others = _shared(root, others)
    texts = [name for name in names if isinstance(name, str)]
    node["properties"] = {name: declared.get(name, others) for name in texts}


_NAMING = {"enum", "const", "pattern"}


def _resolved(root: dict[str, Any], rule: Any) -> dict[str, Any]:
    """Return propertyNames as an object, after following a $ref to a definition."""
    if isinstance(rule, dict) and rule.keys() - ANNOTATIONS == {"$ref"}:
        try:
            rule = target(root, str(rule["$ref"]))
        except LookupError:
            raise _unsupported(rule) from None
    if rule is True:
        return {}
    if not isinstance(rule, dict):
        raise _unsupported(rule)
    return rule


def _shared(root: dict[str, Any], value: Any) -> Any:
    """Return a reference to a subschema, so that its text is not repeated."""
    defs = root.setdefault("$defs", {})
    if not isinstance(value, dict) or not isinstance(defs, dict):
        return value
    name = f"{SHARED}-{len(defs)}"
    defs[name] = value
    return {"$ref": f"#/$defs/{name}"}


def _unsupported(rule: Any) -> UnsupportedSchema:
    return UnsupportedSchema(
        f"has propertyNames: {truncated_repr(rule)}: only type, and one of enum, const and "
        "pattern, without patternProperties; remove it"
    )
