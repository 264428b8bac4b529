"""An interrupted export is taken up for the same content only, by one process at a time."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file

from edge_kv import models
from edge_kv.errors import ExportError, WeightsError
from edge_kv.export import backends, export_model
from edge_kv.export.unfinished import read_record, sole_exporter, write_record
from edge_kv.files import unfinished
from edge_kv.progress import Silent
from edge_kv.runtime import load


class Stop(Silent):
    """Ends an export as it reaches a stage, leaving what a kill would leave."""

    def __init__(self, stage: str, before=lambda: None):
        self._stage, self._before = stage, before

    def stage(self, name: str, unit: str = "") -> None:
        if name.startswith(self._stage):
            self._before()
            raise KeyboardInterrupt


def checkpoint(path: Path, scale: float = 1.0) -> Path:
    """The shipped checkpoint with its matrices scaled: another model of the same config."""
    shutil.copytree(models.get_row("tiny").weights, path)
    file = path / "model.safetensors"
    save_file({k: v * scale for k, v in load_file(file).items()}, file)
    return path


def stopped(weights: Path, out: Path) -> bytes:
    """The weight file of an export that was stopped before its programs were made."""
    with pytest.raises(KeyboardInterrupt):
        export(weights, out, Stop("programs"))
    return (unfinished(out) / "onnx" / "weights.bin").read_bytes()


def export(weights: Path, out: Path, progress=None) -> None:
    export_model(
        weights=str(weights),
        ctx=64,
        chunk=16,
        calibration="none",
        out=out,
        open_session=load,
        progress=progress,
    )


def test_the_same_content_is_taken_up(tmp_path):
    model, out = checkpoint(tmp_path / "model"), tmp_path / "out"
    whole = stopped(model, out)
    file = unfinished(out) / "onnx" / "weights.bin"
    marked = b"\xff" * 64 + whole[64:]
    file.write_bytes(marked)
    assert stopped(model, out) == marked  # nothing was written again


def another_directory(model: Path) -> Path:
    return checkpoint(model.parent / "other" / model.name, 2.0)


def replaced(model: Path) -> Path:
    new = checkpoint(model.parent / "new", 2.0)
    (new / "model.safetensors").replace(model / "model.safetensors")
    return model


def replaced_with_its_times(model: Path) -> Path:
    """As rsync and tar do: same path, size and time of modification."""
    file = model / "model.safetensors"
    before = file.stat()
    file.write_bytes((checkpoint(model.parent / "new", 2.0) / file.name).read_bytes())
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = file.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    return model


@pytest.mark.parametrize("change", [another_directory, replaced, replaced_with_its_times])
def test_other_content_is_exported_from_the_start(tmp_path, change):
    model, out = checkpoint(tmp_path / "model"), tmp_path / "out"
    first = stopped(model, out)
    second = stopped(change(model), out)
    assert second != first
    assert second == stopped(checkpoint(tmp_path / "again" / "model", 2.0), tmp_path / "fresh")


def test_a_weight_file_that_is_gone_or_cut_is_written_again(tmp_path):
    model, out = checkpoint(tmp_path / "model"), tmp_path / "out"
    whole = stopped(model, out)
    file = unfinished(out) / "onnx" / "weights.bin"
    file.unlink()
    assert stopped(model, out) == whole
    file.write_bytes(whole[:-1])
    assert stopped(model, out) == whole


@pytest.mark.parametrize("line", ['{"name": "embed"}', '{"name": 3, "error"', "\0\0\0", ""])
def test_a_torn_journal_is_believed_up_to_the_tear(tmp_path, line):
    model, out = checkpoint(tmp_path / "model"), tmp_path / "out"
    whole = stopped(model, out)
    part = unfinished(out)
    (part / "onnx" / "weights.bin").write_bytes(bytes(len(whole)))
    (part / "onnx" / "journal.jsonl").write_text(line)
    assert stopped(model, out) == whole


@pytest.mark.parametrize("record", [b"", b"{", b"[1]", b"null", b"\xff"])
def test_a_torn_request_starts_anew(tmp_path, record):
    model, out = checkpoint(tmp_path / "model"), tmp_path / "out"
    stopped(model, out)
    (unfinished(out) / "request.json").write_bytes(record)
    (unfinished(out) / "onnx" / "stray").write_bytes(b"")
    stopped(model, out)
    assert not (unfinished(out) / "onnx" / "stray").exists()


def test_a_checkpoint_that_changes_under_the_export_is_refused(tmp_path):
    model, out = checkpoint(tmp_path / "model"), tmp_path / "out"

    class Touch(Silent):
        def stage(self, name: str, unit: str = "") -> None:
            if name == "per-layer embeddings":
                os.utime(model / "model.safetensors")

    with pytest.raises(WeightsError, match="was changed while it was exported"):
        export(model, out, Touch())
    assert os.listdir(tmp_path) == ["model"]


def test_a_bad_tokenizer_is_found_before_the_work(tmp_path):
    model = checkpoint(tmp_path / "model")
    (model / "tokenizer.json").write_text("{}")
    with pytest.raises(WeightsError, match=r"The tokenizer\.json of directory model"):
        export(model, tmp_path / "out", Stop("weights"))
    assert os.listdir(tmp_path) == ["model"]


def test_one_exporter_for_a_target(tmp_path):
    out = tmp_path / "out"
    with sole_exporter(out), pytest.raises(ExportError) as error, sole_exporter(out):
        pass
    assert f"{out} is being exported by process {os.getpid()} on " in str(error.value)
    with sole_exporter(out):
        pass
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("none", path)])
def test_what_stands_where_the_lock_belongs_is_refused_by_name(tmp_path, make):
    make(tmp_path / ".out.lock")
    with pytest.raises(ExportError) as error, sole_exporter(tmp_path / "out"):
        pass
    assert f"{tmp_path / '.out.lock'}, which says who exports, cannot be used" in str(error.value)
    assert os.listdir(tmp_path) == [".out.lock"]


def test_a_killed_exporter_holds_nothing(tmp_path):
    out = tmp_path / "out"
    code = (
        "import sys, time; from pathlib import Path; "
        "from edge_kv.export.unfinished import sole_exporter\n"
        "with sole_exporter(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(out)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout and holder.stdout.readline() == b"held\n"
        with pytest.raises(ExportError, match=f"process {holder.pid} on"), sole_exporter(out):
            pass
        holder.send_signal(signal.SIGKILL)
    with sole_exporter(out):
        pass


def test_records_are_whole_or_absent(tmp_path):
    path = tmp_path / "record.json"
    assert read_record(path) == {}
    record = {"b": 1, "a": {"prefill": 0, "decode": 0}}
    write_record(path, record)
    assert os.listdir(tmp_path) == ["record.json"]
    assert json.dumps(read_record(path)) == json.dumps(record)  # so is a manifest made from it
    for torn in (b"", b"{", b"[]", b"\0" * 9, b"[" * 100_000):
        path.write_bytes(torn)
        assert read_record(path) == {}


def test_a_program_without_a_whole_record_is_made_again(tmp_path, monkeypatch):
    made = []

    def lower(config, plan, weights, path, **_):
        made.append(path.name)
        path.write_bytes(b"program")
        return {"made": len(made)}

    monkeypatch.setattr("edge_kv.export.lower_executorch.lower_executorch", lower)
    config = models.get_row("tiny").config
    request = backends.Request(config, models.plan(config, ctx=64, chunk=16), None)
    weights = SimpleNamespace(layout=SimpleNamespace(bytes=0), path=tmp_path / "weights.bin")

    def times() -> int:
        backend = backends.ExecuTorchLowering()
        return backend._lower(
            request, weights, tmp_path / "model.pte", delegate=True
        ).details["made"]  # fmt: skip

    assert (times(), times()) == (1, 1)
    (tmp_path / "model.json").write_bytes(b"")
    assert (times(), times()) == (2, 2)
    (tmp_path / "model.pte").write_bytes(b"prog")
    assert (times(), times()) == (3, 3)
    (tmp_path / "model.pte").unlink()
    assert times() == 4
