"""What `plan` says of any model: every row, on every device, against what is known otherwise."""

from __future__ import annotations

import io
import json
import random
from collections import OrderedDict

import pytest
from rich.console import Console
from typer.testing import CliRunner

from edge_kv import models
from edge_kv.cli import app
from edge_kv.cli.plan_report import print_plan
from edge_kv.errors import ConfigError
from edge_kv.footprint import (
    DEVICES,
    FLASH,
    NO,
    RESIDENT,
    fits,
    footprint,
    streaming,
)
from edge_kv.models.model import EXPERT8, Weight
from edge_kv.needs import stored_bytes


@pytest.mark.parametrize("name", ["e2b", "e4b", "26b-a4b", "gemma3-270m"])
def test_a_footprint_is_the_memory_of_a_conversation(name):
    config, depth = models.get_row(name).config, 8192
    plan = models.plan(config, ctx=depth)
    need = footprint(config, plan, "int4")
    assert need.memory.state == plan.bytes
    assert need.resident == need.memory.conversation
    assert need.anonymous == need.memory.phases["decode"].anon


@pytest.mark.parametrize("name", models.ROWS)
def test_plan_lists_every_table_as_json_and_prints(name):
    args = ["plan", "--model", name, "--ctx", "4k"]
    result = CliRunner().invoke(app, [*args, "--json"])
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    plan = models.plan(models.get_row(name).config, ctx=4096)
    assert [b["name"] for b in data["buffers"]] == [t.name for t in plan.tables]
    for b in data["buffers"]:
        assert b["bytes"] == plan[b["name"]].bytes and b["shape"] == list(plan[b["name"]].shape)
    assert data["totals"]["bytes"] == plan.bytes == data["memory"]["state"]
    files = data["memory"]["weight_files"]
    assert files["int4"] < files["int8"] < files["none"]
    text = CliRunner().invoke(app, args).stdout
    assert name in text and "of weights and" in text


@pytest.mark.parametrize("name", ["26b-a4b", "deepseek-v4-pro", "tiny"])
def test_plan_fits_a_terminal_of_80_columns(name):
    args = ["plan", "--model", name, "--ctx", "2k", "--json"]
    data = json.loads(CliRunner().invoke(app, args).stdout)
    screen = io.StringIO()
    print_plan(data, Console(file=screen, width=80, highlight=False), buffers=True)
    lines = screen.getvalue().splitlines()
    assert max(map(len, lines)) <= 80 and "…" not in screen.getvalue()
    assert any(line.startswith("█") for line in lines)


def test_plan_reads_a_checkpoint_and_refuses_as_before(tmp_path):
    fields = {
        "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(fields))
    args = ["plan", "--weights", str(tmp_path), "--ctx", "128", "--json"]
    assert len(json.loads(CliRunner().invoke(app, args).stdout)["buffers"]) == 8
    result = CliRunner().invoke(app, ["plan", "--model", "llama3.2-1", "--ctx", "4k"])
    assert result.exit_code == 1 and "Did you mean 'llama3.2-1b'?" in result.stderr
    with pytest.raises(ConfigError, match="int5"):
        config = models.get_row("smollm2-135m").config
        footprint(config, models.plan(config, ctx=64), "int5")


def test_bytes_of_a_weight():
    rows = 16 * 4 + 16 * 4  # a scale a row, and one for each of four blocks of it
    assert stored_bytes(Weight("w", (16, 128)), "int4") == 16 * 128 // 2 + rows
    assert stored_bytes(Weight("w", (3, 4, 128), "expert8"), "int4") == 3 * (16 * 128 + rows)
    assert stored_bytes(Weight("w", (4, 64), "ple_table"), "int4") == 4 * 64 // 2 + 2 * 4 * 2
    assert stored_bytes(Weight("w", (4, 60)), "int4") == 4 * 4 * 60  # no block divides a row
    assert stored_bytes(Weight("w", (4, 64), "float"), "int8") == 4 * 4 * 64


def test_devices():
    rows = {n: models.get_row(n) for n in ("smollm2-135m", "zaya1-8b", "deepseek-v4-pro")}
    found = {(f.model, f.device.name): f for f in fits(rows.items())}
    assert len(found) == 3 * len(DEVICES)
    for device in DEVICES:
        assert found["smollm2-135m", device.name].verdict == RESIDENT
        assert found["deepseek-v4-pro", device.name].verdict == NO
        for name in rows:
            fit = found[name, device.name]
            if fit.verdict == RESIDENT:
                assert fit.need.resident <= device.free
            elif fit.verdict == FLASH:
                assert fit.need.least <= device.free < fit.need.resident
    assert found["zaya1-8b", "Pi 4/5, 4 GB"].verdict == FLASH
    assert found["zaya1-8b", "laptop, 16 GB"].verdict == RESIDENT


def test_what_a_limit_costs_a_mixture():
    """Against an LRU that is run: experts chosen alike, layer after layer, token after token."""
    row = models.get_row("zaya1-8b")
    need = footprint(row.config, models.plan(row.config, ctx=4096, kv="int8"))
    layers = sum(w.kind == EXPERT8 for w in models.weights(row.config)) // 2
    experts = need.experts // layers // row.config.experts  # bytes of one
    rng = random.Random(1)
    for held in (20, 39, 60, 160, 400):  # a token takes one of 40 layers each
        limit = need.least + held * experts
        lru, missed, tokens = OrderedDict(), 0, 3000
        for token in range(tokens):
            for layer in range(layers):
                expert = layer, rng.randrange(row.config.experts)
                missed += expert not in lru and token > tokens // 3
                lru[expert] = lru.pop(expert, None)
                if len(lru) > held:
                    lru.popitem(last=False)
        measured = missed / (tokens - tokens // 3) * experts
        told = streaming(need, limit)
        assert told.storage == pytest.approx(measured, rel=0.06)
        assert told.held == (held >= layers)
    assert streaming(need, need.resident).storage == 0
    assert streaming(need, 0).bank == 0
