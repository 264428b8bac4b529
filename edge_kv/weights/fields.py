"""Typed look-ups in a JSON object or in GGUF metadata: a wrong value is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Any

from edge_kv.errors import ConfigError

_MAX_LAYERS = 1000


class Fields:
    """Values by key with defaults; null counts as absent. Every fault is a ConfigError.

    Args:
        where: what messages call the object ("config.json", a GGUF file's name).
        prefix: put before every key ("gemma4." for GGUF metadata).
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        where: str,
        defaults: Mapping[str, Any] | None = None,
        prefix: str = "",
    ):
        self.values = values
        self.where = where
        self.prefix = prefix
        self._defaults = defaults or {}

    def get(self, key: str) -> Any:
        """The raw value, the default, or None."""
        value = self.values.get(self.prefix + key)
        return self._defaults.get(key) if value is None else value

    def integer(self, key: str) -> int:
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.fault(key, "a whole number")
        return value

    def number(self, key: str) -> float:
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not isfinite(value):
            raise self.fault(key, "a finite number")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.get(key)
        if not (value is None or isinstance(value, bool)):
            raise self.fault(key, "true or false")
        return bool(value)

    def ids(self, key: str) -> tuple[int, ...]:
        """One token id or a list of them."""
        value = self.get(key)
        found = value if isinstance(value, list) else [] if value is None else [value]
        if any(isinstance(i, bool) or not isinstance(i, int) for i in found):
            raise self.fault(key, "a token id or a list of token ids")
        return tuple(found)

    def n_layers(self, key: str) -> int:
        """A number of layers; bounded, because lists of that length are made from it."""
        value = self.integer(key)
        if not 0 < value <= _MAX_LAYERS:
            raise self.fault(key, f"a whole number from 1 to {_MAX_LAYERS}")
        return value

    def per_layer(self, key: str, n_layers: int) -> list[int]:
        """A value for each layer; one number stands for all of them."""
        value = self.get(key)
        if not isinstance(value, list):
            return [self.integer(key)] * n_layers
        if len(value) < n_layers or not all(isinstance(v, int) for v in value):
            raise self.fault(key, f"a whole number or a list of {n_layers} of them")
        return [int(v) for v in value[:n_layers]]

    def refuse_unless(self, key: str, *supported: Any) -> None:
        """Refuse the field by name unless it is absent, null or one of `supported`."""
        value = self.values.get(self.prefix + key)
        if value is None or any(value is s or value == s for s in supported):
            return
        raise self.unsupported(key, value, " or ".join(_show(s) for s in supported))

    def unsupported(self, key: str, value: object, supported: str) -> ConfigError:
        only = f"edge-kv supports {supported}" if supported else "edge-kv cannot read this"
        return ConfigError(
            f"{self.where}: {self.prefix}{key} = {_show(value)} is not supported; "
            f"{only}, use a checkpoint without it."
        )

    def fault(self, key: str, expected: str) -> ConfigError:
        return ConfigError(
            f"{self.where}: {self.prefix}{key} is {_show(self.get(key))}, expected {expected}; "
            "the file is damaged or of another model."
        )


def _show(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "absent", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
