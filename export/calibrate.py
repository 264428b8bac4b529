"""Calibrated rounding: a text is run through the model, and every matrix is rounded for it.

The net runs on all sequences of the text at once, each in a thread of its own. At a matrix they
meet: the covariance of its inputs is taken, its rows are rounded for it (`rounding`), and every
sequence goes on with the rounded matrix, so that later ones make up for earlier ones. One forward
pass does it all, one matrix is in memory at a time, and nothing here knows what model it is.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from functools import partial
from importlib.resources import files
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from edge_kv import heap
from edge_kv.errors import ExportError
from edge_kv.export.rounding import Factor
from edge_kv.models.model import Model, Weight
from edge_kv.nets import make_net, ops
from edge_kv.nets.state import StaticState
from edge_kv.nets.weights import Rows, Value, Weights, load
from edge_kv.plan import Plan

WINDOW = 512  # tokens of a sequence
SEQUENCES = 16
PIECE = 2048  # columns whose covariance is kept; wider matrices are cut into such pieces
DAMPING = 0.01  # of the mean variance, added to every column's
PRIOR = 256  # tokens' worth of all experts' inputs that are added to those of one


def shipped_text() -> str:
    """The text that ships with the package: many scripts, prose, tables, dialogue and code."""
    return (files("edge_kv") / "data" / "calibration.txt").read_text(encoding="utf-8")


def sequences(
    encode: Callable[[str], list[int]], text: str, start: Sequence[int], window: int = WINDOW
) -> list[Tensor]:
    """Token ids of `text`, cut into windows that each begin with `start`.

    Of a text with more than SEQUENCES windows that many are taken, spread evenly over it.

    Raises:
        ExportError: a text without tokens.
    """
    ids = encode(text)
    step = window - len(start)
    cut = [ids[at : at + step] for at in range(0, len(ids), step)]
    count = min(len(cut), SEQUENCES)
    cut = [cut[i * len(cut) // count] for i in range(count)]
    if not ids:
        raise ExportError("The calibration text is empty; give another --calibration FILE.")
    return [torch.tensor([*start, *part]) for part in cut]


class Covariance:
    """Sums x^T x of a matrix's inputs, of each PIECE of its columns."""

    def __init__(self, width: int, device: torch.device):
        sizes = [min(PIECE, width - at) for at in range(0, width, PIECE)]
        self.pieces = [torch.zeros(n, n, device=device) for n in sizes]

    def add(self, x: Tensor, weight: float = 1.0) -> None:
        """Take in x [T, width]."""
        for i, piece in enumerate(self.pieces):
            part = x[:, i * PIECE : i * PIECE + len(piece)]
            piece.addmm_(part.T, part, alpha=weight)

    def factors(self) -> list[Factor] | None:
        """What `rounding.round_rows` needs; None when nothing was taken in."""
        found = []
        for i, piece in enumerate(self.pieces):
            mean = float(piece.diagonal().mean())
            if not mean > 0:
                return None
            found.append(Factor(i * PIECE, _inverse_factor(piece, DAMPING * mean)))
        return found


def _inverse_factor(covariance: Tensor, damping: float) -> Tensor:
    """U upper triangular with U^T U = (covariance + damping)^-1.

    With the order of columns turned around, the Cholesky factor of the covariance is R upper with
    R R^T; U is R^-1.
    """
    eye = torch.eye(len(covariance), device=covariance.device)
    for _ in range(6):
        lower, failed = torch.linalg.cholesky_ex((covariance + damping * eye).flip(0, 1))
        if not failed:
            return torch.linalg.solve_triangular(lower.flip(0, 1), eye, upper=True)
        damping *= 10
    raise ExportError(
        "The inputs of a matrix have no usable covariance; export with --calibration none."
    )


class Store(Protocol):
    """Where matrices come from and rounded ones go."""

    def rounds(self, name: str) -> bool:
        """Whether the matrix `name` is still to be rounded by calibration."""

    def source(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of the float checkpoint, f32."""

    def stored(self, name: str, start: int, stop: int) -> Tensor:
        """Rows as they are stored, dequantised to f32; of a float tensor its values."""

    def round(self, name: str, start: int, stop: int, factors: list[Factor] | None) -> None:
        """Round rows start … stop-1 (of a stack: of its [n * out, in] rows) and store them."""

    def finish(self, name: str) -> None:
        """All rows of `name` are stored."""


def calibrate(
    config: Model,
    plan: Plan,
    rows: Sequence[Weight],
    store: Store,
    texts: Sequence[Tensor],
    *,
    token_rows: Callable[[Tensor], Tensor] | None = None,
    device: str = "cpu",
    on_matrix: Callable[[str], None] = lambda name: None,
) -> None:
    """Round every matrix that `store.rounds`, for the inputs it gets when `texts` are read.

    Args:
        plan: float state for at least as many positions as the longest text has tokens.
        rows: the model's weights.
        token_rows: ids [T] -> rows of the per-layer embedding, for nets that take them.
        on_matrix: is told the name of every matrix that was reached.
    """
    meeting = _Meeting(len(texts))
    walk = _Walk(store, torch.device(device), on_matrix)
    with torch.device("meta"):
        net = make_net(config, _CalibratedWeights(rows, meeting, walk))
    assert isinstance(net, nn.Module)
    load(net, lambda name, a, b: store.stored(name, a, b).to(device))
    for module in net.modules():  # what no checkpoint holds was made on the CPU: rope frequencies
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
    zero = torch.zeros(1, dtype=torch.int64, device=device)

    def read(ids: Tensor) -> None:
        state = StaticState(plan)
        state.tables = {name: table.to(device) for name, table in state.tables.items()}
        ids = ids.to(device)
        net.logits(net(ids, zero, state, token_rows(ids).to(device) if token_rows else None))

    meeting.run([partial(read, ids) for ids in texts])
    walk.close()


class _Walk:
    """What happens at a matrix, for all sequences together."""

    def __init__(self, store: Store, device: torch.device, on_matrix: Callable[[str], None]):
        self.store, self.device, self.on_matrix = store, device, on_matrix
        self._open = ""  # a matrix of which some rows are rounded
        self._inputs: list[Tensor] = []  # what `_factors` belong to
        self._factors: list[Factor] | None = None

    def linear(
        self, held: Rows, n: int, bias: Tensor | None, head: bool, xs: list[Tensor]
    ) -> list[Tensor]:
        """xs [T, in] -> [T, n] of rows `held.start` … of a matrix."""
        name, start = held
        rounds = self.store.rounds(name)
        self._leave(name if rounds else "")
        if rounds:
            self.store.round(name, start, start + n, self._shared_factors(xs))
        if head:  # nothing comes behind the logits
            return [x.new_empty(*x.shape[:-1], n, device="meta") for x in xs]
        weight = self.store.stored(name, start, start + n).to(self.device)
        return [nn.functional.linear(x, weight, bias) for x in xs]

    def experts(
        self, gate_up: Weight, down: Weight, act: str, limit: float, xs: list[tuple[Tensor, ...]]
    ) -> list[Tensor]:
        """Stacks of experts: xs are x [T, D], index [T, k] and weight [T, k]."""
        self._leave("")
        x, index, weight = (torch.cat(part) for part in zip(*xs, strict=True))
        everyone = Covariance(x.shape[1], self.device)
        everyone.add(x, PRIOR / len(x))
        out = torch.zeros_like(x)
        count, inner = gate_up.shape[0], down.shape[2]
        for e in range(count):
            token, place = (index == e).nonzero(as_tuple=True)
            own = Covariance(x.shape[1], self.device)
            own.add(x[token])
            for piece, prior in zip(own.pieces, everyone.pieces, strict=True):
                piece += prior
            matrix = self._expert(gate_up, e, own)
            gate, up = (x[token] @ matrix.T).chunk(2, -1)
            hidden = ops.gated(gate, up, act, limit)
            seen = Covariance(inner, self.device)
            seen.add(hidden)
            matrix = self._expert(down, e, seen)
            out.index_add_(0, token, weight[token, place, None] * (hidden @ matrix.T))
        for row in (gate_up, down):  # their matrices took turns
            if self.store.rounds(row.name):
                self._leave(row.name)
        self._leave("")
        return list(out.split([len(part[0]) for part in xs]))

    def _expert(self, row: Weight, e: int, covariance: Covariance) -> Tensor:
        """Expert `e` of a stack, rounded if it is to be."""
        n = row.shape[1]
        if self.store.rounds(row.name):
            self.store.round(row.name, e * n, (e + 1) * n, covariance.factors())
        return self.store.stored(row.name, e, e + 1)[0].to(self.device)

    def _shared_factors(self, xs: list[Tensor]) -> list[Factor] | None:
        """Of the inputs `xs`; matrices that read the same inputs share one computation."""
        if len(self._inputs) != len(xs) or any(
            a is not b for a, b in zip(self._inputs, xs, strict=True)
        ):
            covariance = Covariance(xs[0].shape[-1], self.device)
            for x in xs:
                covariance.add(x.flatten(0, -2))
            self._inputs, self._factors = xs, covariance.factors()
        return self._factors

    def _leave(self, name: str) -> None:
        """`name` is being rounded: what was before it is complete."""
        if self._open and self._open != name:
            self.store.finish(self._open)
            self.on_matrix(self._open)
            heap.trim()
        self._open = name

    def close(self) -> None:
        self._leave("")


class _MetLinear(nn.Module):
    """Rows of a matrix at which all sequences meet."""

    def __init__(self, meeting: _Meeting, walk: _Walk, row: Weight, bias: Value | None,
                 start: int, stop: int, head: bool):  # fmt: skip
        super().__init__()
        self.bias = bias
        self._meet = meeting.meet
        self._work = lambda xs: walk.linear(
            Rows(row.name, start), stop - start, bias.value[start:stop] if bias else None, head, xs
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self._meet(self._work, x)
        return out


class _MetExperts(nn.Module):
    """A stack of experts at which all sequences meet."""

    def __init__(self, meeting: _Meeting, walk: _Walk, gate_up: Weight, down: Weight, act: str,
                 limit: float):  # fmt: skip
        super().__init__()
        self._meet = meeting.meet
        self._work = lambda xs: walk.experts(gate_up, down, act, limit, xs)

    def forward(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        out: Tensor = self._meet(self._work, (x, index, weight))
        return out


class _TokenRows(nn.Module):
    """Rows of a token table, read where they are stored: it is too large to hold."""

    def __init__(self, walk: _Walk, row: Weight):
        super().__init__()
        self._walk, self._name = walk, row.name

    def forward(self, ids: Tensor) -> Tensor:
        read = self._walk.store.source
        found = [read(self._name, int(i), int(i) + 1) for i in ids]
        return torch.cat(found).to(self._walk.device)


class _CalibratedWeights(Weights):
    """Small tensors as they are; matrices as places where sequences meet."""

    def __init__(self, rows: Sequence[Weight], meeting: _Meeting, walk: _Walk):
        super().__init__(rows)
        self._meeting, self._walk = meeting, walk

    def linear(self, name: str, start: int = 0, stop: int | None = None) -> nn.Module:
        row, bias = self.rows[name], f"{name}.bias"
        return _MetLinear(
            self._meeting, self._walk, row, self.value(bias) if bias in self else None,
            start, row.shape[0] if stop is None else stop, name == self.head_name,
        )  # fmt: skip

    def embedding(self, name: str) -> nn.Module:
        return _TokenRows(self._walk, self.rows[name])

    def experts(self, name: str, act: str, limit: float = 0.0) -> nn.Module:
        gate_up, down = self.rows[f"{name}.gate_up"], self.rows[f"{name}.down"]
        return _MetExperts(self._meeting, self._walk, gate_up, down, act, limit)


class _Meeting:
    """Several threads in step: where they meet, one work is done with what each of them brings.

    The work is done by the thread that called `run`, with torch's threads; the others have one
    each, and wait. Between two meetings only as many of them run at once as there are cores:
    what each makes on the way to the next is then in memory a few times, not once a sequence.
    """

    def __init__(self, seats: int):
        self._running = threading.Semaphore(os.cpu_count() or 1)
        self._brought: list[Any] = [None] * seats
        self._given: list[Any] = [None] * seats
        self._works: list[Callable[[list[Any]], list[Any]] | None] = [None] * seats
        self._seat = threading.local()
        self._arrived = threading.Barrier(seats + 1)
        self._served = threading.Barrier(seats + 1)
        self._fault: BaseException | None = None

    def meet(self, work: Callable[[list[Any]], list[Any]], brought: Any) -> Any:
        """Called by every thread: what `work` makes, from all that was brought, for this one."""
        seat = self._seat.index
        self._brought[seat], self._works[seat] = brought, work
        self._running.release()
        try:
            self._arrived.wait()
            self._served.wait()
        finally:
            self._running.acquire()
        given, self._given[seat] = self._given[seat], None
        return given

    def run(self, tasks: Sequence[Callable[[], None]]) -> None:
        """Run all tasks, one thread each; the first error of any of them is raised."""
        cores = torch.get_num_threads()
        threads = [threading.Thread(target=self._seated, args=job) for job in enumerate(tasks)]
        for thread in threads:
            thread.start()
        try:
            self._arrived.wait()  # every thread has told torch that it works alone
            torch.set_num_threads(cores)
            self._served.wait()
            with torch.no_grad():
                while True:
                    self._arrived.wait()
                    work = self._works[0]
                    if any(other is not work for other in self._works):
                        raise ExportError("The sequences of a calibration took different paths.")
                    if work is None:
                        break
                    brought, self._brought = self._brought, [None] * len(threads)
                    self._given = work(brought)
                    del brought
                    self._served.wait()
        except threading.BrokenBarrierError:
            pass
        except BaseException as e:
            self._fail(e)
        finally:
            for thread in threads:
                thread.join()
            torch.set_num_threads(cores)
        if self._fault is not None:
            raise self._fault

    def _seated(self, seat: int, task: Callable[[], None]) -> None:
        self._seat.index = seat
        try:
            torch.set_num_threads(1)
            torch.get_num_threads()  # torch reads the number once in each thread: now
            self._arrived.wait()
            self._served.wait()
            with torch.no_grad(), self._running:
                task()
            self._works[seat] = None
            self._arrived.wait()
        except threading.BrokenBarrierError:
            pass
        except BaseException as e:
            self._fail(e)

    def _fail(self, fault: BaseException) -> None:
        self._fault = self._fault or fault
        self._arrived.abort()
        self._served.abort()
