"""Downloads from a hub on loopback: what is asked for, what is refused, what is taken up again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hub_server import GATED, NO_REPO, serving
from huggingface_hub import constants

from edge_kv import models
from edge_kv.errors import WeightsError
from edge_kv.weights import hub as hub_module
from edge_kv.weights.hub import download, is_hub_id

TINY = Path(str(models.get_row("tiny").weights))


def tiny_files() -> dict[str, bytes]:
    files = {p.name: p.read_bytes() for p in TINY.iterdir() if p.is_file()}
    return {**files, "README.md": b"read me", "onnx/model.safetensors": b"another format"}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with serving({"org/tiny": tiny_files(), "org/gguf": {"m.gguf": b"GGUF", "a.txt": b""}}) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub_module, "_PAUSE", 0.0)
        # The client waits between its own attempts, 23 s in all where a hub is down.
        hurried = SimpleNamespace(**{**vars(time), "sleep": lambda _: None})
        monkeypatch.setattr("huggingface_hub.utils._http.time", hurried)
        monkeypatch.setenv("HF_TOKEN", "")
        yield hub


class Told:
    def __init__(self):
        self.stages, self.steps = [], []

    def stage(self, name):
        self.stages.append(name)

    def advance(self, what, done, total):
        self.steps.append((what, done, total))


def test_what_is_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    assert is_hub_id("org/tiny") and is_hub_id("google/gemma-3-270m-it")
    for other in ("models/mine", "random", "random:3", "a/b/c", "/abs/dir", "dir/model.gguf"):
        assert not is_hub_id(other)


def test_a_checkpoint_is_what_lies_at_the_top(hub):
    told = Told()
    root = download("org/tiny", progress=told)
    wanted = {n for n in tiny_files() if n.endswith((".json", ".jinja", ".safetensors"))}
    assert {p.name for p in root.iterdir()} == wanted - {"onnx/model.safetensors"}
    for name in (p.name for p in root.iterdir()):
        assert (root / name).read_bytes() == (TINY / name).read_bytes()
    total = sum(p.stat().st_size for p in root.iterdir())
    assert told.stages == ["download"] and told.steps[-1][1:] == (total, total)
    assert [done for _, done, _ in told.steps] == sorted(done for _, done, _ in told.steps)
    hub.asked.clear()
    assert download("org/tiny") == root
    assert not any("GET" in a and "/resolve/" in a for a in hub.asked)  # all of it is held


def test_a_plan_needs_the_config_alone(hub):
    root = download("org/tiny", config_only=True)
    assert [p.name for p in root.iterdir()] == ["config.json"]
    with pytest.raises(WeightsError, match=r"holds a GGUF file and no config.json.*m\.gguf"):
        download("org/gguf", config_only=True)


def test_revisions(hub):
    assert download("org/tiny", "v1") == download("org/tiny")
    with pytest.raises(WeightsError, match=r"no revision 'v7'.*--revision.*/commits/main"):
        download("org/tiny", "v7")


def test_a_repository_of_one_gguf(hub):
    assert download("org/gguf").read_bytes() == b"GGUF"
    hub.repositories["org/gguf"] |= {"mmproj-m.gguf": b"GGUF", "n.gguf": b"GGUF"}
    with pytest.raises(WeightsError, match=r"2 GGUF models \(m.gguf, n.gguf\)"):
        download("org/gguf")


REFUSED = {
    "gated, no token": (401, GATED, r"gated: accept its licence at .*/org/tiny, then set a token"),
    "gated, not granted": (403, GATED, r"gated: accept its licence at .*/org/tiny"),
    "a token without the right": (403, {}, r"token may not read org/tiny.*settings/tokens"),
    "a private name": (401, NO_REPO, r"no repository 'org/tiny' that is open to you; check"),
    "not there": (404, NO_REPO, r"no repository 'org/tiny' that is open to you; check"),
    "a wrong token": (
        401, {"X-Error-Message": "Invalid credentials in Authorization header"},
        r"does not know your token",
    ),
    "no API there": (404, {}, r"answers 404 for org/tiny"),
    "too many": (429, {}, r"429 \(too many requests\)"),
    "down": (503, {}, r"answers 503 for org/tiny: it is down or busy"),
    "broken": (500, {}, r"answers 500 for org/tiny"),
    "disabled": (403, {"X-Error-Message": "Access to this resource is disabled."}, r"disabled"),
}  # fmt: skip


# A hub that lists a repository has it, and the client waits where files are asked for too often.
LATER = [c for c in REFUSED if c not in ("too many", "not there", "a private name")]


@pytest.mark.parametrize(
    ("case", "files_only"), [(c, False) for c in REFUSED] + [(c, True) for c in LATER]
)
def test_each_refusal_is_one_sentence(hub, case, files_only):
    status, headers, message = REFUSED[case]
    hub.refusal, hub.files_only = (status, headers), files_only
    with pytest.raises(WeightsError, match=message) as error:
        download("org/tiny")
    assert "\n" not in str(error.value) and str(error.value).endswith((".", "again"))


def test_a_hub_that_cannot_be_reached(hub, monkeypatch, caplog):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(WeightsError, match=r"'org/tiny' is not a local path.*cannot be reached"):
        download("org/tiny")
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    root = download("org/tiny")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    caplog.set_level("INFO")
    assert download("org/tiny") == root  # what is held serves without a network
    assert "cannot be reached; using what its cache holds" in caplog.text


def test_a_connection_that_breaks_is_taken_up_at_once(hub):
    data = os.urandom(3_000_000)
    hub.repositories["org/tiny"]["model.safetensors"] = data
    hub.cut_after, hub.cuts = 1_000_000, 2
    told = Told()
    root = download("org/tiny", progress=told)
    assert (root / "model.safetensors").read_bytes() == data
    assert hub.ranges == ["bytes=0-", "bytes=1000000-", "bytes=2000000-"]
    assert told.steps[-1][1] == told.steps[-1][2]


def test_a_connection_that_stays_broken_says_how_to_go_on(hub):
    hub.repositories["org/tiny"]["model.safetensors"] = os.urandom(3_000_000)
    hub.cut_after, hub.cuts = 0, 1000
    with pytest.raises(WeightsError, match=r"connection to the hub broke.*same command again"):
        download("org/tiny")
    hub.cuts = 0
    assert download("org/tiny").is_dir()


def test_a_full_disk_is_found_before_the_download(hub, monkeypatch):
    import shutil

    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=65 << 20))
    hub.repositories["org/tiny"]["model.safetensors"] = bytes(2 << 20)
    with pytest.raises(WeightsError, match=r"org/tiny takes .* left; free some space.*HF_HOME"):
        download("org/tiny")
    assert not any("/resolve/" in a for a in hub.asked)


def test_a_killed_download_goes_on_where_it_stopped(tmp_path):
    data = os.urandom(24 << 20)
    with serving({"org/big": {"config.json": b"{}", "model.safetensors": data}}) as hub:
        hub.slow = 0.01
        environment = {
            **os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_TOKEN": "",
        }  # fmt: skip
        command = [
            sys.executable, "-c",
            "from edge_kv.weights.hub import download; print(download('org/big'))",
        ]  # fmt: skip
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 60
        while hub.served < 12 << 20 and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        served, hub.slow = hub.served, 0.0
        assert served < len(data)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert (Path(done.stdout.strip()) / "model.safetensors").read_bytes() == data
        assert hub.ranges and int(hub.ranges[-1][6:-1]) > 1 << 20  # not from the beginning
        assert done.stderr == ""  # no bar and no escape codes where stderr is no terminal
