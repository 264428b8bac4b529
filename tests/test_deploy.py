"""edge-kv deploy: a real ssh server on loopback as the board, a stub adb as the phone.

The server runs as the current user on a free port with keys of its own. What the "board" lacks of
the internet stands in a folder of links to this environment's packages.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from fake_artifact import edit_manifest, write_artifact
from typer.testing import CliRunner

import edge_kv
from edge_kv import devices
from edge_kv.artifact import read_artifact
from edge_kv.bundle import LOADER, RUNNER, write_wheel
from edge_kv.cli import app
from edge_kv.deploy import deploy_to_board
from edge_kv.devices import Ssh, parse_target
from edge_kv.errors import DeployError, ParityError

SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")


# --- the board -----------------------------------------------------------------------------------


@dataclass
class Board:
    """An ssh server whose users see `path` first on their PATH."""

    ssh: str
    path: Path
    login: str = "127.0.0.1"


@pytest.fixture(scope="module")
def board(tmp_path_factory):
    home = tmp_path_factory.mktemp("board")
    for program, package in ((SSHD, "openssh-server"), (shutil.which("ssh"), "openssh-client")):
        if not program:
            pytest.skip(f"the board is an ssh server on this machine; apt install {package}")
    for name in ("host", "user"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(home / name)]
        subprocess.run(command, check=True)
    shutil.copy(home / "user.pub", home / "authorized")
    (home / "bin").mkdir()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    settings = {
        "ListenAddress": "127.0.0.1",
        "Port": port,
        "HostKey": home / "host",
        "AuthorizedKeysFile": home / "authorized",
        "PidFile": "none",
        "StrictModes": "no",
        "UsePAM": "no",
        "PasswordAuthentication": "no",
        "KbdInteractiveAuthentication": "no",
        "SetEnv": f"HOME={home}",  # no start-up files of the user
        "ForceCommand": f"exec sh {home / 'enter'}",  # after whatever the shell sets
    }
    seen = {
        "PATH": f"{home / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": packages(home / "site"),
        "PIP_NO_INDEX": 1,
        "PIP_DISABLE_PIP_VERSION_CHECK": 1,
        "EDGE_KV_CACHE": home / "cache",
        "OMP_NUM_THREADS": 1,
    }
    exports = "".join(f"export {k}='{v}'\n" for k, v in seen.items())
    (home / "enter").write_text(f'{exports}eval "$SSH_ORIGINAL_COMMAND"\n')
    (home / "sshd.conf").write_text("".join(f"{k} {v}\n" for k, v in settings.items()))
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # where a server started by root separates itself
    log = (home / "log").open("wb")
    server = subprocess.Popen([SSHD, "-D", "-e", "-f", str(home / "sshd.conf")], stderr=log)
    try:
        for _ in range(100):
            with socket.socket() as s:
                if s.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert server.poll() is None, (home / "log").read_text()
            time.sleep(0.05)
        known = home / "known"
        key = (home / "host.pub").read_text()
        known.write_text(f"[127.0.0.1]:{port} {key}")
        options = f"-F /dev/null -p {port} -i {home / 'user'} -o UserKnownHostsFile={known}"
        (home / "bin" / "python3").symlink_to(Path(sys.executable).resolve())
        yield Board(f"ssh {options}", home / "bin")
    finally:
        server.terminate()
        server.wait()
        log.close()


def packages(folder: Path) -> Path:
    """Links to everything that is installed here but edge-kv itself."""
    folder.mkdir()
    site = Path(pytest.__file__).parent.parent
    for path in site.iterdir():
        if "edge_kv" not in path.name and path.suffix != ".pth":
            (folder / path.name).symlink_to(path)
    return folder


def deploy(root, board, folder, *args):
    command = ["deploy", str(root), f"{board.login}:{folder}", "--ssh", board.ssh, *args]
    return CliRunner().invoke(app, command)


BENCH = ("--ctx", "16", "--tokens", "4", "--repeats", "1")


def test_a_board_gets_runtime_and_artifact_and_sends_its_measurements(board, tmp_path, compiled):
    compiled(board.path.parent / "cache")
    root, folder = write_artifact(tmp_path / "toy"), tmp_path / "device"
    result = deploy(root, board, folder, *BENCH, "--json", str(tmp_path / "out.json"))
    assert result.exit_code == 0, result.output
    document = json.loads((tmp_path / "out.json").read_text())
    there = folder / "artifacts" / "toy"
    for path in (p for p in root.rglob("*") if p.is_file()):
        assert (there / path.relative_to(root)).read_bytes() == path.read_bytes()
    assert sorted(p.name for p in there.rglob("*.part")) == []
    assert document["copied"]["kept_files"] == 0 and document["installed"]
    assert document["verify"]["onnx"]["passed"] and document["verify"]["onnx"]["steps"] > 0
    assert [r["ctx"] for r in document["bench"]["runs"]] == [16]
    assert document["folder"] == str(folder) and "toy" in result.stdout
    installed = next((folder / "venv" / "lib").glob("python*/site-packages/edge_kv"))
    assert (installed / "runtime" / "session.py").is_file()  # a copy, not this checkout
    code = "import edge_kv.runtime as r, sys; r.load; assert 'torch' not in sys.modules"
    assert not subprocess.run([folder / "venv/bin/python", "-c", code], check=False).returncode

    again = deploy(root, board, folder, "--no-bench", "--json", "-")
    assert again.exit_code == 0, again.output
    document = json.loads(again.stdout)
    assert document["copied"]["files"] == 0 and not document["installed"]
    assert document["bench"] is None


# --- copying, without the runtime ----------------------------------------------------------------


@pytest.fixture(params=["rsync", "pipe"])
def way(request, monkeypatch):
    """Both ways a file travels."""
    if request.param == "pipe":
        monkeypatch.setattr(devices, "_has_rsync", lambda: False)
    else:
        if not devices._has_rsync():
            pytest.skip("files travel as differences where there is rsync; apt install rsync")
    return request.param


@pytest.fixture
def copy(board, monkeypatch):
    """Copy an artifact to a folder and return what `deploy` says of it."""

    def run(root, folder):
        monkeypatch.setattr("edge_kv.deploy._install", lambda *_: False)
        monkeypatch.setattr("edge_kv.deploy._verify", lambda *_: {})
        artifact = read_artifact(root)
        return deploy_to_board(artifact, board.login, str(folder), ssh=board.ssh, bench=None)

    return run


def test_only_what_differs_travels(copy, way, tmp_path):
    root, folder = write_artifact(tmp_path / "toy"), tmp_path / "device"
    first = copy(root, folder)["copied"]
    there = folder / "artifacts" / "toy"
    (there / "ple.bin").write_bytes(b"x" * (there / "ple.bin").stat().st_size)  # same size
    (there / "onnx" / "decode.onnx").unlink()
    stamp = (there / "tokenizer.json").stat().st_mtime_ns
    second = copy(root, folder)["copied"]
    assert first["files"] == second["files"] + second["kept_files"]
    assert second["files"] == 3  # the two, and the manifest: it was away while they came
    assert (there / "ple.bin").read_bytes() == (root / "ple.bin").read_bytes()
    assert (there / "tokenizer.json").stat().st_mtime_ns == stamp
    assert copy(root, folder)["copied"]["files"] == 0


def test_a_copy_that_was_cut_off_goes_on(copy, way, tmp_path, monkeypatch):
    root, folder = write_artifact(tmp_path / "toy"), tmp_path / "device"
    big = os.urandom(3 << 20)
    (root / "big.bin").write_bytes(big)
    files = json.loads((root / "manifest.json").read_text())["files"]
    digest = hashlib.sha256(big).hexdigest()
    edit_manifest(root, files=files | {"big.bin": {"size": len(big), "sha256": digest}})
    there = folder / "artifacts" / "toy"
    there.mkdir(parents=True)
    part = there / f"big.bin.{digest[:12]}.part"
    part.write_bytes(big[: 2 << 20])
    sent = []
    original = Ssh.send

    def noting(self, source, target, held, told):
        seen = []
        original(self, source, target, held, lambda n: (seen.append(n), told(n)))
        if source.name == "big.bin":
            sent.append((held, min(seen), max(seen)))

    monkeypatch.setattr(Ssh, "send", noting)
    copy(root, folder)
    assert (there / "big.bin").read_bytes() == big and not part.exists()
    assert len(sent) == 1 and sent[0][0] == 2 << 20 and sent[0][2] == 3 << 20
    if way == "pipe":
        assert sent[0][1] == 3 << 20  # the first block sent was the last of three


def test_a_copy_that_is_interrupted_leaves_parts_and_goes_on(board, tmp_path, monkeypatch):
    """Ctrl-C in the middle of a file: nothing half-written has its name, and a line says so."""
    root, folder = write_artifact(tmp_path / "toy"), tmp_path / "device"
    there = folder / "artifacts" / "toy"
    monkeypatch.setattr("edge_kv.deploy._install", lambda *_: False)
    monkeypatch.setattr("edge_kv.deploy._verify", lambda *_: {})
    original = Ssh.send

    def send(self, source, target, held, told):
        if source.name == "ple.bin":
            (half := tmp_path / "half").write_bytes(source.read_bytes()[:100])
            original(self, half, target, held, told)
            raise KeyboardInterrupt
        original(self, source, target, held, told)

    with monkeypatch.context() as patch:
        patch.setattr(Ssh, "send", send)
        result = deploy(root, board, folder, "--no-bench")
    assert result.exit_code == 130 and result.stderr.count("\n") == 1, result.output
    assert "The same command goes on where it stopped" in result.stderr
    files = {p.relative_to(there).as_posix() for p in there.rglob("*") if p.is_file()}
    (part,) = {f for f in files if f.endswith(".part")}
    assert part.startswith("ple.bin") and "manifest.json" not in files and len(files) > 1
    for whole in files - {part}:
        assert (there / whole).read_bytes() == (root / whole).read_bytes()
    assert deploy(root, board, folder, "--no-bench", "--json", "-").exit_code == 0
    assert read_artifact(there) and not list(there.rglob("*.part"))


def test_a_beginning_that_is_wrong_is_sent_anew(copy, way, tmp_path):
    root, folder = write_artifact(tmp_path / "toy"), tmp_path / "device"
    there = folder / "artifacts" / "toy"
    there.mkdir(parents=True)
    digest = hashlib.sha256((root / "ple.bin").read_bytes()).hexdigest()
    (there / f"ple.bin.{digest[:12]}.part").write_bytes(b"not the beginning")
    copy(root, folder)
    assert (there / "ple.bin").read_bytes() == (root / "ple.bin").read_bytes()
    assert not list(there.rglob("*.part"))


def test_a_directory_without_its_manifest_is_not_taken_for_whole(copy, way, tmp_path, monkeypatch):
    root, folder = write_artifact(tmp_path / "toy"), tmp_path / "device"
    copy(root, folder)
    there = folder / "artifacts" / "toy"
    (there / "ple.bin").unlink()

    def broken(*_):
        raise DeployError("the connection broke")

    with monkeypatch.context() as patch:
        patch.setattr(Ssh, "send", broken)
        with pytest.raises(DeployError, match="broke"):
            copy(root, folder)
    assert not (there / "manifest.json").exists()
    copy(root, folder)
    assert read_artifact(there)


def test_names_with_spaces_and_quotes(copy, way, tmp_path):
    root = write_artifact(tmp_path / "my 'toy' $x")
    folder = tmp_path / "de vi'ce $y"
    copy(root, folder)
    assert read_artifact(folder / "artifacts" / "my__toy___x")


def test_a_full_disk_is_said_before_and_while(copy, board, tmp_path, monkeypatch):
    root = write_artifact(tmp_path / "toy")
    with monkeypatch.context() as patch:
        patch.setattr("edge_kv.deploy.SPARE_BYTES", 1 << 60)
        with pytest.raises(DeployError, match=r"free in .*are needed; free some"):
            copy(root, tmp_path / "device")
    assert not list((tmp_path / "device").rglob("*.bin"))
    full = board.path / "cat"
    monkeypatch.setattr(devices, "_has_rsync", lambda: False)
    try:
        for said in ("No space left on device", "Disk quota exceeded"):
            full.write_text(f"#!/bin/sh\nhead -c 9 >&-; echo 'cat: {said}' >&2; exit 1\n")
            full.chmod(0o755)
            with pytest.raises(DeployError, match=r"disk of 127.0.0.1 is full \(sending "):
                copy(root, tmp_path / "device")
    finally:
        full.unlink()


# --- boards that do not answer -------------------------------------------------------------------


def test_refusals_say_what_to_do(board, tmp_path):
    root = write_artifact(tmp_path / "toy")
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / "other")], check=True
    )
    mine = board.ssh.split(" -i ")[1].split()[0]
    wrong_key = board.ssh.replace(mine, str(tmp_path / "other")) + " -o IdentitiesOnly=yes"
    unknown = board.ssh.replace("UserKnownHostsFile=", "UserKnownHostsFile=/dev/null -o X=")
    unknown = unknown.split(" -o X=")[0]
    for ssh, words in (
        (wrong_key, "accepts none of your keys: run ssh-copy-id"),
        (unknown, "log in once by hand to accept its host key"),
        (f"{board.ssh} -p 1 -o Port=1", "no ssh server answers there"),
    ):
        if words.startswith("no ssh"):
            ssh = "ssh -F /dev/null -p 1"
        board_there = Board(ssh, board.path)
        result = deploy(root, board_there, tmp_path / "device")
        assert result.exit_code == 1 and result.stderr.count("\n") == 1, result.output
        assert words in result.stderr
    with pytest.raises(DeployError, match="no 'sshx' here"):
        Ssh("127.0.0.1", "sshx")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("exit 127", "has Python"),
        ('case "$*" in *version_info*) echo 3.8.1; exit 1;; esac', "has Python 3.8.1"),
        ('case "$*" in *ensurepip*) exit 1;; esac; echo 3.11.2', "install python3-venv"),
    ],
)
def test_a_board_without_a_fit_python(board, tmp_path, body, words):
    root = write_artifact(tmp_path / "toy")
    python = board.path / "python3"
    kept = python.readlink()
    python.unlink()
    python.write_text(f"#!/bin/sh\n{body}\n")
    python.chmod(0o755)
    try:
        result = deploy(root, board, tmp_path / "device")
    finally:
        python.unlink()
        python.symlink_to(kept)
    assert result.exit_code == 1 and words in result.stderr, result.output


def test_another_result_on_the_board_is_a_parity_error(board, tmp_path, monkeypatch):
    root, folder = write_artifact(tmp_path / "toy"), tmp_path / "device"
    held = json.loads((root / "manifest.json").read_text())["parity"]
    held["onnx"]["verify"]["max_kl"] = 0.0
    edit_manifest(root, parity=held)
    monkeypatch.setattr("edge_kv.deploy._install", lambda *_: False)
    (folder / "venv" / "bin").mkdir(parents=True)
    command = folder / "venv" / "bin" / "edge-kv"
    command.write_text(f"#!/bin/sh\nPYTHONPATH={Path(edge_kv.__file__).parent.parent} "
                       f"exec {sys.executable} -m edge_kv \"$@\"\n")  # fmt: skip
    command.chmod(0o755)
    with pytest.raises(ParityError, match=r"On 127.0.0.1: .*computes something else"):
        deploy_to_board(read_artifact(root), board.login, str(folder), ssh=board.ssh, bench=None)


@pytest.mark.parametrize("text", ["", "pi@", "-oProxyCommand=x", "pi@-x", "pi@host:", "a b", ":x"])
def test_targets_that_name_no_device(text):
    with pytest.raises(DeployError, match="names no device"):
        parse_target(text)


def test_targets():
    assert parse_target("pi") == ("pi", None)
    assert parse_target("pi@raspberrypi.local") == ("pi@raspberrypi.local", None)
    assert parse_target("pi@10.0.0.3:/mnt/a b") == ("pi@10.0.0.3", "/mnt/a b")
    assert parse_target("pi@[fe80::1]:kv") == ("pi@[fe80::1]", "kv")


def test_the_wheel_is_ours_and_the_same_every_time(tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    one, two = write_wheel(tmp_path / "a"), write_wheel(tmp_path / "b")
    assert one.read_bytes() == two.read_bytes()
    with zipfile.ZipFile(one) as wheel:
        names = set(wheel.namelist())
        assert {"edge_kv/cli/run.py", "edge_kv/runtime/native/engine.h"} <= names
        assert "edge_kv/data/tiny/config.json" in names and not [n for n in names if ".pyc" in n]
        info = f"edge_kv-{edge_kv.__version__}.dist-info"
        text = wheel.read(f"{info}/METADATA").decode()
        assert "Requires-Dist: onnxruntime" in text and "extra ==" in text
        listed = [x.split(",")[0] for x in wheel.read(f"{info}/RECORD").decode().splitlines()]
        assert set(listed) == names


# --- the phone -----------------------------------------------------------------------------------

ADB = """#!/bin/sh
# adb as it answers: a folder is the phone.
echo "$@" >> {root}/calls
case "$1" in
devices) printf 'List of devices attached\\n'; cat {root}/phones; exit 0;;
esac
[ "$1" = -s ] || exit 9
shift 2
case "$1" in
shell) shift; cd {root} && exec env PATH={root}/bin:$PATH sh -c "$*";;
push) cp "$2" "$3" && echo "$2: 1 file pushed.";;
esac
"""
LOADER_STUB = """#!/bin/sh
# The loader of the bundle: stands where it is started from, and the runner answers.
[ "$1" = --library-path ] && [ -f "$2/libc.so.6" ] && [ -x "$3" ] || exit 8
shift 3
exec {python} {here}/answer.py "$@"
"""
ANSWER = """
import sys, numpy as np
args = sys.argv[1:]
ids = [int(i) for i in args[args.index("--ids") + 1].split(",")]
count = int(args[args.index("--max-new-tokens") + 1])
with np.load({vectors!r}) as v:
    known = v["ids"].tolist()
    assert ids == known[: len(ids)], "not a prefix of the reference"
    step = len(ids) - int(v["prompt"]) - 1
    choice = int(v["logits"][step].argmax()) + {off}
print(",".join([str(choice)] * count))
print(f"load 0.10 s, prefill {{len(ids) - 1}} tokens 0.20 s, decode {{count}} tokens 0.30 s "
      f"({{count / 0.3:.1f}} tokens/s), neon", file=sys.stderr)
print("VmHWM:\\t    9000 kB\\nRssAnon:\\t    7000 kB\\nRssFile:\\t    2000 kB", file=sys.stderr)
"""


@pytest.fixture
def phone(tmp_path, monkeypatch):
    """A stub adb whose phone is a folder; returns (that folder, how to make its answers wrong)."""
    root = tmp_path / "phone"
    root.mkdir()
    (root / "adb").write_text(ADB.format(root=root))
    (root / "adb").chmod(0o755)
    (root / "phones").write_text("R58M12\tdevice\n")
    monkeypatch.setenv("ADB", str(root / "adb"))
    artifact = executorch_artifact(tmp_path / "toy")
    vectors = str(artifact / "verify.npz")

    def bundle(folder, wheel=None):
        (folder / "lib").mkdir()
        (folder / "lib" / "libc.so.6").write_bytes(b"libc")
        (folder / RUNNER).write_bytes(b"\x7fELF")
        (folder / LOADER).write_text(LOADER_STUB.format(python=sys.executable, here=root))
        return folder

    monkeypatch.setattr("edge_kv.deploy.write_runner", bundle)

    def answers(off=0):
        (root / "answer.py").write_text(ANSWER.format(vectors=vectors, off=off))

    answers()
    return root, artifact, answers


def executorch_artifact(path):
    """A toy artifact that claims programs for ExecuTorch as well."""
    root = write_artifact(path)
    held = json.loads((root / "manifest.json").read_text())
    parts = ("backends", "parity")
    edit_manifest(root, **{p: held[p] | {"executorch": held[p]["onnx"]} for p in parts})
    return root


def to_phone(artifact, folder, *args):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edge_kv.deploy.PHONE_FOLDER", str(folder))
        return CliRunner().invoke(app, ["deploy", str(artifact), "--adb", *args])


def test_a_phone_gets_a_runner_with_its_loader(phone, tmp_path):
    root, artifact, _ = phone
    folder = tmp_path / "data"
    result = to_phone(artifact, folder, "--tokens", "5", "--json", "-")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["device"] == "R58M12"
    assert document["verify"]["executorch"]["top1"] == 1.0
    assert document["bench"]["decode_tokens"] == 5 and document["bench"]["isa"] == "neon"
    assert document["bench"]["memory"] == {
        "VmHWM": 9_216_000, "RssAnon": 7_168_000, "RssFile": 2_048_000,
    }  # fmt: skip
    assert read_artifact(folder / "artifacts" / "toy")
    assert os.access(folder / "runner" / LOADER, os.X_OK)
    calls = (root / "calls").read_text()
    again = to_phone(artifact, folder, "R58M12", "--json", "-")
    assert json.loads(again.stdout)["copied"]["files"] == 0
    assert "push" in calls and "push" not in (root / "calls").read_text()[len(calls) :]


def test_a_phone_that_computes_something_else(phone, tmp_path):
    _, artifact, answers = phone
    answers(off=1)
    result = to_phone(artifact, tmp_path / "data")
    assert result.exit_code == 1
    assert "chooses the reference's id in 0 of" in result.stderr


@pytest.mark.parametrize(
    ("phones", "args", "words"),
    [
        ("", (), "adb sees no phone"),
        ("A\tdevice\nB\tdevice\n", (), "several phones; name one: A, B"),
        ("A\tdevice\n", ("C",), "adb sees no 'C', only A"),
        ("A\tunauthorized\n", (), "is unauthorized; unlock it and allow USB debugging"),
    ],
)
def test_phones_that_cannot_be_used(phone, tmp_path, phones, args, words):
    root, artifact, _ = phone
    (root / "phones").write_text(phones)
    result = to_phone(artifact, tmp_path / "data", *args)
    assert result.exit_code == 1 and words in result.stderr, result.output


def test_no_adb_and_no_target(phone, tmp_path, monkeypatch):
    _, artifact, _ = phone
    monkeypatch.setenv("ADB", "no-such-adb")
    result = to_phone(artifact, tmp_path / "data")
    assert result.exit_code == 1 and "There is no adb here" in result.stderr
    result = CliRunner().invoke(app, ["deploy", str(artifact)])
    assert result.exit_code == 1 and "Name a device" in result.stderr
