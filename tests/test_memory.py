"""Predicted memory: byte counts against plain arithmetic, and how it moves."""

import dataclasses
import subprocess
import sys

import pytest
import tokenizers
from fake_artifact import make_config

from edge_kv.amounts import parse_bytes
from edge_kv.artifact import PleEntry
from edge_kv.errors import ConfigError
from edge_kv.kv_plan import plan_kv
from edge_kv.memory import GRAPH_BYTES, TOKEN_BYTES, TOKENIZER_BYTES, predict_memory
from edge_kv.presets import PRESETS
from edge_kv.tensors import tensor_table, weight_formats

E2B = PRESETS["e2b"].config
INT4 = weight_formats("int4", dict.fromkeys(("embed", "linear"), "int4-s8"))


@pytest.mark.parametrize("head", [{}, {"embed": "int8-f16"}], ids=str)
def test_weight_file_of_e2b(head):
    formats = weight_formats("int4", head)
    memory = predict_memory(E2B, plan_kv(E2B, ctx=1024), "int4", formats)
    count, rows = {}, {}
    for t in tensor_table(E2B):
        count[t.kind] = count.get(t.kind, 0) + t.elements
        rows[t.kind] = rows.get(t.kind, 0) + t.shape[0]
    want = count["linear"] * 4.25 / 8 + (count["kv"] + count["ple_linear"]) * 8.25 / 8
    want += 4 * (rows["linear"] + rows["kv"] + rows["ple_linear"] + count["float"])
    want += count["embed"] * 8.5 / 8 if head else count["embed"] * 4.25 / 8 + 4 * rows["embed"]
    assert memory.weight_file == want
    entry = PleEntry(file="p", rows=262_144, n_layers=35, dim=256, bits=4, block=32)
    assert memory.ple_file == 262_144 * entry.row_bytes


def test_schemes_order_and_none_is_four_bytes_a_weight():
    plan = plan_kv(E2B, ctx=1024)
    sizes = [predict_memory(E2B, plan, q) for q in ("int4", "int8", "none")]
    assert sizes[0].weight_file < sizes[1].weight_file < sizes[2].weight_file
    assert sizes[0].peak < sizes[1].peak < sizes[2].peak
    elements = sum(t.elements for t in tensor_table(E2B) if t.kind != "ple_table")
    assert sizes[2].weight_file == 4 * elements
    assert sizes[2].ple_file == 4 * 262_144 * 8960


def test_rows_no_block_divides_stay_float():
    config = make_config()  # hidden 8, mlp 16: nothing to quantise in blocks of 32
    plan = plan_kv(config, ctx=64)
    assert (
        predict_memory(config, plan, "int4").weights == predict_memory(config, plan, "none").weights
    )


def test_phases_grow_and_depth_counts_only_written_rows():
    plan = plan_kv(E2B, ctx=32_768)
    full, shallow = predict_memory(E2B, plan), predict_memory(E2B, plan, depth=512)
    assert full.phases["load"].total < full.phases["prefill"].total <= full.phases["decode"].total
    assert full.phases["load"] == shallow.phases["load"]
    assert (full.touched, shallow.touched) == (plan.bytes, plan.touched_bytes(512))
    gap = full.phases["decode"].anon - shallow.phases["decode"].anon
    assert gap >= full.touched - shallow.touched
    assert full.peak == full.phases["decode"].total
    assert predict_memory(E2B, plan, depth=10**9).depth == 32_768


def test_packed_weights_are_heap_without_a_cache_and_file_pages_with_one():
    plan = plan_kv(E2B, ctx=32_768)
    cached, heap = (
        predict_memory(E2B, plan, "int4", INT4, cache=c, engine="onnx-stock") for c in (True, False)
    )
    assert "first load" not in heap.phases
    gap = heap.phases["decode"].anon - cached.phases["decode"].anon
    mapped = cached.phases["decode"].file - heap.phases["decode"].file
    assert gap > mapped > 1.2e9  # on the heap, prefill's matrices lie a second time
    fed = {n: p.anon - cached.tokenizer for n, p in cached.phases.items()}
    assert fed["load"] < fed["prefill"] < fed["decode"] < 280e6
    assert fed["first load"] > 1.3e9


def test_with_native_operators_nothing_is_packed_and_no_scores_are_held():
    plan = plan_kv(E2B, ctx=131_072)
    native = predict_memory(E2B, plan, "int4", INT4)
    assert native == predict_memory(E2B, plan, "int4", INT4, cache=False)
    assert native.phases["decode"].file > native.weight_file > native.phases["prefill"].file
    stock = predict_memory(E2B, plan, "int4", INT4, engine="onnx-stock")
    assert native.phases["decode"].anon < stock.phases["decode"].anon - 50e6
    short = predict_memory(E2B, plan, "int4", INT4, 4096)
    grown = native.phases["decode"].anon - short.phases["decode"].anon
    assert grown == native.touched - short.touched + TOKEN_BYTES * (131_072 - 4096)


def test_a_layer_in_one_program_costs_what_onnxruntime_was_measured_to_hold():
    """Bytes held for each byte stored, seen by adding layers that only `decode` runs."""
    config = dataclasses.replace(E2B, ple_dim=0)
    longer = dataclasses.replace(config, pattern=config.pattern + "SSSSF", n_kv_shared=25)
    plan = plan_kv(config, ctx=512)
    short, long = (
        predict_memory(c, plan, "int4", INT4, cache=False, engine="onnx-stock")
        for c in (config, longer)
    )
    held = long.phases["load"].total - short.phases["load"].total
    held -= 5 * GRAPH_BYTES
    # A packed block of 32 takes 16 bytes and 8 of scale and sum, a stored one 17 and its share of
    # the row's scale; keys and values do not occur in these layers.
    assert abs(held / (long.weight_file - short.weight_file) - 24 / 17) < 0.02


_READ = """
import sys, tokenizers
from pathlib import Path
from edge_kv.runtime import Tokenizer, read_memory
before = read_memory().anon
tokenizer = Tokenizer(Path(sys.argv[1]), bos_id=0)
print(read_memory().anon - before)
"""


def test_a_tokenizer_holds_what_the_plan_counts(tmp_path):
    """In a process of its own; what reading it took beside that was given back."""
    letters = [chr(0x4E00 + i) for i in range(300)]
    pairs = [(a, b) for a in letters for b in letters]
    vocab = {token: i for i, token in enumerate((*letters, *map("".join, pairs)))}
    path = tmp_path / "tokenizer.json"
    tokenizers.Tokenizer(tokenizers.models.BPE(vocab, pairs)).save(str(path))
    command = [sys.executable, "-c", _READ, str(path)]
    held = int(subprocess.run(command, capture_output=True, check=True).stdout)
    assert held / len(vocab) == pytest.approx(TOKENIZER_BYTES, rel=0.25)


def test_dictionary_is_complete():
    data = predict_memory(E2B, plan_kv(E2B, ctx=512)).as_dict()
    assert list(data["phases"]) == ["load", "tokenizer", "prefill", "decode"]
    assert data["peak"] == max(p["total"] for p in data["phases"].values())
    stock = predict_memory(E2B, plan_kv(E2B, ctx=512), engine="onnx-stock").as_dict()
    assert set(stock["phases"]) == {"first load", *data["phases"]}
    assert stock["peak"] < stock["phases"]["first load"]["total"]
    assert data["weight_file"] == sum(data["weights"].values())


def test_unknown_scheme():
    with pytest.raises(ConfigError, match="Unknown quantisation 'int5'"):
        predict_memory(E2B, plan_kv(E2B, ctx=64), "int5")


def test_amounts_of_memory():
    texts = ("1500m", "2g", "2GiB", "2 GB", "1.5G", "4096", "64k")
    assert [parse_bytes(t) for t in texts] == [
        1500 << 20, 2 << 30, 2 << 30, 2 << 30, 3 << 29, 4096, 64 << 10,
    ]  # fmt: skip
    for bad in ("", "g", "-1g", "lots", "0", "nan", "inf", "1e400g"):
        with pytest.raises(ConfigError, match="not an amount of memory"):
            parse_bytes(bad)


def test_executorch_maps_what_onnxruntime_maps_and_needs_less_beside_it():
    plan = plan_kv(E2B, ctx=32_768)
    onnx, native = (
        predict_memory(E2B, plan, "int4", INT4, 4096, engine=e) for e in ("onnx", "executorch")
    )
    assert native.phases["load"].anon < onnx.phases["load"].anon
    for phase in ("prefill", "decode"):
        assert native.touched < native.phases[phase].anon < onnx.phases[phase].anon
        assert native.phases[phase].file < onnx.phases[phase].file
    assert set(native.phases) == {"load", "tokenizer", "prefill", "decode"}


def test_checkpoints_of_conversations_are_counted():
    """Every ring row, f32, of three states; none where no layer slides far enough to lose rows."""
    plan = plan_kv(E2B, ctx=8192)
    memory = predict_memory(E2B, plan)
    rings = sum(b.bytes for b in plan.buffers if b.kind == "ring")
    assert memory.checkpoints == 3 * rings and memory.conversation == memory.peak + 3 * rings
    assert predict_memory(E2B, plan, depth=10).checkpoints == 30 * rings // plan.ring_slots
