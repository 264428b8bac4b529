"""Lowering to ExecuTorch without the work that leaves no trace in the program.

torch.fx and ExecuTorch check a graph and write its code anew after every pass, trace it anew for
every small rewrite, and run all of XNNPACK's passes over every delegate: most of the time of an
export. Within `lean()` graphs are compiled when they are called, rewrites of single operators share
a trace, and passes over operators that no decoder has are left out.
"""

from __future__ import annotations

import copy
import functools
import typing
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from executorch.backends.xnnpack import _passes as xnnpack
from executorch.backends.xnnpack.xnnpack_preprocess import XnnpackBackend
from executorch.exir import passes as exir
from executorch.exir._serialize import _dataclass
from executorch.exir.passes.remove_mixed_type_operators import RemoveMixedTypeOperators
from executorch.exir.passes.scalar_to_tensor_pass import ScalarToTensorPass
from executorch.exir.program import _program
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule
from torch.fx.graph import _PyTreeCodeGen
from torch.fx.passes.infra.pass_base import PassResult
from torch.fx.traceback import NodeSource

# XNNPACK's passes that may change a delegate of a decoder; each of the others traces it anew.
DELEGATE_PASSES = [
    xnnpack.XNNPACKRemoveCloneOpsTransform,
    xnnpack.DimOrderOpsRevertPass,
    xnnpack.ConvertToLinearPass,
    xnnpack.DecomposeConcatenate,
]
_compile = GraphModule.recompile


# A pass rewrites an operator and hands it to its base class, so a class of passes, in their order,
# rewrites as they do one after the other.
_to_functional = type(
    "_ToFunctional",
    (
        exir.NormalizeTransposePass,
        exir.ReplaceBrokenOpsWithFunctionalOpsPass,
        ScalarToTensorPass,
        exir.SymToTensorPass,
    ),
    {},
)
_to_edge = type(
    "_ToEdge", (RemoveMixedTypeOperators, exir.OpReplacePass, exir.MemoryFormatOpsPass), {}
)


@contextmanager
def lean() -> Iterator[None]:
    """No checks, no code of graphs that nobody calls, no copies of what is only read."""
    replaced: list[tuple[Any, str, Any]] = [
        (XnnpackBackend, "copy_exported_program_for_preprocess", classmethod(_share_weights)),
        (xnnpack.XNNPACKPassManager, "__init__", _choose_passes),
        (_program, "_get_aten_to_edge_passes", _edge_passes),
        (_program, "ReplaceViewOpsWithViewCopyOpsPass", lambda: _as_it_is),
        (_program, "OpReplacePass", _to_edge),
        (_program, "MemoryFormatOpsPass", lambda: _as_it_is),
        (_dataclass, "get_type_hints", functools.cache(typing.get_type_hints)),
        (GraphModule, "recompile", _compile_when_called),
        (GraphModule, "__str__", GraphModule._get_name),
        (Graph, "lint", _accept),
        (ExportedProgram, "_validate", _accept),
    ]
    with ExitStack() as stack:
        for owner, name, value in replaced:
            stack.enter_context(patch.object(owner, name, value))
        # Passes copy each node's record of what it came from, as deep as there were passes.
        stack.enter_context(
            patch.object(NodeSource, "__deepcopy__", lambda self, memo: self, create=True)
        )
        yield


def _share_weights(cls: Any, program: Any, specs: Any) -> Any:
    """A copy that holds the same weights: XNNPACK only reads them."""
    tensors = [*program.state_dict.values(), *program.constants.values()]
    return copy.deepcopy(program, {id(t): t for t in tensors if isinstance(t, torch.Tensor)})


def _choose_passes(self: Any, program: Any, passes: Any = None) -> None:
    self._exported_program, self.passes = program, passes or DELEGATE_PASSES


def _edge_passes(config: Any) -> tuple[list[Any], list[Any]]:
    """Passes before and after operators become edge operators."""
    alone = [exir.ReplaceSymSizeOpPass(), _to_functional(), exir.RemoveNoopPass()]
    return [*alone, exir.PruneEmptyTensorsPass()], exir.base_post_op_replace_passes


def _as_it_is(module: Any) -> PassResult:
    return PassResult(module, False)


def _accept(self: Any) -> None:
    pass


def _compile_when_called(self: Any) -> None:
    if isinstance(self._graph._codegen, _PyTreeCodeGen):
        info = self._graph._codegen.pytree_info
        self._in_spec, self._out_spec = info.in_spec, info.out_spec
    type(self).forward = _compile_and_call


def _compile_and_call(self: Any, *args: Any, **kwargs: Any) -> Any:
    _compile(self)
    return self.forward(*args, **kwargs)
