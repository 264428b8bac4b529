"""Typed look-ups in a JSON object or in GGUF metadata: a wrong value is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf, isfinite
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

    def integer(self, key: str, least: int | None = None) -> int:
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.fault(key, "a whole number")
        if least is not None and value < least:
            raise self.fault(key, f"a whole number from {least}")
        return value

    def number(self, key: str) -> float:
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not _finite(value):
            raise self.fault(key, "a finite number")
        return float(value)

    def positive(self, key: str, *, at_most: float = inf, or_zero: bool = False) -> float | None:
        """A number above 0 (or from 0), None when absent."""
        if self.get(key) is None:
            return None
        value = self.number(key)
        if value > at_most or value < 0 or (value == 0 and not or_zero):
            low, high = "from 0" if or_zero else "above 0", f" to {at_most:g}" * (at_most < inf)
            raise self.fault(key, f"a number {low}{high}")
        return value

    def count(self, key: str) -> int | None:
        """A whole number from 0, None when absent."""
        return None if self.get(key) is None else self.integer(key, least=0)

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

    def token_ids(self, key: str, vocab_size: int) -> tuple[int, ...]:
        """`ids`, each of which the model has to have."""
        found = self.ids(key)
        if any(not 0 <= i < vocab_size for i in found):
            raise self.fault(key, f"token ids below {vocab_size}")
        return found

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


def _finite(value: int | float) -> bool:
    try:
        return isfinite(value)
    except OverflowError:  # a whole number that no float can hold
        return False


def _show(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "absent", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
