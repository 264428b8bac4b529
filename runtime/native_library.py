"""Builds and loads the native libraries when they are first needed.

Two share the kernels: the ExecuTorch engine, on the libraries inside the executorch wheel, none of
which needs torch, and the operators of the ONNX engine, which need nothing. Each is compiled once
for this machine's compiler, wheel and sources into the user's cache directory; finding the wheel
does not import it. Wheels made by `make wheel` bring the operators compiled for the machines of
SHIPPED_FOR; they are taken where they were made of the sources that lie beside this file.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from edge_kv.artifact import sha256_file
from edge_kv.errors import RuntimeFault
from edge_kv.files import locked, write_text
from edge_kv.runtime.cache import CACHE_VARIABLE, cache_folder, require_own

log = logging.getLogger(__name__)
EXECUTORCH = "1.5.1"  # its C++ interface is not stable between versions
INSTALL = f"pip install --no-deps executorch=={EXECUTORCH}"
NO_COMPILER = (
    "There is no C++ compiler, and native code is compiled when it is first used; install one "
    "(Debian and Ubuntu: apt install g++) or use --engine onnx-stock."
)
SOURCES = Path(__file__).parent / "native"
SHIPPED = Path(__file__).parent / "shipped"  # compiled libraries of a wheel; none in a checkout
SHIPPED_FOR = {"x86_64": "g++", "aarch64": "aarch64-linux-gnu-g++"}  # and what compiles for them
# What a shipped library brings along; of glibc it needs 2.34, as manylinux_2_34 wheels do.
PORTABLE = ("-static-libstdc++", "-Wl,--exclude-libs,ALL", "-Wl,--gc-sections", "-Wl,-s")
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fno-math-errno", "-fvisibility=hidden")
AVX512 = ("-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mfma", "-mf16c")
# Instruction sets of kernels.cpp: it is compiled once for each, the CPU chooses at run time.
ISAS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {
        "scalar": (),
        "avx2": ("-mavx2", "-mfma", "-mf16c"),
        "avx512": AVX512,
        "avx512vnni": (*AVX512, "-mavx512vnni"),
    },
    "aarch64": {
        "scalar": ("-DEDGE_KV_SCALAR",),
        "neon": (),
        "dotprod": ("-march=armv8.2-a+dotprod",),
    },
}
OPERATORS_LIBRARY = "edge_kv_onnx"
OPERATORS_LINK = ("-shared", "-pthread")
OPERATORS = ("ops.cpp", "ops_state.cpp", "ops_rows.cpp", "ops_weights.cpp")
KERNELS = (
    "dispatch.cpp",
    "parallel.cpp",
    "expert_bank.cpp",
    "fused.cpp",
    "weights.cpp",
    *OPERATORS,
)
ENGINE = (
    "executorch_adapter.cpp", "fused_operators.cpp", "engine.cpp", "running.cpp", "weight_file.cpp",
)  # fmt: skip
RUNNER = ("run_main.cpp", "manifest.cpp", "snapshot.cpp", "json.cpp", "sha256.cpp")
Unit = tuple[str, str, tuple[str, ...]]  # source, name of its object, flags
_SILENCE = 10.0  # seconds after which a compilation says how far it is
LIBRARIES = (
    "executorch",
    "executorch_kernels_optimized",
    "executorch_kernels_quantized",
    "executorch_backend_xnnpack",
    "executorch_threadpool",
    "executorch_etdump",
)


@cache
def load_library() -> ctypes.CDLL:
    """The engine library, built if this machine has not built it yet.

    Raises:
        RuntimeFault: no executorch wheel, no compiler, or it does not compile.
    """
    wheel = _wheel()
    try:
        library = ctypes.CDLL(str(build_engine(wheel)))
    except OSError as e:
        raise RuntimeFault(f"The ExecuTorch engine library cannot be loaded: {e}") from e
    text, number = ctypes.c_char_p, ctypes.c_int64
    library.edge_kv_open.restype = ctypes.c_void_p
    library.edge_kv_open.argtypes = [
        text, text, ctypes.c_int, ctypes.c_int, text, ctypes.c_int,
    ]  # fmt: skip
    library.edge_kv_close.argtypes = [ctypes.c_void_p]
    library.edge_kv_close.restype = None
    library.edge_kv_describe.restype = number
    library.edge_kv_describe.argtypes = [ctypes.c_void_p, text, number]
    library.edge_kv_buffer.restype = ctypes.c_void_p
    library.edge_kv_buffer.argtypes = [ctypes.c_void_p, text, ctypes.POINTER(number)]
    pointer = ctypes.c_void_p
    library.edge_kv_prefill.argtypes = [
        pointer, pointer, number, number, pointer, text, ctypes.c_int,
    ]  # fmt: skip
    library.edge_kv_decode.argtypes = [
        pointer, pointer, number, number, pointer, pointer, number, text, ctypes.c_int,
    ]  # fmt: skip
    library.edge_kv_load_draft.argtypes = [pointer, text, text, ctypes.c_int]
    library.edge_kv_hidden.argtypes = [pointer, pointer, number, text, ctypes.c_int]
    library.edge_kv_draft.argtypes = [
        pointer, number, number, pointer, pointer, number, pointer, pointer, number, text,
        ctypes.c_int,
    ]  # fmt: skip
    library.edge_kv_isa.restype = text
    return library


def _wheel() -> Path:
    """Where the executorch wheel is installed."""
    try:
        found = version("executorch").split("+")[0]
    except PackageNotFoundError:
        raise RuntimeFault(
            f"The ExecuTorch engine needs executorch {EXECUTORCH}; run: {INSTALL}"
        ) from None
    if found != EXECUTORCH:
        raise RuntimeFault(
            f"The ExecuTorch engine needs executorch {EXECUTORCH}, not {found}; run: {INSTALL}"
        )
    spec = find_spec("executorch")
    places = list(spec.submodule_search_locations or ()) if spec else []
    for place in map(Path, places):
        if (place / "include").is_dir() and (place / "lib").is_dir():
            return place
    raise RuntimeFault(
        f"This executorch has no C++ libraries in it; run: {INSTALL} --force-reinstall"
    )


def build_engine(wheel: Path, machine: str | None = None, installed: Path | None = None) -> Path:
    """The engine library over the wheel's own libraries.

    For another `machine` (see `build_runner`), `installed` is where it has that wheel.
    """
    sources, libraries = _over_wheel(wheel)
    link = ("-shared", *libraries, *((f"-Wl,-rpath,{installed / 'lib'}",) if installed else ()))
    return build("edge_kv", sources, link, suffix=".so", machine=machine)


def build_runner(wheel: Path | None = None, machine: str | None = None) -> Path:
    """`edge-kv-run`, a program that runs an artifact without Python.

    `wheel` and `machine` are those of another CPU when cross-compiling with $CXX: the `executorch`
    folder of its unpacked wheel, and a key of ISAS. The program looks for the wheel's libraries
    there and beside itself.

    Raises:
        RuntimeFault: as `load_library`.
    """
    sources, libraries = _over_wheel(wheel or _wheel())
    link = (*libraries, "-Wl,-rpath,$ORIGIN")
    sources.update(dict.fromkeys(RUNNER, ()))
    return build("edge-kv-run", sources, link, machine=machine)


def _over_wheel(wheel: Path) -> tuple[dict[str, tuple[str, ...]], tuple[str, ...]]:
    """The engine's sources with their flags, and what they link to."""
    include = wheel / "include"
    flags = (
        "-DC10_USING_CUSTOM_GENERATED_MACROS",
        "-DET_EVENT_TRACER_ENABLED",
        "-DET_USE_THREADPOOL",
        "-isystem", str(include),
        "-isystem", str(include / "executorch/runtime/core/portable_type/c10"),
    )  # fmt: skip
    libraries = (
        f"-L{wheel / 'lib'}",
        "-Wl,--no-as-needed",
        *(f"-l{name}" for name in LIBRARIES),
        f"-Wl,-rpath,{wheel / 'lib'}",
    )
    return dict.fromkeys(KERNELS, ()) | dict.fromkeys(ENGINE, flags), libraries


def build_kernels(*extra: str) -> Path:
    """The kernels alone with a C interface, for tests and measurements; no executorch needed."""
    flags = dict.fromkeys((*KERNELS, "kernel_interface.cpp"), extra)
    link = ("-shared", "-pthread", *extra)
    return build("edge_kv_kernels", flags, link, kernel_flags=extra, suffix=".so")


def build_onnx_operators(machine: str | None = None) -> Path:
    """The operators that stand in for the functions of an ONNX program, on any `machine` of ISAS.

    For this machine, the library that was shipped with the package, if one fits.

    Raises:
        RuntimeFault: no compiler, an unknown CPU, or a compiler that refuses.
    """
    shipped = None if machine else _shipped(platform.machine())
    return shipped or build(OPERATORS_LIBRARY, _operators(), OPERATORS_LINK, suffix=".so",
                            machine=machine)  # fmt: skip


def lack_of_onnx_operators() -> str:
    """Why `build_onnx_operators` would find nothing to give, in words; empty where it would try.

    Nothing is compiled for it.
    """
    machine = platform.machine()
    if _shipped(machine):
        return ""
    try:
        _compiler()
        _require_kernels(machine)
    except RuntimeFault as e:
        return str(e)
    return ""


def _operators() -> dict[str, tuple[str, ...]]:
    return dict.fromkeys((*KERNELS, "onnx_adapter.cpp"), ())


def ship(folder: Path) -> list[Path]:
    """Compile the ONNX operators for all machines of SHIPPED_FOR into `folder`, for a wheel.

    Raises:
        RuntimeFault: a compiler is missing or refuses.
    """
    folder.mkdir(exist_ok=True)
    for old in folder.glob(f"{OPERATORS_LIBRARY}-*"):
        old.unlink()
    made = []
    for machine, compiler in SHIPPED_FOR.items():
        link = (*OPERATORS_LINK, *PORTABLE)
        library = build(
            OPERATORS_LIBRARY, _operators(), link, suffix=".so", machine=machine, compiler=compiler
        )
        copy = Path(shutil.copy(library, folder / _shipped_name(machine)))
        write_text(_record(copy), sha256_file(copy))
        made.append(copy)
    return made


def _shipped_name(machine: str) -> str:
    """The file name of shipped operators, which says of what they were made."""
    digest = _digest("", _units(_operators(), machine), (*OPERATORS_LINK, *PORTABLE))
    return f"{OPERATORS_LIBRARY}-{machine}-{digest}.so"


@cache
def _shipped(machine: str) -> Path | None:
    """The shipped operators, if they are of these sources and this system can load them."""
    if machine not in SHIPPED_FOR or sys.platform != "linux":
        return None
    library = SHIPPED / _shipped_name(machine)
    if not _whole(library):
        return None
    try:
        ctypes.CDLL(str(library))
    except OSError as e:
        log.info("The operators of this package cannot be loaded here (%s).", e)
        return None
    return library


_failed: dict[Path, str] = {}  # what could not be built: a process tries once


def build(
    name: str,
    sources: dict[str, tuple[str, ...]],
    link: tuple[str, ...],
    kernel_flags: tuple[str, ...] = (),
    suffix: str = "",
    machine: str | None = None,
    compiler: str = "",
) -> Path:
    """Compile `sources` and kernels.cpp for every instruction set, and link them.

    The file name carries a digest of everything it is made of, so a change builds anew; object
    files are kept likewise, since libraries share most of them. `compiler` is $CXX or the first
    that is found, unless it is named.

    Raises:
        RuntimeFault: no compiler, an unknown CPU, or a compiler that refuses.
    """
    compiler, machine = _compiler(compiler), machine or platform.machine()
    _require_kernels(machine)
    units = _units(sources, machine, kernel_flags)
    folder = cache_folder("native")
    target = folder / f"{name}-{_digest(compiler, units, link)}{suffix}"
    if not _whole(target):
        if target in _failed:
            raise RuntimeFault(_failed[target])
        try:
            with locked(folder / "build.lock"):
                if not _whole(target):
                    _compile(compiler, units, link, target)
        except RuntimeFault as e:
            _failed[target] = str(e)
            raise
        except OSError as e:
            _failed[target] = (
                f"Native code cannot be compiled into {folder} ({e.strerror}); free some space, "
                f"or set {CACHE_VARIABLE} to a directory that can be written."
            )
            raise RuntimeFault(_failed[target]) from e
    require_own(target)
    return target


def _require_kernels(machine: str) -> None:
    if machine not in ISAS:
        raise RuntimeFault(
            f"There are no native kernels for {machine} (only for {', '.join(ISAS)}); "
            "use --engine onnx-stock."
        )


def _units(
    sources: dict[str, tuple[str, ...]], machine: str, kernel_flags: tuple[str, ...] = ()
) -> list[Unit]:
    """What is compiled: the kernels for every instruction set, which take longest, come first."""
    kernels = [
        ("kernels.cpp", f"kernels_{isa}", (f"-DEDGE_KV_ISA={isa}", *flags, *kernel_flags))
        for isa, flags in ISAS[machine].items()
    ]
    return kernels + [(source, name_of(source), flags) for source, flags in sources.items()]


def _whole(target: Path) -> bool:
    """Whether `target` was built and is what the build left: its digest lies beside it."""
    try:
        return _record(target).read_text() == sha256_file(target)
    except OSError:
        return False


def _record(target: Path) -> Path:
    return target.with_name(f"{target.name}.sha256")


def name_of(source: str) -> str:
    return source.removesuffix(".cpp")


def _compile(compiler: str, units: list[Unit], link: tuple[str, ...], target: Path) -> None:
    work = target.with_name(f"{target.name}.build")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        objects = [
            target.with_name(f"{unit[1]}-{_digest(compiler, [unit], ())}.o") for unit in units
        ]
        missing = [(u, o) for u, o in zip(units, objects, strict=True) if not _whole(o)]
        if missing:
            log.info("Compiling native code for this machine, once; this takes up to a minute …")
        said = time.monotonic()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            running = [pool.submit(_compile_unit, compiler, u, work, o) for u, o in missing]
            try:
                for done, task in enumerate(as_completed(running), 1):
                    task.result()
                    if done < len(running) and time.monotonic() - said > _SILENCE:
                        said = time.monotonic()
                        log.info("… %d of %d files are compiled.", done, len(running))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        made = work / target.name
        _run([compiler, "-o", str(made), *map(str, objects), *link], work)
        made.chmod(0o755)
        _keep(made, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _compile_unit(compiler: str, unit: Unit, work: Path, target: Path) -> None:
    source, _, flags = unit
    made = work / target.name
    _run([compiler, *FLAGS, *flags, "-c", str(SOURCES / source), "-o", str(made)], work)
    _keep(made, target)


def _keep(made: Path, target: Path) -> None:
    """Move what was built to `target`, with the record by which `_whole` knows it."""
    write_text(_record(target), sha256_file(made))
    made.replace(target)


def _run(command: list[str], work: Path) -> None:
    """Run a compiler, whose own temporary files lie in `work` too and go with it.

    Raises:
        OSError: the disk of `work` is full.
        RuntimeFault: the compiler refuses.
    """
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        check=False, env={**os.environ, "TMPDIR": str(work), "LC_ALL": "C"},
    )  # fmt: skip
    if done.returncode:
        for code in (errno.ENOSPC, errno.EDQUOT):
            if (reason := os.strerror(code)) in done.stdout:
                raise OSError(code, reason)
        lines = done.stdout.splitlines()
        told = [x for x in lines if any(w in x for w in ("error:", "undefined", "cannot find"))]
        why = (told or lines or ["killed"])[0]
        raise RuntimeFault(
            f"The native code of this engine does not compile: {why}; "
            "use a compiler with C++17 (set CXX), or --engine onnx-stock."
        )


def _compiler(named: str = "") -> str:
    for name in [named] if named else [os.environ.get("CXX"), "g++", "clang++", "c++"]:
        found = shutil.which(name) if name else None
        if found:
            return found
    if named:
        raise RuntimeFault(f"There is no {named}; on Debian and Ubuntu: apt install {named}.")
    raise RuntimeFault(NO_COMPILER)


def _digest(compiler: str, units: list[Unit], link: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for part in (compiler, sys.platform, FLAGS, units, link):
        digest.update(repr(part).encode())
    for path in sorted(SOURCES.iterdir()):
        if path.suffix in (".h", ".cpp"):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def main() -> None:
    """Build edge-kv-run into a directory, or the libraries that wheels bring."""
    parser = argparse.ArgumentParser(prog="python -m edge_kv.runtime.native_library")
    parser.add_argument("folder", type=Path, help="where to put edge-kv-run")
    parser.add_argument(
        "--ship", action="store_true", help="put ONNX operators for every machine there instead"
    )
    parser.add_argument("--machine", choices=sorted(ISAS), help="cross-compile with $CXX")
    parser.add_argument("--wheel", type=Path, help="the executorch folder of that machine's wheel")
    given = parser.parse_args()
    try:
        if given.ship:
            print(*ship(given.folder), sep="\n")
            return
        made = build_runner(given.wheel and given.wheel.resolve(), given.machine)
        print(shutil.copy(made, given.folder / "edge-kv-run"))
    except RuntimeFault as e:
        sys.exit(f"Error: {e}")


if __name__ == "__main__":
    main()
