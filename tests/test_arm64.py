"""The ARM board: its guide, what its results have to show, and the tools that make it."""

import json
from pathlib import Path

import arm64
import arm64_vm
import pytest

from edge_kv.errors import RuntimeFault

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
    assert [b["cpu"] for b in result["boards"]] == list(arm64_vm.CPUS)
    for board in result["boards"]:
        assert board["without_torch"]
        onnx, runner = board["engines"]["onnx"], board["engines"]["executorch"]
        assert onnx["verify"]["passed"] and runner["reference_top1"] == 1.0
        for group in (onnx["group"], runner["group"]):
            assert group["oom_kills"] == 0 and 0 < group["peak"] <= group["limit"]
    assert not any("second" in key or "rate" in key for key in keys(result))  # no speeds


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


def test_a_disk_holds_its_tree(tmp_path):
    tree = tmp_path / "tree"
    (tree / "folder").mkdir(parents=True)
    (tree / "folder" / "file").write_bytes(b"x" * 100_000)
    image = arm64_vm.make_disk(tree, tmp_path / "disk.img", spare=1 << 20)
    listed = arm64_vm._call("debugfs", "-R", "ls -l /folder", image)
    assert "100000" in listed and "file" in listed
    with pytest.raises(RuntimeFault, match="ended with status"):
        arm64_vm._call("mke2fs", "-d", tmp_path / "missing", tmp_path / "b.img", "8M")


def test_a_full_size_model_fits_two_gibibytes_at_32k():
    result = load("arm64_e2b")
    assert result["ctx"] == result["memory"]["pos"] == 32_768
    assert result["group"]["limit"] == 2 << 30 and result["group"]["oom_kills"] == 0
    assert result["memory"]["decoding"]["anon"] <= result["planned"]["anon"]
    assert result["state"]["filled"] == "by prefill" and result["against_x86_64"]["max_kl"] < 0.01
