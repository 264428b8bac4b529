"""The backends of an export: how each stores its weights and lowers a net over them.

A backend yields its programs twice: as they ship, and `exact`, with float arithmetic wherever the
shipped ones round activations, so that the parity gate can tell the lowering from its kernels.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from edge_kv.errors import ConfigError, ExportError
from edge_kv.export.apart import apart
from edge_kv.export.quiet import quiet
from edge_kv.export.unfinished import read_record, write_record
from edge_kv.export.weight_file import StoredWeights, WeightLayout
from edge_kv.manifest import Backend, PleEntry
from edge_kv.models.model import Model, Weight
from edge_kv.plan import Plan

WEIGHTS = "weights.bin"
WORTH_A_PROCESS = 256 << 20  # bytes of weights whose lowering leaves much memory behind
INSTALL = "pip install --no-deps executorch==1.5.1"
ATTENTIONS = ("native", "portable")


@dataclass(frozen=True)
class Request:
    """What every backend lowers: a model, its state, and the layout of its per-layer rows.

    `drafter` is the config of what drafts for the model. `attention` is what ExecuTorch programs
    attend with: operators of ours, or stock ones only.
    """

    config: Model
    plan: Plan
    ple: PleEntry | None
    attention: str = "native"
    drafter: Model | None = None


@dataclass(frozen=True)
class Lowered:
    """Programs as they ship, their exact variant, and the files that only the gate needs."""

    shipped: Backend
    exact: Backend
    scratch: tuple[Path, ...]


class Lowering(Protocol):
    """One backend."""

    gate: str  # the engine that judges its programs

    def check(self, config: Model, attention: str) -> None:
        """Refuse what this backend cannot export, before any weight is read.

        Raises:
            ConfigError: a package is missing. ExportError: the model cannot be expressed.
        """

    def layout(
        self, rows: Iterable[Weight], formats: Mapping[str, str], attention: str
    ) -> WeightLayout:
        """How this backend's weights are stored; backends whose layouts agree share one file."""

    def lower(self, request: Request, weights: StoredWeights, folder: Path) -> Lowered:
        """Write the programs over `weights`, the finished weight file, into `folder`.

        Raises:
            ExportError: the model cannot be lowered.
        """


class OnnxLowering:
    """Two graphs over one external weight file.

    The exact variant is one for native operators, which are told, and for onnxruntime's own, which
    read it in the program.
    """

    gate = "onnx"  # onnx-stock holds all weights anew in memory of its own

    def check(self, config: Model, attention: str) -> None:
        pass

    def layout(
        self, rows: Iterable[Weight], formats: Mapping[str, str], attention: str
    ) -> WeightLayout:
        return WeightLayout(rows, formats)

    def lower(self, request: Request, weights: StoredWeights, folder: Path) -> Lowered:
        from edge_kv.export.lower_onnx import DETAILS, lower_onnx
        from edge_kv.export.onnx_graph import EXACT

        programs = lower_onnx(
            request.config, request.plan, weights.layout, folder, WEIGHTS, request.drafter
        )

        def backend(variant: str) -> Backend:
            named = {
                name: p.model_copy(update={"file": p.file.replace(".onnx", f"{variant}.onnx")})
                for name, p in programs.items()
            }
            files = [f"{folder.name}/{WEIGHTS}", *(p.file for p in named.values())]
            details = {**DETAILS, **({"exact": True} if variant else {})}
            return Backend(programs=named, files=files, details=details)

        scratch = tuple(folder / f"{name}{EXACT}.onnx" for name in programs)
        return Lowered(backend(""), backend(EXACT), scratch)


class ExecuTorchLowering:
    """One `.pte` with both methods. The weights of a native one stay in the weight file; a portable
    one holds its own, as XNNPACK multiplies them, so their file does not ship.

    A portable one decodes token by token: its loops over a table have one size, so that a single
    token would cost as much as a pass with all drafts.
    """

    gate = "executorch"

    def check(self, config: Model, attention: str) -> None:
        for package in ("executorch", "flatbuffers", "ruamel", "tabulate", "torchao"):
            if find_spec(package) is None:
                raise ConfigError(
                    f"Exporting to ExecuTorch needs {package}, which is not installed; "
                    f"run: {INSTALL} && pip install 'edge-kv[executorch]'."
                )
        if attention == "native":
            return
        from edge_kv.export.executorch_portable import missing_operators

        if lacks := missing_operators(config):
            raise ExportError(
                f"The stock ExecuTorch runtime has no operators for {' or '.join(lacks)}, which "
                "this model computes with; use --attention native."
            )

    def layout(
        self, rows: Iterable[Weight], formats: Mapping[str, str], attention: str
    ) -> WeightLayout:
        if attention == "native":
            return WeightLayout(rows, formats)
        with quiet():
            from edge_kv.export.executorch_xnnpack import XnnpackLayout
        return XnnpackLayout(rows, formats)

    def lower(self, request: Request, weights: StoredWeights, folder: Path) -> Lowered:
        if request.attention == "native":
            shipped = self._lower(request, weights, folder / "model.pte", delegate=False)
            exact = shipped.model_copy(update={"details": {**shipped.details, "exact": True}})
            return Lowered(shipped, exact, (folder / "model.json",))
        request = replace(request, plan=replace(request.plan, drafts=0))
        paths = folder / "exact.pte", folder / "model.pte"
        backends = []
        for path, delegate in zip(paths, (False, True), strict=True):
            backends.append(self._lower(request, weights, path, delegate=delegate))
            gc.collect()  # graphs are cycles, and hold every weight
        records = (path.with_suffix(".json") for path in paths)
        return Lowered(
            shipped=backends[1], exact=backends[0], scratch=(paths[0], weights.path, *records)
        )

    def _lower(
        self, request: Request, weights: StoredWeights, path: Path, *, delegate: bool
    ) -> Backend:
        """One variant; a finished one of an interrupted export is taken as it is."""
        with quiet():
            from edge_kv.export.lower_executorch import lower_executorch, programs

        record = path.with_suffix(".json")
        done = read_record(record)
        if not (path.is_file() and path.stat().st_size == done.get("bytes")):
            run = apart if weights.layout.bytes > WORTH_A_PROCESS else _here
            details = run(
                lower_executorch, request.config, request.plan, weights, path,
                facts=_facts(request, weights.layout), attention=request.attention,
                delegate=delegate, drafter=request.drafter,
            )  # fmt: skip
            done = {"bytes": path.stat().st_size, "details": details}
            write_record(record, done)
        files = [f"{path.parent.name}/{path.name}"]
        details = dict(done["details"])
        if request.attention != "native":
            details["exact"] = not delegate  # products that are left take float activations
        else:
            details["weights"] = f"{weights.path.parent.name}/{weights.path.name}"
            files.append(details["weights"])
        return Backend(
            programs=programs(request.config, request.plan, files[0], request.drafter),
            files=files,
            details=details,
        )


def _here(work: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return work(*args, **kwargs)


def _facts(request: Request, layout: WeightLayout) -> dict[str, int]:
    """What a runner needs that reads no manifest and that no method's tensors say."""
    facts = {"ctx": request.plan.ctx, "weights": layout.bytes}
    if ple := request.ple:
        facts |= {"ple_bits": ple.bits, "ple_block": ple.block}
    return {f"edge_kv_{name}": value for name, value in facts.items()}


BACKENDS: dict[str, Lowering] = {"onnx": OnnxLowering(), "executorch": ExecuTorchLowering()}
