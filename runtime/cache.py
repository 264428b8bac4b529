"""Where the runtime keeps what it makes for this device: packed weights, benchmark snapshots."""

from __future__ import annotations

import os
from pathlib import Path

CACHE_VARIABLE = "EDGE_KV_CACHE"


def cache_directory() -> Path:
    """$EDGE_KV_CACHE, else $XDG_CACHE_HOME/edge-kv, else ~/.cache/edge-kv; made when needed."""
    own = os.environ.get(CACHE_VARIABLE)
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edge-kv"
