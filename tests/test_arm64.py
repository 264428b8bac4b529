"""The ARM board: its guide, what its results have to show, and the tools that make it."""

import json
import os
import shutil
from pathlib import Path

import arm64
import arm64_e2b
import arm64_vm
import numpy as np
import pytest

from edge_kv.errors import RuntimeFault
from edge_kv.runtime import native_library

RESULTS = Path(arm64.ROOT) / "benchmarks" / "results"


def test_every_command_of_the_guide_was_run_on_the_board():
    """A block whose place is not named is not run; a command that changed has to be run again."""
    text = arm64.GUIDE.read_text(encoding="utf-8")
    assert text.count("```sh\n") == len(arm64._BLOCK.findall(text))
    blocks, ran = arm64.guide_blocks(), load("arm64_guide")["commands"]
    assert set(arm64.GUIDED) == set(blocks)
    shown = [line for where in arm64.GUIDED for line in blocks[where].splitlines()]
    assert shown == [entry["command"] for entry in ran]
    assert [e["command"].split()[1] for e in ran if not e["run"]] == ["export"]


def test_both_cpus_keep_their_limits_and_agree():
    result = load("arm64_vm")
    stored = {(a["quant"], a["kv"]): name for name, a in result["artifacts"].items()}
    assert set(stored) == {("int4", "int8"), ("int8", "int8"), ("none", "f32")}
    assert [b["cpu"] for b in result["boards"]] == list(arm64_vm.CPUS)
    for board in result["boards"]:
        assert board["without_torch"]
        engines = board["engines"]
        assert list(engines) == [*arm64.ENGINES, arm64.RUNNER]
        assert engines[arm64.RUNNER]["reference_top1"] == 1.0
        for engine in engines.values():
            group = engine["group"]
            assert group["oom_kills"] == 0 and 0 < group["peak"] <= group["limit"]
        for name in arm64.ENGINES:
            found = engines[name]["artifacts"]
            assert all(found[a]["verify"]["passed"] for a in stored.values())
            exact = found[stored["none", "f32"]]  # float kernels: the ids are those of x86-64
            assert exact["tokens"] == {"made": arm64.TOKENS, "equal_to_x86_64": arm64.TOKENS}
    assert not any("second" in key or "rate" in key for key in keys(result))  # no speeds


def test_the_board_of_the_guide_compiles_both_libraries():
    result = load("arm64_guide")
    assert result["compiled"] == ["edge_kv", "edge_kv_onnx"]
    assert result["board"]["compiler"].startswith("g++ ")


def test_what_stands_for_a_compiler_gives_out_libraries(tmp_path, monkeypatch):
    """The runtime's own build, with that compiler: its name, its place, the library given out."""
    compiler = tmp_path / "g++"
    compiler.write_text(arm64._COMPILER)
    compiler.chmod(0o755)
    (tmp_path / "edge_kv_onnx.so").write_bytes(b"cross-compiled")
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("EDGE_KV_CACHE", str(tmp_path / "cache"))
    made = native_library.build_onnx_operators()
    assert made.read_bytes() == b"cross-compiled" and made.name.startswith("edge_kv_onnx-")


def load(name):
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def keys(value):
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from keys(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from keys(inner)


@pytest.mark.parametrize(
    ("here", "there", "same"),
    [([1, 2, 3], [1, 2, 3], 3), ([1, 2, 3], [1, 5, 3], 1), ([1], [1, 2], 1), ([4], [1], 0)],
)
def test_agreement_counts_to_the_first_difference(here, there, same):
    assert arm64._agreement(here, there) == {"made": len(here), "equal_to_x86_64": same}


@pytest.mark.skipif(
    not shutil.which("mke2fs", path=f"{os.environ['PATH']}:/usr/sbin"),
    reason="a board's disk is made by mke2fs; apt install e2fsprogs",
)
def test_a_disk_holds_its_tree(tmp_path):
    tree = tmp_path / "tree"
    (tree / "folder").mkdir(parents=True)
    (tree / "folder" / "file").write_bytes(b"x" * 100_000)
    image = arm64_vm.make_disk(tree, tmp_path / "disk.img", spare=1 << 20)
    listed = arm64_vm._call("debugfs", "-R", "ls -l /folder", image)
    assert "100000" in listed and "file" in listed
    with pytest.raises(RuntimeFault, match="ended with status"):
        arm64_vm._call("mke2fs", "-d", tmp_path / "missing", tmp_path / "b.img", "8M")


@pytest.mark.parametrize("name", ["arm64_e2b", "arm64_e2b_executorch"])
def test_a_full_size_model_fits_two_gibibytes_at_32k(name):
    result = load(name)
    assert result["ctx"] == result["state"]["tokens"] + result["decoded"] == 32_768
    assert result["state"]["filled"] == "by prefill" and result["group"]["limit"] == 2 << 30
    for run in (result, *result.get("further", ())):
        assert run["group"]["oom_kills"] == 0
        assert run["memory"]["decoding"]["anon"] <= result["planned"]["anon"]
        assert run["against_x86_64"]["max_kl"] < 0.01


def test_logits_compare_as_far_as_the_same_ids_were_fed(tmp_path):
    here, there = (np.zeros((4, 5), np.float32) for _ in range(2))
    here[range(4), [1, 2, 3, 4]] = 1
    there[range(4), [1, 2, 0, 4]] = 1  # the third choice differs: the fourth logits are of another
    there.tofile(tmp_path / "logits")
    apart = arm64_e2b._apart([0, 1, 2, 3], here, tmp_path / "logits")
    assert apart["steps"] == 3 and apart["max_abs"] == 1 and apart["top1"] == pytest.approx(2 / 3)
    here.tofile(tmp_path / "logits")
    apart = arm64_e2b._apart([0, 1, 2, 3], here, tmp_path / "logits")
    assert apart["steps"] == 4 and apart["max_kl"] == 0 and apart["top1"] == 1
