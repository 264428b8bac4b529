"""The backends of an export: how each stores its weights and lowers a net over them.

A backend yields its programs twice: as they ship, and `exact`, with float arithmetic wherever the
shipped ones round activations, so that the parity gate can tell the lowering from its kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from edge_kv import models
from edge_kv.export.weight_file import StoredWeights, WeightLayout
from edge_kv.manifest import Backend, PleEntry
from edge_kv.models.model import Model
from edge_kv.plan import Plan

WEIGHTS = "weights.bin"
ATTENTIONS = ("native", "portable")


@dataclass(frozen=True)
class Request:
    """What every backend lowers: a model, its state, and the layout of its per-layer rows.

    `attention` is what ExecuTorch programs attend with: operators of ours, or stock ones only.
    """

    config: Model
    plan: Plan
    ple: PleEntry | None
    attention: str = "native"


@dataclass(frozen=True)
class Lowered:
    """Programs as they ship, their exact variant, and the files that only the gate needs."""

    shipped: Backend
    exact: Backend
    scratch: tuple[Path, ...]


class Lowering(Protocol):
    """One backend."""

    gate: str  # the engine that judges its programs

    def check(self, config: Model) -> None:
        """Refuse what this backend cannot export, before any weight is read.

        Raises:
            ConfigError: a package is missing. ExportError: the model cannot be expressed.
        """

    def layout(self, config: Model, formats: Mapping[str, str], attention: str) -> WeightLayout:
        """How this backend's weights are stored; backends whose layouts agree share one file."""

    def lower(self, request: Request, weights: StoredWeights, folder: Path) -> Lowered:
        """Write the programs over `weights`, the finished weight file, into `folder`.

        Raises:
            ExportError: the model cannot be lowered.
        """


class OnnxLowering:
    """Two graphs over one external weight file."""

    gate = "onnx-stock"  # without native operators: the exact variant is one of the programs

    def check(self, config: Model) -> None:
        pass

    def layout(self, config: Model, formats: Mapping[str, str], attention: str) -> WeightLayout:
        return WeightLayout(models.weights(config), formats)

    def lower(self, request: Request, weights: StoredWeights, folder: Path) -> Lowered:
        from edge_kv.export.lower_net import DETAILS, lower_net
        from edge_kv.export.onnx_graph import EXACT

        programs = lower_net(request.config, request.plan, weights.layout, folder, WEIGHTS)

        def backend(variant: str) -> Backend:
            named = {
                name: p.model_copy(update={"file": p.file.replace(".onnx", f"{variant}.onnx")})
                for name, p in programs.items()
            }
            files = [f"{folder.name}/{WEIGHTS}", *(p.file for p in named.values())]
            return Backend(programs=named, files=files, details=DETAILS)

        scratch = tuple(folder / f"{name}{EXACT}.onnx" for name in programs)
        return Lowered(backend(""), backend(EXACT), scratch)


BACKENDS: dict[str, Lowering] = {"onnx": OnnxLowering()}
