"""Weights packed for the device: made once, found again, never trusted when they look wrong."""

import errno
import multiprocessing
import os
import shutil

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edge_kv import runtime
from edge_kv.artifact import read_artifact
from edge_kv.errors import ArtifactError
from edge_kv.manifest import UNFINISHED
from edge_kv.runtime import packed
from edge_kv.runtime.onnx_file import external_data, replace_external_data

IDS = np.random.default_rng(0).integers(0, 2000, 90)


@pytest.fixture(scope="module")
def tiny(tiny_artifact):
    return tiny_artifact


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty cache, and no weights too small to be packed."""
    monkeypatch.setenv("EDGE_KV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(packed, "WORTH_PACKING", 0)
    return tmp_path / "cache" / "onnx"


def run(root, engine="onnx-stock", **options):
    """Logits of the engine that packs weights, unless another is named."""
    with runtime.load(root, engine, threads=1, **options) as session:
        session.prefill(IDS[:-3])
        return np.stack([session.decode(int(t)) for t in IDS[-3:]])


def entry(home):
    """The one directory of packed weights in a cache."""
    (found,) = [p for p in home.iterdir() if p.is_dir()]
    return found


def identity(path):
    stat = path.stat()
    return stat.st_ino, stat.st_mtime_ns


def test_packed_programs_compute_the_same_bits_made_and_found(tiny, home):
    plain = run(tiny, cache=False)
    assert not home.exists()
    np.testing.assert_array_equal(run(tiny), plain)
    weights = entry(home) / "weights.bin"
    before = identity(weights)
    np.testing.assert_array_equal(run(tiny), plain)
    assert identity(weights) == before  # found, not made again
    assert {p.name for p in entry(home).iterdir()} == {
        "decode.onnx", "prefill.onnx", "weights.bin", "packed.json",
    }  # fmt: skip


def test_every_packed_piece_is_aligned_and_prefill_shares_the_file(tiny, home):
    run(tiny)
    decode, prefill = (
        external_data((entry(home) / f"{n}.onnx").read_bytes()) for n in ("decode", "prefill")
    )
    pieces = 0
    for tensor in decode.values():
        assert int(tensor["offset"]) % packed.ALIGNMENT == 0
        for key, value in tensor.items():
            if key.startswith("prepacked"):
                for blob in value.split("|")[1:]:
                    assert int(blob.split(";")[0]) % packed.ALIGNMENT == 0
                    pieces += 1
    assert pieces > 20
    places = {(t["offset"], t["length"]) for t in decode.values()}
    assert prefill and all((t["offset"], t["length"]) in places for t in prefill.values())


@pytest.mark.usefixtures("compiler")
def test_with_native_operators_nothing_is_packed(tiny, home, compiled):
    """They read weights as they were exported: a first start is like any other."""
    compiled(home.parent)
    plain = run(tiny, "onnx", cache=False)
    np.testing.assert_array_equal(run(tiny, "onnx"), plain)
    assert [p.name for p in home.parent.iterdir()] == ["native"]


@pytest.mark.parametrize("damage", ["short", "touched", "program", "record", "gone"])
def test_damaged_cache_is_rebuilt(tiny, home, damage):
    plain = run(tiny)
    at = entry(home)
    weights = at / "weights.bin"
    if damage == "short":
        os.truncate(weights, weights.stat().st_size // 2)
    elif damage == "touched":
        data = bytearray(weights.read_bytes())
        data[len(data) // 2] ^= 255
        weights.write_bytes(data)
    elif damage == "program":
        data = bytearray((at / "decode.onnx").read_bytes())
        data[-1] ^= 255
        (at / "decode.onnx").write_bytes(data)
    elif damage == "record":
        (at / "packed.json").write_text("{")
    else:
        weights.unlink()
    np.testing.assert_array_equal(run(tiny), plain)
    assert packed._valid(at)


def test_packed_programs_that_do_not_load_are_discarded(tiny, home, monkeypatch, caplog):
    plain = run(tiny)
    at = entry(home)
    real = packed._valid

    def trusting(path):  # as if the damage had kept sizes, times and digests
        found = real(path)
        if found:
            found["decode"].write_bytes(b"\xff" * 64)
        return found

    monkeypatch.setattr(packed, "_valid", trusting)
    np.testing.assert_array_equal(run(tiny), plain)
    assert "discarded" in caplog.text and not at.exists()


def test_another_engine_version_or_cpu_gets_its_own(tiny, home, monkeypatch):
    run(tiny)
    monkeypatch.setattr(packed, "_cpu", lambda: ["another"])
    run(tiny)
    assert len([p for p in home.iterdir() if p.is_dir()]) == 2


def test_small_weights_and_artifacts_without_digests_are_left_alone(tiny, home, monkeypatch):
    monkeypatch.setattr(packed, "WORTH_PACKING", 64 << 20)
    run(tiny)
    assert not home.exists()
    monkeypatch.setattr(packed, "WORTH_PACKING", 0)
    artifact = read_artifact(tiny)
    name = "onnx/weights.bin"
    blank = artifact.manifest.files[name].model_copy(update={"sha256": UNFINISHED})
    artifact.manifest.files[name] = blank
    run(artifact)
    assert not home.exists()


def test_full_disk_is_a_warning_and_leaves_nothing(tiny, home, monkeypatch, caplog):
    plain = run(tiny, cache=False)
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(packed.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    np.testing.assert_array_equal(run(tiny), plain)
    assert "free" in caplog.text and "unpacked" in caplog.text
    assert not [p for p in home.iterdir() if p.is_dir()]


def test_disk_that_fills_up_while_writing_leaves_nothing(tiny, home, monkeypatch, caplog):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    plain = run(tiny, cache=False)
    monkeypatch.setattr(packed.os, "fsync", full)
    np.testing.assert_array_equal(run(tiny), plain)
    assert "No space left" in caplog.text
    assert not [p for p in home.iterdir() if p.is_dir()]


def test_writes_that_the_engine_lost_are_noticed(tmp_path):
    (tmp_path / "w").write_bytes(bytes(100))
    entries = {"a": {"location": "w", "offset": "0", "length": "64", "prepacked_0": "k|64;40;0"}}
    with pytest.raises(OSError, match="cut off"):
        packed._align(tmp_path / "w", entries)


def test_cache_that_cannot_be_written_is_a_warning(tiny, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("EDGE_KV_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(packed, "WORTH_PACKING", 0)
    np.testing.assert_array_equal(run(tiny), run(tiny, cache=False))
    assert "unpacked" in caplog.text


def _load_elsewhere(root, start, results):
    packed.WORTH_PACKING = 0
    start.wait()
    results.put(run(root).tobytes())


def test_two_processes_pack_once(tiny, home):
    spawn = multiprocessing.get_context("fork")
    start, results = spawn.Event(), spawn.Queue()
    both = [spawn.Process(target=_load_elsewhere, args=(tiny, start, results)) for _ in "ab"]
    for process in both:
        process.start()
    start.set()
    got = [results.get(timeout=120) for _ in both]
    for process in both:
        process.join(30)
    assert got[0] == got[1]
    assert [p.name for p in home.iterdir() if p.suffix == ".part"] == []
    assert packed._valid(entry(home))


def test_a_killed_packer_leaves_work_that_the_next_one_clears(tiny, home):
    artifact = read_artifact(tiny)
    part = home / f"{packed._key(artifact)}.part"
    part.mkdir(parents=True)
    (part / "weights.bin").write_bytes(b"half")
    run(tiny)
    assert not part.exists() and packed._valid(entry(home))


def test_external_data_is_replaced_and_everything_else_kept():
    kept = numpy_helper.from_array(np.arange(3, dtype=np.float32), "inline")
    moved = TensorProto(name="moved", data_type=TensorProto.UINT8, dims=[300])
    moved.data_location = TensorProto.EXTERNAL
    for key, value in {"location": "a.bin", "offset": "0", "length": "300"}.items():
        moved.external_data.add(key=key, value=value)
    node = helper.make_node("Identity", ["moved"], ["y"], name="n" * 200)
    output = helper.make_tensor_value_info("y", TensorProto.UINT8, [300])
    graph = helper.make_graph([node], "g", [], [output], [kept, moved])
    model = helper.make_model(graph, doc_string="kept")
    raw = model.SerializeToString()
    assert external_data(raw) == {"moved": {"location": "a.bin", "offset": "0", "length": "300"}}
    new = {"location": "b.bin", "offset": "123456789012", "length": "300", "prepacked_1": "x" * 400}
    again = onnx.load_model_from_string(replace_external_data(raw, {"moved": new}))
    assert {e.key: e.value for e in again.graph.initializer[1].external_data} == new
    del again.graph.initializer[1].external_data[:]
    del model.graph.initializer[1].external_data[:]
    assert again == model
    with pytest.raises(KeyError):
        replace_external_data(raw, {})


@pytest.mark.parametrize(
    "raw", [b"\x3a\xff", b"\x3b", b"\xff" * 12, b"\x3a\x05\x2a\xff\x01\x00\x00"]
)
def test_bytes_that_are_no_model(raw):
    with pytest.raises(ValueError):
        external_data(raw)


def test_opting_out_on_the_command_line(tiny, home):
    from typer.testing import CliRunner

    from edge_kv.cli import app

    options = ["run", str(tiny), "In", "--raw", "--max-new-tokens", "2", "--threads", "1"]
    options += ["--engine", "onnx-stock"]
    assert CliRunner().invoke(app, [*options, "--no-cache"]).exit_code == 0
    assert not home.exists()
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 0 and "once" in result.stderr
    assert entry(home)


def test_broken_artifact_is_still_its_own_error(tiny, home, tmp_path):
    root = tmp_path / "broken"
    shutil.copytree(tiny, root)
    path = root / "onnx/decode.onnx"
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(ArtifactError, match=r"onnx/decode.onnx has SHA-256"):
        run(root)
