"""A Q4_0 file of Gemma 3 270M, kept as it is, beside llama.cpp on the same file.

    python benchmarks/imported.py --backend onnx --backend executorch

The file is made here: the matrices of the published Q4_K_M file, dequantised, in Q4_0. It is
exported with `--quant auto`, and three things are compared: every stored matrix with what the gguf
package dequantises, bit for bit; the perplexity of a text, and KL from llama.cpp's logits (both
round activations to 8 bits, each in its own way); and the continuations that both choose greedily.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from common import gguf_path, read_text, run_main, say, show, write_result
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import dequantize, quantize

from edge_kv import models
from edge_kv.artifact import read_artifact
from edge_kv.cli.terminal import Bar
from edge_kv.export import export_model
from edge_kv.export.weight_file import StoredWeights, WeightLayout
from edge_kv.formats import dequantise, unpack
from edge_kv.models.checkpoint import open_checkpoint
from edge_kv.runtime import Tokenizer, load
from edge_kv.runtime.evaluate import evaluate, readable

KIND = GGMLQuantizationType.Q4_0
WINDOW, WINDOWS, CTX = 512, 2, 1024
NEW = 48  # tokens of a continuation
PROMPTS = ("The capital of France is", "Once upon a time there was", "def fibonacci(n):")
ENGINES = {"onnx": ("onnx", "onnx-stock"), "executorch": ("executorch",)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--backend", action="append", choices=ENGINES, required=True)
    parser.add_argument("--work", type=Path, default=Path("artifacts"), help="files go here")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    file = args.work / "gemma-3-270m-q4_0.gguf"
    if not file.exists():
        requantise(gguf_path(), file, KIND)
    root, began = args.work / "gemma3-270m-q4_0", time.monotonic()
    if not root.exists():
        with Bar() as bar:
            export_model(
                weights=str(file), ctx=CTX, kv="f32", backends=tuple(args.backend), out=root,
                open_session=load, progress=bar,
            )  # fmt: skip
    artifact = read_artifact(root)
    peer = Peer(file, args.threads)
    text = read_text("gemma3-270m", Tokenizer.of(artifact), WINDOWS * (WINDOW - 1) + 1)
    matrices, values = compare_stored(root, file)
    logits = {tuple(cut): peer.logits(cut) for cut in cut_up(text.ids)}
    rows = [{"run": "llama.cpp", "perplexity": perplexity(logits)}]
    chosen = {"llama.cpp": [peer.greedy(ids) for ids in prompts(artifact)]}
    for engine in (e for backend in args.backend for e in ENGINES[backend]):
        say(f"{engine}: {len(text.ids)} tokens")
        with load(artifact, engine, threads=args.threads, cache=False) as session:
            found = readable(
                evaluate(
                    session, text.ids[1:], bos=text.ids[0], window=WINDOW,
                    reference=lambda ids: logits[tuple(ids)],
                ),
                str,
            )  # fmt: skip
            chosen[engine] = [greedy(session, ids) for ids in prompts(artifact)]
        against = {k: found["against"][k] for k in ("mean_kl", "p99_kl", "top1")}
        rows.append({"run": engine, "perplexity": found["perplexity"], **against})
    tokenizer = Tokenizer.of(artifact)
    write_result(
        "imported_gemma3_270m_q4_0",
        {
            "file": f"{KIND.name} of {gguf_path().name}, every matrix",
            "scheme": artifact.manifest.quant.scheme,
            "formats": artifact.manifest.quant.formats,
            "backends": args.backend,
            "seconds": round(time.monotonic() - began, 1),
            "matrices": matrices,
            "values": values,
            "values_that_differ": 0,
            **text.card(),
            "window": WINDOW,
            "rows": rows,
            "prompts": PROMPTS,
            "tokens": NEW,
            "same_as_llama_cpp": {
                engine: [agreeing(a, b) for a, b in zip(runs, chosen["llama.cpp"], strict=True)]
                for engine, runs in chosen.items()
            },
            "texts": {e: [tokenizer.decode(ids) for ids in runs] for e, runs in chosen.items()},
        },
    )
    show(f"{matrices} matrices, {values} values, all bits alike", rows)


def requantise(source: Path, out: Path, kind: GGMLQuantizationType) -> None:
    """The same model with every matrix in `kind`, as the gguf package rounds."""
    say(f"writing {out.name}")
    reader = GGUFReader(source)
    writer = GGUFWriter(out, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        nested = field.types[1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], sub_type=nested)
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        if values.ndim == 2:
            writer.add_tensor(tensor.name, quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(tensor.name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def stored(file: Path) -> dict[str, Any]:
    """Bits a weight and bytes of all tensors."""
    tensors = GGUFReader(file).tensors
    size = sum(int(t.n_bytes) for t in tensors)
    elements = sum(int(t.n_elements) for t in tensors)
    return {"bits": round(8 * size / elements, 3), "bytes": size}


def compare_stored(root: Path, file: Path) -> tuple[int, int]:
    """How many matrices and values are stored; every one must be the file's, bit for bit."""
    checkpoint = open_checkpoint(file)
    formats = read_artifact(root).manifest.quant.formats
    layout = WeightLayout(models.weights(checkpoint.config), formats)
    [path] = sorted(root.glob("*/weights.bin"))
    stored = StoredWeights(layout, path)
    own = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    packed = [t for t in layout.tensors if t.format]
    for t in packed:
        region = layout.region(t)
        q = unpack(t.format, stored.read(region.name, 0, region.shape[0]).numpy(), *t.spec.shape)
        tensor = own[checkpoint.stored_name(t.spec.name)]
        expected = dequantize(tensor.data, tensor.tensor_type)
        if not np.array_equal(dequantise(t.format, q).view(np.int32), expected.view(np.int32)):
            raise SystemExit(f"{t.spec.name} is not stored as {file.name} has it.")
    return len(packed), sum(t.spec.elements for t in packed)


def cut_up(ids: Sequence[int]) -> Iterator[list[int]]:
    """The windows `evaluate` reads: each begins with the start token ids[0]."""
    for at in range(1, len(ids), WINDOW - 1):
        yield [ids[0], *ids[at : at + WINDOW - 1]]


def perplexity(logits: dict[tuple[int, ...], np.ndarray[Any, Any]]) -> float:
    losses = []
    for ids, rows in logits.items():
        rows = rows.astype(np.float64)
        top = rows.max(-1)
        total = top + np.log(np.exp(rows - top[:, None]).sum(-1))
        losses.append(total - rows[np.arange(len(rows)), ids[1:]])
    return float(np.exp(np.concatenate(losses).mean()))


def prompts(artifact: Any) -> list[list[int]]:
    return [Tokenizer.of(artifact).encode(prompt) for prompt in PROMPTS]


def greedy(session: Any, ids: Sequence[int]) -> list[int]:
    session.reset()
    session.prefill(ids[:-1])
    out: list[int] = []
    last = ids[-1]
    while len(out) < NEW:
        last = int(np.argmax(session.decode(last)))
        out.append(last)
    return out


def agreeing(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens until two continuations part."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=True)))


class Peer:
    """llama.cpp over a file."""

    def __init__(self, file: Path, threads: int):
        from llama_cpp import Llama

        self._model = Llama(
            str(file), n_ctx=CTX, n_threads=threads, n_threads_batch=threads, logits_all=True,
            verbose=False,
        )  # fmt: skip

    def logits(self, ids: Sequence[int]) -> np.ndarray[Any, Any]:
        """Logits behind every id but the last."""
        self._model.reset()
        self._model.eval(list(ids))
        rows: np.ndarray[Any, Any] = np.array(self._model.scores[: len(ids) - 1], np.float32)
        return rows

    def greedy(self, ids: Sequence[int]) -> list[int]:
        self._model.reset()
        self._model.eval(list(ids))
        out: list[int] = []
        for _ in range(NEW):
            out.append(int(np.argmax(self._model.scores[self._model.n_tokens - 1])))
            self._model.eval(out[-1:])
        return out


if __name__ == "__main__":
    run_main(main)
