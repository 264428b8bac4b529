"""What is installed, and what is imported: the wheel holds edge_kv alone, the runtime no torch."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from adding_a_model import diff_stat
from fake_artifact import write_artifact

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TREES = {"edge_kv": "edge_kv", "export": "edge_kv/export", "runtime": "edge_kv/runtime"}


def sources():
    """Path in the wheel -> file, for every module of the checkout."""
    found = {}
    for tree, package in TREES.items():
        for path in (ROOT / tree).rglob("*.py"):
            relative = path.relative_to(ROOT / tree)
            if tree != "edge_kv" or relative.parts[0] not in ("export", "runtime"):
                found[f"{package}/{relative.as_posix()}"] = path
    return found


def run_python(code, *args, **kwargs):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, **kwargs
    )


def test_exporters_and_runtimes_name_no_model():
    """What is special about a model stands in its two files, `models/x.py` and `nets/x.py`."""
    names = re.compile("gemma|laguna|zaya|deepseek|qwen|llama", re.IGNORECASE)
    kinds = {".py", ".cpp", ".h", ".kt", ".xml", ".kts"}
    files = [
        path
        for tree in ("export", "runtime", "android_demo/src/main")
        for path in (ROOT / tree).rglob("*")
        if path.suffix in kinds
    ]
    assert len(files) > 100
    named = [
        f"{path.relative_to(ROOT)}:{n}: {line.strip()}"
        for path in files
        for n, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if names.search(line)
    ]
    assert not named


def test_a_family_is_its_two_files_and_a_name_in_the_list():
    """Without them every other model still plans and builds; `diff_stat` ends if one does not."""
    assert set(diff_stat("deepseek_v4")) == {
        "edge_kv/models/__init__.py",
        "edge_kv/models/deepseek_v4.py",
        "edge_kv/nets/deepseek_v4.py",
        "tests/tiny_models.py",
    }


IMPORTED = """
import sys
{code}
heavy = {{"torch", "onnx", "transformers", "jax"}} & set(sys.modules)
assert not heavy, heavy
print(*sorted({{"numpy", "onnxruntime", "pydantic", "rich"}} & set(sys.modules)))
"""


def test_importing_the_runtime_is_cheap_and_free_of_torch():
    done = run_python(IMPORTED.format(code="import edge_kv.runtime"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []  # nothing heavy before it is used


def test_every_public_name_of_the_runtime_exists_without_torch():
    code = "import edge_kv.runtime as r; [getattr(r, n) for n in r.__all__]; dir(r)"
    done = run_python(IMPORTED.format(code=code))
    assert done.returncode == 0, done.stderr
    code = "from edge_kv.runtime.generation import generate as g; from edge_kv.runtime import *"
    done = run_python(IMPORTED.format(code=code + "; assert generate is g"))
    assert done.returncode == 0, done.stderr


COMMANDS = """
from edge_kv.cli import main
for line in sys.argv[2:]:
    sys.argv = ["edge-kv", *line.split()]
    try:
        main()
    except SystemExit as e:
        assert e.code in (0, None), (line, e.code)
"""


def test_no_command_but_export_imports_torch(tmp_path):
    root = write_artifact(tmp_path / "a")
    lines = [
        "--help",
        "plan --model e2b --ctx 32k",
        "plan --model e2b --ctx 32k --json",
        f"inspect {root}",
        f"verify {root} --threads 1",
        f"run {root} hello --max-new-tokens 3 --threads 1",
    ]
    code = "import sys\n" + COMMANDS + "\n" + IMPORTED.format(code="")
    done = run_python(code, "-", *lines)
    assert done.returncode == 0, done.stderr


def test_a_plan_imports_no_package_that_takes_long_to_load():
    code = (
        "import sys; sys.argv = 'edge-kv plan --model 31b --ctx 128k'.split()\n"
        "from edge_kv.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(*{m.partition('.')[0] for m in sys.modules}, file=sys.stderr)"
    )
    done = run_python(code)
    long = {"torch", "onnx", "onnxruntime", "executorch", "transformers", "tokenizers", "jinja2",
            "gguf", "safetensors", "huggingface_hub", "prompt_toolkit", "starlette"}  # fmt: skip
    assert done.returncode == 0 and not long & set(done.stderr.splitlines()[-1].split())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of a copy of the checkout, built without the network."""
    base = tmp_path_factory.mktemp("wheel")
    copy = base / "checkout"
    copy.mkdir()
    for tree in TREES:
        shutil.copytree(
            ROOT / tree, copy / tree, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "-q", "-w", str(base)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(copy)], check=True)
    return zipfile.ZipFile(next(base.glob("*.whl")))


def test_wheel_holds_edge_kv_and_nothing_else(wheel):
    version = PROJECT["project"]["version"]
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert tops == {"edge_kv", f"edge_kv-{version}.dist-info"}
    assert not [n for n in wheel.namelist() if n.endswith((".pyc", ".part")) or "test" in n]


def test_wheel_holds_every_module_and_data_file(wheel):
    missing = set(sources()) - set(wheel.namelist())
    assert not missing
    tiny = {p.relative_to(ROOT).as_posix() for p in (ROOT / "edge_kv/data/tiny").glob("*")}
    data = tiny | {"edge_kv/py.typed"}
    assert not data - set(wheel.namelist())
    with wheel.open(next(n for n in wheel.namelist() if n.endswith("entry_points.txt"))) as f:
        assert b"edge-kv = edge_kv.__main__:main" in f.read()


def test_package_list_is_complete():
    """Editable installs find a new subpackage; wheels only what is listed."""
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    packages = {str(Path(name).parent).replace(os.sep, ".") for name in sources()}
    assert packages == listed


def test_links_lead_to_the_real_directories():
    for name in ("export", "runtime"):
        link = ROOT / "edge_kv" / name
        assert link.is_symlink() and os.readlink(link) == f"../{name}"


FRONT = {
    "edge_kv/compare.py",
    "edge_kv/reference.py",
    "edge_kv/deploy.py",
    "edge_kv/bundle.py",
}  # what a person starts


def test_rooms_import_in_one_direction():
    """export -> core <- runtime, never across; only the front sees both."""
    for name, path in sources().items():
        room = name.split("/")[1]
        imported = set(re.findall(r"edge_kv\.(export|runtime)\b(?= import|\.\w+ import)",
                                  path.read_text()))  # fmt: skip
        front = name in FRONT or room in ("cli", "serve")
        assert front or imported <= {room}, (name, imported)


def test_version_is_said_once():
    import edge_kv

    assert edge_kv.__version__ == PROJECT["project"]["version"]
