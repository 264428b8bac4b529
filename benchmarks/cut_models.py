"""The commands of edge-kv, which here also know the first layers of a model: NAME:LAYERS.

    python benchmarks/cut_models.py export --model laguna-xs2:8 --weights random --out part

What is too large for a disk is measured in part, at full width.
"""

from __future__ import annotations

import sys
from dataclasses import fields, replace

from edge_kv import models
from edge_kv.cli import main
from edge_kv.errors import ConfigError
from edge_kv.models.model import Row


def model_row(name: str) -> Row:
    """A model by name, or its first layers: `NAME:LAYERS`, at full width.

    Raises:
        ConfigError: no such model, or not a number of its layers.
    """
    whole, cut, layers = name.partition(":")
    row = models.get_row(whole)
    if not cut:
        return row
    given, kept = row.config.layers, int(layers) if layers.isdecimal() else 0
    if not 1 <= kept <= given:
        raise ConfigError(f"{name}: {layers} is outside 1 … {given}, the layers of {whole}.")
    values = ((f.name, getattr(row.config, f.name)) for f in fields(row.config))
    # What a config says layer by layer has one entry for each.
    each = {k: v[:kept] for k, v in values if isinstance(v, str | tuple) and len(v) == given}
    return replace(row, config=replace(row.config, layers=kept, **each))


if __name__ == "__main__":
    for word in sys.argv[1:]:
        if word.partition(":")[0] in models.ROWS and ":" in word:
            models.ROWS[word] = model_row(word)
    main()
