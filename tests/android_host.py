"""The app's runtime classes in a desktop JVM, asked from Python: android_demo/src/test."""

from __future__ import annotations

import base64
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

DEMO = Path(__file__).parent.parent / "android_demo"
SERVER = DEMO / "build" / "host" / "server"
REQUIRED = "EDGE_KV_ANDROID"  # set where a missing build is a failure: CI


class HostError(Exception):
    """An error the Kotlin code raised on purpose; `kind` is the class."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Host:
    """A running host server; one request at a time."""

    def __init__(self, scratch: Path) -> None:
        self._process = subprocess.Popen(
            [str(SERVER), str(scratch)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, op: str, **fields: Any) -> Any:
        """The answer to one request; HostError when the Kotlin code refused it."""
        process = self._process
        assert process.stdin and process.stdout
        process.stdin.write(json.dumps({"op": op, **fields}) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        assert line, f"the host server died of {op} (exit status {process.wait()})"
        answer = json.loads(line)
        if "error" in answer:
            raise HostError(answer["error"], answer["message"])
        return answer["result"]

    def decode(self, ids: list[int]) -> np.ndarray:
        """Logits after each id, float32 [n, vocab]."""
        few = [ids[i : i + 8] for i in range(0, len(ids), 8)]  # 1.4 MB an id, for Gemma
        return np.stack([floats(row) for part in few for row in self.ask("decode", ids=part)])

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(30)


def floats(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<f4")


def start(scratch: Path) -> Host:
    """A host server, or a skip that says how to get one."""
    if not SERVER.exists():
        message = "the Android host server is not built: make android"
        pytest.fail(message) if os.environ.get(REQUIRED) else pytest.skip(message)
    return Host(scratch)
