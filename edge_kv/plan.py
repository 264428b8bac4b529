"""The decode state of a model as preallocated tables, at one context length.

State is a set of tables. Row i of a table stands for positions i*stride … i*stride+stride-1 and
lies in slot i mod slots. A query at position p sees a row once the row's last position is not later
than p and, if the table has a `keep`, as long as p - i < keep. Every kind of decode state is an
instance of this: an append cache (stride 1, keep 0), a sliding window (1, W), the tail of a
convolution (1, k), compressed blocks (r, 0). The position is the only number that changes, so a
rewind is `pos -= n` and a refused draft leaves nothing to undo.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

from edge_kv.errors import PlanError, did_you_mean

DTYPE_BYTES = {"f32": 4, "f16": 2, "int8": 1}
STORAGES = ("f32", "f16", "int8")
SCALE = ".scale"  # the table of an int8 table's scales is called like it, with this behind
MOST_DRAFTS = 8  # tokens that one pass may check behind the one it decodes
LIVE_STEP = 256  # prefix views are a multiple of this many rows long


@dataclass(frozen=True)
class Table:
    """One preallocated tensor [slots, heads, dim], row-major."""

    name: str  # "l4.k"; the scales of int8 rows are in "l4.k.scale", a table of rows (heads, 1)
    row: tuple[int, int]  # (heads, dim)
    slots: int
    stride: int = 1  # positions a row stands for
    keep: int = 0  # positions a query looks back on, its own included; 0: all. Only with stride 1
    dtype: str = "f32"  # f32 | f16 | int8
    writer: int = 0  # the one layer that writes it
    readers: tuple[int, ...] = ()  # every layer that reads it
    picks: int = 0  # most rows that one query reads, chosen by `select`; 0: all it sees
    exact: bool = False  # raw rows a model computes with (`take`): f32 in every storage

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.slots, *self.row)

    @property
    def row_bytes(self) -> int:
        return self.row[0] * self.row[1] * DTYPE_BYTES[self.dtype]

    @property
    def bytes(self) -> int:
        return self.slots * self.row_bytes

    def rows(self, end: int) -> int:
        """Rows that stand for positions below `end`, the last one perhaps in part."""
        return -(-end // self.stride)

    def live(self, end: int) -> int:
        """Slots to bind so that every row a step up to position end-1 reads or writes is in view.

        A step of T tokens writes rows pos // stride … pos // stride + (T + stride - 2) // stride:
        a number that depends on T alone, so the last of them may be one that it does not touch.
        """
        if self.keep:
            return self.slots
        rows = (end + self.stride - 2) // self.stride + 1
        return min(self.slots, -(-rows // LIVE_STEP) * LIVE_STEP)

    def oldest(self, written: int) -> int:
        """The first row that is still there after positions 0 … written-1 were written."""
        return max(0, written - self.slots) if self.keep else 0

    def held(self, pos: int, written: int) -> range:
        """Row indices a snapshot at `pos` keeps: complete rows that were not overwritten."""
        stop = pos // self.stride
        return range(min(self.oldest(written), stop), stop)

    def can_resume(self, to: int, written: int) -> bool:
        """Whether a step may start at `to`: everything it looks back on is still there."""
        oldest = self.oldest(written)
        return oldest == 0 or to == 0 or to - self.keep + 1 >= oldest

    def read_bytes(self, depth: int) -> int:
        """Bytes one reader reads of it to decode the token at position depth-1."""
        rows = min(depth, self.keep or depth) // self.stride
        return min(rows, self.picks or rows) * self.row_bytes


@dataclass(frozen=True)
class Plan:
    """All state of one model at one context length."""

    ctx: int
    chunk: int  # most tokens of one step
    kv: str  # storage asked for: f32 | f16 | int8 (int8 is for tables without a `keep`)
    tables: tuple[Table, ...]
    drafts: int = 0  # most tokens that one pass of decode checks behind the one it decodes

    @classmethod
    def of(cls, tables: Iterable[Table], sizes: Sizes) -> Plan:
        """The plan of a model's `tables`, with the scales of int8 tables behind them.

        Raises:
            PlanError: see `validate`.
        """
        out: list[Table] = []
        for t in tables:
            out.append(t)
            if t.dtype == "int8":
                out.append(replace(t, name=t.name + SCALE, row=(t.row[0], 1), dtype="f32"))
        plan = cls(sizes.ctx, sizes.chunk, sizes.kv, tuple(out), sizes.drafts)
        plan.validate()
        return plan

    @cached_property
    def by_name(self) -> dict[str, Table]:
        return {t.name: t for t in self.tables}

    def __getitem__(self, name: str) -> Table:
        return self.by_name[name]

    @property
    def bytes(self) -> int:
        return sum(t.bytes for t in self.tables)

    def touched(self, depth: int) -> int:
        """Bytes of state that hold rows once `depth` positions were written."""
        return sum(min(t.rows(depth), t.slots) * t.row_bytes for t in self.tables)

    def read_traffic(self, depth: int) -> int:
        """Bytes of state one decoded token reads at `depth` positions: each reader reads anew."""
        return sum(len(t.readers) * t.read_bytes(depth) for t in self.tables)

    def full_length(self, *, sharing: bool = False, rings: bool = False) -> int:
        """Bytes of the keys and values where layers do not share them or windows are not rings.

        The baseline of published figures: a copy of attended rows for each reader unless `sharing`;
        `ctx` rows in the place of windows and blocks unless `rings`; no raw rows.
        """
        return sum(
            (1 if sharing else len(t.readers)) * (t.slots if rings else self.ctx) * t.row_bytes
            for t in self.tables
            if not t.exact and (rings or t.stride == 1)
        )

    def earliest(self, written: int) -> int:
        """The lowest position but 0 that decoding may go on at after `written` positions; 0: any.

        Going back to 0 is always possible: nothing before it is looked back on.
        """
        return max((t.oldest(written) + t.keep - 1 for t in self.tables if t.oldest(written)),
                   default=0)  # fmt: skip

    def can_rewind(self, to: int, written: int) -> bool:
        """Whether decoding may go on at `to` after `written` positions were written."""
        return 0 <= to <= written and all(t.can_resume(to, written) for t in self.tables)

    def validate(self) -> None:
        """Refuse a plan that could lose a row.

        Raises:
            PlanError: a table planned twice, too short for its `keep`, its stride or a chunk, read
                before it is written, of int8 rows without scales, or of another length than those
                it is bound with; more drafts than fit in a chunk, whose rows alone can be taken
                back without loss.
        """
        if not 1 <= self.chunk <= self.ctx:
            raise PlanError(f"chunk {self.chunk} is outside 1 … ctx ({self.ctx}).")
        if not 0 <= self.drafts <= min(MOST_DRAFTS, self.chunk - 1):
            raise PlanError(
                f"{self.drafts} drafts are outside 0 … {min(MOST_DRAFTS, self.chunk - 1)}, what a "
                f"pass may check where a chunk has {self.chunk} tokens."
            )
        if len(self.by_name) < len(self.tables):
            names = [t.name for t in self.tables]
            twice = next(n for n in names if names.count(n) > 1)
            raise PlanError(f"Table {twice} is planned twice; every table has one writer.")
        for t in self.tables:
            if t.dtype not in DTYPE_BYTES:
                raise PlanError(f"Table {t.name}: unknown type {t.dtype!r}.")
            if min(*t.row, t.stride) < 1 or t.keep < 0 or (t.keep and t.stride > 1):
                raise PlanError(
                    f"Table {t.name} has rows {t.row}, stride {t.stride}, keep {t.keep}; rows and "
                    "stride are positive, and a table with a keep has stride 1."
                )
            need = slots_needed(self.ctx, self.chunk, t.stride, t.keep)
            if t.slots < need:
                raise PlanError(
                    f"Table {t.name} has {t.slots} slots but stride {t.stride} and keep {t.keep} "
                    f"need {need}: the oldest row of a chunk would be overwritten."
                )
            if not t.readers or min(t.readers) < t.writer:
                raise PlanError(f"Table {t.name} is read before layer {t.writer} writes it.")
            if t.dtype == "int8" and t.name + SCALE not in self.by_name:
                raise PlanError(f"Table {t.name} holds int8 rows but {t.name}{SCALE} is missing.")
        lengths: dict[int, int] = {}
        for t in self.tables:
            if not t.keep and lengths.setdefault(t.stride, t.slots) != t.slots:
                raise PlanError(
                    f"Table {t.name} has {t.slots} slots, others of stride {t.stride} have "
                    f"{lengths[t.stride]}; a program binds them with one length."
                )


@dataclass(frozen=True)
class Sizes:
    """What a model's `tables` are laid out for: context, chunk, storage policy and drafts."""

    ctx: int
    chunk: int
    kv: str
    drafts: int = 0

    def __post_init__(self) -> None:
        if self.kv not in STORAGES:
            raise PlanError(f"Unknown KV storage {self.kv!r}.{did_you_mean(self.kv, STORAGES)}")

    def table(
        self, name: str, row: tuple[int, int], *, layer: int, keep: int = 0, stride: int = 1,
        exact: bool = False, readers: tuple[int, ...] | None = None, picks: int = 0,
    ) -> Table:  # fmt: skip
        """A table that `layer` writes and, unless `readers` says otherwise, alone reads."""
        rounded = self.kv if not (exact or (keep and self.kv == "int8")) else "f32"
        return Table(
            name, row, slots_needed(self.ctx, self.chunk, stride, keep), stride, keep, rounded,
            layer, (layer,) if readers is None else readers, picks, exact,
        )  # fmt: skip


def slots_needed(ctx: int, chunk: int, stride: int, keep: int) -> int:
    """Fewest slots of a table in which no query misses a row.

    The first query of a chunk still needs the keep-1 rows before it, and rows are written before
    they are read. A table of blocks has one row more: see `Table.live`.
    """
    if keep:
        return min(ctx, keep + chunk - 1)
    return ctx if stride == 1 else -(-ctx // stride) + 1
