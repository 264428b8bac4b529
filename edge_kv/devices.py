"""Devices an artifact is deployed to: a board behind the user's own ssh, a phone behind adb.

Both offer the same three things: run a shell script there, put a file there, close. A script's
arguments are quoted here or by its writer; nothing on this side is read by a shell.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from edge_kv.errors import DeployError

SSH_FAILED = 255  # the exit status of ssh itself, not of what it ran
CONNECT_SECONDS = 15
_BLOCK = 1 << 20
_TARGET = re.compile(
    r"(?P<login>(?:[^@:\s-][^@:\s]*@)?(?:\[[^\]\s]+\]|[^@:\s-][^@:\s]*))(?::(?P<folder>.+))?"
)

Told = Callable[[int], None]  # is told how many bytes of a file are there


@dataclass(frozen=True)
class Finished:
    """How a script on a device ended."""

    status: int
    out: str
    err: str

    @property
    def last_words(self) -> str:
        """The last line it said on stderr, else on stdout."""
        lines = (self.err.strip() or self.out.strip()).splitlines()
        return lines[-1].strip() if lines else f"exit status {self.status}"


class Device(Protocol):
    """Somewhere with a POSIX shell."""

    name: str
    deltas: bool  # `send` makes use of whatever bytes the target has, not of a beginning alone

    def run(self, script: str) -> Finished:
        """Run a shell script; a script that fails is the caller's affair.

        Raises:
            DeployError: the device cannot be reached.
        """

    def send(self, source: Path, target: str, held: int, told: Told) -> None:
        """Make the file `target` of `source`, going on behind the `held` bytes that it has.

        The caller compares digests afterwards: what was there may not have been a beginning.

        Raises:
            DeployError: the device cannot be reached, or its disk is full.
        """

    def close(self) -> None:
        """End the connection."""


_FULL = ("No space left", "Disk quota exceeded")


def checked(device: Device, script: str, doing: str) -> str:
    """What a script that has to succeed prints.

    Raises:
        DeployError: it fails; its last words are in the message.
    """
    done = device.run(script)
    if done.status:
        raise failure(device, done, doing)
    return done.out


def failure(device: Device, done: Finished, doing: str) -> DeployError:
    """The error for a script that failed while `doing` something on `device`."""
    words = done.last_words
    if any(full in said for full in _FULL for said in (done.err, done.out)):
        return DeployError(
            f"The disk of {device.name} is full ({doing}); free some space there, or name a "
            "directory on another disk."
        )
    return DeployError(f"{device.name}: {doing} failed: {words}")


def parse_target(target: str) -> tuple[str, str | None]:
    """`user@host[:dir]` -> (`user@host`, dir or None).

    Raises:
        DeployError: it is something else.
    """
    match = _TARGET.fullmatch(target)
    if not match:
        raise DeployError(f"{target!r} names no device; give user@host or user@host:directory.")
    return match["login"], match["folder"]


class Ssh:
    """A Linux board behind the user's own ssh: their configuration, keys and known hosts."""

    def __init__(self, login: str, ssh: str = "ssh") -> None:
        """Connect to `login`; `ssh` is the command with its options. One connection serves all.

        Raises:
            DeployError: no ssh here, or the device cannot be reached.
        """
        self.name = login
        self._login = login.replace("[", "").replace("]", "")
        try:
            words = shlex.split(ssh)
        except ValueError as e:
            raise DeployError(f"--ssh {ssh!r} is no command ({e}); close its quotes.") from e
        if not words or not shutil.which(words[0]):
            raise DeployError(f"There is no {ssh!r} here; install an ssh client (openssh-client).")
        # A short path: a socket's must stay below 104 bytes everywhere.
        self._sockets = tempfile.TemporaryDirectory(prefix="edge-kv-")
        options = {
            "BatchMode": "yes",
            "ConnectTimeout": CONNECT_SECONDS,
            "ServerAliveInterval": CONNECT_SECONDS,
            "ControlPath": f"{self._sockets.name}/c",
            "ControlMaster": "no",
        }
        self._ssh = [*words, *(x for k, v in options.items() for x in ("-o", f"{k}={v}"))]
        self._master: subprocess.Popen[bytes] | None = None
        try:
            self._master = self._connect()
            self.deltas = _has_rsync() and not self.run("command -v rsync").status
        except BaseException:
            self.close()
            raise

    def run(self, script: str) -> Finished:
        done = subprocess.run(
            self._command(script),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        return self._reached(Finished(done.returncode, done.stdout, done.stderr))

    def send(self, source: Path, target: str, held: int, told: Told) -> None:
        if self.deltas:
            self._send_rsync(source, target, told)
        else:
            self._send_pipe(source, target, held, told)

    def close(self) -> None:
        if self._master:
            self._master.terminate()
            self._master.wait()
        self._sockets.cleanup()

    def _connect(self) -> subprocess.Popen[bytes]:
        """The connection that every later ssh and rsync goes through; it ends with `close`."""
        socket, said = Path(self._sockets.name, "c"), Path(self._sockets.name, "said")
        with said.open("wb") as err:
            master = subprocess.Popen(
                # options before `ControlMaster=no` win: the first value of an option counts
                [self._ssh[0], "-o", "ControlMaster=yes", *self._ssh[1:], "-N", "--", self._login],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=err,
            )
        try:
            while not socket.exists():
                if master.poll() is not None:
                    self._reached(Finished(SSH_FAILED, "", said.read_text(errors="replace")))
                time.sleep(0.02)
        except BaseException:
            master.kill()
            master.wait()
            raise
        return master

    def _command(self, script: str) -> list[str]:
        return [*self._ssh, "--", self._login, f"exec sh -c {shlex.quote(script)}"]

    def _send_rsync(self, source: Path, target: str, told: Told) -> None:
        """rsync moves what differs from the bytes that are already in `target`."""
        process = subprocess.Popen(
            ["rsync", "-s", "--inplace", "--partial", "--no-whole-file", "--info=progress2",
             "-e", shlex.join(self._ssh), "--", str(source), f"{self.name}:{target}"],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert process.stdout and process.stderr
        with process:
            line = b""
            while piece := process.stdout.read1(4096):  # type: ignore[attr-defined]
                *_, line = re.split(rb"[\r\n]", line + piece)
                if count := re.match(rb"\s*([\d,]+)", line):
                    told(int(count[1].replace(b",", b"") or 0))
            err = process.stderr.read().decode(errors="replace")
        if process.returncode:
            done = self._reached(Finished(process.returncode, "", err))
            raise failure(self, done, f"sending {source.name}")

    def _send_pipe(self, source: Path, target: str, held: int, told: Told) -> None:
        """Append what `target` lacks of `source`, through ssh itself."""
        process = subprocess.Popen(
            self._command(f"cat {'>>' if held else '>'} {shlex.quote(target)}"),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        assert process.stdin and process.stderr
        with process, source.open("rb") as f:
            f.seek(held)
            with suppress(BrokenPipeError):  # its reason is on stderr
                while block := f.read(_BLOCK):
                    process.stdin.write(block)
                    held += len(block)
                    told(held)
            with suppress(BrokenPipeError):
                process.stdin.close()
            err = process.stderr.read().decode(errors="replace")
        if process.returncode:
            done = self._reached(Finished(process.returncode, "", err))
            raise failure(self, done, f"sending {source.name}")

    def _reached(self, done: Finished) -> Finished:
        """`done`, unless it is ssh that failed.

        Raises:
            DeployError: why ssh cannot reach the device, and what to do.
        """
        if done.status != SSH_FAILED:
            return done
        text = done.err
        advice = "look at what `ssh` itself says"
        for sign, what in _REFUSALS.items():
            if sign in text:
                advice = what.format(login=self._login)
                break
        raise DeployError(f"Cannot reach {self.name} ({done.last_words.rstrip('.')}); {advice}.")


_REFUSALS = {  # what ssh says -> what to do
    "Could not resolve": "check the name, or give the IP address",
    "Connection refused": "no ssh server answers there: enable it on the device (raspi-config), "
    "or name the port with --ssh 'ssh -p PORT'",
    "timed out": "check that the device is on and in the same network",
    "No route to host": "check that the device is on and in the same network",
    "unreachable": "check that the device is on and in the same network",
    "Host key verification failed": "log in once by hand to accept its host key: ssh {login}",
    "Permission denied": "it accepts none of your keys: run ssh-copy-id {login}, or unlock the "
    "key with ssh-add",
    "Too many authentication failures": "name one key: --ssh 'ssh -o IdentitiesOnly=yes -i KEY'",
    "Broken pipe": "the connection broke; the same command takes up where it stopped",
    "closed by remote host": "the connection broke; the same command takes up where it stopped",
}


def _has_rsync() -> bool:
    """An rsync here that shows progress: 3.1 or newer, not macOS's own."""
    if not shutil.which("rsync"):
        return False
    done = subprocess.run(["rsync", "--version"], capture_output=True, text=True, check=False)
    match = re.search(r"version (\d+)\.(\d+)", done.stdout)
    return match is not None and (int(match[1]), int(match[2])) >= (3, 1)


class Adb:
    """An Android phone behind adb."""

    deltas = False

    def __init__(self, serial: str | None = None) -> None:
        """Choose the phone `serial`, or the only one.

        Raises:
            DeployError: no adb here, or no such phone that may be used.
        """
        program = os.environ.get("ADB") or "adb"
        if not shutil.which(program):
            raise DeployError(
                "There is no adb here; install Android's platform tools (Debian: apt install adb)."
            )
        self._adb = [program]
        listed = self._call(["devices"]).out.splitlines()[1:]
        phones = dict(line.split()[:2] for line in listed if len(line.split()) >= 2)
        if not phones:
            raise DeployError(
                "adb sees no phone; connect one and switch on USB debugging (developer options)."
            )
        if serial is None and len(phones) > 1:
            raise DeployError(f"adb sees several phones; name one: {', '.join(sorted(phones))}.")
        serial = serial or next(iter(phones))
        if serial not in phones:
            raise DeployError(f"adb sees no {serial!r}, only {', '.join(sorted(phones))}.")
        if phones[serial] != "device":
            raise DeployError(
                f"The phone {serial} is {phones[serial]}; unlock it and allow USB debugging."
            )
        self.name = serial
        self._adb += ["-s", serial]

    def run(self, script: str) -> Finished:
        return self._call(["shell", script])

    def send(self, source: Path, target: str, held: int, told: Told) -> None:
        done = self._call(["push", str(source), target])
        if done.status:
            raise failure(self, done, f"sending {source.name}")
        told(source.stat().st_size)

    def close(self) -> None:
        """Nothing is held open."""

    def _call(self, words: list[str]) -> Finished:
        done = subprocess.run(
            [*self._adb, *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        if done.returncode and done.stderr.startswith(
            ("adb: device", "error: device", "adb: no dev")
        ):
            raise DeployError(f"The phone is gone ({done.stderr.strip()}); connect it again.")
        return Finished(done.returncode, done.stdout, done.stderr)
