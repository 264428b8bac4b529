"""What a device is given beside an artifact: a wheel of this edge-kv, or a runner with its loader.

The wheel is made of the installed package itself, so that a device runs the version that deploys
to it, whether that came from a checkout or from a wheel. The runner bundle is for phones, which
have neither Python nor glibc: `edge-kv-run`, ExecuTorch's libraries, and the C library and loader
of the cross-compiler they were linked with. It is started as

    ./ld-linux-aarch64.so.1 --library-path ./lib ./edge-kv-run ARTIFACT --ids 2,651,9029

A board that shall not compile anything runs it too: `python -m edge_kv.bundle FOLDER` makes it.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import edge_kv
from edge_kv.errors import DeployError, EdgeKVError, RuntimeFault

MACHINE = "aarch64"
PLATFORM = "manylinux_2_28_aarch64"
LOADER = "ld-linux-aarch64.so.1"
RUNNER = "edge-kv-run"
CROSS_COMPILER = "aarch64-linux-gnu-g++"
# What the runner and ExecuTorch's libraries link to, beside each other.
SYSTEM_LIBRARIES = (
    "libc.so.6", "libm.so.6", "libstdc++.so.6", "libgcc_s.so.1", "libdl.so.2", "libpthread.so.0",
    "librt.so.1",
)  # fmt: skip
_DATE = (1980, 1, 1, 0, 0, 0)  # the earliest a zip can say: equal sources make equal wheels


def write_wheel(folder: Path) -> Path:
    """A wheel of the running edge-kv in `folder`: pure Python, the same bytes every time.

    Raises:
        DeployError: edge-kv runs from a bare directory that was never installed.
    """
    try:
        found = distribution("edge-kv")
    except PackageNotFoundError as e:
        raise DeployError(
            "This edge-kv was never installed, so its requirements are not known; "
            "run: pip install . (or pip install -e .)"
        ) from e
    info = f"edge_kv-{edge_kv.__version__}.dist-info"
    files = {name: path.read_bytes() for name, path in _package_files()}
    files[f"{info}/METADATA"] = (
        found.read_text("METADATA") or found.read_text("PKG-INFO") or ""
    ).encode()
    files[f"{info}/entry_points.txt"] = (found.read_text("entry_points.txt") or "").encode()
    files[f"{info}/WHEEL"] = (
        b"Wheel-Version: 1.0\nGenerator: edge-kv\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    )
    record = [f"{name},sha256={_digest(data)},{len(data)}" for name, data in files.items()]
    files[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,", ""]).encode()
    path = folder / f"edge_kv-{edge_kv.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        for name, data in files.items():
            entry = zipfile.ZipInfo(name, _DATE)
            entry.external_attr = 0o644 << 16
            wheel.writestr(entry, data, zipfile.ZIP_DEFLATED)
    return path


def _package_files() -> Iterator[tuple[str, Path]]:
    """Path in a wheel -> file, sorted; the links to export/ and runtime/ are followed."""
    root = Path(edge_kv.__file__).parent
    for folder, folders, names in os.walk(root, followlinks=True):
        folders[:] = sorted(f for f in folders if f != "__pycache__")
        for name in sorted(names):
            path = Path(folder, name)
            if not name.endswith((".pyc", ".part")):
                yield f"edge_kv/{path.relative_to(root).as_posix()}", path


def _digest(data: bytes) -> str:
    """A digest as RECORD writes it."""
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def write_runner(folder: Path, wheel: Path | None = None) -> Path:
    """The runner bundle for a 64-bit ARM phone, made in `folder`; returns `folder`.

    `wheel` is the `executorch` folder of an unpacked aarch64 wheel; left out, pip fetches it once
    into the cache directory. Compiled by $CXX, else by aarch64-linux-gnu-g++.

    Raises:
        DeployError: no cross-compiler with its libraries, or the wheel cannot be fetched.
        RuntimeFault: the runner does not compile.
    """
    from edge_kv.runtime.native_library import build_runner

    compiler = os.environ.get("CXX") or CROSS_COMPILER
    if not shutil.which(compiler):
        raise DeployError(
            f"There is no {compiler} here to compile the runner for a phone; "
            "install it (Debian: apt install g++-aarch64-linux-gnu) or set CXX."
        )
    os.environ["CXX"] = compiler
    wheel = wheel or fetch_executorch()
    program = build_runner(wheel, MACHINE)
    libraries = folder / "lib"
    libraries.mkdir(parents=True, exist_ok=True)
    shutil.copy(program, folder / RUNNER)
    shutil.copy(_system_library(compiler, LOADER), folder / LOADER)
    for path in sorted((wheel / "lib").glob("lib*.so")):
        shutil.copy(path, libraries)
    for name in SYSTEM_LIBRARIES:
        shutil.copy(_system_library(compiler, name), libraries / name)
    return folder


def _system_library(compiler: str, name: str) -> Path:
    """Where the compiler takes a library of its target from."""
    done = subprocess.run(
        [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=False
    )
    path = Path(done.stdout.strip())
    if not path.is_file():
        raise DeployError(f"{compiler} has no {name} for a phone's bundle; install its libraries.")
    return path


def fetch_executorch() -> Path:
    """The `executorch` folder of the aarch64 wheel, downloaded and unpacked once.

    Raises:
        DeployError: pip cannot download it.
    """
    from edge_kv.files import locked
    from edge_kv.runtime.cache import cache_folder
    from edge_kv.runtime.native_library import EXECUTORCH

    home = cache_folder("wheels") / f"executorch-{EXECUTORCH}-{PLATFORM}"
    with locked(home.with_suffix(".lock")):
        if not home.is_dir():
            part = home.with_suffix(".part")
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            done = subprocess.run(
                [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
                 "--only-binary=:all:", "--platform", PLATFORM, "--dest", str(part),
                 f"executorch=={EXECUTORCH}"],
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            found = list(part.glob("*.whl"))
            if done.returncode or not found:
                why = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
                raise DeployError(f"ExecuTorch's libraries cannot be downloaded: {why}")
            with zipfile.ZipFile(found[0]) as archive:
                inside = [n for n in archive.namelist() if n.startswith("executorch/")]
                archive.extractall(part, inside)
            found[0].unlink()
            part.rename(home)
    if not (home / "executorch" / "lib").is_dir():
        raise RuntimeFault(f"{home} holds no libraries; remove it and try again.")
    return home / "executorch"


def main() -> None:
    """Make the runner bundle in a directory."""
    parser = argparse.ArgumentParser(prog="python -m edge_kv.bundle")
    parser.add_argument("folder", type=Path, help="where to put edge-kv-run and its libraries")
    try:
        print(write_runner(parser.parse_args().folder))
    except EdgeKVError as e:
        sys.exit(f"Error: {e}")


if __name__ == "__main__":
    main()
