"""Records what the Android app's classes compute in a desktop JVM, and what its APK holds.

    android_demo/build.sh host && android_demo/build.sh apk
    python benchmarks/android.py --work DIR

The JVM runs the classes that are in the APK, over the JNI library of onnxruntime's Android package
(x86_64) and onnxruntime's Linux build of the same version. Tokens are greedy; the Python runtime
has a newer onnxruntime. No phone is involved.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from common import Variant, exported, gguf_path, say, write_result

from edge_kv.artifact import read_artifact
from edge_kv.parity import divergence
from edge_kv.runtime import Tokenizer, load
from edge_kv.runtime.generation import generate
from edge_kv.weights.gguf_file import GGUFFile
from edge_kv.weights.gguf_tokenizer import hf_tokenizer_json

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from android_host import DEMO, Host
from test_android_text import corpus

NEW = 140
RUNS = {  # model, variant -> prompt lengths: window, chunk edges, ring wraps of tiny
    ("tiny", Variant("none", ctx=2048)): (1, 64, 129, 600),
    ("tiny", Variant("int4", kv="int8", ctx=2048)): (1, 64, 129, 600),
    ("gemma3-270m", Variant("int8", kv="int8", ctx=4096)): (12, 400),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="where artifacts are exported to")
    parser.add_argument("--models", nargs="+", default=["tiny", "gemma3-270m"])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        host = Host(Path(scratch))
        runs = [
            tokens(host, model, variant, lengths, args.work)
            for (model, variant), lengths in RUNS.items()
            if model in args.models
        ]
        write_result(
            "android_jvm",
            {
                "what": "the app's classes in a desktop JVM against the Python runtime",
                "onnxruntime": host.ask("version"),
                "jvm": java(),
                "new_tokens": NEW,
                "runs": runs,
                "tokenizers": [
                    texts(host, name, path) for name, path in tokenizers(Path(scratch), args.work)
                ],
            },
        )
        host.close()
    write_result("android_apk", apk(DEMO / "build" / "edge-kv.apk"))


def tokens(
    host: Host, model: str, variant: Variant, lengths: tuple[int, ...], work: Path
) -> dict[str, Any]:
    """Greedy tokens from prompts of several lengths, and logits along the Python runtime's."""
    root = exported(model, variant, work)
    passage = (Path(__file__).parent.parent / "edge_kv/data/passage.txt").read_text()
    ids = Tokenizer.of(read_artifact(root)).encode(passage)
    rows = []
    for length in lengths:
        with load(root, threads=1) as session:
            wanted = list(generate(session, ids[:length], max_new_tokens=NEW))
            session.reset()
            session.prefill(ids[: length - 1])
            logits = np.stack([session.decode(i) for i in (ids[length - 1], *wanted[:-1])])
        host.ask("open", root=str(root), threads=1)
        found = host.ask("generate", ids=ids[:length], stop=[], max_new_tokens=NEW)["ids"]
        pairs = enumerate(zip(wanted, found, strict=True))
        equal = next((i for i, (a, b) in pairs if a != b), len(wanted))
        host.ask("reset")
        host.ask("prefill", ids=ids[: length - 1])
        apart = divergence(logits, host.decode([ids[length - 1], *wanted[:-1]]))
        rows.append(
            {
                "prompt": length,
                "tokens": len(wanted),
                "first_equal": equal,
                "max_abs_logit": apart.max_abs,
                "mean_kl": apart.mean_kl,
                "max_kl": apart.max_kl,
                "top1": apart.top1,
            }
        )
        say(f"{root.name}, prompt of {length}: {rows[-1]}")
    return {"model": model, "stored": variant.label, "ctx": variant.ctx, "prompts": rows}


def tokenizers(scratch: Path, work: Path) -> list[tuple[str, Path]]:
    gemma = scratch / "gemma.json"
    content = hf_tokenizer_json(GGUFFile(gguf_path()).metadata, "gemma")
    gemma.write_text(content or "", encoding="utf-8")
    tiny = exported("tiny", Variant("none", ctx=2048), work) / "tokenizer.json"
    return [("Gemma 3", gemma), ("tiny", tiny)]


def texts(host: Host, name: str, path: Path) -> dict[str, Any]:
    """How many strings get Hugging Face's ids."""
    import tokenizers as oracle

    strings = corpus()
    engine = oracle.Tokenizer.from_file(str(path))
    wanted = [e.ids for e in engine.encode_batch(strings, add_special_tokens=False)]
    found = host.ask("tokenize", file=str(path), bos=2, add_bos=True, texts=strings)["ids"]
    equal = sum(a == b for a, b in zip(found, wanted, strict=True))
    say(f"{name}: {equal} of {len(strings)} strings")
    return {
        "tokenizer": name,
        "vocabulary": engine.get_vocab_size(),
        "strings": len(strings),
        "ids": sum(map(len, wanted)),
        "equal": equal,
    }


def java() -> str:
    said = subprocess.run(["java", "-version"], capture_output=True, text=True, check=True)
    return said.stderr.splitlines()[0]


def apk(path: Path) -> dict[str, Any]:
    """Size and contents of the APK, and what aapt2 reads in it."""
    with zipfile.ZipFile(path) as archive:
        files = [
            {"path": f.filename, "bytes": f.file_size, "stored": f.compress_size}
            for f in archive.infolist()
        ]
    badging = (DEMO / "build" / "apk" / "badging.txt").read_text().splitlines()
    facts = ("package:", "sdkVersion:", "targetSdkVersion:", "native-code:", "launchable-activity:")
    return {
        "what": "android_demo/build.sh apk: built and verified, run on no phone",
        "bytes": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "files": files,
        "badging": [line for line in badging if line.startswith(facts)],
        "checked_by": ["apksigner verify", "zipalign -c", "dexdump -c", "aapt2 dump badging"],
    }


if __name__ == "__main__":
    main()
