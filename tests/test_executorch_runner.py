"""edge-kv-run: the ids and logits of the Python session, from a prompt or from a snapshot of it."""

import json
import random
import shutil
import struct
import subprocess

import numpy as np
import pytest
from snapshot_forgery import forge, seal
from test_executorch import CONFIG, CTX, exported, ids_for

from edge_kv.manifest import LONGEST_MANIFEST
from edge_kv.runtime import load, native_library

COUNT = 12


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return exported(tmp_path_factory, "native")


@pytest.fixture(scope="module")
def taken(root, tmp_path_factory):
    """A snapshot past two wraps of the rings, behind a rewind, with the rings as they were at an
    earlier turn; and the session's next logits."""
    path = tmp_path_factory.mktemp("taken") / "state.kv"
    ids = ids_for(100)
    with load(root, "executorch", threads=1, cache=False) as session:
        session.prefill(ids[:50])
        session.checkpoint(50)
        session.prefill(ids[50:95])
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


def test_files_of_another_artifact_are_refused(root, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(root, other)
    files = json.loads((other / "manifest.json").read_text())["files"]
    names = [name for name in files if name.endswith((".pte", "weights.bin", "ple.bin"))]
    assert len(names) == 3
    for name in names:
        own = (other / name).read_bytes()
        (other / name).write_bytes(own[::-1])
        done = run(other, "--ids", "1,2", "--max-new-tokens", 1)
        refused(done, f"{name} is not the file that was exported (its digest differs)")
        (other / name).write_bytes(own)
    assert run(other, "--ids", "1,2", "--max-new-tokens", 1).returncode == 0


def test_restored_it_goes_on_bit_for_bit(root, taken, tmp_path):
    snapshot, ids, want = taken
    done = run(root, "--restore", snapshot, "--ids", words(ids), "--max-new-tokens", COUNT,
               "--logits", tmp_path / "logits")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [int(x) for x in done.stdout.split(",")] == want.argmax(-1).tolist()
    got = np.fromfile(tmp_path / "logits", np.float32).reshape(COUNT, CONFIG.vocab)
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
        ({"plan": 7}, "a string is something else"),
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
        ({"sections": [{}] * 7}, "it has no name"),
        ({"sections": None}, "it has no sections"),
        ({"checkpoints": None}, "does not hold the rows"),
        ({"checkpoints": [{"bytes": -8}]}, "does not hold the rows"),
        ({"checkpoints": [{"bytes": (1 << 63) - 1}] * 2}, "does not hold the rows"),
        ({"checkpoints": [{"pos": 50}]}, "it has no bytes"),
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
    body = struct.pack("<8sII", b"EDGEKVSN", 2, len(text)) + text
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


def edited(root, to, change):
    """A copy of an artifact whose manifest `change` has edited."""
    copy = shutil.copytree(root, to)
    manifest = json.loads((copy / "manifest.json").read_text())
    change(manifest)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return copy


def test_another_model_is_refused_and_its_own_snapshot_is_not(root, taken, tmp_path):
    copy = edited(root, tmp_path / "copy", lambda m: m["identity"].update(model="a" * 64))
    refused(run(copy, "--ids", "1", "--restore", taken[0]), "belongs to another model")
    own = forge(taken[0], tmp_path / "own", model="a" * 64)
    assert run(copy, "--ids", "1", "--max-new-tokens", 1, "--restore", own).returncode == 0


def table(**fields):
    return lambda m: m["plan"]["tables"][0].update(**fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(schema_version=1), "another version of edge-kv; export again"),
        (lambda m: m.update(schema_version=3), "another version of edge-kv; export again"),
        (lambda m: m.pop("identity"), "it has no identity"),
        (lambda m: m["identity"].update(plan="A" * 64), "plan is no digest"),
        (lambda m: m["identity"].update(plan=7), "a string is something else"),
        (lambda m: m["tokens"].update(vocab=0), "vocab is 0, which is out of range"),
        (lambda m: m["tokens"].update(vocab=1 << 31), "vocab is 2147483648, which is out of range"),
        (lambda m: m["tokens"].update(vocab="512"), "a whole number is something else"),
        (lambda m: m["plan"].update(ctx=1 << 60), "ctx is 1152921504606846976, which is out of"),
        (lambda m: m["plan"].update(ctx=193), "is too short for its plan"),
        (lambda m: m["plan"].update(chunk=300), "chunk is 300, which is out of range"),
        (lambda m: m["plan"].update(tables={}), "tables is no list of them"),
        (lambda m: m["plan"].update(tables=[]), "disagree about 'state state.l0_k"),
        (table(row=[1 << 31, 1 << 31]), "is not one that this version reads"),
        (table(row=[2]), "row is not two numbers"),
        (table(row=[1 << 15, 1 << 15], slots=(1 << 31) - 1), "more than any machine has"),
        (table(slots=0), "slots is 0, which is out of range"),
        (table(slots=64), "disagree about 'state state.l0_k"),
        (table(dtype="f64"), "is not one that this version reads"),
        (table(keep=23, stride=2), "is not one that this version reads"),
        (table(name="../l0"), "name is no name"),
        (table(name="l9.k"), "disagree about 'state state.l0_k"),
        (lambda m: m["plan"]["tables"].pop(), "disagree about 'state state.l1_v_scale"),
        (lambda m: m["backends"].pop("executorch"), "it has no executorch"),
        (lambda m: m.update(ple=None), "takes other per-layer rows than there are"),
        (lambda m: m["ple"].update(bits=5), "stored in a way that this version does not read"),
        (lambda m: m["ple"].update(block=0), "stored in a way that this version does not read"),
        (lambda m: m["ple"].update(rows=513), "holds fewer rows than the manifest says"),
        (lambda m: m["ple"].update(dim=64), "takes other per-layer rows than there are"),
        (lambda m: m["ple"].update(file="../ple.bin"), "a path outside the artifact"),
        (lambda m: m["files"].pop("ple.bin"), "does not list ple.bin"),
    ],
)  # fmt: skip
def test_manifests_that_do_not_fit_are_refused(root, taken, tmp_path, change, message):
    copy = edited(root, tmp_path / "copy", change)
    refused(run(copy, "--ids", "1", "--restore", taken[0]), message)


def test_manifests_that_cannot_be_read_are_refused(root, tmp_path):
    copy = shutil.copytree(root, tmp_path / "copy")
    path, text = copy / "manifest.json", (root / "manifest.json").read_text()
    path.write_text(text[: len(text) // 2])
    refused(run(copy, "--ids", "1"), "manifest.json cannot be read (")
    path.write_text(text + " " * LONGEST_MANIFEST)
    refused(run(copy, "--ids", "1"), "it is too long")
    path.unlink()
    refused(run(copy, "--ids", "1"), "manifest.json cannot be read (")


ODD = [None, True, -1, 0, 1, 7, 1 << 31, 1 << 63, 1 << 70, 1e300, 0.5, "", "x" * 300, "../../x",
       "/", "\0", [], {}, [[]], "chunk", "f16"]  # fmt: skip


def places(value, path=()):
    """Every place in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (*path, key)
        if isinstance(inner, (dict, list)):
            yield from places(inner, (*path, key))


@pytest.mark.parametrize("seed", range(60))
def test_any_odd_field_ends_in_one_sentence_or_in_tokens(root, taken, tmp_path, seed):
    """One or two fields of the manifest, or of a snapshot's header, are something else or gone."""
    rng = random.Random(seed)
    name = rng.choice(["manifest", "header"])
    raw = taken[0].read_bytes()
    length = struct.unpack("<I", raw[12:16])[0]
    text = (root / "manifest.json").read_bytes() if name == "manifest" else raw[16 : 16 + length]
    document = json.loads(text)
    if name == "manifest":  # what the runner does not read would be hit most
        document = {k: v for k, v in document.items() if k not in ("quant", "made", "needs")}
    for _ in range(rng.randint(1, 2)):
        *path, key = rng.choice(list(places(document)))
        at = document
        for step in path:
            at = at[step]
        if rng.random() < 0.2:
            del at[key]
        else:
            at[key] = rng.choice(ODD)
    snapshot, artifact = taken[0], root
    if name == "manifest":
        artifact = tmp_path / "copy"
        artifact.mkdir()
        for path in root.iterdir():
            (artifact / path.name).symlink_to(path)
        (artifact / "manifest.json").unlink()
        (artifact / "manifest.json").write_text(json.dumps(document))
    else:
        head = json.dumps(document).encode()
        body = struct.pack("<8sII", b"EDGEKVSN", 2, len(head)) + head + raw[16 + length : -32]
        snapshot = seal(tmp_path / "odd", body)
    done = run(artifact, "--ids", "1", "--max-new-tokens", 1, "--restore", snapshot)
    if done.returncode:
        refused(done, "")
    else:
        assert done.stdout.strip().isdecimal()


def test_programs_and_weights_that_are_not_the_artifacts_are_refused(root, tmp_path):
    copy = shutil.copytree(root, tmp_path / "copy")
    program, weights = copy / "executorch/model.pte", copy / "executorch/weights.bin"
    data = program.read_bytes()
    program.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    refused(run(copy, "--ids", "1"), "model.pte is not the file that was exported")
    program.write_bytes(data)
    weights.write_bytes(weights.read_bytes()[:-4096])
    refused(run(copy, "--ids", "1"), "weights.bin has ")
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["files"]["executorch/weights.bin"]["sample"] = None
    manifest["files"]["executorch/weights.bin"]["size"] -= 4096
    (copy / "manifest.json").write_text(json.dumps(manifest))
    refused(run(copy, "--ids", "1"), "it is for weights of ")
    weights.unlink()
    refused(run(copy, "--ids", "1"), "weights.bin cannot be opened")
    manifest["backends"]["executorch"]["details"]["weights"] = "../../weights.bin"
    (copy / "manifest.json").write_text(json.dumps(manifest))
    refused(run(copy, "--ids", "1"), "a path outside the artifact")


def test_more_threads_than_cpus_are_capped(root):
    done = run(root, "--ids", "1", "--max-new-tokens", 1, "--threads", 100_000)
    assert done.returncode == 0 and done.stderr.startswith("Warning: --threads 100000 is more")
