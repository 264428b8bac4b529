"""What each model is: its config, weights, state tables and official sizes. No torch.

A model is one module here and one of the same name in `edge_kv.nets`; `MODULES` is the only list.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

from edge_kv.errors import ConfigError, PlanError, did_you_mean
from edge_kv.models import deepseek_v4, gemma, laguna, llama, zaya
from edge_kv.models.model import Model, Row, Weight
from edge_kv.plan import Plan, Sizes

MODULES: tuple[ModuleType, ...] = (gemma, llama, laguna, zaya, deepseek_v4)
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
    return next(m for m in MODULES if m.Config is type(config))


def name_of(config: Model) -> str:
    """What the model of `config` is called here: its module's name."""
    return module_of(config).__name__.rpartition(".")[2]


def module_for(format: str, kind: object, where: str) -> ModuleType:
    """The module for a config.json's `model_type` ("HF") or a `general.architecture` ("GGUF").

    Raises:
        ConfigError: no model here is called that.
    """
    known = {name: module for module in MODULES for name in getattr(module, format)}
    if not isinstance(kind, str) or kind not in known:
        field = {"HF": "model_type", "GGUF": "general.architecture"}[format]
        raise ConfigError(
            f"{where}: {field} {kind!r} is not supported." + did_you_mean(str(kind), known)
        )
    return known[kind]


def weights(config: Model) -> tuple[Weight, ...]:
    """All weights of a model in the order in which a forward pass meets them."""
    rows: Iterator[Weight] = module_of(config).weights(config)
    return tuple(rows)


def plan(config: Model, *, ctx: int, chunk: int = 128, kv: str = "int8") -> Plan:
    """Lay out the state of `config` for `ctx` positions and prompt chunks of at most `chunk`.

    Raises:
        PlanError: ctx or chunk out of range, or an unknown `kv` storage.
    """
    if not 1 <= ctx <= config.max_ctx:
        raise PlanError(
            f"ctx {ctx} is outside 1 … {config.max_ctx}, the positions this model was made for."
        )
    if chunk < 1:
        raise PlanError(f"chunk {chunk} must be at least 1 token.")
    sizes = Sizes(ctx, min(chunk, ctx), kv)
    return Plan.of(module_of(config).tables(config, sizes), sizes)
