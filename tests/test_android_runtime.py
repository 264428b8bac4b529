"""The app's runtime in a desktop JVM, over the onnxruntime of Android, against the Python one."""

import base64
import copy
import json
import re
import shutil

import numpy as np
import pytest
from android_artifacts import VOCAB, export
from android_host import DEMO, HostError, floats
from fake_artifact import edit_manifest, write_artifact
from tiny_models import FEWEST

from edge_kv.artifact import read_artifact, sample_of, sha256_file
from edge_kv.errors import EdgeKVError
from edge_kv.files import LONGEST_TEXT
from edge_kv.manifest import LONGEST_MANIFEST
from edge_kv.parity import divergence
from edge_kv.plan import Table
from edge_kv.ple import PleTable
from edge_kv.runtime import load, native_library
from edge_kv.runtime.bench import bench
from edge_kv.runtime.generation import feed, generate
from edge_kv.runtime.sampling import Sampler

FAMILIES = {  # rings of 15 slots, strides of 4 and 16, two programs each
    "laguna": {"ctx": 300, "kv": "f16"},
    "zaya-sliding": {"ctx": 300, **FEWEST["zaya-sliding"]},
    # Rows of four positions are bound in prefixes of 256.
    "deepseek_v4": {"ctx": 1100, **FEWEST["deepseek_v4"]},
}


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    """Windows and full tables in float: no 8-bit kernels, whose results differ by version."""
    root = tmp_path_factory.mktemp("exact") / "tiny"
    return export("laguna-element", root, ctx=512, chunk=32, sliding_window=64)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    return export(
        "llama", tmp_path_factory.mktemp("stored") / "tiny", ctx=512, kv="int8", quant="int4"
    )


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    return export(request.param, tmp_path_factory.mktemp("f") / "made", **FAMILIES[request.param])


def prompt(n, seed=3):
    return [2, *np.random.default_rng(seed).integers(5, VOCAB, n - 1).tolist()]


def python(root, ids, count):
    with load(root, "onnx-stock", threads=1) as session:
        return list(generate(session, ids, max_new_tokens=count))


def test_the_manifest_is_read_as_python_reads_it(host, stored):
    artifact = read_artifact(stored)
    answer = host.ask("artifact", root=str(stored), digests=True)
    sampling = artifact.sampling
    assert answer["model"] == artifact.model_digest and answer["plan"] == artifact.plan_digest
    assert answer["bytes"] == artifact.plan.bytes and answer["eos"] == artifact.tokens.eos == [1, 4]
    assert answer["tables"] == [[t.name, *t.shape] for t in artifact.plan.tables]
    assert answer["sampling"] == [sampling.temperature, sampling.top_k, sampling.top_p, 0.0, 1.0]


@pytest.mark.parametrize(
    "slots,stride,keep",
    [(512, 1, 0), (95, 1, 64), (129, 4, 0), (33, 16, 0), (1, 1, 0), (600, 1, 1)],
)
def test_tables_follow_the_rules_of_the_plan(host, slots, stride, keep):
    table = Table("t", (1, 1), slots, stride, keep, readers=(0,))
    ends = range(1, 600)
    at = [[pos, written] for written in range(0, 512, 7) for pos in range(0, written + 1, 5)]
    answer = host.ask("rows", table=[slots, stride, keep], ends=list(ends), at=at)
    assert answer["live"] == [table.live(end) if slots > 1 else 1 for end in ends]
    held = [(table.held(p, w), table.can_resume(p, w)) for p, w in at]
    assert answer["held"] == [[h.start, h.stop, resume] for h, resume in held]


@pytest.mark.parametrize(
    "prompt_tokens",
    [
        1,  # everything through decode
        20,  # inside the window of 64
        64,  # decoding begins at the window's edge
        97,  # three chunks of 32 and the token behind them: a chunk edge, and the rings of 95 wrap
        250,  # several wraps; live rows go from 256 to 512 while decoding
    ],
)
def test_tokens_equal_the_python_runtimes(host, exact, prompt_tokens):
    ids = prompt(prompt_tokens)
    wanted = python(exact, ids, 140)
    host.ask("open", root=str(exact), threads=1)
    assert host.ask("generate", ids=ids, stop=[], max_new_tokens=140) == {
        "ids": wanted, "finish": "LENGTH",
    }  # fmt: skip
    assert len(wanted) == 140 and len(set(wanted)) > 20


def test_every_family_computes_the_same(host, family):
    """Mixed chunks, a wrong continuation that is overwritten, decoding across prefixes of 256."""
    ctx = read_artifact(family).plan.ctx
    ids, forced = prompt(ctx - 60), prompt(50, seed=4)
    with load(family, "onnx-stock", threads=1) as session:
        session.prefill(ids)
        wanted = np.stack([session.decode(i) for i in forced])
    host.ask("open", root=str(family), threads=1)
    host.ask("prefill", ids=ids[:37])
    host.ask("prefill", ids=[(i + 9) % VOCAB for i in ids[37:42]])
    host.ask("rewind", n=5)
    for part in (ids[37:40], ids[40:]):
        host.ask("prefill", ids=part)
    answers = host.ask("decode", ids=forced)
    found = np.stack([np.frombuffer(base64.b64decode(x), "<f4") for x in answers])
    assert np.abs(found - wanted).max() <= 0.02 * wanted.std()
    assert wanted.std(0).min() > 0.002 * wanted.std()  # what is fed matters everywhere


def test_per_layer_rows_reach_the_programs(host, exact_artifact):
    """The shipped model: layers that share rows, per-layer rows read from their file."""
    ids = prompt(97)
    host.ask("open", root=str(exact_artifact), threads=1)
    found = host.ask("generate", ids=ids, stop=[], max_new_tokens=60)
    assert found["ids"] == python(exact_artifact, ids, 60)


@pytest.mark.parametrize("kv", ["f32", "f16", "int8"])
@pytest.mark.parametrize("ple", [True, False])
def test_every_kind_of_state_is_bound_in_place(host, tmp_path, kv, ple):
    """The hand-made model notices any row that is stale, shifted or not written."""
    root = write_artifact(tmp_path / "toy", kv=kv, ple=ple, ctx=300)
    ids = np.random.default_rng(5).integers(0, 200, 290).tolist()
    with load(root, "onnx-stock", threads=1) as session:
        session.prefill(ids[:250])
        wanted = np.stack([session.decode(i) for i in ids[250:]])
    host.ask("open", root=str(root), threads=1)
    host.ask("prefill", ids=ids[:250])
    np.testing.assert_allclose(host.decode(ids[250:]), wanted, rtol=1e-5, atol=1e-5)


def test_logits_of_stored_weights_agree(host, stored):
    """int4 weights, int8 state: the 8-bit kernels of two engine versions, over the same ids."""
    ids = prompt(330)
    with load(stored, "onnx-stock", threads=1) as session:
        session.prefill(ids[:130])
        wanted = np.stack([session.decode(i) for i in ids[130:]])
    host.ask("open", root=str(stored), threads=1)
    host.ask("prefill", ids=ids[:130])
    found = divergence(wanted, host.decode(ids[130:]))
    assert found.max_kl < 1e-2 and found.mean_kl < 1e-3 and found.top1 > 0.9


def test_going_back_gives_the_same_logits(host, exact):
    ids = prompt(120)
    host.ask("open", root=str(exact), threads=1)
    host.ask("prefill", ids=ids[:100])
    first = host.decode(ids[100:])
    state = host.ask("rewind", n=20)
    assert state == {"pos": 100, "written": 120, "max_rewind": 100 - (120 - 95 + 63)}
    np.testing.assert_array_equal(host.decode(ids[100:]), first)
    with pytest.raises(HostError, match="the rings reach back 32"):
        host.ask("rewind", n=33)
    assert host.ask("reset") == {"pos": 0, "written": 0, "max_rewind": 0}


def test_checkpoints_take_long_conversations_up_again(host, exact):
    """Feeds that branch off at their beginnings: what is reused, and logits, are Python's."""
    rng = np.random.default_rng(0)
    base = prompt(300)
    host.ask("open", root=str(exact), threads=1)
    lengths = []
    with load(exact, "onnx-stock", threads=1) as session:
        for _ in range(14):
            cut = int(rng.choice([0, 5, 40, 41, 90, 150, 200, 280]))
            ids = [*base[:cut], *rng.integers(5, VOCAB, int(rng.integers(1, 200))).tolist()]
            at = sorted(int(a) for a in rng.choice([5, 40, 90, 150, 200, 280], 2, replace=False))
            reused = feed(session, ids, at)
            answer = host.ask("feed", ids=ids, at=at)
            assert (answer["reused"], answer["pos"], answer["written"], answer["max_rewind"]) == (
                reused, session.pos, session.written, session.max_rewind,
            )  # fmt: skip
            lengths.append(reused)
            wanted = session.decode(7)
            np.testing.assert_allclose(host.decode([7])[0], wanted, atol=2e-4)
    assert len(set(lengths)) > 3


@pytest.mark.parametrize("length", [40, 97, 300])
def test_snapshots_go_both_ways_byte_for_byte(host, exact, tmp_path, length):
    ids = prompt(length + 30)
    theirs, ours = tmp_path / "python.kv", tmp_path / "kotlin.kv"
    note = {"ü": ["🙂", 1, 2.5, True, None], "a": {"z": "\n", "b": -3}}
    host.ask("open", root=str(exact), threads=1)
    with load(exact, threads=1) as session:
        session.prefill(ids[:length])
        session.snapshot(theirs, {"by": "kotlin", "note": note})
        wanted = np.stack([session.decode(i) for i in ids[length:]])
        assert host.ask("restore", path=str(theirs))["note"] == {"by": "kotlin", "note": note}
        host.ask("snapshot", path=str(ours), note=note)
        assert ours.read_bytes() == theirs.read_bytes()
        found = host.decode(ids[length:])
        np.testing.assert_allclose(found, wanted, atol=1e-3)
        host.ask("reset")
        host.ask("prefill", ids=ids[:length])
        host.ask("snapshot", path=str(ours), note=note)
        mine = host.decode(ids[length:])
        assert session.restore(ours) == {"by": "kotlin", "note": note}
        assert session.tokens == tuple(ids[:length])
        again = np.stack([session.decode(i) for i in ids[length:]])
        np.testing.assert_allclose(again, wanted, atol=1e-3)
    host.ask("reset")
    host.ask("restore", path=str(ours))  # its own: bit for bit
    np.testing.assert_array_equal(host.decode(ids[length:]), mine)


def test_snapshots_of_every_family_are_taken_up_again(host, family, tmp_path):
    path, ids = str(tmp_path / "x.kv"), prompt(100)
    host.ask("open", root=str(family), threads=1)
    host.ask("prefill", ids=ids[:71])
    host.ask("snapshot", path=path)
    wanted = host.decode(ids[71:])
    host.ask("open", root=str(family), threads=1)
    host.ask("prefill", ids=prompt(90, seed=4))
    host.ask("restore", path=path)
    np.testing.assert_array_equal(host.decode(ids[71:]), wanted)


def test_one_seed_chooses_what_numpy_chooses(host):
    for seed in (0, 1, 7, 2**40 + 3):
        answer = host.ask("random", seed=seed, count=300, bound=262_144)
        rng = np.random.default_rng(seed)
        assert answer["doubles"] == rng.random(300).tolist()
        rng = np.random.default_rng(seed)
        assert answer["integers"] == rng.integers(0, 262_144, 300).tolist()


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 40},
        {"temperature": 1.3, "top_p": 0.9},
        {"temperature": 5.0, "top_p": 0.99},
        {"temperature": 0.9, "top_k": 20, "top_p": 0.8, "min_p": 0.05},
        {"temperature": 0.0, "repetition_penalty": 1.3},
        {"temperature": 0.8, "repetition_penalty": 1.2, "min_p": 0.1},
    ],
)
def test_sampling_is_the_python_samplers(host, options):
    logits = (np.random.default_rng(4).standard_normal(3000) * 3).astype("<f4")
    logits[100:140] = logits[50]  # ties
    history = [int(logits.argmax()), 5, 9]
    never = [int(i) for i in np.argsort(-logits)[1:4]] + [5000]
    sampler = Sampler(**options, seed=11, suppress=never)
    wanted = [sampler(logits, history) for _ in range(60)]
    text = base64.b64encode(logits.tobytes()).decode()
    asked = {"history": history, "count": 60, "sampling": {**options, "seed": 11}}
    assert host.ask("sample", logits=text, suppress=never, **asked) == wanted


@pytest.mark.parametrize("bits,block", [(4, 4), (8, 6), (32, 0)])
def test_ple_rows_are_python_s(host, tmp_path, bits, block):
    root = write_artifact(tmp_path / "toy")
    manifest = json.loads((root / "manifest.json").read_text())
    entry = {**manifest["ple"], "bits": bits, "block": block}
    values = entry["n_layers"] * entry["dim"]
    size = values * bits // 8 + (0 if bits == 32 else values // block * 2)
    rng = np.random.default_rng(0)
    if bits == 32:
        data = rng.standard_normal((entry["rows"], values)).astype("<f4").tobytes()
    else:
        raw = rng.integers(0, 256, (entry["rows"], size), dtype=np.uint8)
        scales = rng.standard_normal((entry["rows"], values // block)).astype("<f2")
        scales[0, 0], scales[1, 0] = 6e-8, -65504  # subnormal, largest
        raw[:, values * bits // 8 :] = scales.view(np.uint8)
        data = raw.tobytes()
    (root / "ple.bin").write_bytes(data)
    files = {**manifest["files"], "ple.bin": {"size": len(data), "sha256": "0" * 64}}
    edit_manifest(root, ple=entry, files=files)
    ids = np.array([0, 1, 200, 1, 7])
    wanted = PleTable(root / "ple.bin", read_artifact(root).manifest.ple).rows(ids, 2)
    found = floats(host.ask("ple", root=str(root), ids=ids.tolist(), layers=2))
    np.testing.assert_array_equal(found.reshape(wanted.shape), wanted)


def test_a_step_can_be_cancelled_from_another_thread(host, exact):
    host.ask("open", root=str(exact), threads=1)
    answer = host.ask("cancel", ids=prompt(500), after_ms=0)
    assert answer["said"] == "CancelledException" and answer["pos"] % 32 == 0
    ids = prompt(60)
    asked = host.ask("generate", ids=ids, stop=[], max_new_tokens=10)
    assert asked["ids"] == python(exact, ids, 10)


def test_memory_is_told_apart(host):
    memory = host.ask("memory")
    assert memory["peak"] >= memory["anon"] > 0 and memory["file"] > 0 and memory["pss"] > 0


def paths(node, path=()):
    """Every place in a JSON tree, the first two of a list."""
    for key in list(node) if isinstance(node, dict) else range(min(2, len(node))):
        yield (*path, key)
        if isinstance(node[key], dict | list):
            yield from paths(node[key], (*path, key))


def test_manifests_are_refused_where_python_refuses_them(host, stored, tmp_path):
    """Every field missing, null, of another kind and out of range; unknown fields everywhere."""
    root = tmp_path / "toy"
    shutil.copytree(stored, root)
    good = json.loads((root / "manifest.json").read_text())
    (judged,) = good["parity"].values()
    same = ("lowering", "kernels", "quantisation", "correlation", "lowering_limit")
    judged["draft"] = {
        "drafts": 9, **{name: judged[name] for name in same},
        "verify": {**judged["verify"], "min_common": 0.5},
    }  # fmt: skip
    values = [None, "", "x" * 300, -1, 0, 1.5, 1e40, True, [], {}, "../x", "a b"]
    places = [p for p in paths(good) if p[0] not in ("made", "files") and "tensors" not in p[:-1]]
    rng = np.random.default_rng(0)
    refused = accepted = 0
    for place in places:
        for change in ("drop", "unknown", *rng.choice(len(values), 4, replace=False)):
            tree = copy.deepcopy(good)
            node = tree
            for key in place[:-1]:
                node = node[key]
            if change == "drop":
                del node[place[-1]]
            elif change == "unknown":
                if not isinstance(node, dict):
                    continue
                node["surprise"] = 1
            else:
                node[place[-1]] = values[change]
            (root / "manifest.json").write_text(json.dumps(tree))
            try:
                read_artifact(root).plan.validate()
                wanted = True
            except EdgeKVError:
                wanted = False
            try:
                host.ask("artifact", root=str(root))
                found = True
            except HostError as e:
                assert e.kind == "ArtifactException"
                found = False
            said = change if isinstance(change, str) else values[change]
            assert found == wanted, f"{place} {said!r}: Python {wanted}, Kotlin {found}"
            refused, accepted = refused + (not wanted), accepted + wanted
    assert refused > 400 and accepted > 50


def damage(root, what):
    """The damages of an artifact by name; docs/errors.md shows what Python says to them."""
    manifest = root / "manifest.json"
    raw = json.loads(manifest.read_text())
    decode = root / "onnx/decode.onnx"
    program = raw["backends"]["onnx"]["programs"]["decode"]
    if what == "not JSON":
        manifest.write_text("{")
    elif what == "a list":
        manifest.write_text("[]")
    elif what == "a long text":
        manifest.write_text(json.dumps(raw) + " " * LONGEST_MANIFEST)
    elif what == "a long tokenizer":
        raw["files"]["tokenizer.json"]["size"] = LONGEST_TEXT + 1
        edit_manifest(root, files=raw["files"])
    elif what == "schema 1":
        edit_manifest(root, schema_version=1)
    elif what == "wrong type":
        edit_manifest(root, plan={**raw["plan"], "ctx": "many"})
    elif what == "outside":
        edit_manifest(root, files={**raw["files"], "../evil": {"size": 1, "sha256": "0" * 64}})
    elif what == "missing file":
        decode.unlink()
    elif what == "cut off":
        decode.write_bytes(b"short")
    elif what == "link":
        decode.unlink()
        decode.symlink_to("/etc/hostname")
    elif what == "unlisted":
        edit_manifest(root, files={k: v for k, v in raw["files"].items() if "decode" not in k})
    elif what == "short table":
        raw["plan"]["tables"][0]["slots"] -= 1
        edit_manifest(root, plan=raw["plan"])
    elif what == "no engine":
        edit_manifest(root, backends={}, parity={})
    elif what == "another contract":
        program["inputs"][0]["dtype"] = "float"
        edit_manifest(root, backends=raw["backends"])
    elif what == "another plan":
        raw["plan"]["tables"][0]["slots"] += 1
        raw["plan"]["tables"][0]["row"][1] += 1
        edit_manifest(root, plan=raw["plan"])
    elif what == "another program":
        decode.write_bytes(b"x" * decode.stat().st_size)


@pytest.mark.parametrize(
    "what,words",
    [
        ("not JSON", "is not valid JSON"),
        ("a list", "is not a JSON object"),
        ("a long text", f"at most {LONGEST_MANIFEST} are read"),
        ("a long tokenizer", f"at most {LONGEST_TEXT} are read"),
        ("schema 1", "has schema_version 1, this app reads 2; update the app or export again"),
        ("wrong type", 'ctx is "many", expected a whole number'),
        ("outside", "a path outside the artifact; refused"),
        ("missing file", "is missing; copy or export"),
        ("cut off", "has 5 bytes, the manifest says"),
        ("link", "a link that leaves the artifact"),
        ("unlisted", "but does not list its size"),
        ("short table", "slots is 511, expected at least 512"),
        ("no engine", "has no programs for 'onnx'"),
        ("another contract", "disagree about 'ids'"),
        ("another plan", "takes 'l0.k' in another form than its plan"),
        ("another program", "decode.onnx has SHA-256"),
    ],
)
def test_damaged_artifacts_are_refused_in_words(host, stored, tmp_path, what, words):
    root = shutil.copytree(stored, tmp_path / "toy")
    damage(root, what)
    with pytest.raises(HostError) as error:
        host.ask("open", root=str(root), threads=1)
    assert error.value.kind == "ArtifactException" and words in str(error.value)


def test_a_directory_that_is_no_artifact_is_refused(host, tmp_path):
    with pytest.raises(HostError, match="is not an edge-kv artifact"):
        host.ask("open", root=str(tmp_path), threads=1)
    with pytest.raises(HostError, match="is not a directory"):
        host.ask("open", root=str(tmp_path / "none"), threads=1)


def test_a_changed_byte_is_found_by_digest(host, stored, tmp_path):
    root = shutil.copytree(stored, tmp_path / "toy")
    data = bytearray((root / "onnx/weights.bin").read_bytes())
    data[5] ^= 1
    (root / "onnx/weights.bin").write_bytes(data)
    with pytest.raises(HostError, match=r"weights.bin has SHA-256 .* the file was changed"):
        host.ask("artifact", root=str(root), digests=True)


def test_a_file_of_another_model_is_refused_at_every_load(host, stored, tmp_path):
    root = shutil.copytree(stored, tmp_path / "toy")
    weights = root / "onnx/weights.bin"
    content = np.frombuffer(weights.read_bytes(), np.uint8)
    for name, changed in (("onnx/weights.bin", content[::-1]), ("tokenizer.json", None)):
        path = root / name
        kept = path.read_bytes()
        path.write_bytes(bytes(len(kept)) if changed is None else changed.tobytes())
        with pytest.raises(HostError) as error:
            host.ask("open", root=str(root), threads=1)
        assert error.value.kind == "ArtifactException"
        assert str(error.value) == (
            f"{name} is not the file that belongs to this model (its size is right, its content "
            "is not); delete the model here and add it again."
        )
        path.write_bytes(kept)
    assert host.ask("open", root=str(root), threads=1)["pos"] == 0


@pytest.mark.parametrize("size", [1, 4096, 65 * 4096 - 1, 65 * 4096, 1_000_003])
def test_pieces_of_a_file_are_those_that_python_compares(host, tmp_path, size):
    root = write_artifact(tmp_path / "toy")
    (root / "x").write_bytes(np.random.default_rng(size).bytes(size))
    digests = {"sha256": sha256_file(root / "x"), "sample": sample_of(root / "x")}
    files = json.loads((root / "manifest.json").read_text())["files"]
    edit_manifest(root, files={**files, "x": {"size": size, **digests}})
    assert host.ask("open", root=str(root), threads=1)["pos"] == 0


def test_bad_requests_leave_the_session_as_it_was(host, stored):
    host.ask("open", root=str(stored), threads=1)
    host.ask("prefill", ids=[3, 4, 5])
    for ids, words in (([4, 100_000], "Token id 100000 at index 1"), ([1] * 510, "do not fit")):
        with pytest.raises(HostError, match=words):
            host.ask("prefill", ids=ids)
    with pytest.raises(HostError, match="The prompt is empty"):
        host.ask("generate", ids=[], stop=[], max_new_tokens=3)
    with pytest.raises(HostError, match="The prompt has 513 tokens, the context 512"):
        host.ask("generate", ids=[1] * 513, stop=[], max_new_tokens=3)
    with pytest.raises(HostError, match=r"Sampling: top_p 0.0 must .*; min_p 2.0 must"):
        host.ask(
            "generate", ids=[1], stop=[], max_new_tokens=3, sampling={"top_p": 0.0, "min_p": 2.0}
        )
    assert host.ask("rewind", n=0)["pos"] == 3
    host.ask("close")
    with pytest.raises(HostError, match="This session is closed"):
        host.ask("reset")


def test_a_full_context_ends_the_reply(host, stored):
    host.ask("open", root=str(stored), threads=1)
    answer = host.ask("generate", ids=[3] * 507, stop=[], max_new_tokens=50)
    assert len(answer["ids"]) == 6 and answer["finish"] == "FULL"


def test_damaged_snapshots_are_refused_and_change_nothing(host, stored, exact, tmp_path):
    host.ask("open", root=str(stored), threads=1)
    host.ask("prefill", ids=list(range(10)))
    good = tmp_path / "good.kv"
    host.ask("snapshot", path=str(good))
    data = good.read_bytes()
    other = tmp_path / "other.kv"
    with load(exact, "onnx-stock", threads=1) as session:
        session.snapshot(other)
    cases = {
        "Cannot open the snapshot": None,
        "is not an edge-kv snapshot": b"hello",
        "is a snapshot of version 1": data[:8] + b"\x01" + data[9:],
        "is cut off or changed": data[:-40],
        r"is cut off or changed \(its": data[:200] + bytes([data[200] ^ 1]) + data[201:],
        "belongs to another engine": other.read_bytes(),
    }
    for words, content in cases.items():
        bad = tmp_path / "bad.kv"
        bad.unlink(missing_ok=True)
        if content is not None:
            bad.write_bytes(content)
        with pytest.raises(HostError, match=words) as error:
            host.ask("restore", path=str(bad))
        assert error.value.kind == "SnapshotException"
    assert host.ask("rewind", n=0)["pos"] == 10
    with pytest.raises(HostError, match="Cannot write the snapshot"):
        host.ask("snapshot", path=str(tmp_path / "no" / "where.kv"))


def test_packed_weights_are_made_once_and_give_the_same_logits(host, stored, tmp_path):
    ids = prompt(50)
    host.ask("open", root=str(stored), threads=1)
    host.ask("prefill", ids=ids[:40])
    wanted = host.decode(ids[40:])

    def opened():
        answer = host.ask("open", root=str(stored), threads=1, pack_from=0, cache=str(tmp_path))
        assert answer["packed"]
        host.ask("prefill", ids=ids[:40])
        np.testing.assert_array_equal(host.decode(ids[40:]), wanted)
        (weights,) = tmp_path.glob("packed/*/weights.bin")
        return weights

    weights = opened()
    made = weights.stat().st_mtime_ns
    assert opened().stat().st_mtime_ns == made
    with weights.open("ab") as f:  # a file that is not as it was recorded is made anew
        f.write(b"x")
    assert opened().stat().st_size < weights.stat().st_size + 1
    assert not list(tmp_path.glob("packed/*.part")) and not list(tmp_path.glob("*.kv"))


def test_a_measurement_is_the_document_of_edge_kv_bench(host, stored):
    asked = {"prompt": 32, "tokens": 4, "repeats": 2}
    answer = host.ask("bench", root=str(stored), depths=[512, 100], **asked)
    found = answer["document"]
    wanted = bench(read_artifact(stored), [100, 512], engines=["onnx-stock"], threads=1, **asked)
    assert keys(found) == keys(wanted)
    assert [r["ctx"] for r in found["runs"]] == [100, 512]
    for run, theirs in zip(found["runs"], wanted["runs"], strict=True):
        assert keys({**run, "roofline": None}) == keys({**theirs, "roofline": None})
        assert run["depth"] == theirs["depth"] and run["filled"] == "prefilled in this run"
        assert run["decode"]["tokens"] == 8 and len(run["prefill"]["seconds"]) == 2
        assert 0 < run["decode"]["seconds"]["p50"] <= run["decode"]["seconds"]["p99"]
        assert all(run["memory"][p]["anon_peak"] > 0 for p in ("load", "prefill", "decode"))
    assert found["failures"] == wanted["failures"] == []
    assert any("filling" in s for s in answer["said"])
    with pytest.raises(HostError, match="Depth 513 is outside 2 … 512"):
        host.ask("bench", root=str(stored), depths=[513], **asked)


def keys(value):
    """The shape of a document: its keys, without values; what a phone leaves out is null."""
    if isinstance(value, dict):
        unmeasured = ("bandwidth", "machine", "plan", "runs", "load_average", "several")
        return {k: None if k in unmeasured else keys(v) for k, v in value.items()}
    return None


def test_native_operators_know_the_places_of_onnxruntimes_functions(host):
    """Each function that runtime/native/onnx_abi.h names, at its place in the release's header."""
    header = (DEMO / "build/tools/aar/headers/onnxruntime_c_api.h").read_text()
    table = header[header.index("struct OrtApi {") :]
    table = re.sub(r"//[^\n]*|/\*.*?\*/", "", table[: table.index("\n};")], flags=re.DOTALL)
    member = (
        r"ORT_API2_STATUS\((\w+)|ORT_CLASS_RELEASE\((\w+)\)|\(\s*ORT_API_CALL\s*\*\s*(\w+)\s*\)"
    )
    places = [a or (b and f"Release{b}") or c for a, b, c in re.findall(member, table)]
    ours = (native_library.SOURCES / "onnx_abi.h").read_text()
    named = re.findall(r"Entry<(\d+),[^;]*?>\s*(\w+)\{table\};", ours)
    assert len(named) > 15
    for place, name in named:
        assert places[int(place)] == name
