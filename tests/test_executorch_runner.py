"""edge-kv-run: the ids and logits of the Python session, from a prompt or from a snapshot of it."""

import json
import shutil
import struct
import subprocess

import numpy as np
import pytest
from snapshot_forgery import forge, seal
from test_executorch import CONFIG, CTX, exported, ids_for

from edge_kv.artifact import model_fingerprint, read_artifact
from edge_kv.runtime import load, native_library

COUNT = 12


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return exported(tmp_path_factory, "native")


@pytest.fixture(scope="module")
def taken(root, tmp_path_factory):
    """A snapshot past two wraps of the rings, behind a rewind, and the session's next logits."""
    path = tmp_path_factory.mktemp("taken") / "state.kv"
    ids = ids_for(100)
    with load(root, "executorch", threads=1, cache=False) as session:
        session.prefill(ids[:95])
        session.rewind(3)
        session.snapshot(path, note={"of": ["this", 1.5, None]})
        session.prefill(ids[95:99])
        return path, ids[95:], greedy(session, int(ids[99]))


def greedy(session, token):
    logits = []
    for _ in range(COUNT):
        logits.append(session.decode(token))
        token = int(logits[-1].argmax())
    return np.stack(logits)


def run(root, *arguments):
    command = [native_library.build_runner(), root, "--threads", "1", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def words(ids):
    return ",".join(map(str, ids))


def refused(done, message):
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1
    assert message in done.stderr


def test_it_says_what_the_session_says(root):
    ids = ids_for(40)
    with load(root, "executorch", threads=1, cache=False) as session:
        session.prefill(ids[:-1])
        want = greedy(session, int(ids[-1])).argmax(-1).tolist()
    done = run(root, "--ids", words(ids), "--max-new-tokens", COUNT)
    assert done.returncode == 0, done.stderr
    assert [int(x) for x in done.stdout.split(",")] == want
    assert "tokens/s" in done.stderr and "VmHWM" in done.stderr


def test_restored_it_goes_on_bit_for_bit(root, taken, tmp_path):
    snapshot, ids, want = taken
    done = run(root, "--restore", snapshot, "--ids", words(ids), "--max-new-tokens", COUNT,
               "--logits", tmp_path / "logits")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [int(x) for x in done.stdout.split(",")] == want.argmax(-1).tolist()
    got = np.fromfile(tmp_path / "logits", np.float32).reshape(COUNT, CONFIG.vocab_size)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ids", "1,x"], "--ids wants token ids below 512"),
        (["--ids", "512"], "--ids wants token ids below 512"),
        (["--ids"], "--ids wants a value"),
        (["--speed", "1"], "Unknown option --speed"),
        ([], "Usage:"),
        (["--ids", "1", "--restore", "nowhere"], "Cannot open the snapshot nowhere: No such file"),
        (["--ids", "1", "--restore", "/"], "/ "),
        (["--ids", "1", "--logits", "/no/where"], "Cannot write /no/where"),
        (["--ids", words(range(CTX + 1))], "193 ids do not fit a context of 192 at position 0"),
    ],
)
def test_wrong_arguments_are_one_sentence(root, arguments, message):
    refused(run(root, *arguments), message)


def test_help_names_every_option(root):
    done = run(root, "--help")
    assert done.returncode == 0 and "--restore SNAPSHOT" in done.stdout


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "f" * 64}, "belongs to another model (ffffffffffff, this one is "),
        ({"plan": "f" * 64}, "belongs to another plan"),
        ({"engine": "onnx"}, "belongs to another engine (onnx, this one is executorch)"),
        ({"engine": 7}, "a string is something else"),
        ({"model": None}, "it has no model"),
        ({"pos": 91}, "does not hold the rows"),
        ({"pos": -1}, "does not hold the rows"),
        ({"pos": 1 << 62}, "does not hold the rows"),
        ({"pos": 1 << 70}, "a whole number is something else"),
        ({"pos": True}, "a whole number is something else"),
        ({"written": 91}, "does not hold the rows"),
        ({"written": 193}, "does not hold the rows"),
        ({"written": 150}, "does not hold the rows"),
        ({"sections": []}, "does not hold the rows"),
        ({"sections": [{}] * 11}, "does not hold the rows"),
        ({"sections": None}, "it has no sections"),
    ],
)
def test_wrong_headers_with_a_right_digest_are_refused(root, taken, tmp_path, changes, message):
    forged = forge(taken[0], tmp_path / "forged", **changes)
    refused(run(root, "--ids", "1", "--restore", forged), message)


@pytest.mark.parametrize(
    "text",
    [b"{", b"[]", b"", b"{}x", b"nul", b'{"engine": "executorch', b"[" * 5000, b'{"a" 1}', b"[1,]",
     b'{"pos": 0\x00', b"\xff\xfe", b'"\\'],
)  # fmt: skip
def test_headers_that_are_no_json_are_refused(root, tmp_path, text):
    body = struct.pack("<8sII", b"EDGEKVSN", 1, len(text)) + text
    done = run(root, "--ids", "1", "--restore", seal(tmp_path / "bad", body))
    refused(done, "header that cannot be read" if text else "is cut off or changed")


def test_any_cut_or_changed_snapshot_is_refused(root, taken, tmp_path):
    raw, bad = taken[0].read_bytes(), tmp_path / "bad"
    for size in (0, 7, 15, 16, 40, 300, len(raw) // 2, len(raw) - 1):
        bad.write_bytes(raw[:size])
        refused(run(root, "--ids", "1", "--restore", bad), f"{bad} is ")
    for at in (0, 8, 12, 15, 20, len(raw) // 2, len(raw) - 1):
        bad.write_bytes(raw[:at] + bytes([raw[at] ^ 0x55]) + raw[at + 1 :])
        refused(run(root, "--ids", "1", "--restore", bad), f"{bad} is ")
    bad.write_bytes(raw + b"x")
    refused(run(root, "--ids", "1", "--restore", bad), "is cut off or changed")


def test_a_full_context_is_one_sentence(root, taken):
    done = run(root, "--ids", words([1] * 101), "--restore", taken[0])
    refused(done, "101 ids do not fit a context of 192 at position 92")


def test_the_model_is_named_as_python_names_it(root, taken, tmp_path):
    """Floats of any size are written as Python's JSON writes them; another model is refused."""
    copy = shutil.copytree(root, tmp_path / "copy")
    manifest = json.loads((copy / "manifest.json").read_text())
    for theta in (1e-05, 0.0001, 123456.789, 1e15, 1e16, 1.5e300, 0.1 + 0.2, 5e-324, 3.0):
        manifest["model"]["full"]["rope_theta"] = theta
        (copy / "manifest.json").write_text(json.dumps(manifest))
        refused(run(copy, "--ids", "1", "--restore", taken[0]), "belongs to another model")
        model = model_fingerprint(read_artifact(copy).manifest)
        done = run(copy, "--ids", "1", "--restore", forge(taken[0], tmp_path / "s", model=model))
        assert done.returncode == 0, (theta, done.stderr)


def test_manifests_that_do_not_fit_the_program_are_refused(root, taken, tmp_path):
    copy = shutil.copytree(root, tmp_path / "copy")
    path, text = copy / "manifest.json", (root / "manifest.json").read_text()
    arguments = "--ids", "1", "--restore", taken[0]

    def changed(change):
        manifest = json.loads(text)
        change(manifest["plan"])
        path.write_text(json.dumps(manifest))
        return run(copy, *arguments)

    for change in (
        lambda plan: plan["buffers"][0].update(bytes=1 << 62),
        lambda plan: plan["buffers"][0].update(shape=[0, 0, 0]),
        lambda plan: plan["buffers"][0].update(shape=[1 << 62, 1 << 62]),
        lambda plan: plan["buffers"][0].update(name="k9"),
        lambda plan: plan["buffers"][0].update(name="v1"),
        lambda plan: plan["buffers"][0].update(kind="append"),
        lambda plan: plan.update(ctx=1 << 60),
    ):
        refused(changed(change), "its state is not that of the program")
    path.write_text(text[: len(text) // 2])
    refused(run(copy, *arguments), "manifest.json cannot be read (")
    path.unlink()
    refused(run(copy, *arguments), "manifest.json cannot be read (")


def test_programs_and_weights_that_are_not_the_artifacts_are_refused(root, tmp_path):
    copy = shutil.copytree(root, tmp_path / "copy")
    program, weights = copy / "executorch/model.pte", copy / "executorch/weights.bin"
    data = program.read_bytes()
    program.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    refused(run(copy, "--ids", "1"), "model.pte is not the file that was exported")
    program.write_bytes(data)
    weights.write_bytes(weights.read_bytes()[:-4096])
    refused(run(copy, "--ids", "1"), "it is for weights of ")
    weights.unlink()
    refused(run(copy, "--ids", "1"), "weights.bin cannot be opened")
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["backends"]["executorch"]["details"]["weights"] = "../../weights.bin"
    (copy / "manifest.json").write_text(json.dumps(manifest))
    refused(run(copy, "--ids", "1"), "a path outside the artifact")


def test_more_threads_than_cpus_are_capped(root):
    done = run(root, "--ids", "1", "--max-new-tokens", 1, "--threads", 100_000)
    assert done.returncode == 0 and done.stderr.startswith("Warning: --threads 100000 is more")
