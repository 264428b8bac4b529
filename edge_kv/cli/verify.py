"""`edge-kv verify`: does an artifact compute here what it was exported to compute?"""

from __future__ import annotations

import sys

import typer

from edge_kv.cli.checks import check_digests
from edge_kv.cli.options import ArtifactDir, Engine, Json, NoCache, Threads
from edge_kv.cli.printing import print_json, wrapped
from edge_kv.errors import ParityError


def verify(
    artifact: ArtifactDir,
    engine: Engine = "onnx",
    threads: Threads = None,
    no_cache: NoCache = False,
    as_json: Json = False,
) -> None:
    """Integrity and parity again, on this device: digests, then the stored reference logits."""
    from dataclasses import asdict

    from edge_kv.cli.terminal import Bar
    from edge_kv.guidance import open_artifact
    from edge_kv.runtime import load
    from edge_kv.runtime.verify import verify as compare

    opened = open_artifact(artifact)
    total = check_digests(opened)
    with Bar() as bar:
        bar.stage("parity", "steps")
        with load(opened, engine, threads, cache=not no_cache) as session:
            parity = compare(session, lambda step, steps: bar.advance("steps", step, steps))
    data = {
        "artifact": str(artifact),
        "engine": engine,
        "files": len(opened.manifest.files),
        "bytes": total,
        **asdict(parity),
        "passed": parity.passed,
    }
    line = (
        f"max |Δlogit| {parity.max_abs:.3g}, KL mean {parity.mean_kl:.3g} max {parity.max_kl:.3g} "
        f"(limit {parity.limit_kl:.3g}), top-1 {parity.top1:.1%} (limit {parity.limit_top1:.1%}) "
        f"over {parity.steps} steps"
    )
    if drafts := parity.draft:
        line += (
            f"; drafts of its assistant: max |Δlogit| {drafts.max_abs:.3g}, KL mean "
            f"{drafts.mean_kl:.3g} max {drafts.max_kl:.3g} (limit {drafts.limit_kl:.3g}), top-1 "
            f"{drafts.top1:.1%} (limit {drafts.limit_top1:.1%}), {drafts.common:.1%} of the tokens "
            f"(limit {drafts.limit_common:.1%}), over {drafts.drafts} drafts"
        )
    elif opened.manifest.drafter:
        line += "; its assistant was not checked: no reference drafts are recorded, export again"
    if as_json:
        print_json(data)
    elif parity.passed:
        files = len(opened.manifest.files)
        typer.echo(wrapped(f"{files} files unchanged; {line}.", sys.stdout))
    if not parity.passed:
        raise ParityError(f"{artifact} computes something else on this machine: {line}.")
