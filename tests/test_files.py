"""Files of several processes: whole or not at all; caches that nobody else can have written."""

import errno
import os
import signal
import stat
import subprocess
import sys
import threading

import pytest

from edge_kv.errors import RuntimeFault
from edge_kv.files import locked, replacing, write_text
from edge_kv.runtime import native_library
from edge_kv.runtime.cache import CACHE_VARIABLE, cache_directory, cache_folder, require_own

OTHER_USER = 12345


def test_a_failed_write_leaves_the_old_file_and_nothing_beside(tmp_path):
    path = tmp_path / "a.json"
    write_text(path, "old")
    with pytest.raises(ZeroDivisionError), replacing(path) as f:
        f.write(b"half")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_is_followed_and_permissions_stay(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    write_text(target, "old")
    target.chmod(0o640)
    link.symlink_to(target)
    write_text(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert stat.S_IMODE(target.stat().st_mode) == 0o640


def test_a_new_file_has_the_permissions_that_the_umask_leaves(tmp_path):
    code = "import os, sys; os.umask(0o27); from edge_kv.files import write_text; "
    code += "from pathlib import Path; write_text(Path(sys.argv[1]), 'x')"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], check=True)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


def test_a_pipe_is_written_to_and_stays_a_pipe(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    heard = []
    reader = threading.Thread(target=lambda: heard.append(pipe.read_text()))
    reader.start()
    write_text(pipe, "hello")
    reader.join(10)
    assert heard == ["hello"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_two_writers_of_one_file_both_succeed(tmp_path):
    path = tmp_path / "shared"
    with replacing(path) as first, replacing(path) as second:
        first.write(b"first")
        second.write(b"second")
    assert path.read_bytes() == b"first"  # the one that finished last
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_writer_left_goes_with_the_next_write(tmp_path):
    path, other = tmp_path / "talk.kv", tmp_path / ".other.kv.0123456789abcdef.part"
    other.write_bytes(b"of another path")
    code = "import os, signal, sys; from pathlib import Path; from edge_kv.files import replacing\n"
    code += "with replacing(Path(sys.argv[1])) as f: os.kill(os.getpid(), signal.SIGKILL)"
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
        assert done.returncode == -signal.SIGKILL
    left = [p for p in tmp_path.iterdir() if p != other]
    assert len(left) == 1  # the second took the first one's away
    with replacing(path) as f:
        f.write(b"whole")
        assert not left[0].exists()
        write_text(path, "another writer's")  # which leaves the one that is being written
    assert path.read_bytes() == b"whole"
    assert set(tmp_path.iterdir()) == {path, other}


def test_a_lock_is_held_by_one_at_a_time(tmp_path):
    path, order = tmp_path / "lock", []

    def wait():
        with locked(path):
            order.append("second")

    with locked(path):
        other = threading.Thread(target=wait)
        other.start()
        other.join(0.2)
        order.append("first")
    other.join(10)
    assert order == ["first", "second"]


def test_a_cache_without_a_home_lies_in_the_temporary_directory(monkeypatch):
    for name in (CACHE_VARIABLE, "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # no entry in the user database
    assert cache_directory().name == f"edge-kv-{os.getuid()}"


def test_a_new_cache_folder_is_this_users_alone(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    folder = cache_folder("native")
    for path in (folder, folder.parent):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700


@pytest.mark.parametrize("part", ["cache", "cache/native"])
def test_a_cache_folder_that_others_can_write_is_refused(tmp_path, monkeypatch, part):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    cache_folder("native")
    (tmp_path / part).chmod(0o777)
    with pytest.raises(RuntimeFault, match="can be written by others") as e:
        cache_folder("native")
    assert CACHE_VARIABLE in str(e.value)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file to another user")
def test_a_library_of_another_user_is_refused(tmp_path):
    planted = tmp_path / "edge_kv.so"
    planted.write_bytes(b"")
    os.chown(planted, OTHER_USER, OTHER_USER)
    with pytest.raises(RuntimeFault, match=f"belongs to user {OTHER_USER}"):
        require_own(planted)


def test_a_cache_that_cannot_be_made_is_a_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file" / "cache"))
    with pytest.raises(RuntimeFault, match="Cannot make the cache directory"):
        cache_folder("native")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can act as another user")
def test_a_cache_that_may_not_be_looked_into_is_a_sentence(tmp_path):
    (tmp_path / "cache" / "native").mkdir(parents=True)
    (tmp_path / "cache").chmod(0o700)
    code = "import os; from edge_kv.runtime.cache import cache_folder as f\n"
    code += f"os.setuid({OTHER_USER})\ntry: f('native')\nexcept Exception as e: print(repr(e))"
    said = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, CACHE_VARIABLE: str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert said.startswith("RuntimeFault('Cannot make the cache directory")


COMPILER = """#!/bin/sh
echo called >> {calls}
echo "/tmp/ccx.s: Fatal error: can't write 12 bytes to section .text of x.o: '{said}'"
exit 1
"""


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_is_full_while_compiling_is_said_with_its_place(tmp_path, monkeypatch, code):
    compiler = tmp_path / "cxx"
    compiler.write_text(COMPILER.format(said=os.strerror(code), calls=tmp_path / "calls"))
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    with pytest.raises(RuntimeFault) as e:
        native_library.build("toy", {"weights.cpp": ()}, (), suffix=".so")
    assert f"cannot be compiled into {tmp_path / 'cache'}" in str(e.value)
    assert f"({os.strerror(code)}); free some space" in str(e.value)
    assert sorted(p.name for p in (tmp_path / "cache" / "native").iterdir()) == ["build.lock"]
    calls = (tmp_path / "calls").read_text()
    with pytest.raises(RuntimeFault, match="free some space"):  # and not a minute later once more
        native_library.build("toy", {"weights.cpp": ()}, (), suffix=".so")
    assert (tmp_path / "calls").read_text() == calls
