"""The app's runtime in a desktop JVM, over the onnxruntime of Android, against the Python one."""

import base64
import json
import re
import shutil

import numpy as np
import pytest
from android_host import DEMO, HostError, floats, start
from fake_artifact import edit_manifest, write_artifact

from edge_kv.artifact import read_artifact
from edge_kv.memory import predict_artifact
from edge_kv.parity import divergence
from edge_kv.ple import PleTable
from edge_kv.runtime import Chat, Options, load, native_library
from edge_kv.runtime.bench import bench
from edge_kv.runtime.generation import generate
from edge_kv.runtime.sampling import Sampler


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    server = start(tmp_path_factory.mktemp("scratch"))
    yield server
    server.close()


def prompt(n, vocab=2048, seed=3):
    return [2, *np.random.default_rng(seed).integers(5, vocab, n - 1).tolist()]


def test_the_manifest_is_read_as_python_reads_it(host, tiny_artifact):
    artifact = read_artifact(tiny_artifact)
    answer = host.ask("artifact", root=str(tiny_artifact), digests=True)
    assert answer == {
        "fingerprint": artifact.model_digest,
        "plan": artifact.plan_digest,
        "bytes": artifact.plan.bytes,
        "views": [t.name for t in artifact.plan.tables],
    }


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
def test_tokens_equal_the_python_runtimes(host, exact_artifact, prompt_tokens):
    ids = prompt(prompt_tokens)
    with load(exact_artifact, threads=1) as session:
        wanted = list(generate(session, ids, max_new_tokens=140))
    host.ask("open", root=str(exact_artifact), threads=1)
    assert host.ask("generate", ids=ids, stop=[], max_new_tokens=140) == wanted
    assert len(wanted) == 140


def test_logits_of_the_shipped_kernels_agree(host, tiny_artifact):
    """int4 weights, int8 state: the 8-bit kernels of two engine versions, over the same 200 ids."""
    ids = prompt(330)
    with load(tiny_artifact, threads=1) as session:
        session.prefill(ids[:130])
        wanted = np.stack([session.decode(i) for i in ids[130:]])
    host.ask("open", root=str(tiny_artifact), threads=1)
    host.ask("prefill", ids=ids[:130])
    found = divergence(wanted, host.decode(ids[130:]))
    assert found.max_kl < 1e-2 and found.mean_kl < 1e-3 and found.top1 > 0.95


@pytest.mark.parametrize("kv", ["f32", "f16", "int8"])
@pytest.mark.parametrize("ple", [True, False])
def test_every_kind_of_state_is_bound_in_place(host, tmp_path, kv, ple):
    """The hand-made model notices any row that is stale, shifted or not written."""
    root = write_artifact(tmp_path / "toy", kv=kv, ple=ple, ctx=300)
    ids = np.random.default_rng(5).integers(0, 200, 290).tolist()
    with load(root, threads=1) as session:
        session.prefill(ids[:250])
        wanted = np.stack([session.decode(i) for i in ids[250:]])
    host.ask("open", root=str(root), threads=1)
    host.ask("prefill", ids=ids[:250])
    np.testing.assert_allclose(host.decode(ids[250:]), wanted, rtol=1e-5, atol=1e-5)


def test_going_back_gives_the_same_logits(host, exact_artifact):
    ids = prompt(120)
    host.ask("open", root=str(exact_artifact), threads=1)
    host.ask("prefill", ids=ids[:100])
    first = host.decode(ids[100:])
    state = host.ask("rewind", n=20)
    assert state == {"pos": 100, "written": 120, "max_rewind": 100 - (120 - 95 + 63)}
    np.testing.assert_array_equal(host.decode(ids[100:]), first)
    with pytest.raises(HostError, match="the rings reach back 32"):
        host.ask("rewind", n=33)
    assert host.ask("reset") == {"pos": 0, "written": 0, "max_rewind": 0}


@pytest.mark.parametrize("length", [40, 97, 300])
def test_snapshots_go_both_ways(host, exact_artifact, tmp_path, length):
    ids = prompt(length + 30)
    theirs, ours = str(tmp_path / "python.kv"), str(tmp_path / "kotlin.kv")
    with load(exact_artifact, threads=1) as session:
        session.prefill(ids[:length])
        session.snapshot(theirs, {"by": "python"})
        wanted = np.stack([session.decode(i) for i in ids[length:]])
        host.ask("open", root=str(exact_artifact), threads=1)
        assert host.ask("restore", path=theirs)["note"] == {"by": "python"}
        found = host.decode(ids[length:])
        np.testing.assert_allclose(found, wanted, atol=1e-3)
        assert (found.argmax(-1) == wanted.argmax(-1)).all()
        host.ask("reset")
        host.ask("prefill", ids=ids[:length])
        host.ask("snapshot", path=ours)
        mine = host.decode(ids[length:])
        assert session.restore(ours) == {"by": "kotlin"}
        assert session.tokens == tuple(ids[:length])
        again = np.stack([session.decode(i) for i in ids[length:]])
        np.testing.assert_allclose(again, wanted, atol=1e-3)
    host.ask("reset")
    host.ask("restore", path=ours)  # its own: bit for bit
    np.testing.assert_array_equal(host.decode(ids[length:]), mine)


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
    sampler = Sampler(**options, seed=11)
    wanted = [sampler(logits, history) for _ in range(60)]
    text = base64.b64encode(logits.tobytes()).decode()
    asked = {**options, "seed": 11}
    assert host.ask("sample", logits=text, history=history, count=60, sampling=asked) == wanted


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
    files = {**manifest["files"], "ple.bin": {"size": len(data), "sha256": ""}}
    edit_manifest(root, ple=entry, files=files)
    artifact = read_artifact(root)
    ids = np.array([0, 1, 200, 1, 7])
    wanted = PleTable(root / "ple.bin", artifact.manifest.ple).rows(ids, 2)
    found = floats(host.ask("ple", root=str(root), ids=ids.tolist(), layers=2))
    np.testing.assert_array_equal(found.reshape(wanted.shape), wanted)


def test_a_step_can_be_cancelled_from_another_thread(host, exact_artifact):
    host.ask("open", root=str(exact_artifact), threads=1)
    answer = host.ask("cancel", ids=prompt(500), after_ms=0)
    assert answer["said"] == "CancelledException" and answer["pos"] % 32 == 0
    ids = prompt(60)
    with load(exact_artifact, threads=1) as session:
        wanted = list(generate(session, ids, max_new_tokens=10))
    assert host.ask("generate", ids=ids, stop=[], max_new_tokens=10) == wanted


def test_memory_is_told_apart(host):
    memory = host.ask("memory")
    assert memory["peak"] >= memory["anon"] > 0 and memory["file"] > 0 and memory["pss"] > 0


def damage(root, what):
    """The damages of an artifact by name; docs/errors.md shows what Python says to them."""
    manifest = root / "manifest.json"
    raw = json.loads(manifest.read_text())
    if what == "not JSON":
        manifest.write_text("{")
    elif what == "a list":
        manifest.write_text("[]")
    elif what == "version":
        edit_manifest(root, schema_version=99)
    elif what == "unknown field":
        edit_manifest(root, surprise=1)
    elif what == "wrong type":
        edit_manifest(root, plan={**raw["plan"], "ctx": "many"})
    elif what == "missing field":
        edit_manifest(root, model={k: v for k, v in raw["model"].items() if k != "vocab_size"})
    elif what == "outside":
        edit_manifest(root, files={**raw["files"], "../evil": {"size": 1, "sha256": ""}})
    elif what == "missing file":
        (root / "ple.bin").unlink()
    elif what == "cut off":
        (root / "ple.bin").write_bytes(b"short")
    elif what == "link":
        (root / "ple.bin").unlink()
        (root / "ple.bin").symlink_to("/etc/hostname")
    elif what == "unlisted":
        edit_manifest(root, files={k: v for k, v in raw["files"].items() if k != "ple.bin"})
    elif what == "short ring":
        buffers = [dict(b) for b in raw["plan"]["buffers"]]
        for b in buffers:
            if b["kind"] == "ring":
                b["shape"][1] -= 1
        edit_manifest(root, plan={**raw["plan"], "buffers": buffers})
    elif what == "no engine":
        edit_manifest(root, backends={})
    elif what == "another contract":
        backends = raw["backends"]
        backends["onnx"]["programs"]["decode"]["inputs"][0]["dtype"] = "float"
        edit_manifest(root, backends=backends)
    elif what == "another input":
        backends = raw["backends"]
        for io in ("inputs", "outputs"):
            entries = backends["onnx"]["programs"]["decode"][io]
            entries[:] = [t for t in entries if not t["name"].startswith("k0")]
        edit_manifest(root, backends=backends)
    elif what == "not a program":
        data = b"x" * (root / "onnx/decode.onnx").stat().st_size
        (root / "onnx/decode.onnx").write_bytes(data)


@pytest.mark.parametrize(
    "what,kind,words",
    [
        ("not JSON", "ArtifactException", "is not valid JSON"),
        ("a list", "ArtifactException", "is not a JSON object"),
        ("version", "ArtifactException", "has schema_version 99, this app reads 1"),
        ("unknown field", "ArtifactException", "has a field 'surprise'"),
        ("wrong type", "ArtifactException", 'ctx is "many", expected a whole number'),
        ("missing field", "ArtifactException", "vocab_size is missing"),
        ("outside", "ArtifactException", "a path outside the artifact; refused"),
        ("missing file", "ArtifactException", "is missing; copy or export"),
        ("cut off", "ArtifactException", "has 5 bytes, the manifest says"),
        ("link", "ArtifactException", "a link that leaves the artifact"),
        ("unlisted", "ArtifactException", "but does not list its size"),
        ("short ring", "ArtifactException", "slots where 7 are needed"),
        ("no engine", "ArtifactException", "has no programs for 'onnx'"),
        ("another contract", "ArtifactException", "disagree about 'ids'"),
        ("another input", "ArtifactException", "disagree about 'k0'"),
        ("not a program", "ArtifactException", "onnxruntime cannot load"),
    ],
)
def test_damaged_artifacts_are_refused_in_words(host, tmp_path, what, kind, words):
    root = write_artifact(tmp_path / "toy")
    damage(root, what)
    with pytest.raises(HostError) as error:
        host.ask("open", root=str(root), threads=1)
    assert error.value.kind == kind and words in str(error.value)


def test_a_directory_that_is_no_artifact_is_refused(host, tmp_path):
    with pytest.raises(HostError, match="is not an edge-kv artifact"):
        host.ask("open", root=str(tmp_path), threads=1)
    with pytest.raises(HostError, match="is not a directory"):
        host.ask("open", root=str(tmp_path / "none"), threads=1)


def test_a_changed_byte_is_found_by_digest(host, tmp_path):
    root = write_artifact(tmp_path / "toy")
    data = bytearray((root / "ple.bin").read_bytes())
    data[5] ^= 1
    (root / "ple.bin").write_bytes(data)
    with pytest.raises(HostError, match=r"ple.bin has SHA-256 .* the file was changed"):
        host.ask("artifact", root=str(root), digests=True)


def test_bad_requests_leave_the_session_as_it_was(host, tmp_path):
    host.ask("open", root=str(write_artifact(tmp_path / "toy")), threads=1)
    host.ask("prefill", ids=[3, 4, 5])
    for ids, words in (([4, 100_000], "Token id 100000 at index 1"), ([1] * 62, "do not fit")):
        with pytest.raises(HostError, match=words):
            host.ask("prefill", ids=ids)
    with pytest.raises(HostError, match="The prompt is empty"):
        host.ask("generate", ids=[], stop=[], max_new_tokens=3)
    with pytest.raises(HostError, match="The prompt has 65 tokens, the context 64"):
        host.ask("generate", ids=[1] * 65, stop=[], max_new_tokens=3)
    with pytest.raises(HostError, match=r"Sampling: top_p 0.0 must .*; min_p 2.0 must"):
        host.ask(
            "generate", ids=[1], stop=[], max_new_tokens=3, sampling={"top_p": 0.0, "min_p": 2.0}
        )
    assert host.ask("rewind", n=0)["pos"] == 3
    host.ask("close")
    with pytest.raises(HostError, match="This session is closed"):
        host.ask("reset")


def test_a_full_context_ends_the_reply(host, tmp_path):
    host.ask("open", root=str(write_artifact(tmp_path / "toy", ctx=20)), threads=1)
    assert len(host.ask("generate", ids=[3] * 15, stop=[], max_new_tokens=50)) == 6


def test_damaged_snapshots_are_refused_and_change_nothing(host, tmp_path):
    root = write_artifact(tmp_path / "toy")
    host.ask("open", root=str(root), threads=1)
    host.ask("prefill", ids=list(range(10)))
    good = tmp_path / "good.kv"
    host.ask("snapshot", path=str(good))
    data = good.read_bytes()
    other = tmp_path / "other.kv"
    with load(write_artifact(tmp_path / "other", seed=1, window=6), threads=1) as session:
        session.prefill(range(10))
        session.snapshot(other)
    cases = {
        "Cannot open the snapshot": None,
        "is not an edge-kv snapshot": b"hello",
        "is a snapshot of version 9": data[:8] + b"\x09" + data[9:],
        "is cut off or changed": data[:-40],
        r"is cut off or changed \(its": data[:200] + bytes([data[200] ^ 1]) + data[201:],
        "belongs to another model": other.read_bytes(),
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
    shutil.rmtree(root)


def test_packed_weights_are_made_once_and_give_the_same_logits(host, exact_artifact, tmp_path):
    ids = prompt(50)
    host.ask("open", root=str(exact_artifact), threads=1)
    host.ask("prefill", ids=ids[:40])
    wanted = host.decode(ids[40:])

    def opened():
        answer = host.ask(
            "open", root=str(exact_artifact), threads=1, pack_from=0, cache=str(tmp_path)
        )
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


def test_a_measurement_is_the_document_of_edge_kv_bench(host, exact_artifact):
    asked = {"prompt": 32, "tokens": 4, "repeats": 2}
    answer = host.ask("bench", root=str(exact_artifact), depths=[512, 100], **asked)
    found = answer["document"]
    wanted = bench(read_artifact(exact_artifact), [100, 512], threads=1, **asked)
    assert keys(found) == keys(wanted)
    assert [r["ctx"] for r in found["runs"]] == [100, 512]
    for run, theirs in zip(found["runs"], wanted["runs"], strict=True):
        assert keys({**run, "roofline": theirs["roofline"]}) == keys(theirs)
        assert run["depth"] == theirs["depth"] and run["filled"] == "prefilled in this run"
        assert run["decode"]["tokens"] == 8 and len(run["prefill"]["seconds"]) == 2
        assert 0 < run["decode"]["seconds"]["p50"] <= run["decode"]["seconds"]["p99"]
        assert all(run["memory"][p]["anon_peak"] > 0 for p in ("load", "prefill", "decode"))
    assert set(found["plan"][0]) == set(wanted["plan"][0])
    planned = predict_artifact(read_artifact(exact_artifact)).phases["decode"].anon
    assert found["plan"][0]["phases"]["decode"]["anon"] == planned
    assert any("filling" in s for s in answer["said"])
    with pytest.raises(HostError, match="Depth 513 is outside 2 … 512"):
        host.ask("bench", root=str(exact_artifact), depths=[513], **asked)


def keys(value):
    """The shape of a document: its keys, without values; what a phone leaves out is null."""
    if isinstance(value, dict):
        unmeasured = ("bandwidth", "machine", "plan", "runs", "load_average")
        return {k: None if k in unmeasured else keys(v) for k, v in value.items()}
    return None


@pytest.fixture
def storage(exact_artifact, tmp_path):
    """App storage with tiny in it, and a directory that is not an artifact."""
    (tmp_path / "storage" / "empty").mkdir(parents=True)
    (tmp_path / "storage" / "tiny").symlink_to(exact_artifact)
    (tmp_path / "cache").mkdir()
    return {"storage": str(tmp_path / "storage"), "cache": str(tmp_path / "cache")}


def test_a_screen_chats_and_takes_a_conversation_up_again(host, storage, exact_artifact):
    assert host.ask("assistant", **storage) == ["tiny"]
    screen = host.ask("act", action="load", name="tiny")
    assert screen["model"] == "tiny" and screen["ctx"] == 512 and screen["problem"] is None
    screen = host.ask("act", action="send", content="And it came to pass", max_new_tokens=20)
    with load(exact_artifact, threads=1) as session:
        chat = Chat(session, options=Options(max_new_tokens=20))
        first = "".join(chat.send("And it came to pass"))
        second = "".join(chat.send("Behold"))
    assert screen["transcript"] == f"▸ And it came to pass\n\n{first}"
    assert screen["speed"] > 0 and screen["position"] > 20 and screen["activity"] is None
    host.ask("act", action="save")
    host.ask("assistant", **storage)  # the system ended the app, the user opens it again
    again = host.ask("act", action="load", name="tiny")
    assert again["transcript"] == screen["transcript"]
    again = host.ask("act", action="send", content="Behold", max_new_tokens=20)
    assert again["transcript"].endswith(f"▸ Behold\n\n{second}")
    assert host.ask("act", action="new chat")["transcript"] == ""


def test_a_screen_says_what_is_wrong_in_words(host, storage):
    host.ask("assistant", **storage)
    problem = host.ask("act", action="send", content="Hi", max_new_tokens=1)["problem"]
    assert problem == "No model is loaded; choose one first."
    assert "is not an edge-kv artifact" in host.ask("act", action="load", name="empty")["problem"]
    host.ask("assistant", available=10_000_000, **storage)
    screen = host.ask("act", action="load", name="tiny")
    assert screen["model"] is None
    assert "of memory by its plan, 10 MB are available; close other apps" in screen["problem"]


def test_stop_ends_a_reply_at_once(host, storage):
    host.ask("assistant", **storage)
    host.ask("act", action="load", name="tiny")
    host.ask("act", action="send", content="And it came", max_new_tokens=400, wait=False)
    while not host.ask("act", action="look", wait=False)["position"]:
        pass
    screen = host.ask("act", action="stop")
    assert screen["activity"] is None and screen["problem"] is None
    assert 0 < screen["position"] < 400
    screen = host.ask("act", action="send", content="And", max_new_tokens=5)
    assert screen["problem"] is None and "▸ And" in screen["transcript"]


def test_a_screen_measures_and_loads_its_model_again(host, storage):
    host.ask("assistant", **storage)
    host.ask("act", action="load", name="tiny")
    screen = host.ask("act", action="measure", depths=[100, 2048])
    assert screen["problem"] is None
    assert [r["ctx"] for r in screen["measurement"]["runs"]] == [100, 512]


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
