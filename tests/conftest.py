"""What tests share: a cache directory of their own, and one export of tiny."""

import os
import shutil

import pytest
from filelock import FileLock

from edge_kv.runtime.native_library import (
    NO_COMPILER,
    build_onnx_operators,
    lack_of_onnx_operators,
)

# Processes that tests start write as a user's do: late, and with their bytecode kept.
for name in ("PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE"):
    os.environ.pop(name, None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Tests of native code are skipped where there is no compiler, and say what to install."""
    report = yield
    fault = call.excinfo.value if call.excinfo else None
    while fault is not None and NO_COMPILER not in str(fault):
        fault = fault.__cause__ or fault.__context__
    if fault is not None and report.failed:
        report.outcome = "skipped"
        report.longrepr = (str(item.path), item.location[1] + 1, f"Skipped: {NO_COMPILER}")
    return report


@pytest.fixture(autouse=True, scope="session")
def cache_home(tmp_path_factory):
    """A cache directory of this test run, for its workers and the processes they start."""
    with pytest.MonkeyPatch.context() as patch:
        home = _shared(tmp_path_factory) / "cache"
        patch.setenv("EDGE_KV_CACHE", str(home))
        yield home


@pytest.fixture(scope="session")
def compiled(cache_home):
    """Builds the native operators, where that can be; gives them to a cache of a test's own, which
    takes a minute otherwise.
    """
    files = []
    if not lack_of_onnx_operators():
        with pytest.MonkeyPatch.context() as patch:  # a test may have named its cache already
            patch.setenv("EDGE_KV_CACHE", str(cache_home))
            library = build_onnx_operators()
        files = list(library.parent.glob(f"{library.name}*"))  # and its record

    def fill(cache):
        (cache / "native").mkdir(parents=True)
        for path in files:
            shutil.copy(path, cache / "native")

    return fill


@pytest.fixture
def compiler(compiled):
    """For tests of what is said and measured where the native operators run: they are built."""
    if lack := lack_of_onnx_operators():
        pytest.skip(lack)


@pytest.fixture(scope="session")
def tiny_artifact(tmp_path_factory):
    """Directory of tiny exported as `edge-kv export` does by default, at ctx 512 and chunk 32.

    Shared between all workers of a run: read it, never write into it.
    """
    return _exported(tmp_path_factory, "tiny-512")


@pytest.fixture(scope="session")
def exact_artifact(tmp_path_factory):
    """As `tiny_artifact`, all in f32: no 8-bit kernels, whose results differ between engines."""
    return _exported(tmp_path_factory, "tiny-512-exact", quant="none", kv="f32")


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """The app's runtime in a desktop JVM, for the Android tests of one file."""
    from android_host import start

    server = start(tmp_path_factory.mktemp("scratch"))
    yield server
    server.close()


def _shared(tmp_path_factory):
    """The temporary directory of this test run, which pytest-xdist's workers share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if base.name.startswith("popen-") else base


def _exported(tmp_path_factory, name, **options):
    shared = _shared(tmp_path_factory)
    root = shared / name
    with FileLock(shared / f"{name}.lock"):
        if not root.exists():
            from edge_kv.export import export_model
            from edge_kv.runtime import load

            export_model(model="tiny", ctx=512, chunk=32, out=root, open_session=load, **options)
    return root
