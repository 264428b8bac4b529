"""What each model is: its config, weights, state tables and official sizes. No torch.

A model is one module here and one of the same name in `edge_kv.nets`; `MODULES` is the only list.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

from edge_kv.errors import PlanError
from edge_kv.models import llama
from edge_kv.models.model import Model, Weight
from edge_kv.plan import Plan, Sizes

MODULES: tuple[ModuleType, ...] = (llama,)


def module_of(config: Model) -> ModuleType:
    """The module that describes the model of `config`."""
    return next(m for m in MODULES if m.Config is type(config))


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
