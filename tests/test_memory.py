"""Predicted memory: byte counts against plain arithmetic, and how it moves."""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import tokenizers
from ram_runs import least_limit, peak_under

from edge_kv import models, runtime
from edge_kv.amounts import parse_bytes
from edge_kv.errors import ConfigError
from edge_kv.export import export_model
from edge_kv.manifest import PleEntry
from edge_kv.memory import (
    COSTS,
    ENTRY_BYTES,
    MERGE_BYTES,
    PHASES,
    TOKEN_BYTES,
    Base,
    count_merges,
    predict,
    predict_memory,
    with_margin,
)
from edge_kv.models.model import EXPERT, PLE_TABLE
from edge_kv.needs import count_needs
from edge_kv.runtime.base import machine_base, own_base
from edge_kv.runtime.meter import read_memory
from edge_kv.tensors import weight_formats

E2B = models.get_row("e2b").config
INT4 = weight_formats("int4", dict.fromkeys(("embed", "linear"), "int4-s8"))
NOTHING = Base(0, 0)
ROOT = Path(__file__).parents[1]
PACKAGES = ("numpy", "numpy.libs", "onnxruntime")  # with the largest libraries of a run


def plan(ctx, config=E2B, **options):
    return models.plan(config, ctx=ctx, **options)


@pytest.mark.parametrize("head", [{}, {"embed": "int8-f16"}], ids=str)
def test_weight_file_of_e2b(head):
    needs = count_needs(E2B, "int4", {**INT4, **head})
    count, rows = {}, {}
    for w in models.weights(E2B):
        count[w.kind] = count.get(w.kind, 0) + w.elements
        rows[w.kind] = rows.get(w.kind, 0) + w.shape[0]
    want = count["linear"] * 4.25 / 8 + (count["kv"] + count["linear8"]) * 8.25 / 8
    want += 4 * (rows["linear"] + rows["kv"] + rows["linear8"] + count["float"])
    want += count["embed"] * 8.5 / 8 if head else count["embed"] * 4.25 / 8 + 4 * rows["embed"]
    assert needs.weight_file == want
    entry = PleEntry(file="p", rows=262_144, n_layers=35, dim=256, bits=4, block=32)
    assert needs.lookup_file == 262_144 * entry.row_bytes


def test_schemes_order_and_none_is_four_bytes_a_weight():
    sizes = [count_needs(E2B, q) for q in ("int4", "int8", "none")]
    assert sizes[0].weight_file < sizes[1].weight_file < sizes[2].weight_file
    peaks = [predict(n, plan(1024), E2B.vocab).peak for n in sizes]
    assert peaks[0] < peaks[1] < peaks[2]
    elements = sum(w.elements for w in models.weights(E2B) if w.kind != PLE_TABLE)
    assert sizes[2].weight_file == 4 * elements
    assert sizes[2].lookup_file == 4 * 262_144 * 8960


def test_experts_are_counted_apart():
    config = models.get_row("26b-a4b").config
    needs = count_needs(config)
    stacks = [w for w in models.weights(config) if w.kind == EXPERT]
    assert needs.experts == needs.weights[EXPERT] > 0
    assert needs.dense + needs.experts <= needs.weight_file
    share = sum(w.share * w.elements for w in stacks) / sum(w.elements for w in stacks)
    assert needs.read_experts == pytest.approx(share * needs.experts, rel=1e-6)
    assert needs.read_weights == pytest.approx(needs.dense + needs.read_experts, rel=0.01)


def test_a_chunk_holds_what_its_operators_meet():
    """Of E2B: residual and norm; q, k, v and q again of a full layer; a gated unit of 6,144 with
    its inputs in 8 bits; four times the 15 rows of 256 a token. Laguna's widest unit is dense."""
    assert count_needs(E2B).row == (
        2 * 1536 + (4096 + 2 * 512 + 4096) + (2 * 6144 + (1536 + 6144) // 4) + 4 * 15 * 256
    )
    laguna = models.get_row("laguna-xs2").config
    between = 8192 + 2 * 1024 + 64 + 8192
    dense = 2 * 8192 + (2048 + 8192) // 4
    assert count_needs(laguna).row == 2 * 2048 + between + dense


@pytest.mark.parametrize("engine", COSTS)
def test_phases_are_what_their_parts_add_up_to(engine):
    whole = predict_memory(E2B, plan(32_768), engine=engine, base=Base(7, 11))
    parts, mapped = whole.parts, whole.mapped
    assert whole.phases["decode"].anon == sum(parts.values())
    assert whole.phases["decode"].file == sum(mapped.values())
    assert parts["Python and libraries"] == 7
    assert parts["state"] == plan(32_768).touched(32_768) + TOKEN_BYTES * 32_768
    assert tuple(whole.phases) == PHASES
    assert whole.phases["load"].anon < whole.phases["prefill"].anon
    assert whole.phases["prefill"].file < whole.phases["decode"].file
    assert whole.peak == max(p.total for p in whole.phases.values())
    nothing = predict_memory(E2B, plan(32_768), engine=engine, base=NOTHING)
    assert whole.phases["load"].total - nothing.phases["load"].total == 18
    assert whole.peak - nothing.peak == 7  # what lies in files is let go of when a model is loaded


@pytest.mark.parametrize("engine", COSTS)
def test_libraries_of_which_a_touch_maps_more_take_more(engine):
    """Four doublings of numpy are planned once libraries run; of what reads a tokenizer, a part."""
    few, many = (
        predict_memory(E2B, plan(512), engine=engine, base=Base(0, 0, {"numpy": n})).phases
        for n in (0.0, 4.0)
    )
    more = {name: many[name].file - few[name].file for name in PHASES}
    whole = 4 * COSTS[engine].doubling["numpy"]
    assert more["load"] == 0 < more["tokenizer"] < whole == more["prefill"] == more["decode"]
    assert all(many[name].anon == few[name].anon for name in PHASES)


@pytest.mark.parametrize("engine", COSTS)
def test_weights_in_huge_pages_are_heap(engine):
    """They are no pages of a file then, except those that a prefill of its own maps."""
    needs = count_needs(E2B)
    plain, huge = (
        predict(needs, plan(512), E2B.vocab, engine=engine, base=NOTHING, huge=huge)
        for huge in (False, True)
    )
    for name in ("load", "prefill", "decode"):
        assert huge.phases[name].anon - plain.phases[name].anon == needs.dense
    assert huge.phases["decode"].anon == sum(huge.parts.values())
    code = plain.mapped["libraries"]
    left = huge.phases["decode"].file - code
    assert left == (plain.phases["prefill"].file - code if engine == "onnx" else 0)


def test_depth_counts_written_rows_alone():
    layout = plan(32_768)
    full, shallow = (predict_memory(E2B, layout, depth=d, base=NOTHING) for d in (32_768, 512))
    assert full.phases["load"] == shallow.phases["load"]
    assert (full.touched, shallow.touched) == (layout.bytes, layout.touched(512))
    gap = full.phases["decode"].anon - shallow.phases["decode"].anon
    assert gap == full.touched - shallow.touched + TOKEN_BYTES * (32_768 - 512)
    assert predict_memory(E2B, layout, depth=10**9).depth == 32_768


def test_a_session_that_is_fed_ids_reads_no_tokenizer():
    needs = count_needs(E2B)
    text, ids = (predict(needs, plan(512), E2B.vocab, text=t, base=NOTHING) for t in (True, False))
    assert "tokenizer" not in ids.phases and ids.parts["tokenizer"] == 0
    gap = text.phases["decode"].anon - ids.phases["decode"].anon
    assert gap == (ENTRY_BYTES + 2 * MERGE_BYTES) * E2B.vocab


def test_checkpoints_of_conversations_are_counted():
    """Every ring row of three states, unless another phase needs more than a conversation."""
    layout = plan(32_768)
    held = predict_memory(E2B, layout, base=NOTHING)
    rings = sum(t.bytes for t in layout.tables if t.keep)
    assert held.checkpoints == 3 * rings
    assert held.conversation == held.phases["decode"].total + 3 * rings
    qwen = models.get_row("qwen3-0.6b").config
    assert predict_memory(qwen, plan(512, qwen)).checkpoints == 0


def test_a_process_is_measured(monkeypatch, tmp_path):
    monkeypatch.setenv("EDGE_KV_CACHE", str(tmp_path))
    own = own_base("onnx")
    now = read_memory()
    assert abs(own.anon - now.anon) < 20e6 and 20e6 < own.file < 400e6
    first = machine_base("onnx")
    assert 15e6 < first.anon < 150e6 and 15e6 < first.file < 150e6
    monkeypatch.setattr(subprocess, "run", None)  # a second time it is not measured
    assert machine_base("onnx") == first
    monkeypatch.setattr("edge_kv.runtime.base.doublings", lambda _: 9.0)
    with pytest.raises(TypeError):  # unless the files lie in the page cache in other pieces
        machine_base("onnx")
    monkeypatch.undo()
    monkeypatch.setenv("EDGE_KV_CACHE", str(tmp_path))
    monkeypatch.setattr(subprocess, "run", None)
    (tmp_path / "memory" / "base.json").write_text("[1, 2")
    with pytest.raises(TypeError):
        machine_base("onnx")


def test_without_a_measurement_typical_figures_stand_in(monkeypatch, tmp_path):
    monkeypatch.setenv("EDGE_KV_CACHE", str(tmp_path))
    monkeypatch.setattr(sys, "executable", os.devnull)
    assert machine_base("executorch") == COSTS["executorch"].typical
    assert predict_memory(E2B, plan(512)) == predict_memory(
        E2B, plan(512), base=COSTS["onnx"].typical
    )


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """tiny for both engines."""
    out = tmp_path_factory.mktemp("both") / "tiny"
    return export_model(
        model="tiny", ctx=512, chunk=32, out=out, open_session=runtime.load, calibration="none",
        backends=("onnx", "executorch"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def just_written(pytestconfig):
    """numpy and onnxruntime, each library written at once a moment ago, as pip leaves them.

    They lie beside pytest's cache: a temporary directory may be in RAM, where no page is a file's.
    """
    site = Path(find_spec("numpy").origin).parents[1]
    folder = pytestconfig.cache.mkdir("libraries")
    for path in (p for name in PACKAGES for p in (site / name).rglob("*") if p.is_file()):
        copy = folder / path.relative_to(site)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if ".so" in path.name:
            copy.write_bytes(path.read_bytes())
        else:
            copy.symlink_to(path)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("engine", COSTS)
@pytest.mark.parametrize("fresh", [False, True])
def test_a_run_that_a_limit_lets_start_stays_inside(engine, fresh, both, just_written, monkeypatch):
    """The whole context is used, so that all of the state is written; SmolLM2 and Gemma 3 270M are
    held to the same by `benchmarks/memory_model.py`."""
    if fresh:
        paths = (str(just_written), str(ROOT), os.environ.get("PYTHONPATH", ""))
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    limit = least_limit(both, engine)
    long = ["In those days " * 60, "--max-new-tokens", "400", "--temperature", "1.5"]
    assert 0.7 * limit < peak_under(both, engine, limit, *long) <= limit


@pytest.mark.parametrize("engine", COSTS)
def test_phases_with_libraries_that_were_just_written(engine, both, just_written, monkeypatch):
    """Linux maps more of such files, from 6.18 on: with ONNX 20 MB more while steps run."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(just_written), str(ROOT))))
    command = [sys.executable, str(ROOT / "benchmarks" / "memory_phases.py"), str(both), engine]
    done = subprocess.run([*command, "256", "8", "1"], capture_output=True, check=True)
    run = json.loads(done.stdout)
    for phase, held in run["measured"].items():
        off = abs(run["planned"][phase]["total"] - held["total"])
        assert off <= max(0.05 * held["total"], 5_000_000), phase


def test_margin():
    assert with_margin(10_000_000) == 15_000_000
    assert with_margin(1_000_000_000) == 1_050_000_000


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
    assert held == pytest.approx(ENTRY_BYTES * len(vocab) + MERGE_BYTES * len(pairs), rel=0.25)
    assert count_merges(path) == len(pairs)


@pytest.mark.parametrize("merges", [["a b", 'c \\"', "d e"], [["a", "b"], ["c", '"'], ["d", "e"]]])
def test_merges_are_counted_in_both_of_their_forms(merges, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"model": {"vocab": {"a": 1}, "merges": merges}}, indent=1))
    assert count_merges(path) == 3
    path.write_text("{}")
    count_merges.cache_clear()
    assert count_merges(path) is None and count_merges(tmp_path / "none") is None


def test_dictionary_is_complete():
    data = predict_memory(E2B, plan(512)).as_dict()
    assert list(data["phases"]) == ["load", "tokenizer", "prefill", "decode"]
    assert data["peak"] == max(p["total"] for p in data["phases"].values())


def test_unknown_scheme_and_engine():
    with pytest.raises(ConfigError, match="Unknown quantisation 'int5'"):
        predict_memory(E2B, plan(64), "int5")
    with pytest.raises(ConfigError, match=r"no memory plan for engine 'onnx-stock'.*onnx"):
        predict_memory(E2B, plan(64), engine="onnx-stock")


def test_amounts_of_memory():
    texts = ("1500m", "2g", "2GiB", "2 GB", "1.5G", "4096", "64k")
    assert [parse_bytes(t) for t in texts] == [
        1500 << 20, 2 << 30, 2 << 30, 2 << 30, 3 << 29, 4096, 64 << 10,
    ]  # fmt: skip
    for bad in ("", "g", "-1g", "lots", "0", "nan", "inf", "1e400g"):
        with pytest.raises(ConfigError, match="not an amount of memory"):
            parse_bytes(bad)
