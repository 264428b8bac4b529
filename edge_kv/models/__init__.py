"""What each model is: its config, weights, state tables and official sizes. No torch.

A model is one module here and one of the same name in `edge_kv.nets`; `MODULES` is the only list.
Drafters are models that read the state of a target: `attach` binds one to its target.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType

from edge_kv.errors import ConfigError, PlanError, did_you_mean
from edge_kv.models import deepseek_v4, gemma, gemma_assistant, laguna, llama, zaya
from edge_kv.models.model import Model, Row, Weight
from edge_kv.plan import MOST_DRAFTS, SCALE, Plan, Sizes

MODULES: tuple[ModuleType, ...] = (gemma, llama, laguna, zaya, deepseek_v4)
DRAFTERS: tuple[ModuleType, ...] = (gemma_assistant,)
ROWS: dict[str, Row] = {name: row for module in MODULES for name, row in module.ROWS.items()}


def get_row(name: str) -> Row:
    """The official model called `name`.

    Raises:
        ConfigError: no such row; the message names the closest one.
    """
    if name not in ROWS:
        raise ConfigError(f"Unknown model {name!r}.{did_you_mean(name, ROWS)}")
    return ROWS[name]


def module_of(config: Model) -> ModuleType:
    """The module that describes the model of `config`."""
    return next(m for m in (*MODULES, *DRAFTERS) if m.Config is type(config))


def name_of(config: Model) -> str:
    """What the model of `config` is called here: its module's name."""
    return module_of(config).__name__.rpartition(".")[2]


def module_for(format: str, kind: object, where: str) -> ModuleType:
    """The module for a config.json's `model_type` ("HF") or a `general.architecture` ("GGUF").

    Raises:
        ConfigError: no model here is called that.
    """
    modules = (*MODULES, *DRAFTERS)
    known = {name: module for module in modules for name in getattr(module, format)}
    if not isinstance(kind, str) or kind not in known:
        field = {"HF": "model_type", "GGUF": "general.architecture"}[format]
        raise ConfigError(
            f"{where}: {field} {kind!r} is not supported." + did_you_mean(str(kind), known)
        )
    return known[kind]


def weights(config: Model, drafter: Model | None = None) -> tuple[Weight, ...]:
    """All weights of a model in the order in which a forward pass meets them, then a drafter's."""
    rows: Iterator[Weight] = module_of(config).weights(config)
    return (*rows, *(weights(drafter) if drafter else ()))


def is_drafter(config: Model) -> bool:
    """Whether a model drafts for another."""
    return module_of(config) in DRAFTERS


def attach(drafter: Model, target: Model) -> Model:
    """The config of a drafter as it reads the tables of its target.

    Raises:
        ConfigError: it is no drafter, or one of another target.
    """
    if not is_drafter(drafter):
        raise ConfigError(
            f"A {name_of(drafter)} model drafts for no other; give an assistant of the target."
        )
    bound: Model = module_of(drafter).attach(drafter, target)
    return bound


def drafter_plan(drafter: Model, plan: Plan) -> Plan:
    """Of a target's plan, the tables that its drafter reads."""
    names = set(module_of(drafter).read_tables(drafter))
    tables = tuple(t for t in plan.tables if t.name.removesuffix(SCALE) in names)
    return replace(plan, tables=tables)


def official_drafter(target: Model) -> Row:
    """The drafter that was published for the target's shape.

    Raises:
        ConfigError: none is known.
    """
    for module in DRAFTERS:
        for row in module.OFFICIAL.values():
            try:
                bound: Row = replace(row, config=attach(row.config, target))
                return bound
            except ConfigError:
                continue
    raise ConfigError(
        "No assistant is known for this model; leave --assistant out, or give a checkpoint of one."
    )


DRAFTS = 7  # a pass of 8 tokens: kernels take as many at a time


def plan(
    config: Model, *, ctx: int, chunk: int = 128, kv: str = "int8", drafts: int = DRAFTS
) -> Plan:
    """Lay out the state of `config` for `ctx` positions and prompt chunks of at most `chunk`.

    A pass of decode checks at most `drafts` tokens behind the one it decodes, and no more than a
    chunk leaves room for.

    Raises:
        PlanError: ctx, chunk or drafts out of range, an unknown `kv` storage, or a drafter.
    """
    if is_drafter(config):
        raise PlanError(
            "This model drafts for another and has no state of its own; name its target, and give "
            "this one as --assistant."
        )
    if not 1 <= ctx <= config.max_ctx:
        raise PlanError(
            f"ctx {ctx} is outside 1 … {config.max_ctx}, the positions this model was made for."
        )
    if chunk < 1:
        raise PlanError(f"chunk {chunk} must be at least 1 token.")
    if not 0 <= drafts <= MOST_DRAFTS:
        raise PlanError(f"drafts {drafts} is outside 0 … {MOST_DRAFTS}, what one pass may check.")
    chunk = min(chunk, ctx)
    sizes = Sizes(ctx, chunk, kv, min(drafts, chunk - 1))
    return Plan.of(module_of(config).tables(config, sizes), sizes)
