"""The documents: commands parse, generated parts are up to date, links lead somewhere."""

import re
import shlex
from pathlib import Path

import pytest
import report
import typer

import edge_kv
from edge_kv.amounts import parse_size
from edge_kv.cli import app
from edge_kv.models import ROWS, get_row

ROOT = Path(__file__).parent.parent

DOCUMENTS = sorted(
    p.relative_to(ROOT).as_posix()
    for folder in (".", "docs", "benchmarks", "edge_kv/data/tiny")
    for p in (ROOT / folder).glob("*.md")
)


def text(name):
    return (ROOT / name).read_text(encoding="utf-8")


def commands(start):
    """Lines of shell blocks that begin with `start`, without their comments."""
    found = []
    for name in DOCUMENTS:
        for block in re.findall(r"^```sh\n(.*?)^```", text(name), re.DOTALL | re.MULTILINE):
            found += [line for line in block.splitlines() if line.startswith(start)]
    return found


@pytest.mark.parametrize("line", commands("edge-kv "))
def test_commands_parse(line):
    _, name, *args = shlex.split(line, comments=True)
    group = typer.main.get_command(app)
    with group.commands[name].make_context(name, args) as context:
        given = context.params
    for option in ("ctx", "chunk"):
        for size in (given.get(option) or "").split(","):
            assert not size or parse_size(size) > 0
    if given.get("model"):
        get_row(given["model"])


def test_every_command_is_shown():
    shown = {line.split()[1] for line in commands("edge-kv ")}
    assert shown == set(typer.main.get_command(app).commands)


@pytest.mark.parametrize("line", commands("make "))
def test_make_targets_exist(line):
    targets = re.findall(r"^([a-z][a-z0-9-]*):", text("Makefile"), re.MULTILINE)
    assert shlex.split(line, comments=True)[1] in targets


def test_scripts_that_documents_name_exist():
    for name in DOCUMENTS:
        for path in re.findall(r"python ((?:benchmarks|tests)/\w+\.py)", text(name)):
            assert (ROOT / path).is_file(), (name, path)


@pytest.mark.parametrize("name", report.DOCUMENTS)
def test_generated_parts_are_up_to_date(name):
    assert report.render(text(name)) == text(name), "run: python benchmarks/report.py"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text(name)):
        if not target.startswith(("http://", "https://")):
            assert ((ROOT / name).parent / target).exists(), target


def test_python_of_the_readme_compiles():
    for block in re.findall(r"^```python\n(.*?)^```", text("README.md"), re.DOTALL | re.MULTILINE):
        compile(block, "README.md", "exec")
        for names in re.findall(r"from edge_kv\.runtime import (.+)", block):
            import edge_kv.runtime

            assert {n.strip() for n in names.split(",")} <= set(edge_kv.runtime.__all__)


def test_changelog_begins_with_the_version():
    first = re.search(r"^## \[([\d.]+)\]", text("CHANGELOG.md"), re.MULTILINE)
    assert first and first[1] == edge_kv.__version__


def test_every_named_model_is_documented():
    missing = [name for name in ROWS if f"`{name}`" not in text("docs/models.md")]
    assert not missing
