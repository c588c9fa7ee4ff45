"""Validated access to the fields of a checkpoint's JSON files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from ...scheduler.params import truncated_repr
from ..errors import ConfigError


@dataclass(frozen=True)
class JsonFields:
    """An object of a JSON file. Null fields count as absent.

    All readers raise `ConfigError` naming the file, the field, its value and the valid range.
    """

    raw: Mapping[str, Any]
    file: str  # for error messages
    prefix: str = ""  # of field names in error messages: "vision_config."

    def get(self, name: str) -> Any:
        return self.raw.get(name)

    def nested(self, name: str) -> JsonFields:
        """Return the fields of a nested object; empty if it is absent."""
        value = self.raw.get(name)
        if value is not None and not isinstance(value, Mapping):
            raise self.error(name, "must be an object")
        return JsonFields(value or {}, self.file, f"{self.prefix}{name}.")

    def integer(self, name: str, low: int, high: int, default: int | None = None) -> int:
        """Return an integer from `low` to `high`. Without a default the field is required."""
        value = self._value(name, default)
        if type(value) is not int or not low <= value <= high:
            raise self.error(name, f"must be an integer from {low:,} to {high:,}")
        return value

    def number(self, name: str, low: float, high: float, default: float | None = None) -> float:
        """Return a finite number from `low` to `high`."""
        value = self._value(name, default)
        if not _is_number(value, low, high):
            raise self.error(name, f"must be a number from {low:g} to {high:g}")
        return value

    def numbers(self, name: str, count: int, low: float, high: float) -> tuple[float, ...] | None:
        """Return a list of `count` finite numbers; None if it is absent."""
        value = self.raw.get(name)
        if value is None:
            return None
        is_list = isinstance(value, list) and len(value) == count
        if not is_list or not all(_is_number(each, low, high) for each in value):
            raise self.error(name, f"must be a list of {count} numbers from {low:g} to {high:g}")
        return tuple(value)

    def _value(self, name: str, default: float | None) -> Any:
        value = self.raw.get(name)
        if value is None and default is None:
            raise ConfigError(f"{self.file}: {self.prefix}{name} is missing")
        return default if value is None else value

    def error(self, name: str, text: str) -> ConfigError:
        value = truncated_repr(self.raw.get(name))
        return ConfigError(f"{self.file}: {self.prefix}{name}={value} {text}")


def _is_number(value: Any, low: float, high: float) -> TypeGuard[float]:
    return type(value) in (int, float) and low <= value <= high  # false for NaN
