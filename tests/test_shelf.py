"""What lies on a machine, and what was meant: list, cache, and the words of other tools."""

import json

import pytest
from fake_artifact import write_artifact
from typer.testing import CliRunner

from edge_kv.cli import app
from edge_kv.guidance import OTHER_WORDS


def invoke(*words):
    done = CliRunner().invoke(app, [str(w) for w in words])
    return done.exit_code, done.output


def test_artifacts_of_a_folder_are_listed_with_what_is_wrong(tmp_path):
    write_artifact(tmp_path / "good", ctx=64)
    write_artifact(tmp_path / "short", ctx=64)
    (tmp_path / "short" / "ple.bin").write_bytes(b"")
    (tmp_path / "other").mkdir()
    status, said = invoke("list", tmp_path)
    assert status == 0
    lines = said.splitlines()
    assert any(line.split()[0] == "good" and "64" in line for line in lines)
    assert "short: " in said and "cut off or changed" in said
    rows = json.loads(invoke("list", tmp_path, "--json")[1])["artifacts"]
    assert [r["name"] for r in rows] == ["good", "short"]
    assert rows[0]["bytes"] > 1000 and rows[0]["ctx"] == 64


def test_an_empty_folder_says_so(tmp_path):
    assert "edge-kv export" in invoke("list", tmp_path)[1]


def test_the_cache_is_shown_and_cleared(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGE_KV_CACHE", str(tmp_path))
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "weights.bin").write_bytes(bytes(5000))
    assert "5 kB" in invoke("cache")[1]
    assert json.loads(invoke("cache", "--json")[1])["bytes"] == 5000
    assert "Freed 5 kB" in invoke("cache", "--clear")[1]
    assert not (tmp_path / "onnx").exists()
    assert "0 B" in invoke("cache")[1]


def test_a_cache_that_cannot_be_cleared_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGE_KV_CACHE", str(tmp_path))
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "weights.bin").write_bytes(bytes(5000))
    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)  # as where permission lacks
    status, said = invoke("cache", "--clear")
    assert status == 1 and f"5 kB in {tmp_path} cannot be removed" in said


@pytest.mark.parametrize(("word", "meant"), [*OTHER_WORDS.items(), ("exprot", "export")])
def test_words_of_other_tools_name_the_command(word, meant):
    status, said = invoke(word, "e2b")
    assert status == 2 and f"`edge-kv {meant}`" in said


def test_a_word_that_means_nothing_here():
    status, said = invoke("xyzzy")
    assert status == 2 and "`edge-kv --help`" in said


def test_a_prompt_is_no_file_name(tmp_path):
    status, said = invoke("run", tmp_path / "none", "x" * 5000)
    assert status == 1 and "is not a directory" in said
