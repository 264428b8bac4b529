"""Manifest, schema 2: every field has a type and bounds, and a changed one ends in one sentence."""

from __future__ import annotations

import json
from copy import deepcopy

import pytest

from edge_kv import models
from edge_kv.artifact import read_artifact, sha256_file
from edge_kv.errors import ArtifactError
from edge_kv.manifest import PlanEntry, QuantEntry, model_digest, parse_manifest, plan_digest
from edge_kv.models import llama
from edge_kv.models.model import Rope

CONFIG = llama.Config(
    vocab=96, hidden=32, layers=2, max_ctx=512, q_heads=2, kv_heads=1, head_dim=16, mlp_width=64,
    rope=Rope.whole(1e4, 16),
)  # fmt: skip
PLAN = models.plan(CONFIG, ctx=300, chunk=8, kv="int8")


def io(name, shape, dtype="float"):
    return {"name": name, "dtype": dtype, "shape": shape}


@pytest.fixture
def root(tmp_path):
    """An artifact directory that reads, its programs and weights being empty files."""
    root = tmp_path / "art"
    (root / "onnx").mkdir(parents=True)
    names = ["onnx/prefill.onnx", "onnx/decode.onnx", "onnx/weights.bin", "verify.npz",
             "tokenizer.json", "ple.bin"]  # fmt: skip
    for name in names:
        (root / name).write_bytes(name.encode())
    files = {n: {"size": (root / n).stat().st_size, "sha256": sha256_file(root / n)} for n in names}
    entry = PlanEntry.of(PLAN)
    distance = {"max_abs": 1e-6, "max_kl": 0.0}
    inputs = [io("ids", ["chunk"], "int64"), io("ple", ["chunk", 2, 8])]
    program = {"inputs": inputs, "outputs": [io("logits", [96])]}
    document = {
        "schema_version": 2,
        "edge_kv": "1",
        "name": "art",
        "tokens": {"vocab": 96, "bos": 1, "eos": [2, 24], "pad": None, "suppress": [5]},
        "sampling": {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": None,
                     "repetition_penalty": 1.1},
        "identity": {"model": "a" * 64, "plan": plan_digest(entry)},
        "plan": entry.model_dump(mode="json"),
        "quant": {"scheme": "int4", "formats": {"embed": "code4-s8"},
                  "tensors": {"embed": {"format": "code4-s8", "error": 0.1}}},
        "ple": {"file": "ple.bin", "rows": 96, "n_layers": 2, "dim": 8, "bits": 8, "block": 8},
        "backends": {
            "onnx": {
                "programs": {"prefill": {"file": names[0], **program},
                             "decode": {"file": names[1], **program}},
                "files": names[:3],
                "details": {"opset": 24},
            }
        },
        "tokenizer": {"file": "tokenizer.json", "chat_template": None, "add_bos": True},
        "parity": {
            "onnx": {
                "prompt": 4, "steps": 2, "lowering": distance, "kernels": distance,
                "quantisation": distance, "correlation": 0.99, "lowering_limit": {"max_kl": 1e-3},
                "vectors": "verify.npz", "verify": {"max_kl": 0.1, "min_top1": 0.5},
                "draft": {
                    "drafts": 9, "lowering": distance, "kernels": distance,
                    "quantisation": distance, "correlation": 0.99,
                    "lowering_limit": {"max_kl": 1e-3},
                    "verify": {"max_kl": 0.1, "min_top1": 0.5, "min_common": 0.5},
                },
            }
        },
        "needs": {"weights": {"linear": 5}, "dense": 5, "experts": 0, "read_weights": 5,
                  "read_experts": 0, "prefill": 5, "row": 8},
        "files": files,
        "made": {"source": "a test"},
    }  # fmt: skip
    (root / "manifest.json").write_text(json.dumps(document))
    return root


def leaves(value, path=()):
    """Every path to a field of the document that a reader may rely on."""
    yield path
    if path and path[-1] in ("made", "details"):
        return
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, (*path, key))
    elif isinstance(value, list) and value:
        yield from leaves(value[0], (*path, 0))


def changed(document, path, value):
    out = deepcopy(document)
    at = out
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return out


WRONG = [-1, 1 << 60, 1.5, 1e400, True, "", "x" * 4096, "../../etc/passwd", [[]], {"a": 1}, "NaN"]


def test_a_whole_manifest_reads(root):
    artifact = read_artifact(root)
    assert artifact.plan == PLAN
    assert artifact.tokens.eos == [2, 24]
    assert artifact.sampling.top_k == 20
    assert artifact.plan_digest == plan_digest(artifact.manifest.plan)
    assert artifact.parity("onnx")["verify"]["min_top1"] == 0.5
    assert artifact.parity("executorch") == {}
    assert artifact.manifest.finished
    assert [n for n, _ in artifact.check_digests()]


def test_every_field_refuses_what_it_cannot_be(root):
    """Each field with each wrong value: it reads as a manifest, or one sentence says why not."""
    path = root / "manifest.json"
    document = json.loads(path.read_text())
    refused = 0
    for field in leaves(document):
        for value in WRONG if field else [[], 1, "x", None]:
            mutated = changed(document, field, value) if field else value
            path.write_text(json.dumps(mutated))
            try:
                artifact = read_artifact(root)
            except ArtifactError as e:
                refused += 1
                assert "\n" not in str(e) and str(e).endswith("."), (field, value, str(e))
                assert len(str(e)) < 1000, (field, value)
                continue
            # What still reads has plausible values: bounds that nothing is allocated beyond.
            assert artifact.plan.bytes < 1 << 42
            assert isinstance(artifact.tokens.vocab, int)
            for table in artifact.plan.tables:
                assert all(type(n) is int and 0 < n < 1 << 31 for n in table.shape)
    assert refused > 500


@pytest.mark.parametrize("field", [
    ("tokens", "vocab"), ("identity", "model"), ("plan", "tables"), ("plan", "tables", 0, "slots"),
    ("parity", "onnx", "verify"), ("files",), ("sampling",),
])  # fmt: skip
def test_a_missing_field_is_named(root, field):
    document = json.loads((root / "manifest.json").read_text())
    at = document
    for key in field[:-1]:
        at = at[key]
    del at[field[-1]]
    (root / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(ArtifactError, match=str(field[-1])):
        read_artifact(root)


@pytest.mark.parametrize(("field", "value", "message"), [
    (("identity", "model"), "A" * 64, "identity.model"),
    (("identity", "plan"), "a" * 63, "identity.plan"),
    (("files", "verify.npz", "sha256"), "", "sha256"),
    (("tokens", "eos"), [96], "token 96 of a vocabulary of 96"),
    (("plan", "tables", 0, "slots"), 8, "has 8 slots but"),
    (("plan", "tables", 0, "slots"), 400, "slots, others of stride 1 have 400"),
    (("plan", "tables", 0, "dtype"), "f64", "dtype"),
    (("plan", "tables", 0, "row"), [1, 2, 3], "row"),
    (("plan", "tables", 0, "name"), "a b", "name"),
    (("plan", "chunk"), 301, "chunk 301"),
    (("sampling", "top_p"), 0, "top_p"),
    (("backends", "onnx", "files"), ["onnx/else.bin"], "does not list its size"),
    (("parity", "onnx", "vectors"), "missing.npz", "does not list its size"),
    (("surprise",), 1, "surprise"),
    (("ple",), None, r"per-layer rows holds None .*, onnx/prefill.onnx takes"),
    (("ple", "rows"), 95, "file of per-layer rows holds"),
    (("ple", "dim"), 16, "file of per-layer rows holds"),
    (("ple", "n_layers"), 1, "file of per-layer rows holds"),
    (("backends", "onnx", "programs", "decode", "inputs"), [], "decode.onnx takes None"),
])  # fmt: skip
def test_wrong_fields_are_named(root, field, value, message):
    document = json.loads((root / "manifest.json").read_text())
    (root / "manifest.json").write_text(json.dumps(changed(document, field, value)))
    with pytest.raises(ArtifactError, match=message):
        read_artifact(root)


def test_text_that_is_no_json_of_a_manifest():
    for text in (b"", b"\xff", b"[" * 100_000, b'{"schema_version": NaN}', b"null"):
        with pytest.raises(ArtifactError, match="not a valid manifest"):
            parse_manifest(text, "manifest.json")


def test_digests_follow_what_they_stand_for(root):
    manifest = read_artifact(root).manifest
    quant = QuantEntry(scheme="int4", formats={}, tensors={})
    one = model_digest({"a": 1}, quant, manifest.files)
    assert one == model_digest({"a": 1}, quant, dict(reversed(manifest.files.items())))
    assert one != model_digest({"a": 2}, quant, manifest.files)
    less = {n: f for n, f in manifest.files.items() if n != "verify.npz"}
    assert one == model_digest({"a": 1}, quant, less)
    other = models.plan(CONFIG, ctx=301, chunk=8, kv="int8")
    assert plan_digest(PlanEntry.of(other)) != plan_digest(manifest.plan)
