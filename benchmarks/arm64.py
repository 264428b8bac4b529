"""What runs on a 64-bit ARM board: parity, tokens and memory there, and the commands of its guide.

Boots the virtual machine of arm64_vm.py as a Cortex-A76 and as a Cortex-A72 with an installed
runtime on its disk, and runs every engine under a hard memory limit: the Python runtime on
onnxruntime, with and without native operators, and on ExecuTorch, over every artifact named; and
edge-kv-run, over the first, in a directory that holds nothing but its bundle. An emulated compiler
takes many minutes, so the native libraries are cross-compiled here and handed out there by what
stands for a compiler. With `--guide`, boots an empty Cortex-A76 that has a real one instead and
runs the commands of docs/raspberry-pi.md as they stand there, all but the export. Times are those
of an emulator and not kept.

    python benchmarks/arm64.py artifacts/tiny artifacts/tiny-int8 artifacts/tiny-float \\
        --result arm64_vm
    python benchmarks/arm64.py artifacts/tiny --guide --result arm64_guide
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from arm64_vm import COMPILER, CPUS, USER, Machine, missing_tools
from common import run_main, say, write_result

from edge_kv.artifact import Artifact, read_artifact
from edge_kv.bundle import LOADER, MACHINE, RUNNER, fetch_executorch, write_runner, write_wheel
from edge_kv.errors import ConfigError, ParityError, RuntimeFault
from edge_kv.runtime import native_library

ROOT = Path(__file__).parent.parent
GUIDE = ROOT / "docs" / "raspberry-pi.md"
NAME = "tiny-2048"  # what the guide calls the artifact
SUITE, PYTHON = "trixie", "313"  # what Raspberry Pi OS is made of
GUIDED = ("desktop", "board", "desktop, runner", "board, runner", "board, executorch",
          "desktop, by hand", "board, by hand", "board, limits")  # fmt: skip
PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux2014_aarch64",
             "manylinux_2_17_aarch64")  # fmt: skip
ENGINES = ("onnx", "onnx-stock", "executorch")  # of the Python runtime
SITE = f"edge-kv/venv/lib/python{PYTHON[0]}.{PYTHON[1:]}/site-packages"  # of the user's home
TOKENS = 30
PYTHON_LIMIT, RUNNER_LIMIT = 160 << 20, 32 << 20
KILLED_LIMIT = 32 << 20  # a process that takes twice as much has to be killed
CHECKOUT = ("edge_kv", "export", "runtime", "pyproject.toml", "README.md", "LICENSE")
# Run on the board, a process for every engine: parity, then tokens, of every artifact.
_CHECK = """
import dataclasses, json
from edge_kv.runtime import generate, load, read_memory
from edge_kv.runtime.verify import verify
found = {{}}
for name in {names}:
    with load("artifacts/" + name, {engine!r}, threads=2) as session:
        parity = verify(session)
        session.reset()
        ids = list(generate(session, {prompt}, max_new_tokens={tokens}, stop=()))
        native = getattr(session, "operators", None) is not None
    found[name] = dict(verify=dict(dataclasses.asdict(parity), passed=parity.passed), ids=ids,
                       native=native)
print(json.dumps(dict(found=found, peak=read_memory().peak)))
"""
# Stands for a compiler: gives out what was cross-compiled of the same sources.
_COMPILER = """#!/bin/sh
while [ "$1" != -o ]; do shift; done
case $2 in *.o) : > "$2" ;; *) name=${2##*/}; cp "${0%/*}/${name%-*}.so" "$2" ;; esac
"""
_BLOCK = re.compile(r"<!-- run: ([\w, ]+) -->\n```sh\n(.*?)^```", re.DOTALL | re.MULTILINE)


def main() -> None:
    args = _arguments()
    lacking = missing_tools()
    if lacking:
        raise ConfigError(f"{', '.join(lacking)} is missing; see the head of arm64_vm.py.")
    artifacts = [read_artifact(path) for path in args.artifact]
    cache = args.cache.expanduser()
    with tempfile.TemporaryDirectory() as folder:
        desk = Path(folder)
        run = _guide if args.guide else _boards
        content = {
            "artifacts": {
                a.root.name: {"model": a.manifest.made["model"]["type"], "ctx": a.plan.ctx,
                              "quant": a.manifest.quant.scheme, "kv": a.plan.kv}
                for a in artifacts
            },
            "emulator": "qemu-system-aarch64: correctness and memory, never speed",
            **run(desk, artifacts, cache, args.memory),
        }  # fmt: skip
    if args.result:
        write_result(args.result, content)
    else:
        print(json.dumps(content, indent=1))


def _boards(desk: Path, artifacts: list[Artifact], cache: Path, memory: str) -> dict[str, Any]:
    """Every engine on both CPUs."""
    expected = _expected(artifacts)
    home, found = desk / "home", wheels(cache, PYTHON)
    write_runner(home / "bundle")  # from here on, $CXX is the cross-compiler
    _cross_compile(home / "compiler")
    install(home, found)
    for artifact in artifacts:
        shutil.copytree(artifact.root, home / "edge-kv" / "artifacts" / artifact.root.name)
    machine = Machine(cache, cache / "work", SUITE, memory, found, home)
    boards = []
    for cpu in CPUS:
        with machine.on(cpu) as board:
            say(f"{cpu} is up ({SUITE})")
            boards.append({**_facts(board), **_limited(board, artifacts, expected)})
    say("parity holds on both, within their limits")
    return {"compiled": "here, by a cross-compiler", "boards": boards}


def _cross_compile(folder: Path) -> None:
    """The board's native libraries, and in `folder`/g++ what hands them out there."""
    folder.mkdir()
    there = Path("/home", USER, SITE, "executorch")
    for name, made in (
        ("edge_kv_onnx", native_library.build_onnx_operators(MACHINE)),
        ("edge_kv", native_library.build_engine(fetch_executorch(), MACHINE, there)),
    ):
        shutil.copy(made, folder / f"{name}.so")
    (folder / "g++").write_text(_COMPILER)
    (folder / "g++").chmod(0o755)


def _guide(desk: Path, artifacts: list[Artifact], cache: Path, memory: str) -> dict[str, Any]:
    """Every command of the guide, on a board that has nothing yet but its system."""
    shutil.copytree(artifacts[0].root, desk / NAME)
    for name in CHECKOUT:
        (desk / name).symlink_to(ROOT / name)
    blocks, commands = guide_blocks(), []
    machine = Machine(cache, cache / "work", SUITE, memory, wheels(cache, PYTHON), more=COMPILER)
    with machine.on(CPUS[0]) as board:
        say(f"{board.cpu} is up ({SUITE})")
        for where in GUIDED:
            run = _on_desktop if where.startswith("desktop") else _on_board
            commands += run(board, desk, blocks[where])
        compiled = board.checked("cd .cache/edge-kv/native; ls *.so").split()
        return {
            "board": {**_facts(board), "compiler": board.checked("g++ --version").split("\n")[0]},
            "compiled": sorted(name.rpartition("-")[0] for name in compiled),
            "commands": commands,
        }


def guide_blocks() -> dict[str, str]:
    """Where a block of the guide is run -> its commands."""
    blocks: dict[str, str] = {}
    for where, text in _BLOCK.findall(GUIDE.read_text(encoding="utf-8")):
        blocks[where] = blocks.get(where, "") + text
    return blocks


def wheels(cache: Path, python: str) -> Path:
    """Wheels of the runtime's requirements and executorch for aarch64, downloaded once."""
    from importlib.metadata import requires

    folder = cache / f"wheels-{python}"
    if folder.is_dir():
        return folder
    needed = [r for r in requires("edge-kv") or () if "extra ==" not in r]
    part = folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for options in (needed, ["--no-deps", f"executorch=={native_library.EXECUTORCH}"]):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(part),
                   "--only-binary=:all:", "--python-version", python]  # fmt: skip
        platforms = [word for p in PLATFORMS for word in ("--platform", p)]
        done = subprocess.run(
            [*command, *platforms, *options], capture_output=True, text=True, check=False
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
            raise RuntimeFault(f"The wheels for the board cannot be downloaded: {last}")
    part.rename(folder)
    return folder


def install(home: Path, found: Path) -> None:
    """Fill `home` as `edge-kv deploy` leaves it, made here: the environment is only files."""
    environment = home / "edge-kv" / "venv"
    (environment / "bin").mkdir(parents=True)
    (environment / "pyvenv.cfg").write_text("home = /usr/bin\n")
    (environment / "bin" / "python").symlink_to("/usr/bin/python3")
    command = environment / "bin" / "edge-kv"
    command.write_text('#!/bin/sh\nexec "${0%/*}/python" -m edge_kv "$@"\n')
    command.chmod(0o755)
    for wheel in (write_wheel(home), *sorted(found.glob("*.whl"))):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(home / SITE)


def _desk(work: Path, config: Path) -> dict[str, str]:
    """The environment of the desktop's commands: this Python's, and an ssh that knows the board."""
    tools = work / "tools"
    tools.mkdir(exist_ok=True)
    for name in ("ssh", "scp"):
        (tools / name).write_text(f'#!/bin/sh\nexec /usr/bin/{name} -F {config} "$@"\n')
        (tools / name).chmod(0o755)
    for name, module in (("edge-kv", "edge_kv"), ("python3", "")):
        words = f"{sys.executable} {'-m ' + module if module else ''}"
        (tools / name).write_text(f'#!/bin/sh\nexec {words} "$@"\n')
        (tools / name).chmod(0o755)
    return {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}


def _on_desktop(board: Machine, desk: Path, script: str) -> list[dict[str, Any]]:
    """Run the desktop's commands of the guide here, but for an export of what is there already.

    `desk` holds the artifact and, beside it, what a checkout needs to make a wheel.
    """
    ran = []
    for line in script.splitlines():
        skipped = line.startswith("edge-kv export")
        if not skipped:
            say(f"desktop: {line}")
            done = subprocess.run(
                line, shell=True, cwd=desk, env=_desk(desk, board.ssh_config),
                stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
            )  # fmt: skip
            if done.returncode:
                raise RuntimeFault(f"{line!r} ended with: {done.stderr.strip()[-500:]}")
        ran.append({"on": "desktop", "command": line, "run": not skipped})
    return ran


def _on_board(board: Machine, _: Path, script: str) -> list[dict[str, Any]]:
    """Run a block of the guide there, as one shell of the user's."""
    say(f"{board.cpu}: {'; '.join(script.splitlines())}")
    board.checked(f"set -e\n{script}")
    return [{"on": "board", "command": line, "run": True} for line in script.splitlines()]


def _facts(board: Machine) -> dict[str, Any]:
    """What the board is: CPU, kernel, memory and the versions installed by the guide."""
    lines = board.checked(
        "uname -srm; sed -n 's/^CPU part.*: //p' /proc/cpuinfo | head -n 1; "
        "sed -n 's/^MemTotal: *//p' /proc/meminfo; "
        "edge-kv/venv/bin/python -c 'import platform, importlib.metadata as m; "
        'print(platform.python_version(), m.version("numpy"), m.version("onnxruntime"), '
        'not any(d.name == "torch" for d in m.distributions()))\''
    ).splitlines()
    python, numpy_version, onnxruntime, torch_free = lines[3].split()
    return {
        "cpu": board.cpu,
        "cpu_part": lines[1],
        "system": f"Debian {board.suite}, {lines[0]}",
        "memory_kb": int(lines[2].split()[0]),
        "versions": {"python": python, "numpy": numpy_version, "onnxruntime": onnxruntime},
        "without_torch": torch_free == "True",
    }


def _limited(board: Machine, artifacts: list[Artifact], expected: dict[str, Any]) -> dict[str, Any]:
    """Every engine under memory.max: parity, tokens beside x86's, and the group's peak."""
    say(f"{board.cpu}: under memory.max")
    kill, killed = board.capped(f"python3 -c 'bytearray({2 * KILLED_LIMIT})'", KILLED_LIMIT)
    if not killed["oom_kills"] or not kill.status:
        raise RuntimeFault(f"A limit of {KILLED_LIMIT} bytes kills nothing; it is not in force.")
    engines = {engine: _python(board, engine, artifacts, expected) for engine in ENGINES}
    return {"engines": {**engines, RUNNER: _runner(board, artifacts[0], expected)}}


def _python(
    board: Machine, engine: str, artifacts: list[Artifact], expected: dict[str, Any]
) -> dict[str, Any]:
    """One engine of the Python runtime, over all artifacts in one process."""
    home = f"/home/{USER}"
    script = _CHECK.format(names=[a.root.name for a in artifacts], engine=engine,
                           prompt=expected["prompt"], tokens=TOKENS)  # fmt: skip
    done, group = board.capped(
        f"cd edge-kv; CXX={home}/compiler/g++ exec venv/bin/python -c {shlex.quote(script)}",
        PYTHON_LIMIT,
    )
    if done.status or group["oom_kills"]:
        raise RuntimeFault(f"{board.cpu}: {engine} ended with {done.status}: {done.err[-500:]}")
    result = json.loads(done.out)
    for name, found in result["found"].items():
        if not found["verify"]["passed"]:
            raise ParityError(f"{board.cpu}: {engine} is beyond {name}'s limits: {found}")
        if found.pop("native") != (engine == "onnx"):
            raise RuntimeFault(f"{board.cpu}: {engine} ran {name} with the wrong operators.")
        found["tokens"] = _agreement(found.pop("ids"), expected[engine, name])
    return {"artifacts": result["found"], "vm_hwm": result["peak"], "group": group}


def _runner(board: Machine, artifact: Artifact, expected: dict[str, Any]) -> dict[str, Any]:
    """edge-kv-run in a root directory of its own: the bundle, the artifact, /proc and /sys."""
    empty = "/empty"
    home = f"/home/{USER}"
    board.checked(
        f"cp -r {home}/bundle {empty}; mkdir {empty}/proc {empty}/sys; "
        f"mount -t proc none {empty}/proc; mount -t sysfs none {empty}/sys; "
        f"cp -r {home}/edge-kv/artifacts/{artifact.root.name} {empty}/artifact",
        "root",
    )

    def run(ids: list[int], count: int) -> tuple[list[int], dict[str, Any], str]:
        done, group = board.capped(
            f"exec chroot {empty} ./{LOADER} --library-path ./lib ./{RUNNER} artifact "
            f"--ids {','.join(map(str, ids))} --max-new-tokens {count} --threads 2",
            RUNNER_LIMIT,
            user="root",
        )
        if done.status or group["oom_kills"]:
            raise RuntimeFault(f"{board.cpu}: {RUNNER} ended with {done.status}: {done.err}")
        return [int(i) for i in done.out.strip().split(",")], group, done.err

    chosen, group, said = run(expected["prompt"], TOKENS)
    vectors = expected["vectors"]
    right = sum(
        run(vectors["ids"][: vectors["prompt"] + step + 1], 1)[0] == [vectors["choices"][step]]
        for step in vectors["steps"]
    )
    board.checked(f"umount {empty}/proc {empty}/sys; rm -rf {empty}", "root")
    if right < len(vectors["steps"]) * vectors["min_top1"]:
        raise ParityError(f"{board.cpu}: {RUNNER} chooses the reference's id {right} times.")
    return {
        "artifact": artifact.root.name,
        "reference_steps": len(vectors["steps"]),
        "reference_top1": right / len(vectors["steps"]),
        "tokens": _agreement(chosen, expected["executorch", artifact.root.name]),
        "isa": said.strip().splitlines()[0].rpartition(", ")[2],
        "memory": reported(said),
        "group": group,
    }


def reported(said: str) -> dict[str, int]:
    """Bytes of memory by the kernel's name, from what edge-kv-run says at its end."""
    held = re.findall(r"(VmHWM|RssAnon|RssFile):\s+(\d+) kB", said)
    return {name: 1024 * int(kb) for name, kb in held}


def _agreement(here: list[int], there: list[int]) -> dict[str, int]:
    """How many tokens were made, and how many are x86's before the first that is not."""
    pairs = zip(here, there, strict=False)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(here))
    return {"made": len(here), "equal_to_x86_64": same}


def _expected(artifacts: list[Artifact]) -> dict[Any, Any]:
    """The same tokens on this machine, and the reference's choices at some steps of the first."""
    from edge_kv.runtime import generate, load

    parity = artifacts[0].parity("executorch")
    with np.load(artifacts[0].path(parity["vectors"])) as arrays:
        ids, prompt, logits = arrays["ids"].tolist(), int(arrays["prompt"]), arrays["logits"]
    made: dict[Any, Any] = {}
    for engine in ENGINES:
        for artifact in artifacts:
            with load(artifact, engine, threads=2, cache=False) as session:
                made[engine, artifact.root.name] = list(
                    generate(session, ids[: prompt + 1], max_new_tokens=TOKENS, stop=())
                )
    return {
        **made,
        "prompt": ids[: prompt + 1],
        "vectors": {
            "ids": ids,
            "prompt": prompt,
            "choices": logits.argmax(-1).tolist(),
            "steps": np.unique(np.linspace(0, len(logits) - 1, 4).astype(int)).tolist(),
            "min_top1": float(parity["verify"]["min_top1"]),
        },
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("artifact", type=Path, nargs="+", help="tiny, exported for both backends")
    parser.add_argument("--cache", type=Path, default=Path("~/.cache/edge-kv/arm64"))
    parser.add_argument("--memory", default="4G", help="the board's RAM")
    parser.add_argument("--guide", action="store_true", help="run the guide's commands instead")
    parser.add_argument("--result", default="", help="name in results/; left out, print it")
    return parser.parse_args()


if __name__ == "__main__":
    run_main(main)
