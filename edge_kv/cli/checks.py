"""What commands make sure of before they begin: digests, files to write, memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from edge_kv.errors import ConfigError, MemoryLimitError

if TYPE_CHECKING:
    from edge_kv.artifact import Artifact
    from edge_kv.memory import Base, MemoryPlan


def planned_memory(
    artifact: Artifact, engine: str, base: Base | None, depth: int | None = None,
    drafts: int | None = None, huge: bool = False,
) -> MemoryPlan | None:  # fmt: skip
    """The memory plan of `artifact` over what this process held before it (`base_of`)."""
    from edge_kv.memory import predict_artifact

    if base is None:
        return None
    return predict_artifact(artifact, depth, engine=engine, base=base, drafts=drafts, huge=huge)


def base_of(engine: str, imports: tuple[str, ...] = ()) -> Base | None:
    """What this process holds before a session is opened, with what it will import of `imports`;
    None for an engine without a plan."""
    from edge_kv.runtime.base import planned_base

    return planned_base(engine, imports)


def check_digests(artifact: Artifact) -> int:
    """Compare every file with its digest; returns their bytes."""
    from edge_kv.cli.terminal import Bar

    total, done = sum(f.size for f in artifact.manifest.files.values()), 0
    with Bar() as bar:
        bar.stage("digests")
        for name, count in artifact.check_digests():
            done += count
            bar.advance(name, done, total)
    return total


def check_target(path: Path | None) -> None:
    """Refuse a file that cannot be written, before work whose result it is to hold.

    Raises:
        ConfigError: its directory is missing or read-only, or it is a directory.
    """
    if path is None or str(path) == "-":
        return
    parent = path.absolute().parent
    if path.is_dir():
        raise ConfigError(f"Cannot write {path}: it is a directory.")
    if not parent.is_dir():
        raise ConfigError(f"Cannot write {path}: its directory does not exist.")
    if not os.access(path if path.exists() else parent, os.W_OK):
        raise ConfigError(f"Cannot write {path}: permission denied.")


def check_ram(
    artifact: Artifact, limit: str, engine: str, planned: MemoryPlan | None, huge_pages: bool
) -> None:
    """Refuse a run that is `planned` to need more than `limit`, or might.

    Raises:
        ConfigError: no amount of memory, or an engine without a plan.
        MemoryLimitError: it could need more.
    """
    from edge_kv.amounts import parse_bytes, size
    from edge_kv.memory import COSTS, with_margin

    allowed = parse_bytes(limit)
    if planned is None and engine in COSTS:
        raise ConfigError(
            f"--ram-limit needs a memory plan, and there is none for {engine} without its native "
            "operators; install a C++ compiler (Debian and Ubuntu: apt install g++)."
        )
    if planned is None:
        raise ConfigError(
            f"--ram-limit needs a memory plan, and there is none for {engine}; use "
            f"--engine {' or '.join(COSTS)}."
        )
    needed = with_margin(planned.conversation)
    if needed > allowed:
        raise MemoryLimitError(
            f"{artifact.root} is planned to need up to {size(needed)} of RAM, the limit is "
            f"{size(allowed)}; {'leave out --huge-pages, or ' if huge_pages else ''}"
            "export with a smaller --ctx, --quant int4 or --kv int8."
        )
