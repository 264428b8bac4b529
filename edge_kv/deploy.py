"""Deploy: an artifact and the torch-free runtime onto a device, then verified and measured there.

    DIR/artifacts/NAME/    the artifact; its manifest comes last: a directory that has one is whole
    DIR/venv/              a board: Python environment with this edge-kv, no torch in it
    DIR/runner/            a phone: edge-kv-run with its libraries and loader

Files are compared by the digests of the manifest, and only what the device lacks travels. A file
arrives under a name that carries its digest and is renamed when the device has computed that digest
too: what was cut off is taken up where it stopped, and never mistaken for a whole file.
"""

from __future__ import annotations

import json
import posixpath
import re
import shlex
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edge_kv import __version__
from edge_kv.amounts import size
from edge_kv.artifact import MANIFEST, Artifact, sha256_file
from edge_kv.bundle import LOADER, RUNNER, write_runner, write_wheel
from edge_kv.devices import Adb, Device, Ssh, checked, failure
from edge_kv.errors import ArtifactError, Cancelled, DeployError, ParityError
from edge_kv.progress import Progress, Silent

SCHEMA_VERSION = 1
BOARD_FOLDER = "edge-kv"  # below the home directory
PHONE_FOLDER = "/data/local/tmp/edge-kv"
RUNTIME_BYTES = 400 << 20  # a Python environment with onnxruntime and numpy
SPARE_BYTES = 16 << 20
RUNNER_STEPS = 4  # reference steps a phone is asked to repeat; each loads the model anew


@dataclass(frozen=True)
class Item:
    """One file to be on the device: where it is here, where it goes, what it is."""

    source: Path
    target: str
    size: int
    sha256: str


@contextmanager
def _taken_up() -> Iterator[None]:
    """Say of Ctrl-C what becomes of what is on the device."""
    try:
        yield
    except KeyboardInterrupt as e:
        raise Cancelled(
            "Interrupted. The same command goes on where it stopped; until then, files that are "
            "not whole end in .part there."
        ) from e


@_taken_up()
def deploy_to_board(
    artifact: Artifact,
    login: str,
    folder: str | None = None,
    *,
    ssh: str = "ssh",
    engines: Sequence[str] = ("onnx",),
    bench: Sequence[str] | None = (),
    wheels: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Bring `artifact` to the board `login` (user@host) and measure it there; one JSON document.

    `folder` is the directory there, by default edge-kv in the home directory. `bench` are options
    for `edge-kv bench` on the device; None leaves it out. `wheels` is a folder of wheels for the
    device, for one that cannot reach a package index.

    Raises:
        DeployError: the device cannot be reached, has no Python, no room, or a command fails.
        ParityError: the artifact computes something else there.
    """
    progress = progress or Silent()
    for engine in engines:
        artifact.backend(engine)
    progress.stage("connect")
    device = Ssh(login, ssh)
    try:
        root = _make_folder(device, folder or BOARD_FOLDER)
        python = _python(device)
        beside = 0 if _held(device, f"{root}/venv") else RUNTIME_BYTES
        copied = _copy_artifact(device, artifact, root, progress, beside)
        installed = _install(device, root, engines, wheels, progress)
        home = _q(f"{root}/artifacts/{_name(artifact)}")
        command = _q(f"{root}/venv/bin/edge-kv")
        verified = {}
        for engine in engines:
            progress.stage(f"verify {engine}", "steps")
            script = f"{command} verify {home} --engine {_q(engine)} --json"
            verified[engine] = _verify(device, script, artifact)
        measured = None
        if bench is not None:
            progress.stage("bench")
            options = ["--engine", ",".join(engines), *bench, "--json", "-"]
            script = f"{command} bench {home} {shlex.join(options)}"
            measured = _json(device, checked(device, script, "bench"))
        return {
            **_head(artifact, device, root),
            "python": python,
            "copied": copied,
            "installed": installed,
            "verify": verified,
            "bench": measured,
        }
    finally:
        device.close()


@_taken_up()
def deploy_to_phone(
    artifact: Artifact,
    serial: str | None = None,
    folder: str | None = None,
    *,
    tokens: int = 32,
    wheel: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Bring `artifact` and a runner to a phone over adb and run it there; one JSON document.

    The phone has to choose the ids that the stored reference logits choose, and then generates
    `tokens` more, timed by the runner itself. `wheel` as in `bundle.write_runner`.

    Raises:
        DeployError: no phone, no cross-compiler, no room there, or a command fails.
        ParityError: the runner chooses other ids than the reference.
    """
    progress = progress or Silent()
    artifact.backend("executorch")
    progress.stage("connect")
    device = Adb(serial)
    try:
        root = _make_folder(device, folder or PHONE_FOLDER)
        progress.stage("compile")
        with tempfile.TemporaryDirectory() as work:
            bundle = write_runner(Path(work), wheel)
            sources = sorted(p for p in bundle.rglob("*") if p.is_file())
            runner = [
                _item(p, f"{root}/runner/{p.relative_to(bundle).as_posix()}") for p in sources
            ]
            beside = 0 if _held(device, f"{root}/runner") else sum(i.size for i in runner)
            copied = _copy_artifact(device, artifact, root, progress, beside)
            _copy(device, runner, progress)
        programs = " ".join(_q(f"{root}/runner/{name}") for name in (LOADER, RUNNER))
        checked(device, f"chmod 755 {programs}", "making the runner executable")
        progress.stage("verify executorch", "steps")
        run = _Runner(device, root, artifact)
        verified = _verify_runner(run, artifact, progress)
        progress.stage("bench")
        ids, prompt, _ = _vectors(artifact)
        _, measured = run(ids[: prompt + 1].tolist(), tokens)
        return {
            **_head(artifact, device, root),
            "copied": copied,
            "verify": {"executorch": verified},
            "bench": measured,
        }
    finally:
        device.close()


def _head(artifact: Artifact, device: Device, root: str) -> dict[str, Any]:
    system = checked(device, "uname -srm", "uname").strip()
    return {
        "schema_version": SCHEMA_VERSION,
        "edge_kv": __version__,
        "artifact": artifact.manifest.name,
        "device": device.name,
        "system": system,
        "folder": root,
    }


# --- files ---------------------------------------------------------------------------------------


def _name(artifact: Artifact) -> str:
    """The artifact's folder on a device: its own, in characters every shell and disk takes."""
    return re.sub(r"[^\w.-]", "_", artifact.root.resolve().name) or "artifact"


def _make_folder(device: Device, folder: str) -> str:
    """Make `folder` on the device and return its absolute path."""
    where = folder.removeprefix("~/")
    return checked(
        device, f"mkdir -p -- {_q(where)} && cd -- {_q(where)} && pwd", f"making {folder}"
    ).strip()


def _item(source: Path, target: str) -> Item:
    return Item(source, target, source.stat().st_size, sha256_file(source))


def _copy_artifact(
    device: Device, artifact: Artifact, root: str, progress: Progress, beside: int
) -> dict[str, Any]:
    """Every file of the artifact, its manifest last; `beside` bytes must be free besides."""
    home = f"{root}/artifacts/{_name(artifact)}"
    files = artifact.manifest.files
    items = [Item(artifact.path(n), f"{home}/{n}", f.size, f.sha256) for n, f in files.items()]
    manifest = _item(artifact.path(MANIFEST), f"{home}/{MANIFEST}")
    progress.stage("compare")
    lacking = _lacking(device, [*items, manifest])
    new = sum(i.size for i in (*items, manifest)) - _held(device, home)
    _check_room(device, root, max(0, new) + beside)
    if lacking and lacking != [manifest]:  # from here on it is not whole
        checked(device, f"rm -f -- {_q(manifest.target)}", "removing the old manifest")
        lacking = [i for i in lacking if i != manifest] + [manifest]
    _send(device, lacking, progress)
    return {
        "files": len(lacking),
        "bytes": sum(i.size for i in lacking),
        "kept_files": len(items) + 1 - len(lacking),
        "kept_bytes": sum(i.size for i in (*items, manifest) if i not in lacking),
    }


def _copy(device: Device, items: list[Item], progress: Progress) -> None:
    progress.stage("compare")
    _send(device, _lacking(device, items), progress)


def _lacking(device: Device, items: list[Item]) -> list[Item]:
    """The items that the device does not have, or not with these bytes."""
    names = " ".join(_q(i.target) for i in items)
    listed = device.run(f"sha256sum -- {names} 2>/dev/null; true").out
    there = {line[66:]: line[:64] for line in listed.splitlines() if len(line) > 66}
    return [i for i in items if there.get(i.target) != i.sha256]


def _held(device: Device, folder: str) -> int:
    """Bytes a folder holds: files that stay, and older or partial ones that make way."""
    words = device.run(f"du -sk -- {_q(folder)} 2>/dev/null").out.split()
    return int(words[0]) << 10 if words and words[0].isdecimal() else 0


def _check_room(device: Device, root: str, needed: int) -> None:
    out = checked(device, f"df -Pk -- {_q(root)} | tail -n 1", "asking for free space")
    words = out.split()
    free = int(words[3]) << 10 if len(words) > 3 and words[3].isdecimal() else None
    if free is not None and free < needed + SPARE_BYTES:
        raise DeployError(
            f"{device.name} has {size(free)} free in {root}, {size(needed + SPARE_BYTES)} are "
            "needed; free some space there, or name a directory on another disk."
        )


def _send(device: Device, items: list[Item], progress: Progress) -> None:
    """Send `items` in order; each is renamed to its name when the device has its digest."""
    if not items:
        return
    progress.stage("copy")
    held = _make_way(device, items)
    total, done = sum(i.size for i in items), 0
    for item in items:

        def told(count: int, before: int = done, name: str = item.source.name) -> None:
            progress.advance(name, before + count, total)

        device.send(item.source, _part(item), held[item], told)
        if not _finish(device, item):  # what was there was not a beginning of it
            device.send(item.source, _part(item), 0, told)
            if not _finish(device, item):
                raise DeployError(
                    f"{item.source} arrives changed on {device.name}, twice; "
                    "check its disk, and the artifact with `edge-kv verify`."
                )
        done += item.size
        progress.advance(item.source.name, done, total)


def _part(item: Item) -> str:
    """Its name until it is whole; of another content, another one."""
    return f"{item.target}.{item.sha256[:12]}.part"


def _make_way(device: Device, items: list[Item]) -> dict[Item, int]:
    """Make the folders, move older versions out of the way: bytes that each new file has.

    Where only differences travel, an older version is what the new one begins with.
    """
    folders = sorted({posixpath.dirname(i.target) for i in items})
    lines = [f"mkdir -p -- {' '.join(map(_q, folders))} || exit"]
    for item in items:
        old, new = _q(item.target), _q(_part(item))
        away = f"[ -e {new} ] || mv -f -- {old} {new}" if device.deltas else f"rm -f -- {old}"
        lines.append(f"{{ {away}; }} 2>/dev/null; wc -c < {new} 2>/dev/null || echo 0")
    counts = checked(device, "\n".join(lines), "making folders").split()
    sizes = {i: int(n) for i, n in zip(items, counts, strict=True)}
    return {i: n if n <= i.size else 0 for i, n in sizes.items()}


def _finish(device: Device, item: Item) -> bool:
    """Rename a file that the device finds whole; remove one that is not."""
    part, name = _q(_part(item)), _q(item.target)
    script = (
        f'if [ "$(sha256sum -- {part} | cut -c -64)" != {_q(item.sha256)} ]; then\n'
        f"rm -f -- {part}; exit 0; fi\n"
        f"mv -f -- {part} {name} && echo whole"
    )
    return "whole" in checked(device, script, f"renaming {item.source.name}")


# --- a board: Python -----------------------------------------------------------------------------

# Exit status of the check -> what is wrong.
_NO_PYTHON, _OLD_PYTHON, _NO_VENV = 10, 11, 12
_PYTHON_CHECK = f"""
command -v python3 >/dev/null || exit {_NO_PYTHON}
python3 -c 'import sys; print(sys.version.split()[0]); sys.exit(sys.version_info < (3, 11))' ||
    exit {_OLD_PYTHON}
python3 -c 'import ensurepip, venv' 2>/dev/null || exit {_NO_VENV}
"""


def _python(device: Device) -> str:
    """The version of the device's Python, which must be able to make environments."""
    done = device.run(_PYTHON_CHECK)
    wrong = {
        _NO_PYTHON: "has no python3; install it there: sudo apt install python3-venv",
        _OLD_PYTHON: f"has Python {done.out.strip()}, edge-kv needs 3.11 or newer; "
        "update its system",
        _NO_VENV: "cannot make Python environments; install there: sudo apt install python3-venv",
    }.get(done.status)
    if wrong:
        raise DeployError(f"{device.name} {wrong}.")
    if done.status:
        raise failure(device, done, "looking for Python")
    return done.out.strip()


def _install(
    device: Device, root: str, engines: Sequence[str], wheels: Path | None, progress: Progress
) -> bool:
    """This edge-kv in DIR/venv, and what `engines` need; False when it was there already."""
    from edge_kv.runtime.native_library import EXECUTORCH

    progress.stage("install")
    with tempfile.TemporaryDirectory() as work:
        wheel = _item(path := write_wheel(Path(work)), f"{root}/wheels/{path.name}")
        extra = [f"executorch=={EXECUTORCH}"] if "executorch" in engines else []
        want = " ".join([wheel.sha256, *extra])
        python, stamp = f"{root}/venv/bin/python", _q(f"{root}/venv/edge-kv.stamp")
        if device.run(f"{_q(python)} -c '' && cat {stamp}").out == want:
            return False
        given = [wheel]
        if wheels:
            given += [_item(p, f"{root}/wheels/{p.name}") for p in sorted(wheels.glob("*.whl"))]
        _copy(device, given, progress)
    progress.stage("install")
    here = f"{_q(python)} -c 'import edge_kv, pip'"
    update = not device.run(f"rm -f {stamp}; {here} 2>/dev/null").status
    if not update:  # nothing yet, or cut off
        checked(device, f"python3 -m venv --clear {_q(root + '/venv')}", "python3 -m venv")
    pip = f"{_q(python)} -m pip install --quiet --disable-pip-version-check"
    if wheels:
        pip += f" --no-index --find-links {_q(root + '/wheels')}"
    if update:  # pip takes an equal version for the same
        checked(device, f"{pip} --force-reinstall --no-deps {_q(wheel.target)}", "pip install")
    checked(device, f"{pip} {_q(wheel.target)}", "pip install")
    if extra:
        checked(device, f"{pip} --no-deps {_q(extra[0])}", "pip install executorch")
    checked(device, f"printf %s {_q(want)} > {stamp}", "noting what is installed")
    return True


def _verify(device: Device, script: str, artifact: Artifact) -> dict[str, Any]:
    done = device.run(script)
    if done.status and not done.out.strip().startswith("{"):
        raise failure(device, done, "verify")
    result = _json(device, done.out)
    if not result.get("passed"):
        words = done.last_words.removeprefix("Error: ")
        raise ParityError(f"On {device.name}: {words}")
    return {**result, "artifact": artifact.manifest.name}


def _json(device: Device, text: str) -> dict[str, Any]:
    try:
        document = json.loads(text)
    except ValueError:
        document = None
    if not isinstance(document, dict):
        line = (text.strip().splitlines() or ["nothing"])[-1]
        raise DeployError(
            f"{device.name} answers with something that is not JSON ({line[:80]!r}); "
            "its login scripts must print nothing."
        )
    return document


# --- a phone: edge-kv-run ------------------------------------------------------------------------

_TIMES = re.compile(
    r"load (?P<load>[\d.]+) s, prefill (?P<prompt>\d+) tokens (?P<prefill>[\d.]+) s, "
    r"decode (?P<made>\d+) tokens (?P<decode>[\d.]+) s .*, (?P<isa>\w+)$",
    re.MULTILINE,
)
_HELD = re.compile(r"^(VmHWM|RssAnon|RssFile):\s+(\d+) kB$", re.MULTILINE)


class _Runner:
    """edge-kv-run on a device: ids in, ids and what they cost out."""

    def __init__(self, device: Device, root: str, artifact: Artifact) -> None:
        self._device = device
        self._start = (
            f"cd -- {_q(root + '/runner')} && "
            f"./{LOADER} --library-path ./lib ./{RUNNER} {_q(f'../artifacts/{_name(artifact)}')}"
        )

    def __call__(self, ids: list[int], count: int) -> tuple[list[int], dict[str, Any]]:
        script = f"{self._start} --ids {','.join(map(str, ids))} --max-new-tokens {count}"
        done = self._device.run(script)
        if done.status:
            raise failure(self._device, done, "edge-kv-run")
        said = done.out + done.err  # older adb puts both into one
        line = next((x for x in done.out.splitlines() if re.fullmatch(r"\d+(,\d+)*", x)), "")
        times = _TIMES.search(said)
        if not line or not times:
            raise DeployError(
                f"edge-kv-run on {self._device.name} answers {done.last_words!r}, not token ids; "
                "remove its folder there and deploy again."
            )
        cost: dict[str, Any] = {
            "load_seconds": float(times["load"]),
            "prefill_tokens": int(times["prompt"]),
            "prefill_seconds": float(times["prefill"]),
            "decode_tokens": int(times["made"]),
            "decode_seconds": float(times["decode"]),
            "isa": times["isa"],
            "memory": {name: 1024 * int(kb) for name, kb in _HELD.findall(said)},
        }
        return [int(i) for i in line.split(",")], cost


def _verify_runner(
    run: Callable[[list[int], int], tuple[list[int], Any]], artifact: Artifact, progress: Progress
) -> dict[str, Any]:
    """Have the runner choose ids after prefixes of the reference's; it must agree with its logits.

    Raises:
        ParityError: it agrees less often than the manifest asks for.
    """
    ids, prompt, logits = _vectors(artifact)
    steps = np.unique(np.linspace(0, len(logits) - 1, RUNNER_STEPS).astype(int)).tolist()
    right = 0
    for i, step in enumerate(steps):
        chosen, _ = run(ids[: prompt + step + 1].tolist(), 1)
        right += chosen == [int(np.argmax(logits[step]))]
        progress.advance("steps", i + 1, len(steps))
    limit = float(artifact.parity("executorch")["verify"]["min_top1"])
    result = {"steps": len(steps), "top1": right / len(steps), "limit_top1": limit}
    if result["top1"] < limit:
        raise ParityError(
            f"edge-kv-run chooses the reference's id in {right} of {len(steps)} steps "
            f"(limit {limit:.0%}): {artifact.root} computes something else on that device."
        )
    return {**result, "passed": True}


def _vectors(artifact: Artifact) -> tuple[Any, int, Any]:
    """Ids, prompt length and reference logits of the ExecuTorch programs."""
    name = str(artifact.parity("executorch").get("vectors"))
    if name not in artifact.manifest.files:
        raise ArtifactError(f"{artifact.root} holds no reference vectors to verify; export again.")
    try:
        with np.load(artifact.path(name), allow_pickle=False) as arrays:
            return arrays["ids"], int(arrays["prompt"]), arrays["logits"]
    except (KeyError, ValueError, OSError, zipfile.BadZipFile) as e:
        raise ArtifactError(
            f"The reference vectors of {artifact.root} cannot be read ({e}); export again."
        ) from e


def _q(text: str) -> str:
    return shlex.quote(text)
