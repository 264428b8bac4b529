"""Which files a checkpoint was read from, and which content they had."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from edge_kv.errors import WeightsError

_HEAD = 1 << 20  # bytes read whole: the header and what is small
_SAMPLES, _SAMPLE = 256, 4096  # blocks read from the rest, evenly spread


def identity(files: Iterable[Path]) -> list[dict[str, int | str]]:
    """Path, size, times and a digest of each file: equal only while nothing was written to it.

    The digest is over the beginning of a file and blocks spread over the rest: reading a whole
    checkpoint twice would cost minutes. The time of the last change is the system's own, which no
    copying tool sets back.

    Raises:
        WeightsError: a file that is no longer there or cannot be read.
    """
    return [_one(path) for path in files]


def _one(path: Path) -> dict[str, int | str]:
    try:
        digest = hashlib.sha256()
        with path.open("rb") as f:
            digest.update(f.read(_HEAD))
            stat = path.stat()
            step = max(_SAMPLE, stat.st_size // _SAMPLES)
            for at in range(_HEAD, stat.st_size, step):
                f.seek(at)
                digest.update(f.read(_SAMPLE))
    except OSError as e:
        raise WeightsError(f"{path} cannot be read ({e.strerror}).") from e
    return {
        "path": str(path.resolve()),
        "bytes": stat.st_size,
        "modified": stat.st_mtime_ns,
        "changed": stat.st_ctime_ns,
        "sha256": digest.hexdigest(),
    }
