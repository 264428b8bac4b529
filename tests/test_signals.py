"""Signals that end a command leave nothing half-written, and say one line."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

SCRIPT = """
import os, signal, sys, time
from pathlib import Path
from edge_kv.files import replacing
from edge_kv.signals import end_on_signals, hang_up
{before}
end_on_signals()
with {around}, replacing(Path(sys.argv[1])) as f:
    f.write(b"half of it")
    f.flush()
    print("writing", flush=True)
    {wait}
print("over")
"""


DEFAULT = "signal.signal(signal.SIGHUP, signal.SIG_DFL)"  # whatever started the tests ignores it


def ended(tmp_path, number, before=DEFAULT, around="open(sys.argv[0])", wait="time.sleep(30)"):
    """Exit status, output and errors of a command that is sent a signal while it writes a file."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(before=before, around=around, wait=wait))
    command = [sys.executable, str(script), str(tmp_path / "file")]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout.readline() == "writing\n"
        running.send_signal(number)
        out, err = running.communicate(timeout=20)
    script.unlink()
    return running.returncode, out, err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_what_is_being_written_is_removed(tmp_path, number):
    assert ended(tmp_path, number) == (128 + number, "", f"Ended by {number.name}.\n")
    assert list(tmp_path.iterdir()) == []


def test_a_line_that_is_being_written_does_not_end_in_a_traceback(tmp_path):
    wait = "\n    while True: print('busy', file=sys.stderr)"
    status, _, err = ended(tmp_path, signal.SIGTERM, wait=wait)
    assert status == 143 and "Ended by SIGTERM.\n" in err and "Traceback" not in err


def test_an_ignored_signal_stays_ignored(tmp_path):
    ignore = "signal.signal(signal.SIGHUP, signal.SIG_IGN)"
    status, out, _ = ended(tmp_path, signal.SIGHUP, before=ignore, wait="time.sleep(0.5)")
    assert (status, out) == (0, "over\n")
    assert (tmp_path / "file").read_bytes() == b"half of it"


def test_a_server_that_is_hung_up_on_ends_in_its_own_time(tmp_path):
    heard = "hang_up(lambda number, frame: os.write(1, b'heard\\n'))"
    status, out, err = ended(
        tmp_path, signal.SIGHUP, around=heard, wait="time.sleep(0.5); print('kept', flush=True)"
    )
    assert (status, out, err) == (0, "heard\nkept\nover\n", "")
    assert (tmp_path / "file").read_bytes() == b"half of it"


LOADING = """
import os, signal, sys, types
class Loading(types.ModuleType):  # stands for a module that is being loaded when the signal comes
    def __getattr__(self, name):
        try:
            os.kill(os.getpid(), {number})
        except SystemExit:
            raise ImportError("initialization failed")
sys.modules["edge_kv.cli"] = Loading("edge_kv.cli")
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whatever started the tests may ignore these
signal.signal(signal.SIGINT, signal.default_int_handler)
from edge_kv.__main__ import main
main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_command_that_is_still_loading_ends_in_a_line(number):
    script = LOADING.format(number=int(number))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    said = "Interrupted." if number == signal.SIGINT else f"Ended by {number.name}."
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, "", f"{said}\n")


CUT = """
import os, sys
import numpy as np
from edge_kv.signals import say_of_cut_files
say_of_cut_files()
held = np.memmap(sys.argv[1], np.uint8, mode="r")
os.truncate(sys.argv[1], 0)
print(held.sum())
"""


@pytest.mark.skipif(not hasattr(signal, "SIGBUS"), reason="a system that does not tell")
def test_a_file_that_is_cut_off_while_it_is_mapped_is_one_line(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(bytes(1 << 20))
    done = subprocess.run([sys.executable, "-c", CUT, str(path)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "Error: A file was cut off while it was in use; copy it again.\n"
