"""What a process holds before it opens a model: measured here, or once for this machine.

The interpreter, libraries and a command line's own imports differ between machines, Pythons and
versions by tens of megabytes; `edge_kv.memory` adds what belongs to the model.
"""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from edge_kv.errors import RuntimeFault
from edge_kv.files import write_text
from edge_kv.memory import COSTS, UNPLANNED, Base
from edge_kv.runtime.cache import cache_folder
from edge_kv.runtime.mapped import doublings
from edge_kv.runtime.meter import read_memory
from edge_kv.runtime.native_library import build_onnx_operators, lack_of_onnx_operators

COMMAND = (  # what `edge-kv run` imports
    "edge_kv.cli", "edge_kv.cli.repl", "edge_kv.cli.terminal", "edge_kv.runtime.text",
    "numpy.random",
)  # fmt: skip
_MODULES = {
    "onnx": "edge_kv.runtime.onnx_session",
    "executorch": "edge_kv.runtime.executorch_session",
}
# Where the largest library of a package that `Costs.doubling` names lies in it.
_LARGEST = {
    "onnxruntime": "capi/onnxruntime_pybind11_state*",
    "numpy": "_core/_multiarray_umath*",
    "executorch": "lib/libexecutorch_kernels_optimized*",
}
_LIBRARIES = ("numpy", "onnxruntime", "executorch", "pydantic", "tokenizers", "typer", "rich")
_FILE = "base.json"
_MEASURE = """
import json, sys
from dataclasses import asdict
from importlib import import_module
for name in sys.argv[2:]:
    import_module(name)
from edge_kv.runtime.base import own_base
print(json.dumps(asdict(own_base(sys.argv[1]))))
"""
_SAME = 0.5  # doublings that leave a kept measurement in force
_SECONDS = 60  # that a measuring process may take


def own_base(engine: str) -> Base:
    """What this process holds now, with the engine's libraries; typical figures where unknown.

    Raises:
        KeyError: an engine without costs in `edge_kv.memory`.
    """
    import_module(_MODULES[engine])
    held = read_memory()
    if held.anon is None or held.file is None:
        return COSTS[engine].typical
    return Base(held.anon, held.file, _doublings(engine))


def _doublings(engine: str) -> dict[str, float]:
    """`Base.doublings` of the libraries that `engine` runs, as their files lie in RAM now."""
    found = {}
    for package in COSTS[engine].doubling:
        spec = find_spec(package)
        places = list(spec.submodule_search_locations or ()) if spec else []
        files = (f for place in places for f in sorted(Path(place).glob(_LARGEST[package])))
        found[package] = round(doublings(next(files, Path())), 1)
    return found


def planned_base(engine: str, imports: tuple[str, ...] = ()) -> Base | None:
    """`own_base` of an engine that has a memory plan here, with `imports`; None of one without.

    The plan of ONNX is of its native operators: where they cannot be had there is none.
    """
    if engine not in COSTS:
        return None
    for name in imports:
        import_module(name)
    base = own_base(engine)
    if engine == "onnx":
        try:
            build_onnx_operators()
        except RuntimeFault:
            return None
    return base


def lacks_plan(engine: str) -> str:
    """Why what `engine` runs here is not what its memory plan is of, in words; else empty.

    Nothing is compiled to find out.
    """
    lack = lack_of_onnx_operators() if engine == "onnx" else ""
    if not lack:
        return ""
    return (
        f"{lack} The memory plan of ONNX is of its native operators; ONNX Runtime's own run here, "
        f"slower. {UNPLANNED}"
    )


def machine_base(engine: str, imports: tuple[str, ...] = COMMAND) -> Base:
    """What a process holds on this machine that imports `imports` and the engine.

    Measured once and kept in the cache directory, for the versions that are installed and as long
    as a touch of their files maps as much as it did; typical figures where that cannot be done.

    Raises:
        KeyError: an engine without costs in `edge_kv.memory`.
    """
    key, versions = f"{engine} {' '.join(imports)}", _versions()
    kept: dict[str, Any] = {}
    with suppress(RuntimeFault, OSError, ValueError, AttributeError):
        kept = json.loads((cache_folder("memory") / _FILE).read_bytes()).get(versions) or {}
    with suppress(KeyError, TypeError, ValueError):
        base, now = _base(kept[key]), _doublings(engine)
        if all(abs(base.doublings[name] - n) < _SAME for name, n in now.items()):
            return base
    try:
        done = subprocess.run(
            [sys.executable, "-c", _MEASURE, engine, *imports],
            capture_output=True, text=True, timeout=_SECONDS, check=True,
        )  # fmt: skip
        base = _base(json.loads(done.stdout))
    except (OSError, ValueError, subprocess.SubprocessError):
        return COSTS[engine].typical
    with suppress(RuntimeFault, OSError):
        record = {versions: {**kept, key: asdict(base)}}
        write_text(cache_folder("memory") / _FILE, json.dumps(record))
    return base


def _base(data: dict[str, Any]) -> Base:
    """A base out of JSON."""
    found = {str(name): float(n) for name, n in dict(data["doublings"]).items()}
    return Base(int(data["anon"]), int(data["file"]), found)


def _versions() -> str:
    """This Python and the libraries that a runtime loads: another version may hold more."""
    found = [sys.version]
    for package in _LIBRARIES:
        with suppress(PackageNotFoundError):
            found.append(f"{package} {version(package)}")
    return ", ".join(found)
