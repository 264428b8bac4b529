"""The commands of edge-kv, which here also know the first layers of a model: NAME:LAYERS.

    python benchmarks/cut_models.py export --model laguna-xs2:8 --weights random --out part

What is too large for a disk is measured in part, at full width.
"""

from __future__ import annotations

import sys

from common import model_row

from edge_kv import models
from edge_kv.cli import main

if __name__ == "__main__":
    for word in sys.argv[1:]:
        if word.partition(":")[0] in models.ROWS and ":" in word:
            models.ROWS[word] = model_row(word)
    main()
