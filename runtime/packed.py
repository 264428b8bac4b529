"""Weights packed once for this device, so that later loads map them instead of building a heap.

onnxruntime rearranges every matrix for the CPU it runs on. It can write the result to a file and
map it at the next load: packed weights are then clean file pages that the kernel may drop. The
layout belongs to one engine version and one kind of CPU, so it is made here, at the first load,
and kept in a cache directory outside the artifact. All packed programs point into the one file
that the last of them was packed into; `prefill` runs a subset of the matrices of `decode`.

    <cache>/onnx/<key>.lock            held while packing: two processes do not do it twice
    <cache>/onnx/<key>.part/           being written; renamed when complete
    <cache>/onnx/<key>/                decode.onnx, prefill.onnx, weights.bin, packed.json

The file also holds the original matrices: onnxruntime packs them again at every load, one at a
time, to find the packed copy by its hash.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edge_kv.artifact import Artifact, sha256_file
from edge_kv.errors import EdgeKVError, RuntimeFault
from edge_kv.files import locked
from edge_kv.runtime.cache import CACHE_VARIABLE, cache_folder, require_own
from edge_kv.runtime.onnx_file import Entries, external_data, replace_external_data
from edge_kv.runtime.ort import onnxruntime as ort

PROGRAMS = ("prefill", "decode")  # the last has the weights of them all
LAYOUT = 1  # counts up when what is stored here changes
WEIGHTS, RECORD = "weights.bin", "packed.json"
WORTH_PACKING = 64 << 20  # bytes of weights below which packing is not worth a file
ALIGNMENT = 4096
ROOM = 3  # free disk asked for, in weight files: originals, packed copies and the work beside
INLINE_BYTES = 1024  # smaller weights stay inside the program

Saver = Callable[[Path, Any], None]  # creates an engine for a model, with session options
log = logging.getLogger(__name__)


def packed_programs(artifact: Artifact, save: Saver) -> dict[str, Path] | None:
    """The programs of `artifact` packed for this device: name -> file; made when missing.

    None where there is nothing to gain or nowhere to write: the artifact's own programs are then
    loaded as they are. `save(model, options)` loads a program with the given session options.
    """
    key = _key(artifact)
    weights = _weight_bytes(artifact)
    if key is None or weights < WORTH_PACKING:
        return None
    try:
        home = cache_folder("onnx") / key
        found = _valid(home)
        if found:
            return found
        with locked(home.with_name(f"{key}.lock")):
            return _valid(home) or _make(artifact, home, weights, save)
    except (OSError, EdgeKVError, KeyError, ValueError) as e:
        reason = e.strerror if isinstance(e, OSError) and e.strerror else str(e)
        log.warning("Weights stay unpacked and are loaded to the heap: %s.", reason.rstrip("."))
        return None


def discard(programs: dict[str, Path]) -> None:
    """Forget packed programs that could not be loaded; the next start makes them anew."""
    for home in {p.parent for p in programs.values()}:
        shutil.rmtree(home, ignore_errors=True)


def _key(artifact: Artifact) -> str | None:
    """What packed weights depend on, as a digest; None without digests (a running export)."""
    files = artifact.manifest.files
    if not artifact.manifest.finished:
        return None
    digests = [files[name].sha256 for name in sorted(artifact.backend("onnx").files)]
    parts = [LAYOUT, *PROGRAMS, ort.__version__, *_cpu(), *digests]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _cpu() -> list[str]:
    """The kind of CPU: kernels, and with them layouts, are chosen by its features."""
    wanted = ("model name", "flags", "CPU implementer", "CPU part", "Features")
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return [platform.machine(), platform.processor()]
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    facts = {name.strip(): value.strip() for name, value in pairs}
    return [platform.machine(), *(facts.get(name, "") for name in wanted)]


def _weight_bytes(artifact: Artifact) -> int:
    backend, files = artifact.backend("onnx"), artifact.manifest.files
    programs = {p.file for p in backend.programs.values()}
    return sum(files[name].size for name in backend.files if name not in programs)


def _valid(home: Path) -> dict[str, Path] | None:
    """The programs in `home` if every file is as it was recorded.

    Programs are compared by digest, the weight file by size and time of change.
    """
    try:
        for path in (home, *home.iterdir()):
            require_own(path)
        record = json.loads((home / RECORD).read_bytes())
        stat = (home / WEIGHTS).stat()
        if [stat.st_size, stat.st_mtime_ns] != record["weights"]:
            return None
        found = {name: home / f"{name}.onnx" for name in record["programs"]}
        if any(sha256_file(path) != record["programs"][name] for name, path in found.items()):
            return None
    except (OSError, ValueError, KeyError, TypeError, RuntimeFault):
        return None
    return found


def _make(artifact: Artifact, home: Path, weights: int, save: Saver) -> dict[str, Path]:
    """Pack into a directory beside `home` and rename it; the lock is held."""
    part = home.with_name(f"{home.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    free = shutil.disk_usage(home.parent).free
    if free < ROOM * weights:
        raise OSError(
            f"{free / 1e9:.1f} GB are free, packing needs {ROOM * weights / 1e9:.1f} GB; "
            f"free some, or set {CACHE_VARIABLE} to a larger disk"
        )
    log.info("Packing the weights for this machine, once (in %s) …", home.parent)
    try:
        part.mkdir()
        programs = {name: artifact.backend("onnx").programs[name] for name in PROGRAMS}
        *others, whole = PROGRAMS
        _save(artifact.path(programs[whole].file), part / f"{whole}.onnx", save, packed=True)
        written = external_data((part / f"{whole}.onnx").read_bytes())
        contents = _contents(part / WEIGHTS, written)
        aligned = _align(part / WEIGHTS, written)
        places = {content: aligned[name] for name, content in contents.items()}
        work = part / "work"  # takes the weights that come with other programs: known already
        work.mkdir()
        for name in PROGRAMS:
            graph = part / f"{name}.onnx"
            if name in others:
                graph = work / graph.name
                _save(artifact.path(programs[name].file), graph, save, packed=False)
            known = aligned
            if name in others:  # what a function unfolds to is named after its place in a program
                held = _contents(work / WEIGHTS, external_data(graph.read_bytes()))
                known = {tensor: places[content] for tensor, content in held.items()}
            rewritten = replace_external_data(graph.read_bytes(), known)
            (part / f"{name}.onnx").write_bytes(rewritten)
        shutil.rmtree(work)
        stat = (part / WEIGHTS).stat()
        record = {
            "artifact": artifact.manifest.name,
            "onnxruntime": ort.__version__,
            "weights": [stat.st_size, stat.st_mtime_ns],
            "programs": {name: sha256_file(part / f"{name}.onnx") for name in programs},
        }
        (part / RECORD).write_text(json.dumps(record, indent=1))
        for path in part.iterdir():
            with path.open("rb") as f:
                os.fsync(f.fileno())  # where a full disk shows at the latest
        shutil.rmtree(home, ignore_errors=True)  # a damaged one
        part.rename(home)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    found = _valid(home)
    if not found:
        raise OSError("it was changed while it was written")
    return found


def _save(model: Path, to: Path, save: Saver, *, packed: bool) -> None:
    """Have onnxruntime write its optimised form of `model`, weights beside it."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(to)
    settings = {
        "session.optimized_model_external_initializers_file_name": WEIGHTS,
        "session.optimized_model_external_initializers_min_size_in_bytes": str(INLINE_BYTES),
    }
    if packed:
        settings["session.save_external_prepacked_constant_initializers"] = "1"
    else:
        settings["session.disable_prepacking"] = "1"
    for name, value in settings.items():
        options.add_session_config_entry(name, value)
    save(model, options)


def _contents(path: Path, entries: dict[str, Entries]) -> dict[str, str]:
    """Name -> digest of the bytes of every weight in the file that onnxruntime wrote."""
    found = {}
    with path.open("rb") as f:
        for name, tensor in entries.items():
            f.seek(int(tensor["offset"]))
            left, digest = int(tensor["length"]), hashlib.sha256()
            while left and (block := f.read(min(left, 1 << 20))):
                digest.update(block)
                left -= len(block)
            found[name] = digest.hexdigest()
    return found


def _align(path: Path, entries: dict[str, Entries]) -> dict[str, Entries]:
    """Append aligned copies of all pieces that onnxruntime wrote at odd offsets.

    It aligns only tensors above 1 MB, but kernels find the parts of a packed matrix by rounding
    addresses up, as they did in aligned memory when they packed it: a shifted copy is garbage.

    Raises:
        OSError: a piece is missing: onnxruntime does not look whether its writes fitted the disk.
    """
    with path.open("r+b") as f:
        size = f.seek(0, os.SEEK_END)

        def moved(offset: int, length: int) -> int:
            nonlocal size
            if offset + length > size:
                raise OSError(f"{path.name} is cut off; is the disk full?")
            if offset % ALIGNMENT == 0:
                return offset
            f.seek(offset)
            piece = f.read(length)
            begin = -(-size // ALIGNMENT) * ALIGNMENT
            f.seek(begin)
            size = begin + f.write(piece)
            return begin

        aligned = {}
        for name, tensor in entries.items():
            aligned[name] = {**tensor}
            start = moved(int(tensor["offset"]), int(tensor["length"]))
            aligned[name]["offset"] = str(start)
            for entry, value in tensor.items():
                if entry.startswith("prepacked"):
                    key, *blobs = value.split("|")
                    for i, blob in enumerate(blobs):
                        offset, length, check = blob.split(";")
                        blobs[i] = f"{moved(int(offset), int(length))};{length};{check}"
                    aligned[name][entry] = "|".join([key, *blobs])
    return aligned
