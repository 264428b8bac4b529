"""What `plan` answers: will it fit, where the bytes are, and what would fit instead."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from edge_kv import models
from edge_kv.amounts import size
from edge_kv.cli.terminal import layers
from edge_kv.errors import MemoryLimitError
from edge_kv.footprint import DEVICES, Footprint, footprint, streaming
from edge_kv.memory import COSTS, Base, predict
from edge_kv.models.model import Model
from edge_kv.needs import count_needs, read_by_draft
from edge_kv.plan import STORAGES
from edge_kv.tensors import SCHEMES, weight_formats

BASELINES = {  # name -> (label, sharing, rings)
    "every_layer_full": ("every layer keeps every position", False, False),
    "sharing_only": ("layers share, no rings", True, False),
    "rings_only": ("rings, no sharing", False, True),
    "sharing_and_rings": ("sharing and rings", True, True),
}
_COLOURS = {  # what a part of the bar looks like; letters where there are no colours
    "Python and libraries": "bright_black", "programs": "yellow", "tokenizer": "magenta",
    "state": "green", "workspace": "cyan", "checkpoints": "bright_green",
    "weights": "blue", "experts": "bright_blue",
}  # fmt: skip
_BAR = 64  # columns
_STEP = 1024  # `fits` answers in whole multiples of this many tokens


def plan_data(
    config: Model, name: str, ctx: int, chunk: int, kv: str, quant: str,
    formats: Mapping[str, str], bases: Mapping[str, Base], available: int | None,
    drafts: int = models.DRAFTS, drafter: Model | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Everything `plan` prints, as JSON data; bytes throughout.

    Args:
        bases: for each engine, what a process holds on this machine before it opens a model.
        available: memory that this machine has left; None where it does not say.
        drafts: most tokens that a pass of decode checks.
        drafter: what drafts them, where it is exported beside the model.

    Raises:
        PlanError, ConfigError: a context, chunk, storage or quantisation that cannot be.
    """
    plan = models.plan(config, ctx=ctx, chunk=chunk, kv=kv, drafts=drafts)
    need = footprint(config, plan, quant, formats=formats, base=bases.get("onnx"), drafter=drafter)
    needs, memory = need.needs, need.memory
    others, rooms = models.plan(config, ctx=ctx, chunk=1, kv="f16"), _rooms(available)
    engines = {
        engine: predict(needs, plan, config.vocab, engine=engine, base=bases.get(engine))
        for engine in COSTS
    }
    return {
        "model": name,
        "ctx": plan.ctx,
        "chunk": plan.chunk,
        "drafts": plan.drafts,
        "kv": plan.kv,
        "quant": quant,
        "available": available,
        "fits": _where(need, rooms),
        "streaming": {
            name: vars(streaming(need, room))
            for name, room in rooms.items()
            if need.experts and need.least <= room < need.resident
        },
        "buffers": [
            {
                "name": t.name, "shape": list(t.shape), "dtype": t.dtype, "bytes": t.bytes,
                "stride": t.stride, "keep": t.keep, "writer": t.writer, "readers": list(t.readers),
            }
            for t in plan.tables
        ],
        "totals": {
            "bytes": plan.bytes,
            "baselines_f16": {
                key: others.full_length(sharing=sharing, rings=rings)
                for key, (_, sharing, rings) in BASELINES.items()
            },
            "read_traffic_per_token": need.read_state,
        },
        "memory": {
            "quant": quant,
            "formats": dict(formats),
            "weight_file": needs.weight_file,
            "weights": needs.weights,
            "weight_files": {
                q: footprint(config, plan, q, drafter=drafter).weight_file for q in SCHEMES
            },
            "assistant": _assistant(config, quant, formats, drafter) if drafter else None,
            "ple_file": needs.lookup_file,
            "read_per_token": {
                "weights": needs.read_weights, "experts": needs.read_experts,
                "state": need.read_state,
            },
            "resident": need.resident,
            "least": need.least,
            **memory.as_dict(),
            "engines": {e: m.as_dict()["phases"] for e, m in engines.items()},
        },
    }  # fmt: skip


def _assistant(
    config: Model, quant: str, formats: Mapping[str, str], drafter: Model
) -> dict[str, int]:
    """Bytes of the weight file that are a drafter's, and that one draft reads."""
    both, alone = (count_needs(config, quant, formats, d).weight_file for d in (drafter, None))
    return {"weights": both - alone, "read_per_draft": read_by_draft(drafter, quant, formats)}


def _rooms(available: int | None) -> dict[str, int]:
    """Bytes that a program may take on this machine and on every device class."""
    here = {} if available is None else {"this machine": available}
    return {**here, **{d.name: d.free for d in DEVICES}}


def _where(need: Footprint, rooms: dict[str, int]) -> dict[str, str]:
    """Device -> "yes", "experts from storage" or "no"."""
    return {
        name: "yes" if need.resident <= room
        else "experts from storage" if need.experts and need.least <= room else "no"
        for name, room in rooms.items()
    }  # fmt: skip


def print_plan(data: dict[str, Any], console: Console, buffers: bool = False) -> None:
    """`plan_data` for people: the answer, a bar, totals; every table of state with `buffers`."""
    memory = data["memory"]
    console.print(
        f"[bold]{data['model']}[/]: {data['ctx']:,} tokens of context, state {data['kv']}, "
        f"weights {data['quant']}"
    )
    console.print(
        f"Needs [bold]{size(memory['resident'])}[/] of RAM: {size(memory['stays'])} that stays, "
        f"and {size(memory['resident'] - memory['stays'])} of mapped files,\nwhich the system can "
        f"drop and read again. On disk: {size(memory['weight_file'] + memory['ple_file'])}."
    )
    if memory["anonymous"] > 1.1 * memory["stays"]:
        console.print(
            f"Reading the tokenizer at the start takes {size(memory['anonymous'])} that cannot be "
            "dropped."
        )
    for line in _verdicts(data):
        console.print(line)
    console.print()
    console.print(_bar(_parts(data), memory["resident"]))
    console.print()
    totals = data["totals"]
    naive = totals["baselines_f16"]["every_layer_full"]
    state = Table("state", box=None, pad_edge=False)
    state.add_column("bytes", justify="right")
    state.add_column("share", justify="right")
    state.add_row("this plan", size(totals["bytes"]), f"{totals['bytes'] / naive:.1%}")
    shown: set[int] = set()
    for key, (label, _, _) in BASELINES.items():
        value = totals["baselines_f16"][key]
        if value not in shown:  # what a model has nothing of makes no difference
            state.add_row(f"f16, {label}", size(value), f"{value / naive:.1%}")
        shown.add(value)
    console.print(state)
    console.print()
    console.print(_phases(memory["engines"]))
    if memory["checkpoints"]:
        console.print(
            f"A conversation keeps {size(memory['checkpoints'])} more: its rings as they were at "
            "earlier turns."
        )
    console.print(f"Each further one that edge-kv serve keeps aside takes {size(memory['aside'])}.")
    read = memory["read_per_token"]
    console.print(
        f"\nOne token at {memory['depth']:,} tokens reads {size(read['weights'])} of weights and "
        f"{size(read['state'])} of state."
    )
    if assistant := memory["assistant"]:
        console.print(
            f"Its assistant is {size(assistant['weights'])} of the weights; a draft reads "
            f"{size(assistant['read_per_draft'])} of them."
        )
    files = ", ".join(f"{quant} {size(n)}" for quant, n in memory["weight_files"].items())
    console.print(f"Weight files: {files}.")
    if memory["ple_file"]:
        console.print(f"Rows of tokens: {size(memory['ple_file'])} on disk, read row by row.")
    if buffers:
        console.print()
        console.print(tables_by_shape(data["buffers"]))
    else:
        console.print("Every table of state: --buffers. What fits a limit: --fits 2g.")


def _verdicts(data: dict[str, Any]) -> Iterator[str]:
    found = data["fits"]
    if here := found.get("this machine"):
        left = f", which has {size(data['available'])} left"
        yield {
            "yes": f"[green]It fits this machine[/]{left}.",
            "no": f"[red]It does not fit this machine[/]{left}.",
            "experts from storage": f"[yellow]On this machine[/]{left}, experts come from storage.",
        }[here]
    for verdict, words in (("yes", "Fits"), ("no", "Too large for")):
        names = [n for n, v in found.items() if v == verdict and n != "this machine"]
        if names:
            yield f"{words}: {'; '.join(names)}."
    if data["streaming"]:
        yield "With experts read from storage:"
    for name, cost in data["streaming"].items():
        low = cost["limit"] < cost["cliff"]
        more = f" (less from {size(cost['cliff'])} of RAM on)" if low else ""
        yield f"  {name}: {size(cost['storage'])} a token{more}"


def _parts(data: dict[str, Any]) -> dict[str, int]:
    """Where the bytes lie while tokens are decoded, anonymous ones first."""
    memory = data["memory"]
    parts = dict(memory["parts"])
    parts["Python and libraries"] += memory["mapped"]["libraries"]
    parts["checkpoints"] = memory["checkpoints"]
    parts["weights"] = memory["mapped"]["weights"]
    parts["experts"] = memory["mapped"]["experts"]
    return {name: count for name, count in parts.items() if count}


def _bar(parts: dict[str, int], whole: int) -> Text:
    """One bar of all parts, and a line for each with its own."""
    whole = max(whole, sum(parts.values()))
    bar = Text()
    for name, count in parts.items():
        bar.append("█" * round(_BAR * count / whole), style=_COLOURS[name])
    for name, count in sorted(parts.items(), key=lambda item: -item[1]):
        own = max(1, round(_BAR // 2 * count / whole))
        bar.append(f"\n  {name:21}{size(count):>8}  ")
        bar.append("█" * own, style=_COLOURS[name])
        bar.append(f" {count / whole:.0%}" if count >= whole / 200 else " under 1%")
    return bar


def _phases(engines: dict[str, Any]) -> Table:
    table = Table("peak of", box=None, pad_edge=False)
    for engine in engines:
        for kind in ("heap", "files"):
            table.add_column(f"{engine} {kind}", justify="right")
    for name in next(iter(engines.values())):
        cells = [
            size(phases[name][kind]) for phases in engines.values() for kind in ("anon", "file")
        ]
        table.add_row(name, *cells)
    return table


def tables_by_shape(buffers: list[dict[str, Any]]) -> Table:
    """One row for each kind of table: the layers that have it, and all their bytes."""
    kinds: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for b in buffers:
        suffix = b["name"].partition(".")[2]
        key = (suffix, tuple(b["shape"]), b["dtype"], b["stride"], b["keep"])
        kinds.setdefault(key, []).append(b)
    table = Table("table", "rows × heads × dim", "type", box=None, pad_edge=False)
    for name in ("stride", "keeps", "each", "all"):
        table.add_column(name, justify="right")
    table.add_column("layers", overflow="fold")
    for (suffix, shape, dtype, stride, keep), same in kinds.items():
        each = same[0]["bytes"]
        table.add_row(
            suffix, "×".join(f"{n:,}" for n in shape), dtype, str(stride),
            f"{keep:,}" if keep else "all", size(each), size(each * len(same)),
            layers([b["writer"] for b in same]),
        )  # fmt: skip
    return table


# --- what fits a limit ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """The longest context that fits with one storage of state and weights."""

    kv: str
    quant: str
    ctx: int  # 0: none fits
    need: Footprint  # at that context, or at the shortest


def fit_choices(
    config: Model, limit: int, chunk: int, base: Base | None, kvs: tuple[str, ...] = STORAGES,
    quants: tuple[str, ...] = tuple(SCHEMES),
) -> list[Choice]:  # fmt: skip
    """For each storage of weights and state, the longest context that needs at most `limit` bytes.

    Contexts are multiples of 1,024 tokens, or the model's own longest.
    """

    def need(ctx: int, kv: str, quant: str) -> Footprint:
        plan = models.plan(config, ctx=ctx, chunk=min(chunk, ctx), kv=kv)
        return footprint(config, plan, quant, formats=weight_formats(quant), base=base)

    found = []
    for quant in quants:
        for kv in kvs:
            low, high = 0, -(-config.max_ctx // _STEP)  # in steps; low fits, high + 1 does not
            while low < high:
                middle = (low + high + 1) // 2
                ctx = min(middle * _STEP, config.max_ctx)
                if need(ctx, kv, quant).resident <= limit:
                    low = middle
                else:
                    high = middle - 1
            ctx = min(low * _STEP, config.max_ctx)
            found.append(Choice(kv, quant, ctx, need(ctx or min(_STEP, config.max_ctx), kv, quant)))
    return found


def fits_data(name: str, limit: int, choices: list[Choice]) -> dict[str, Any]:
    """What `plan --fits` prints, as JSON data; bytes throughout."""
    return {
        "model": name,
        "limit": limit,
        "choices": [
            {"quant": c.quant, "kv": c.kv, "ctx": c.ctx, "resident": c.need.resident,
             "state": c.need.memory.state, "weight_file": c.need.weight_file}
            for c in choices
        ],
    }  # fmt: skip


def print_fits(data: dict[str, Any], choices: list[Choice], console: Console, command: str) -> None:
    """The longest contexts under a limit; `command` is how the model is named to `export`.

    Raises:
        MemoryLimitError: nothing fits.
    """
    limit = data["limit"]
    binary = limit / (1 << 30)  # as it was typed: 2g are 2 GiB
    told = f"{binary:g} GiB ({size(limit)})" if binary * 4 == int(binary * 4) else size(limit)
    fitting = [c for c in choices if c.ctx]
    if not fitting:
        least = min(choices, key=lambda c: c.need.resident)
        cost = ""
        if least.need.experts and least.need.least <= limit:
            found = streaming(least.need, limit)
            cost = f"; with experts read from storage it runs, {size(found.storage)} a token"
        raise MemoryLimitError(
            f"{data['model']} needs {size(least.need.resident)} at {least.need.depth:,} tokens "
            f"with weights {least.quant} and state {least.kv}, more than {told}{cost}."
        )
    # The longest context; of equally long ones the storage that is closest to the checkpoint.
    best = max(fitting, key=lambda c: (c.ctx, list(SCHEMES).index(c.quant), -STORAGES.index(c.kv)))
    console.print(
        f"[bold]{data['model']}[/] in {told} of RAM: up to [bold]{best.ctx:,}[/] tokens of context."
    )
    table = Table("weights", "state", box=None, pad_edge=False)
    for title in ("context", "RAM", "of it state", "weight file"):
        table.add_column(title, justify="right")
    for c in choices:
        if c.ctx:
            cells = (f"{c.ctx:,}", size(c.need.resident), size(c.need.memory.state))
        else:
            cells = ("–", f"from {size(c.need.resident)}", "–")
        table.add_row(c.quant, c.kv, *cells, size(c.need.weight_file))
    console.print(table)
    console.print(
        f"edge-kv export {command} --ctx {best.ctx} --kv {best.kv} --quant {best.quant}",
        soft_wrap=True,
    )
