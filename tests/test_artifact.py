"""The manifest: round trip, and every kind of damage refused with one sentence."""

import hashlib
import json
import os
import shutil

import numpy as np
import pytest
from fake_artifact import write_artifact

from edge_kv.artifact import CHECKED_BYTES, MANIFEST, read_artifact, sample_of, write_manifest
from edge_kv.errors import ArtifactError
from edge_kv.files import LONGEST_TEXT
from edge_kv.manifest import LONGEST_MANIFEST, PleEntry
from edge_kv.runtime import load


@pytest.fixture
def root(tmp_path):
    return write_artifact(tmp_path / "a", programs=False, kv="int8")


def manifest(root):
    return json.loads((root / MANIFEST).read_text())


def change(root, *path, to):
    """Set one nested field of the manifest."""
    raw = manifest(root)
    at = raw
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = to
    (root / MANIFEST).write_text(json.dumps(raw))


def test_round_trip(root):
    artifact = read_artifact(root)
    assert artifact.plan.ctx == 64 and artifact.layers == 3 and artifact.family == "toy"
    before = (root / MANIFEST).read_text()
    write_manifest(root, artifact.manifest)
    assert (root / MANIFEST).read_text() == before
    assert not list(root.glob("*.part"))
    listed = dict(artifact.check_digests())
    assert listed == {n: (root / n).stat().st_size for n in artifact.manifest.files}


@pytest.mark.parametrize(
    ("path", "to", "message"),
    [
        (("schema_version",), 3, "schema_version 3, this edge-kv reads 2; update edge-kv"),
        (("schema_version",), 1, "was made by an earlier edge-kv; export it again"),
        (("schema_version",), True, "schema_version True"),
        (("schema_version",), None, "schema_version None"),
        (("plan", "ctx"), 65, "l1.k has 64 slots but stride 1 and keep 0 need 65"),
        (("plan", "ctx"), "many", "plan.ctx"),
        (("plan", "chunk"), 0, "plan.chunk"),
        (("plan", "tables", 0, "keep"), 6, "l0.k has 7 slots but stride 1 and keep 6 need 8"),
        (("plan", "tables", 1, "name"), "l0.k", "l0.k is planned twice"),
        (("surprise",), 1, "surprise"),
        (("files", "ple.bin"), {"size": 1, "sha256": "0" * 64}, "manifest says 1; it is cut off"),
        (("files", "../secret"), {"size": 1, "sha256": "0" * 64}, "path outside the artifact"),
        (("files", "/etc/passwd"), {"size": 1, "sha256": "0" * 64}, "path outside the artifact"),
        (("files", "a\\..\\b"), {"size": 1, "sha256": "0" * 64}, "path outside the artifact"),
        (("files", ""), {"size": 1, "sha256": "0" * 64}, "should have at least 1 character"),
        (("files", "a\nb"), {"size": 1, "sha256": "0" * 64}, "path outside the artifact"),
        (("files", "ple.bin", "sha256"), "x ]; touch here; [ x", "files.ple.bin.sha256"),
        (("files", "ple.bin", "sha256"), "/etc/" + "0" * 59, "files.ple.bin.sha256"),
        (("files", "ple.bin", "sha256"), "0" * 63, "files.ple.bin.sha256"),
        (("files", "ple.bin", "size"), -1, "files.ple.bin.size"),
        (("files", "gone.bin"), {"size": 1, "sha256": "0" * 64}, "gone.bin is missing"),
        (("tokenizer", "file"), "other.json", "uses 'other.json' but does not list"),
        (("ple", "file"), "../ple.bin", "uses '../ple.bin' but does not list"),
        (("ple", "bits"), "four", "ple.bits"),
    ],
)
def test_changed_manifests_are_refused(root, path, to, message):
    change(root, *path, to=to)
    with pytest.raises(ArtifactError, match=message) as e:
        read_artifact(root)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"[]", b"null", b"3"])
def test_manifests_that_are_no_json_object(root, content):
    (root / MANIFEST).write_bytes(content)
    with pytest.raises(ArtifactError, match="the artifact is damaged"):
        read_artifact(root)


def test_texts_of_any_length_are_not_read(root):
    """A file with a hole stands for one of gigabytes."""
    raw = json.loads((root / MANIFEST).read_text())
    with (root / "tokenizer.json").open("r+b") as f:
        f.truncate(LONGEST_TEXT + 1)
    change(root, "files", "tokenizer.json", "size", to=LONGEST_TEXT + 1)
    with pytest.raises(ArtifactError, match=r"lists tokenizer.json with 67108865 bytes, at most"):
        read_artifact(root)
    (root / MANIFEST).write_text(json.dumps(raw))
    with (root / MANIFEST).open("r+b") as f:
        f.truncate(LONGEST_MANIFEST + 1)
    with pytest.raises(ArtifactError, match=r"manifest.json has 8388609 bytes, at most 8388608"):
        read_artifact(root)


def test_directories_that_are_no_artifact(tmp_path):
    with pytest.raises(ArtifactError, match="is not a directory"):
        read_artifact(tmp_path / "none")
    with pytest.raises(ArtifactError, match=r"has no manifest\.json"):
        read_artifact(tmp_path)


def test_truncated_file_is_found_when_opened(root):
    with (root / "ple.bin").open("r+b") as f:
        f.truncate(7)
    with pytest.raises(ArtifactError, match=r"ple\.bin has 7 bytes"):
        read_artifact(root)


def test_changed_file_of_the_same_size_is_found_by_its_digest(root):
    raw = bytearray((root / "ple.bin").read_bytes())
    raw[100] ^= 1
    (root / "ple.bin").write_bytes(raw)
    artifact = read_artifact(root)
    with pytest.raises(ArtifactError, match=r"ple.bin has SHA-256 .* the file was changed"):
        list(artifact.check_digests())


def test_links_that_leave_the_artifact_are_refused(root, tmp_path):
    outside = tmp_path / "outside"
    outside.write_bytes((root / "ple.bin").read_bytes())
    (root / "ple.bin").unlink()
    os.symlink(outside, root / "ple.bin")
    with pytest.raises(ArtifactError, match="a link that leaves the artifact"):
        read_artifact(root)


@pytest.mark.parametrize(
    ("bits", "block", "row"), [(4, 32, 4480 + 560), (8, 32, 8960 + 560), (32, 0, 4 * 8960)]
)
def test_ple_rows_of_e2b(bits, block, row):
    entry = PleEntry(file="p", rows=262_144, n_layers=35, dim=256, bits=bits, block=block)
    assert entry.values == 8960 and entry.row_bytes == row


def in_hub_cache(root, cache):
    """`root` as huggingface_hub lays it out: a snapshot of links into blobs."""
    snapshot = cache / "models--me--art" / "snapshots" / "abc"
    blobs = cache / "models--me--art" / "blobs"
    blobs.mkdir(parents=True)
    for file in [f for f in root.rglob("*") if f.is_file()]:
        link = snapshot / file.relative_to(root)
        link.parent.mkdir(parents=True, exist_ok=True)
        blob = file.rename(blobs / file.relative_to(root).as_posix().replace("/", "_"))
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


def test_links_into_the_hub_cache_are_followed(root, tmp_path):
    snapshot = in_hub_cache(root, tmp_path / "hub")
    assert read_artifact(snapshot).path("ple.bin").read_bytes()
    outside = (tmp_path / "hub" / "models--me--art" / "blobs" / "ple.bin").rename(tmp_path / "ple")
    (snapshot / "ple.bin").unlink()
    (snapshot / "ple.bin").symlink_to(outside)
    with pytest.raises(ArtifactError, match="a link that leaves the artifact"):
        read_artifact(snapshot)
    other = tmp_path / "hub" / "models--other--art" / "blobs" / "ple"
    other.parent.mkdir(parents=True)
    outside.rename(other)
    (snapshot / "ple.bin").unlink()
    (snapshot / "ple.bin").symlink_to(other)
    with pytest.raises(ArtifactError, match="a link that leaves the artifact"):
        read_artifact(snapshot)


@pytest.mark.parametrize("length", [0, 1, 262_144, 266_239, 266_240, 266_241, 1_000_003])
def test_a_sample_is_of_pieces_from_the_beginning_to_the_end(length, tmp_path):
    content = np.random.default_rng(length).bytes(length)
    path = tmp_path / "x"
    path.write_bytes(content)
    pieces = [content]
    if length - 4096 >= 64 * 4096:
        starts = [(length - 4096) * i // 63 for i in range(64)]
        pieces = [content[at : at + 4096] for at in starts]
        assert starts[0] == 0 and starts[-1] + 4096 == length
    assert sample_of(path) == hashlib.sha256(b"".join(pieces)).hexdigest()


def test_a_file_of_another_artifact_is_refused_at_load(tiny_artifact, tmp_path):
    files = read_artifact(tiny_artifact).manifest.files
    for name, entry in files.items():  # whatever runs is looked at in one way or the other
        program = name.endswith((".onnx", ".pte")) and entry.size <= CHECKED_BYTES
        assert (entry.sample is None) == (program or name.startswith("verify")), name
    sampled = [name for name, entry in files.items() if entry.sample]
    assert len(sampled) >= 3
    root = tmp_path / "other"
    shutil.copytree(tiny_artifact, root)
    for name in sampled:
        own = (root / name).read_bytes()
        (root / name).write_bytes(own[::-1])
        with pytest.raises(ArtifactError, match=rf"{name} is not the file that was exported"):
            load(root, "onnx-stock", threads=1)
        (root / name).write_bytes(own)
    load(root, "onnx-stock", threads=1).close()
