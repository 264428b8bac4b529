"""Numbers of tokens and bytes as people write and read them."""

from __future__ import annotations

import re

from edge_kv.errors import ConfigError


def parse_size(text: str) -> int:
    """`32768`, `32,768`, `32k`, `1.5k` or `128K` as a number of tokens (k = 1024).

    Raises:
        ConfigError: not a positive number with an optional k or m, or no whole number of tokens.
    """
    number = r"([0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,12}(?:\.[0-9]{1,12})?)"
    found = re.fullmatch(rf"{number}([km]?)", text.strip().lower())
    factor = {"k": 1024, "m": 1024**2}.get(found[2], 1) if found else 0
    count = float(found[1].replace(",", "")) * factor if found else 0.0
    if not 1 <= count < 2**53 or count != int(count):
        raise ConfigError(f"{text!r} is not a size; write a positive number such as 32768 or 32k.")
    return int(count)


def parse_bytes(text: str) -> int:
    """`1500m`, `2g`, `2GiB` or plain bytes as a number of bytes (k, m, g are powers of 1024).

    Raises:
        ConfigError: not a number with an optional unit, or less than a page.
    """
    unit = text.strip().lower().removesuffix("b").removesuffix("i")
    factor = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}.get(unit[-1:], 1)
    try:
        size = float(unit[:-1] if factor > 1 else unit) * factor
    except ValueError:
        size = 0.0
    if not _LEAST <= size < float("inf"):
        raise ConfigError(f"{text!r} is not an amount of memory; write for example 1500m or 2g.")
    return int(size)


_LEAST = 4096  # bytes: less is a number whose unit was forgotten


def size(count: float) -> str:
    """Bytes for people, in powers of 1000 as in data sheets."""
    for unit in ("B", "kB", "MB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB" if count < 1000 else f"{count:.0f} GB"
