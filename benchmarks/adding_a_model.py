"""What adding a model costs: the diff between this tree and the same tree without one family.

    python benchmarks/adding_a_model.py

Families came into the history together with what they share, so no commit is one family's own. For
each, a copy of the package loses its two modules and its name in the list of models, and the tests
lose its tiny models; the copy still has to plan every other model and to build its net. What git
counts between the two is the family. `alone` names what nets share and only this one uses: the
shared file has it for this family.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from common import run_main, say, show, write_result

from edge_kv import models

ROOT = Path(__file__).parent.parent
FAMILIES = ("llama", "laguna", "zaya", "deepseek_v4")  # in the order in which they were added
LIST, ORACLES = Path("edge_kv/models/__init__.py"), Path("tests/tiny_models.py")
KEPT = """
import torch
from edge_kv import models, nets
from edge_kv.nets.weights import Weights
for row in models.ROWS.values():
    models.plan(row.config, ctx=4096)
    with torch.device("meta"):
        nets.make_net(row.config, Weights(models.weights(row.config)))
print(len(models.ROWS))
"""


def main() -> None:
    rows = []
    for family in FAMILIES:
        files = diff_stat(family)
        rows.append(
            {
                "family": family,
                "files": files,
                "lines": sum(files.values()),
                "models": list(vars(models)[family].ROWS),
                "alone": alone(family),
            }
        )
        say(f"{family}: {rows[-1]['lines']} lines in {len(files)} files")
    write_result("adding_a_model", {"rows": rows})
    show(
        "What adding a model costs",
        [{"run": r["family"], "files": len(r["files"]), "lines": r["lines"]} for r in rows],
    )


def diff_stat(family: str) -> dict[str, int]:
    """Lines that `family` adds, by file."""
    with tempfile.TemporaryDirectory() as folder:
        whole, less = Path(folder) / "a", Path(folder) / "b"
        for tree in (whole, less):
            shutil.copytree(
                ROOT / "edge_kv", tree / "edge_kv",
                ignore=shutil.ignore_patterns("__pycache__", "data", "shipped"),
            )  # fmt: skip
            (tree / "tests").mkdir()
            shutil.copy(ROOT / ORACLES, tree / ORACLES)
        for room in ("models", "nets"):
            (less / "edge_kv" / room / f"{family}.py").unlink()
        listed = (less / LIST).read_text()
        (less / LIST).write_text(re.sub(rf"\b{family}, |, {family}\b", "", listed))
        (less / ORACLES).write_text(without(family, (less / ORACLES).read_text()))
        done = subprocess.run(
            [sys.executable, "-B", "-c", KEPT], cwd=less, capture_output=True, text=True,
            env=os.environ | {"PYTHONPATH": str(less)},
        )  # fmt: skip
        others = len(models.ROWS) - len(vars(models)[family].ROWS)
        if done.returncode or int(done.stdout) != others:
            raise SystemExit(f"Other models need {family}: {done.stdout}{done.stderr}")
        stat = subprocess.run(
            ["git", "diff", "--no-index", "--numstat", "--no-renames", "b", "a"],
            cwd=folder, capture_output=True, text=True,
        )  # fmt: skip
    files = {}
    for line in stat.stdout.splitlines():
        added, _, path = line.split("\t")
        files[re.sub(r"^.*\{b => a\}/|^a/|^.*=> a/", "", path)] = int(added)
    return files


def without(family: str, text: str) -> str:
    """The module of tiny models less those that `family` reads, and constants of theirs alone."""
    tree = ast.parse(text)
    constants = {
        node.targets[0].id: node
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    table = constants.pop("ROWS").value
    assert isinstance(table, ast.Dict)
    own, others = [], []
    for key, value in zip(table.keys, table.values, strict=True):
        assert isinstance(key, ast.Constant) and isinstance(value, ast.Tuple)
        kind = ast.unparse(value.elts[0]).removeprefix("hf.").removesuffix("Config")
        reads = {name.replace("_", "") for name in vars(models)[family].HF}
        (own if kind.lower() in reads else others).append((key, value))
    spans = [(key.lineno, value.end_lineno) for key, value in own]

    def used(nodes: list[ast.AST]) -> set[str]:
        found: set[str] = set()
        for node in (n for top in nodes for n in ast.walk(top)):
            if isinstance(node, ast.Name) and node.id in constants and node.id not in found:
                found |= {node.id, *used([constants[node.id].value])}
        return found

    kept = used([v for _, v in others])
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    for name in used([v for _, v in own]) - kept - used([*functions]):
        spans.append((constants[name].lineno, constants[name].end_lineno))
    gone = {n for first, last in spans for n in range(first, (last or first) + 1)}
    return "".join(
        line for n, line in enumerate(text.splitlines(keepends=True), 1) if n not in gone
    )


def alone(family: str) -> list[str]:
    """Functions of `nets/parts.py` and verbs of the state that no other net uses."""

    def used(path: Path) -> set[str]:
        found = re.findall(r"\bparts\.([a-z]\w*)|\b(?:state|read)\.([a-z]\w*)\(", path.read_text())
        return {a or b for a, b in found}

    nets = ROOT / "edge_kv" / "nets"
    shared = re.findall(
        r"^ *def ([a-z]\w*)", (nets / "parts.py").read_text() + (nets / "state.py").read_text(),
        re.MULTILINE,
    )  # fmt: skip
    others = [nets / f"{m.__name__.rpartition('.')[2]}.py" for m in models.MODULES]
    mine = nets / f"{family}.py"
    elsewhere = set().union(*(used(path) for path in others if path != mine))
    return sorted((used(mine) - elsewhere) & set(shared))


if __name__ == "__main__":
    run_main(main)
