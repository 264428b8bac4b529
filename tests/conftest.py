"""What tests share: a cache directory of their own, and one export of tiny."""

import pytest
from filelock import FileLock


@pytest.fixture(autouse=True, scope="session")
def cache_home(tmp_path_factory):
    """A cache directory of this test run, for this process and the ones it starts."""
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("cache")
        patch.setenv("EDGE_KV_CACHE", str(home))
        yield home


@pytest.fixture(scope="session")
def tiny_artifact(tmp_path_factory):
    """Directory of tiny exported as `edge-kv export` does by default, at ctx 512 and chunk 32.

    Shared between all workers of a run: read it, never write into it.
    """
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if base.name.startswith("popen-") else base  # a pytest-xdist worker
    root = shared / "tiny-512"
    with FileLock(shared / "tiny-512.lock"):
        if not root.exists():
            from edge_kv.export import export_model
            from edge_kv.runtime import load

            export_model(model="tiny", ctx=512, chunk=32, out=root, open_session=load)
    return root
