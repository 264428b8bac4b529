"""The kernels of this machine and of an emulated one, as tests and measurements call them."""

import hashlib
import os
import platform
import shutil
import subprocess
from pathlib import Path
from unittest import mock

from edge_kv.runtime.native_library import ISAS, KERNELS, SOURCES, build


def have(isa):
    """Whether this CPU runs `isa`: asked of the CPU, so that a kernel cannot skip itself."""
    if isa == "scalar" or platform.machine() == "aarch64":
        return True
    with open("/proc/cpuinfo") as f:
        flags = f.read().split("flags", 1)[-1].split("\n", 1)[0].split()
    return {"avx2": "avx2", "avx512": "avx512vl", "avx512vnni": "avx512_vnni"}[isa] in flags


MACHINE_ISAS = [isa for isa in ISAS[platform.machine()] if have(isa)]
CROSS, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
EMULATED = [f"aarch64:{isa}" for isa in ISAS["aarch64"]]
if platform.machine() == "aarch64" or not (shutil.which(CROSS) and shutil.which(EMULATOR)):
    EMULATED = []
ALL_ISAS = MACHINE_ISAS + EMULATED


def start_emulator(cpu, *arguments):
    """The kernels of aarch64 behind tests/kernel_driver.cpp, in the emulator."""
    driver = Path(__file__).parent / "kernel_driver.cpp"
    digest = hashlib.sha256(driver.read_bytes()).hexdigest()
    with mock.patch.dict(os.environ, CXX=CROSS):
        link = ("-static", "-pthread", "-std=c++17", "-O2", f"-I{SOURCES}", f"-DDRIVER={digest}")
        program = build(
            "kernel_driver", dict.fromkeys(KERNELS, ()), (*link, str(driver)), machine="aarch64"
        )
    return subprocess.Popen(
        [EMULATOR, "-cpu", cpu, program, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
