"""Groups of subschemas that constrain the same value.

A value must satisfy all subschemas of a group: those of `allOf` and `$ref`, and one alternative of
each `anyOf` and `oneOf`. Limits and bounds are checked per group, since a subschema alone does not
show what it is combined with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from .subschemas import subschemas, target

MAX_VISITS = 20_000  # subschemas of all groups; above it, the schema is treated as one group

Node = dict[str, Any]
Group = tuple[Node, ...]


class _Ungroupable(Exception):
    pass


class Joined(NamedTuple):
    groups: list[Group]
    is_exact: bool  # False: one group of all subschemas, which may be unrelated


def joined_groups(schema: Any) -> Joined:
    """Return the groups of a schema; every subschema is in at least one.

    They are not exact for references that cannot be resolved here, and for very many groups.
    """
    nodes = list(subschemas(schema))
    try:
        groups = list(_Groups(schema).find())
    except _Ungroupable:
        return Joined([tuple(nodes)], is_exact=False)
    found = {id(node) for group in groups for node in group}
    return Joined(groups + [(node,) for node in nodes if id(node) not in found], is_exact=True)


class _Groups:
    def __init__(self, root: Any) -> None:
        self._root, self._num_visits = root, 0

    def find(self) -> Iterator[Group]:
        left, seen = [[self._root]], set()
        while left:
            for group in self._alternatives(left.pop()):
                key = frozenset(map(id, group))
                if group and key not in seen:
                    seen.add(key)
                    yield group
                    left += self._children(group)

    def _alternatives(self, nodes: list[Any]) -> Iterator[Group]:
        """Follow allOf and $ref of the nodes; yield a group per choice of alternatives."""
        pending: list[tuple[list[Any], dict[int, Node], list[list[Any]]]] = [(nodes, {}, [])]
        while pending:
            todo, found, unions = pending.pop()
            while todo:
                node = todo.pop()
                if isinstance(node, dict) and id(node) not in found:
                    found[id(node)] = node
                    self._spend(1)
                    todo += self._conjuncts(node)
                    unions += [part for key in ("anyOf", "oneOf") if (part := _list(node, key))]
            if not unions:
                yield tuple(found.values())
                continue
            *rest, options = unions
            self._spend(len(options) * (1 + len(found)))
            pending += [([option], dict(found), list(rest)) for option in options]

    def _conjuncts(self, node: Node) -> list[Any]:
        parts = list(_list(node, "allOf"))
        if "$id" in node and node is not self._root:  # It changes what references below mean.
            raise _Ungroupable
        if "$ref" in node:
            try:
                parts.append(target(self._root, str(node["$ref"])))
            except LookupError:
                raise _Ungroupable from None
        return parts

    def _children(self, group: Group) -> list[list[Any]]:
        """Return the subschemas of each property and item of a value that matches the group."""
        names = dict.fromkeys(name for node in group for name in _dict(node, "properties"))
        patterns = dict.fromkeys(key for node in group for key in _dict(node, "patternProperties"))
        self._spend(len(group) * ((1 + len(names)) * (1 + len(patterns)) + 1))
        children = [
            [part for node in group for part in _property(node, name, pattern)]
            for name in (None, *names)
            for pattern in (None, *patterns)
        ]
        num_items = max(len(_prefix(node)) for node in group)
        self._spend(len(group) * num_items)
        children += [[_item(node, index) for node in group] for index in range(num_items + 1)]
        return [parts for parts in children if any(isinstance(part, dict) for part in parts)]

    def _spend(self, count: int) -> None:
        self._num_visits += count
        if self._num_visits > MAX_VISITS:
            raise _Ungroupable


def _property(node: Node, name: str | None, pattern: str | None) -> list[Any]:
    """Return the subschemas of a property with this name, or that matches this pattern.

    llguidance requires patterns to be disjoint, so a name matches one at most.
    """
    named, matched = _dict(node, "properties"), _dict(node, "patternProperties")
    found = [named[name]] if name in named else []
    found += [matched[pattern]] if pattern in matched else []
    return found or [node.get("additionalProperties")]


def _item(node: Node, index: int) -> Any:
    prefix = _prefix(node)
    if index < len(prefix):
        return prefix[index]
    items = node.get("items")
    return node.get("additionalItems") if isinstance(items, list) else items


def _prefix(node: Node) -> Sequence[Any]:
    return _list(node, "prefixItems") or _list(node, "items")


def _list(node: Node, key: str) -> list[Any]:
    value = node.get(key)
    return value if isinstance(value, list) else []


def _dict(node: Node, key: str) -> dict[str, Any]:
    value = node.get(key)
    return value if isinstance(value, dict) else {}
