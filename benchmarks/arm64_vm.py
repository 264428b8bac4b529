"""A 64-bit ARM board in a virtual machine: Debian's kernel on an emulated Cortex-A76 or A72.

qemu emulates the CPU of a Raspberry Pi 5 (A76) or 4 (A72), so that engines choose the kernels they
choose there; memory and its limits are real, times mean nothing. The system is Debian arm64, as
Raspberry Pi OS is. Nothing is installed by running ARM programs here: packages are unpacked into a
root directory, users and an ssh server with throw-away keys are written beside them, and the disk
image is made of that. Needs root, and these Debian packages:

    apt-get install -y --no-install-recommends qemu-system-arm mmdebstrap kmod cpio e2fsprogs
"""

from __future__ import annotations

import gzip
import hashlib
import os
import shlex
import shutil
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_kv.errors import RuntimeFault

TOOLS = ("qemu-system-aarch64", "mmdebstrap", "modprobe", "cpio", "mke2fs", "ssh-keygen")
SYSTEM = (
    "bash", "busybox-static", "ca-certificates", "coreutils", "dash", "findutils", "grep",
    "gzip", "libgomp1", "libstdc++6", "mount", "openssh-server", "procps", "python3",
    "python3-venv", "rsync", "sed", "sudo", "tar", "util-linux",
)  # fmt: skip
COMPILER = ("g++",)  # Raspberry Pi OS has one
MODULES = ("virtio_pci", "virtio_blk", "crc32c_generic", "ext4", "virtio_net")
KERNEL_SUITE = "bookworm"
CPUS = (
    "cortex-a76",
    "cortex-a72",
)  # Raspberry Pi 5, 4; qemu's "max" computes some of XNNPACK wrong
HOST = "raspberrypi.local"  # what documents call the board
USER = "pi"
BOOT_SECONDS = 180
_ACCOUNTS = {
    "passwd": "root:x:0:0::/root:/bin/bash\nsshd:x:100:65534::/run/sshd:/usr/sbin/nologin\n"
    "nobody:x:65534:65534::/nonexistent:/usr/sbin/nologin\n"
    f"{USER}:x:1000:1000::/home/{USER}:/bin/bash\n",
    "group": f"root:x:0:\nnogroup:x:65534:\n{USER}:x:1000:\n",
    "shadow": f"root:*:20000::::::\nsshd:*:20000::::::\n{USER}:*:20000::::::\n",
    "hosts": f"127.0.0.1 localhost\n10.0.2.15 raspberrypi {HOST}\n",
    "hostname": "raspberrypi\n",
    "sudoers.d/pi": f"{USER} ALL=(ALL) NOPASSWD: ALL\n",
    "pip.conf": "[global]\nno-index = true\nfind-links = /opt/wheels\n"
    "[install]\ncompile = no\n",
    "ssh/sshd_config": "HostKey /etc/ssh/host_key\nPermitRootLogin yes\nUsePAM no\n"
    "PasswordAuthentication no\nStrictModes no\nSubsystem sftp /usr/lib/openssh/sftp-server\n"
    "MaxStartups 50\n",
}  # fmt: skip
_PAM = "auth", "account", "session", "session-noninteractive", "password"
# The first program of the machine: finds its disks, mounts them and serves ssh until it is ended.
_INIT = r"""#!/bin/busybox sh
B=/bin/busybox
$B mount -t devtmpfs none /dev; $B mount -t proc none /proc; $B mount -t sysfs none /sys
for m in $($B cat /mods/order); do $B insmod /mods/$m || echo "insmod $m failed"; done
i=0; while [ ! -b /dev/vda ] && [ $i -lt 50 ]; do $B usleep 100000; i=$((i+1)); done
$B mount -t ext4 /dev/vda /mnt
[ -b /dev/vdb ] && $B mkdir -p /mnt/data && $B mount -t ext4 /dev/vdb /mnt/data
for f in proc sysfs:sys devtmpfs:dev; do $B mount -t ${f%:*} none /mnt/${f#*:}; done
$B mkdir -p /mnt/dev/shm /mnt/run/sshd; $B mount -t tmpfs none /mnt/dev/shm
$B mount -t cgroup2 none /mnt/sys/fs/cgroup
echo +memory > /mnt/sys/fs/cgroup/cgroup.subtree_control
$B ip link set lo up; $B ip addr add 10.0.2.15/24 dev eth0; $B ip link set eth0 up
$B hostname raspberrypi
exec $B chroot /mnt /usr/sbin/sshd -D -e
"""


@dataclass(frozen=True)
class Done:
    """How a command in the machine ended."""

    status: int
    out: str
    err: str


def missing_tools() -> list[str]:
    """Programs this file needs that are not installed."""
    return [p for p in TOOLS if not shutil.which(p, path=f"{os.environ['PATH']}:/usr/sbin")]


def prepare(cache: Path, suite: str, more: tuple[str, ...] = ()) -> tuple[Path, Path, Path]:
    """(root directory of `suite`, kernel, initial RAM disk), each made once in `cache`.

    `more` are packages of the root beside SYSTEM.
    """
    cache.mkdir(parents=True, exist_ok=True)
    root = _unpacked(cache, suite, tuple(sorted(SYSTEM + more)), f"root-{suite}")
    kernel = _unpacked(cache, KERNEL_SUITE, ("linux-image-arm64", "busybox-static"), "kernel")
    return root, next(kernel.glob("boot/vmlinuz-*")), _initrd(cache, kernel)


def _unpacked(cache: Path, suite: str, packages: tuple[str, ...], name: str) -> Path:
    digest = hashlib.sha256(" ".join(packages).encode()).hexdigest()[:8]
    root = cache / f"{name}-{digest}"
    if not root.is_dir():
        part = root.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        _call("mmdebstrap", "--quiet", "--variant=extract", "--architectures=arm64",
              f"--include={','.join(packages)}", suite, part, _sources(cache, suite))  # fmt: skip
        part.rename(root)
    return root


def _sources(cache: Path, suite: str) -> Path:
    """An apt source for `suite` on the mirror this machine uses."""
    mirror = "http://deb.debian.org/debian"
    keys = "/usr/share/keyrings/debian-archive-keyring.gpg"
    path = cache / f"{suite}.list"
    path.write_text(f"deb [signed-by={keys}] {mirror} {suite} main\n")
    return path


def _initrd(cache: Path, kernel: Path) -> Path:
    made = cache / "initrd.gz"
    if made.is_file():
        return made
    version = next((kernel / "lib/modules").iterdir()).name
    _call("depmod", "-b", kernel, version)
    with tempfile.TemporaryDirectory() as work:
        tree = Path(work)
        for name in ("bin", "dev", "proc", "sys", "mnt", "mods"):
            (tree / name).mkdir()
        shutil.copy(kernel / "bin/busybox", tree / "bin")
        order: list[str] = []
        for module in MODULES:
            command = ("modprobe", "-d", kernel, "-S", version, "--show-depends", module)
            for line in _call(*command).splitlines():
                if line.startswith("insmod"):
                    path = Path(line.split()[1])
                    if path.name not in order:
                        order.append(path.name)
                        shutil.copy(path, tree / "mods")
        (tree / "mods/order").write_text("\n".join(order))
        (tree / "init").write_text(_INIT)
        (tree / "init").chmod(0o755)
        names = "\n".join(p.relative_to(tree).as_posix() for p in sorted(tree.rglob("*")))
        packed = subprocess.run(
            ["cpio", "-o", "-H", "newc", "--quiet"],
            cwd=tree, input=names.encode(), stdout=subprocess.PIPE, check=True,
        )  # fmt: skip
    part = made.with_suffix(".part")
    part.write_bytes(gzip.compress(packed.stdout, 1))
    part.replace(made)
    return made


def make_disk(tree: Path, image: Path, spare: int = 0) -> Path:
    """An ext4 image of `tree` with `spare` bytes free beside its files."""
    used = sum(p.stat().st_size for p in tree.rglob("*") if p.is_file() and not p.is_symlink())
    blocks = (used * 5 // 4 + spare >> 20) + 64
    image.unlink(missing_ok=True)
    _call("mke2fs", "-q", "-F", "-t", "ext4", "-m", "0", "-d", tree, image, f"{blocks}M")
    return image


class Machine:
    """A board: `with Machine(...).on("cortex-a72") as board: board.run("uname -m")`.

    What is written to its disk stays there, for the next CPU it is started on.
    """

    def __init__(
        self,
        cache: Path,
        work: Path,
        suite: str,
        memory: str,
        wheels: Path,
        home: Path | None = None,
        more: tuple[str, ...] = (),
    ) -> None:
        """Prepare a disk of `suite` for a machine with `memory` ("2G").

        `wheels` is a folder for pip there, `home` files for the user's home directory, `more`
        packages beside SYSTEM; `work` is emptied and takes disk, keys and log.
        """
        self.cpu, self.suite, self._memory = CPUS[0], suite, memory
        self._work = work
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        root, self._kernel, self._initrd_file = prepare(cache, suite, more)
        for name in ("host_key", "user_key"):
            _call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", work / name)
        stage = work / "stage"
        _call("cp", "-a", root, stage)
        self._furnish(stage, wheels)
        if home:
            _call("cp", "-a", f"{home}/.", stage / "home" / USER)
            _call("chown", "-R", "1000:1000", stage / "home" / USER)
        self._disk = make_disk(stage, work / "disk.img", spare=2 << 30)
        shutil.rmtree(stage)
        self._data: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._link: subprocess.Popen[bytes] | None = None

    def _furnish(self, stage: Path, wheels: Path) -> None:
        """Users, keys, pip's wheels: what the packages' own scripts and a user would have done."""
        for name, text in _ACCOUNTS.items():
            path = stage / "etc" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        (stage / "etc/sudoers.d/pi").chmod(0o440)
        for kind in _PAM:
            rule = f"{kind.partition('-')[0]} required pam_permit.so\n"
            (stage / "etc/pam.d" / f"common-{kind}").write_text(rule)
        certificates = sorted((stage / "usr/share/ca-certificates/mozilla").glob("*.crt"))
        (stage / "etc/ssl/certs/ca-certificates.crt").write_text(
            "".join(p.read_text() for p in certificates)
        )
        key = (self._work / "user_key.pub").read_text()
        for home, owner in (("root", 0), (f"home/{USER}", 1000)):
            folder = stage / home / ".ssh"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "authorized_keys").write_text(key)
            for path in (folder.parent, folder, folder / "authorized_keys"):
                os.chown(path, owner, owner)
        shutil.copy(self._work / "host_key", stage / "etc/ssh/host_key")
        shutil.copytree(wheels, stage / "opt/wheels")
        (stage / "tmp").chmod(0o1777)

    def on(self, cpu: str) -> Machine:
        """The same disk on another CPU, to be started."""
        self.cpu = cpu
        return self

    def add_data(self, tree: Path, spare: int) -> None:
        """A second disk with the files of `tree` and `spare` bytes beside them, on /data."""
        self._data = make_disk(tree, self._work / "data.img", spare)

    @property
    def ssh_config(self) -> Path:
        """An ssh configuration in which the board is called raspberrypi.local."""
        return self._work / "ssh_config"

    def __enter__(self) -> Machine:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        kind, key, *_ = (self._work / "host_key.pub").read_text().split()
        (self._work / "known_hosts").write_text(f"[127.0.0.1]:{self.port} {kind} {key}\n")
        self.ssh_config.write_text(
            f"Host {HOST}\n HostName 127.0.0.1\n Port {self.port}\n"
            f" IdentityFile {self._work / 'user_key'}\n IdentitiesOnly yes\n"
            f" UserKnownHostsFile {self._work / 'known_hosts'}\n"
        )
        disks = [p for p in (self._disk, self._data) if p]
        drives = [
            word
            for i, path in enumerate(disks)
            for word in ("-drive", f"file={path},if=none,format=raw,id=d{i},cache=unsafe",
                         "-device", f"virtio-blk-pci,drive=d{i}")
        ]  # fmt: skip
        with (self._work / "console.log").open("wb") as log:
            self._process = subprocess.Popen(
                ["qemu-system-aarch64", "-M", "virt", "-cpu", self.cpu, "-smp", "2",
                 "-m", self._memory, "-nographic", "-no-reboot",
                 "-netdev", f"user,id=n0,restrict=on,hostfwd=tcp:127.0.0.1:{self.port}-:22",
                 "-device", "virtio-net-pci,netdev=n0,romfile=",
                 "-kernel", str(self._kernel), "-initrd", str(self._initrd_file),
                 "-append", "console=ttyAMA0 quiet panic=-1", *drives],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        try:
            self._wait()
        except BaseException:
            self._process.kill()
            raise
        return self

    def _wait(self) -> None:
        assert self._process
        end = time.monotonic() + BOOT_SECONDS
        while time.monotonic() < end:
            if self._process.poll() is not None:
                break
            if self.run("true", user="root", timeout=20).status == 0:
                self._link = self._connect()
                return
            time.sleep(0.5)
        text = (self._work / "console.log").read_text(errors="replace")
        raise RuntimeFault(f"The machine does not come up; its console ends: {text[-400:]}")

    def _connect(self) -> subprocess.Popen[bytes]:
        """One connection as root for all that `run` does: a handshake takes the CPU a second."""
        socket = self._work / "link"
        link = subprocess.Popen(
            ["ssh", "-F", str(self.ssh_config), "-o", "BatchMode=yes", "-M", "-S", str(socket),
             "-N", f"root@{HOST}"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        while not socket.exists() and link.poll() is None:
            time.sleep(0.05)
        return link

    def __exit__(self, *error: object) -> None:
        assert self._process
        self.run("sync", user="root")
        for process in (self._link, self._process):
            if process:
                process.terminate()
                process.wait()

    def run(self, script: str, user: str = USER, timeout: float | None = None) -> Done:
        """Run a bash script there, as a user whose home it starts in."""
        if user != "root":
            script = as_user(user, script)
        command = ["ssh", "-F", str(self.ssh_config), "-o", "BatchMode=yes",
                   "-o", "ConnectTimeout=15", "-S", str(self._work / "link"), f"root@{HOST}",
                   f"exec bash -c {shlex.quote(script)}"]  # fmt: skip
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                errors="replace", timeout=timeout, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return Done(124, "", f"no answer in {timeout} s")
        return Done(done.returncode, done.stdout, done.stderr)

    def checked(self, script: str, user: str = USER) -> str:
        """What a script that has to succeed prints.

        Raises:
            RuntimeFault: it fails.
        """
        done = self.run(script, user)
        if done.status:
            words = (done.err.strip() or done.out.strip())[-600:]
            raise RuntimeFault(f"{self.cpu}: {script[:200]} ended with {done.status}: {words}")
        return done.out

    def capped(self, script: str, limit: int, user: str = USER) -> tuple[Done, dict[str, Any]]:
        """Run a script in a control group of `limit` bytes, no swap, nothing cached before.

        Returns how it ended, and the group's peak (page cache included) and OOM kills.
        """
        group = "/sys/fs/cgroup/capped"
        done = self.run(
            f"set -e; mkdir {group}; echo {limit} > {group}/memory.max; "
            f"echo 0 > {group}/memory.swap.max 2>/dev/null || true; "
            f"sync; echo 3 > /proc/sys/vm/drop_caches; echo $BASHPID > {group}/cgroup.procs; "
            f"{script if user == 'root' else as_user(user, script)}",
            user="root",
        )
        words = self.checked(
            f"cat {group}/memory.peak 2>/dev/null || echo 0; "
            f"sed -n 's/^oom_kill //p' {group}/memory.events; "
            f"i=0; until rmdir {group} 2>/dev/null || [ $i = 50 ]; do sleep 0.1; i=$((i+1)); done",
            user="root",
        ).split()
        return done, {"limit": limit, "peak": int(words[0]), "oom_kills": int(words[1])}

    def fetch(self, path: str, to: Path) -> None:
        """Copy a file from there."""
        _call("scp", "-q", "-F", self.ssh_config, f"{USER}@{HOST}:{path}", to)


def as_user(user: str, script: str) -> str:
    """A script of root's that runs `script` as a user would find it after logging in."""
    home = f"/home/{user}"
    return (
        f"cd {home}; exec setpriv --reuid=1000 --regid=1000 --clear-groups env -i HOME={home} "
        f"USER={user} PATH=/usr/local/bin:/usr/bin:/bin bash -c {shlex.quote(script)}"
    )


def _call(*words: str | Path) -> str:
    """Run a program of this machine: its output.

    Raises:
        RuntimeFault: it fails.
    """
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    done = subprocess.run(
        [str(w) for w in words], capture_output=True, text=True, check=False,
        env={**os.environ, "PATH": path},
    )  # fmt: skip
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        raise RuntimeFault(f"{words[0]} ended with status {done.returncode}: {last}")
    return done.stdout
