"""Snapshots for llama_peer.c that need no prefill by llama.cpp: random rows, or another layout.

    python benchmarks/llama_state.py random --model e4b --depths 4096,16384 --fa 1 --out snaps
    python benchmarks/llama_state.py turn snaps/fa0-f16-4096.state --out snaps

`random` fills the cache of a model of make_random_checkpoint.py with seeded f16 rows: neither time
nor memory depends on their values. `turn` takes the rows of a real prefill over to the other
setting of flash attention, which stores values untransposed. The format is that of llama.cpp's
llama_state_seq_save_file, version 3, for a cache with windows: the full layers' cells, then the
sliding layers'.
"""

import argparse
import io
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from common import run_main, say
from make_random_checkpoint import MODELS, make_config

from edge_kv.errors import ConfigError

MAGIC, VERSION = 0x67677371, 3
F16 = 1  # of ggml's types
CELL = np.dtype([("pos", "<i4"), ("n_seq", "<u4"), ("seq", "<i4")])


def owners(model: str) -> Iterator[list[int]]:
    """Widths of a row of keys, layer by layer: of the layers with full attention, of the others."""
    config = make_config(model)
    own = config["layer_types"][: -config["num_kv_shared_layers"]]
    heads = config["num_key_value_heads"]
    for kind, head in (
        ("full_attention", config["global_head_dim"]),
        ("sliding_attention", config["head_dim"]),
    ):
        yield [heads * head] * own.count(kind)


def write_random(out: BinaryIO, model: str, depth: int, flash: bool) -> None:
    """A state of `depth` tokens; `flash` leaves values as rows."""
    rng = np.random.default_rng(0)
    out.write(struct.pack("<3I", MAGIC, VERSION, depth))
    out.write(rng.integers(0, make_config(model)["vocab_size"], depth, "<i4").tobytes())
    window = make_config(model)["sliding_window"]
    for widths, cells in zip(owners(model), (depth, min(depth, window)), strict=True):
        marks = np.zeros(cells, CELL)
        marks["pos"], marks["n_seq"] = np.arange(depth - cells, depth), 1
        out.write(struct.pack("<2I", 1, cells) + marks.tobytes())
        out.write(struct.pack("<2I", not flash, len(widths)))
        for width in widths:
            out.write(struct.pack("<iQ", F16, 2 * width) + rows(rng, cells, width).tobytes())
        for width in widths:
            out.write(struct.pack("<iQ", F16, 2 * width) if flash else values(width))
            out.write(rows(rng, cells, width).tobytes())


def values(width: int) -> bytes:
    """What precedes transposed values: type, bytes of an element, rows."""
    return struct.pack("<i2I", F16, 2, width)


def rows(rng: np.random.Generator, cells: int, width: int) -> np.ndarray:
    return rng.standard_normal((cells, width), np.float32).astype(np.float16)


def turn(source: BinaryIO, out: BinaryIO) -> None:
    """Copy a state and transpose its values, whichever way they lie."""

    def take(form: str) -> tuple[int, ...]:
        got = source.read(struct.calcsize(form))
        out.write(got)
        return struct.unpack(form, got)

    magic, version, tokens = take("<3I")
    if (magic, version) != (MAGIC, VERSION):
        raise ConfigError(f"Version {version} of {magic:#x} is no state of llama.cpp, version 3.")
    out.write(source.read(4 * tokens))
    for _ in ("full", "sliding"):
        _, cells = take("<2I")
        out.write(source.read(cells * CELL.itemsize))
        transposed, layers = struct.unpack("<2I", source.read(8))
        out.write(struct.pack("<2I", not transposed, layers))
        for _ in range(layers):
            _, width = take("<iQ")
            out.write(source.read(cells * width))
        for _ in range(layers):
            if transposed:
                _, _, width = struct.unpack("<i2I", source.read(12))
                shape = (width, cells)
            else:
                width = struct.unpack("<iQ", source.read(12))[1] // 2
                shape = (cells, width)
            out.write(struct.pack("<iQ", F16, 2 * width) if transposed else values(width))
            held = np.frombuffer(source.read(2 * cells * width), np.float16)
            out.write(held.reshape(shape).T.tobytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(required=True)
    make = commands.add_parser("random", help="seeded rows")
    make.set_defaults(call=make_random)
    make.add_argument("--model", choices=MODELS, required=True)
    make.add_argument("--depths", required=True, help="tokens, with commas")
    make.add_argument("--fa", type=int, choices=(0, 1), required=True, help="flash attention")
    other = commands.add_parser("turn", help="the other setting of flash attention")
    other.set_defaults(call=turn_files)
    other.add_argument("states", nargs="+", type=Path)
    for command in (make, other):
        command.add_argument("--out", type=Path, required=True, help="llama_peer's snapshots=")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    args.call(args)


def make_random(args: argparse.Namespace) -> None:
    for depth in map(int, args.depths.split(",")):
        made = io.BytesIO()
        write_random(made, args.model, depth, bool(args.fa))
        keep(made, args.out / f"fa{args.fa}-f16-{depth}.state")


def turn_files(args: argparse.Namespace) -> None:
    for state in args.states:
        made = io.BytesIO()
        with state.open("rb") as source:
            turn(source, made)
        flash, rest = state.name[2], state.name[3:]
        keep(made, args.out / f"fa{1 - int(flash)}{rest}")


def keep(made: io.BytesIO, path: Path) -> None:
    path.with_suffix(".part").write_bytes(made.getbuffer())
    path.with_suffix(".part").replace(path)
    say(f"wrote {path}")


if __name__ == "__main__":
    run_main(main)
