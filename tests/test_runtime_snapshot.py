"""Snapshot files: bit-equal in another process, refused when anything is not as it was."""

import os
import struct
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from fake_artifact import VOCAB, NumpySession, write_artifact
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from snapshot_forgery import forge, header_of, seal

from edge_kv.artifact import read_artifact
from edge_kv.errors import SnapshotError
from edge_kv.runtime.onnx_session import OnnxSession


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("snapshots")


@pytest.fixture(scope="module")
def artifacts(base):
    return {
        kv: read_artifact(write_artifact(base / kv, kv=kv, programs=False, verify=False))
        for kv in ("f32", "int8")
    }


@pytest.fixture
def taken(artifacts, tmp_path):
    session = NumpySession(artifacts["f32"])
    session.prefill(range(20))
    session.snapshot(tmp_path / "s.kv", {"who": "test"})
    return tmp_path / "s.kv"


@settings(deadline=None, max_examples=60)
@given(
    ids=st.lists(st.integers(0, VOCAB - 1), max_size=60),
    back=st.integers(0, 10),
    kept=st.sets(st.integers(1, 60), max_size=3),
    kv=st.sampled_from(["f32", "int8"]),
)
def test_a_restored_session_is_the_same_session(artifacts, base, ids, back, kept, kv):
    first = NumpySession(artifacts[kv])
    kept = [at for at in sorted(kept) if at <= len(ids)]
    for start, stop in pairwise([0, *kept, len(ids)]):
        first.prefill(ids[start:stop])
        first.checkpoint(stop)
    first.rewind(min(back, first.max_rewind))
    path = base / "round.kv"
    first.snapshot(path, {"n": len(ids)})
    second = NumpySession(artifacts[kv])
    second.prefill([7] * 33)  # leftovers of another text must not shine through
    assert second.restore(path) == {"n": len(ids)}
    assert (second.tokens, second.written) == (first.tokens, first.written)
    assert second.max_rewind == first.max_rewind
    assert second.own_checkpoints() == first.own_checkpoints()
    for token in (3, 250, 9):
        if second.pos < second.plan.ctx:
            np.testing.assert_array_equal(first.decode(token), second.decode(token))


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_changed_or_missing_byte_is_noticed(artifacts, taken, data):
    good = taken.read_bytes()
    at = data.draw(st.integers(0, len(good) - 1))
    kind = data.draw(st.sampled_from(["flip", "cut", "grow"]))
    bad = {
        "flip": good[:at] + bytes([good[at] ^ data.draw(st.integers(1, 255))]) + good[at + 1 :],
        "cut": good[:at],
        "grow": good + b"x",
    }[kind]
    path = taken.with_name("bad.kv")
    path.write_bytes(bad)
    session = NumpySession(artifacts["f32"])
    session.prefill([1, 2, 3])
    before = {name: a.copy() for name, a in session.state.items()}
    with pytest.raises(SnapshotError) as e:
        session.restore(path)
    assert "\n" not in str(e.value)
    assert session.tokens == (1, 2, 3)
    for name, array in session.state.items():
        np.testing.assert_array_equal(array, before[name])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "f" * 64}, "belongs to another model"),
        ({"plan": "f" * 64}, "belongs to another plan"),
        ({"pos": 21}, "does not hold the rows"),
        ({"pos": True}, "does not hold the rows"),
        ({"written": 19}, "does not hold the rows"),
        ({"written": 65}, "does not hold the rows"),
        ({"written": 30}, "does not hold the rows"),
        ({"sections": []}, "does not hold the rows"),
        ({"pos": "20"}, "does not hold the rows"),
    ],
)
def test_wrong_headers_with_a_right_digest(artifacts, taken, changes, message):
    with pytest.raises(SnapshotError, match=message):
        NumpySession(artifacts["f32"]).restore(
            forge(taken, taken.with_name("forged.kv"), **changes)
        )


@pytest.mark.parametrize("token", [-1, VOCAB])
def test_ids_that_are_no_tokens(artifacts, taken, token):
    raw = taken.read_bytes()
    at = 16 + struct.unpack("<I", raw[12:16])[0]
    forged = seal(
        taken.with_name("forged.kv"), raw[:at] + struct.pack("<i", token) + raw[at + 4 : -32]
    )
    session = NumpySession(artifacts["f32"])
    session.prefill([7])
    with pytest.raises(SnapshotError, match="holds ids that are no tokens here"):
        session.restore(forged)
    assert session.tokens == (7,)


@pytest.mark.parametrize(
    "changes",
    [
        None,
        {"pos": 9},  # before the first
        {"pos": 21},  # behind the session
        {"pos": 15, "written": 64},  # its rows were written over
        {"bytes": 0},
        {"bytes": -8},
        {"written": "12"},
        "checkpoint",
    ],
)
def test_wrong_checkpoints_with_a_right_digest(artifacts, tmp_path, changes):
    session, path = NumpySession(artifacts["f32"]), tmp_path / "s.kv"
    for part in (range(10), range(5), range(5)):
        session.prefill(part)
        session.checkpoint(session.pos)
    session.snapshot(path)
    again = NumpySession(artifacts["f32"])
    again.restore(path)
    assert [len(c.tokens) for c in again.own_checkpoints()] == [10, 15, 20]
    kept = header_of(path)["checkpoints"]
    kept[1] = {**kept[1], **changes} if isinstance(changes, dict) else changes
    with pytest.raises(SnapshotError, match="does not hold the rows"):
        again.restore(forge(path, tmp_path / "forged.kv", checkpoints=kept))
    with pytest.raises(SnapshotError, match="does not hold the rows"):
        again.restore(forge(path, tmp_path / "forged.kv", checkpoints=None))
    assert again.pos == 20


def test_snapshot_of_another_model_or_plan(artifacts, taken, tmp_path):
    for name, kwargs in {
        "weights": {"seed": 1, "programs": True},
        "ctx": {"ctx": 63},
        "kv": {"kv": "int8"},
    }.items():
        artifact = read_artifact(
            write_artifact(tmp_path / name, **{"programs": False, "verify": False, **kwargs})
        )
        with pytest.raises(SnapshotError, match="belongs to another"):
            NumpySession(artifact).restore(taken)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an edge-kv snapshot"),
        (b"GGUF" + bytes(100), "not an edge-kv snapshot"),
        (b"EDGEKVSN" + struct.pack("<II", 1, 9) + bytes(60), "version 1, this edge-kv reads 2"),
        (b"EDGEKVSN" + struct.pack("<II", 2, 1 << 31) + bytes(60), "cut off or changed"),
    ],
)
def test_files_that_are_no_snapshots(artifacts, tmp_path, content, message):
    path = tmp_path / "x.kv"
    path.write_bytes(content)
    with pytest.raises(SnapshotError, match=message):
        NumpySession(artifacts["f32"]).restore(path)


def test_paths_that_cannot_be_used(artifacts, tmp_path):
    session = NumpySession(artifacts["f32"])
    with pytest.raises(SnapshotError, match=r"Cannot open .*No such file"):
        session.restore(tmp_path / "none.kv")
    with pytest.raises(SnapshotError, match="Cannot write"):
        session.snapshot(tmp_path / "no" / "dir.kv")
    (tmp_path / "taken").mkdir()
    with pytest.raises(SnapshotError, match="Cannot write"):
        session.snapshot(tmp_path / "taken")
    assert not list(tmp_path.glob("*.part"))
    os.mkfifo(tmp_path / "pipe")  # that nobody writes to
    for path in (tmp_path / "pipe", tmp_path / "taken", Path("/dev/zero")):
        with pytest.raises(SnapshotError, match=f"{path} is not an edge-kv snapshot"):
            session.restore(path)


def test_a_failed_write_keeps_the_old_snapshot(artifacts, taken, monkeypatch):
    old = taken.read_bytes()
    session = NumpySession(artifacts["f32"])
    session.prefill(range(9))

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("edge_kv.runtime.snapshot.os.fsync", full)
    with pytest.raises(SnapshotError, match="No space left"):
        session.snapshot(taken)
    assert taken.read_bytes() == old and not list(taken.parent.glob("*.part"))


def test_only_live_rows_are_written(artifacts, tmp_path):
    session = NumpySession(artifacts["f32"])
    session.snapshot(tmp_path / "empty.kv")
    session.prefill(range(10))
    session.snapshot(tmp_path / "ten.kv")
    plan = session.plan
    rows = sum(b.row_bytes * min(10, b.slots) for b in plan.tables) + 4 * 10
    grown = (tmp_path / "ten.kv").stat().st_size - (tmp_path / "empty.kv").stat().st_size
    assert rows <= grown <= rows + 16  # and a few more digits in the header


SCRIPT = """
import sys
import numpy as np
from edge_kv.runtime import load
with load(sys.argv[1], threads=1) as session:
    session.restore(sys.argv[2])
    np.save(sys.argv[3], np.stack([session.decode(t) for t in (5, 77, 130)]))
assert "torch" not in sys.modules
"""


@pytest.mark.parametrize("kv", ["f32", "int8"])
def test_restored_in_another_process_the_logits_are_bit_equal(tmp_path, kv):
    root = write_artifact(tmp_path / "a", kv=kv, ctx=600)
    with OnnxSession(read_artifact(root), threads=1) as session:
        session.prefill(np.random.default_rng(0).integers(0, VOCAB, 300))
        session.rewind(2)
        session.snapshot(tmp_path / "s.kv")
        here = np.stack([session.decode(t) for t in (5, 77, 130)])
    out = tmp_path / "logits.npy"
    subprocess.run(
        [sys.executable, "-c", SCRIPT, str(root), str(tmp_path / "s.kv"), str(out)], check=True
    )
    np.testing.assert_array_equal(np.load(out), here)
