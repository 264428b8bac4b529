"""Shell completion: commands, options and values, by the protocols of bash and zsh."""

import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from edge_kv import models
from edge_kv.cli import app
from edge_kv.plan import STORAGES
from edge_kv.runtime import ENGINES

HEAVY = {"torch", "onnxruntime", "onnx", "tokenizers", "jinja2", "prompt_toolkit", "transformers"}


def test_bash_completes_and_imports_nothing_heavy(tmp_path):
    command = tmp_path / "edge-kv"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -X importtime -m edge_kv "$@"\n')
    command.chmod(0o755)
    lines = ["edge-kv pl", "edge-kv run x --max", "edge-kv plan --model e"]
    script = f'PATH={tmp_path}:$PATH; eval "$(_EDGE_KV_COMPLETE=source_bash edge-kv)"\n' + "".join(
        f"COMP_WORDS=({line}); COMP_CWORD={line.count(' ')}; _edge_kv_completion edge-kv\n"
        "echo ${COMPREPLY[@]}\n"
        for line in lines
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == ["plan", "--max-new-tokens", "e2b e4b"]
    imported = set(re.findall(r"^import time:.*\| +([^\s.]+)$", done.stderr, re.MULTILINE))
    assert "edge_kv" in imported and not imported & HEAVY


def zsh(line):
    environment = {"_EDGE_KV_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": line}
    return CliRunner().invoke(app, [], env=environment, prog_name="edge-kv").stdout


@pytest.mark.parametrize(
    ("line", "values"),
    [
        ("edge-kv export --model ", models.ROWS),
        ("edge-kv run x --engine ", ENGINES),
        ("edge-kv bench x --engine ", ENGINES),
        ("edge-kv plan --kv ", STORAGES),
        ("edge-kv plan --quant ", ["int4", "int8", "none", "auto"]),
        ("edge-kv export --backend ", ["onnx", "executorch", "both"]),
        ("edge-kv run x --think o", ["on", "off"]),
        ("edge-kv run x --on-full s", ["stop", "slide"]),
    ],
)
def test_zsh_completes_values(line, values):
    assert re.findall('"([^"]+)"', zsh(line)) == list(values)


def test_zsh_completes_commands_options_and_files():
    assert '"serve":' in zsh("edge-kv ") and '"serve":' not in zsh("edge-kv r")
    assert re.search(r'"--max-new-tokens":"Longest reply', zsh("edge-kv run x --max"))
    assert zsh("edge-kv run ").strip() == zsh('edge-kv run "a').strip() == "_files"
