"""Returning conversations: what is read again, and how long the first token takes.

    edge-kv export --weights GGUF --ctx 16384 --out artifacts/gemma3-270m
    python benchmarks/prompt_cache.py artifacts/gemma3-270m --gguf GGUF

Four conversations, each begun with its own part of the shipped text, are held at once; then each
goes on with a short question, in turn, twice. `edge-kv serve` keeps them in RAM, or with --state in
files, over a restart between the rounds. llama.cpp is the server of llama-cpp-python with its cache
of states in RAM; the file and the prompts are the same, and so is what asks. It needs the package
llama-cpp-python[server], here or in the Python that --llama-python names. Times are from the
question to the first token; the openings, of which nothing is known, are read whole. Writes
results/prompt_cache.json; with --ways, some of them are measured and the others stay as they were.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from common import read_result, say, write_result

from edge_kv.artifact import read_artifact
from edge_kv.runtime import Tokenizer

RESULT = "prompt_cache"
TALKS = 4
REPLY = 8  # tokens
RAM, FILES, LLAMA = "in RAM", "--state, restarted", "llama.cpp's server, states in RAM"
WAYS = {"ram": RAM, "files": FILES, "llama": LLAMA}
QUESTIONS = ("What was told first?", "And what came then?")
Turns = list[dict[str, str]]


def openings(artifact: Path, tokens: int) -> list[str]:
    """The first message of each conversation, of about so many tokens, none like another."""
    tokenizer = Tokenizer.of(read_artifact(artifact))
    text = (Path(__file__).parent.parent / "edge_kv/data/calibration.txt").read_text("utf-8")
    text += (Path(__file__).parent.parent / "edge_kv/data/passage.txt").read_text("utf-8")
    ids = tokenizer.encode(text, start=False)
    ids = ids * (1 + TALKS * tokens // len(ids))
    parts = [ids[n * tokens : (n + 1) * tokens] for n in range(TALKS)]
    return [f"Text {n}: {tokenizer.decode(part)}" for n, part in enumerate(parts)]


def rounds(openings: list[str], ask: Callable[[Turns], tuple[str, dict[str, Any]]],
           between: Callable[[], None]) -> list[dict[str, Any]]:  # fmt: skip
    """What every turn cost: the openings, then two rounds of questions, `between` before each."""
    talks: list[Turns] = [[] for _ in openings]
    rows = []
    for number, questions in enumerate([openings, *([q] * TALKS for q in QUESTIONS)]):
        if number:
            between()
        for talk, question in zip(talks, questions, strict=True):
            talk.append({"role": "user", "content": question})
            text, cost = ask(talk)
            talk.append({"role": "assistant", "content": text})
            rows.append({"round": number, **cost})
    return rows


def stream(base: str, turns: Turns) -> tuple[str, float, dict[str, Any]]:
    """(text, seconds to the first token, usage) of one reply.

    A reply may end with its first token, which no text stands for: the end tells of it then.
    """
    body = {"messages": turns, "max_tokens": REPLY, "temperature": 0, "stream": True,
            "stream_options": {"include_usage": True}}  # fmt: skip
    begin, first, text, usage = time.monotonic(), 0.0, "", {}
    with httpx.stream("POST", f"{base}/v1/chat/completions", json=body, timeout=3600) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            usage = event.get("usage") or usage
            for choice in event["choices"]:
                piece = choice["delta"].get("content")
                if piece or choice.get("finish_reason"):
                    first = first or time.monotonic() - begin
                text += piece or ""
    return text, first, usage


@contextmanager
def served(artifact: Path, options: list[str]) -> Iterator[str]:
    """The address of a server, which ends as a supervisor would end it."""
    command = [sys.executable, "-m", "edge_kv", "serve", str(artifact), "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        try:
            yield server.stdout.readline().split()[2]
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)


class Client:
    """Asks a server; `restart` ends it and starts it anew."""

    def __init__(self, artifact: Path, options: list[str]) -> None:
        self._start = lambda: served(artifact, options)
        self._server = self._start()
        self._base = self._server.__enter__()

    def restart(self) -> None:
        self.close()
        self._server = self._start()
        self._base = self._server.__enter__()

    def close(self) -> None:
        self._server.__exit__(None, None, None)

    def ask(self, turns: Turns) -> tuple[str, dict[str, Any]]:
        text, first, usage = stream(self._base, turns)
        prompt = usage["prompt_tokens"]
        read = prompt - usage["prompt_tokens_details"]["cached_tokens"]
        return text, {"prompt": prompt, "read": read, "first_token_seconds": first}


class LlamaServer:
    """Asks llama-cpp-python's server, which says on stderr how much of a prompt it read."""

    _HIT = re.compile(r"(\d+) prefix-match hit, remaining (\d+) prompt tokens")
    _READ = re.compile(r"prompt eval time =.*/ *(\d+) tokens")

    def __init__(self, python: str, gguf: Path, ctx: int, threads: int, log: Path) -> None:
        """Start it with states of up to 2 GiB and Gemma's chat format; `log` takes its stderr.

        Its default, the logits of every token, would copy 8 GB of them into each kept state of
        8,000 tokens, beyond the cache's limit: with four conversations the kernel kills it.
        """
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        options = {
            "model": gguf, "n_ctx": ctx, "n_threads": threads, "n_threads_batch": threads,
            "cache": "true", "cache_type": "ram", "cache_size": 2 << 30, "logits_all": "false",
            "chat_format": "gemma", "port": port, "host": "127.0.0.1",
        }  # fmt: skip
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        command = [*shlex.split(python), "-m", "llama_cpp.server", *words]
        self._log, self._base = log, f"http://127.0.0.1:{port}"
        with log.open("w") as file:
            self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=file)
        while True:
            try:
                httpx.get(f"{self._base}/v1/models").raise_for_status()
                break
            except httpx.TransportError:
                if self._process.poll() is not None:
                    raise SystemExit(f"Error: {log.read_text()[-400:]}") from None
                time.sleep(0.2)

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(60)

    def ask(self, turns: Turns) -> tuple[str, dict[str, Any]]:
        before = self._log.stat().st_size
        text, first, _ = stream(self._base, turns)
        said = self._log.read_bytes()[before:].decode(errors="replace")
        (read,) = map(int, self._READ.findall(said))
        hit = self._HIT.search(said)
        prompt = sum(map(int, hit.groups())) if hit else read
        return text, {"prompt": prompt, "read": read, "first_token_seconds": first}


def nothing() -> None:
    """No restart between the rounds."""


def summed(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of the opening round and of those that return."""
    found = {}
    for name, part in (("opening", [r for r in rows if r["round"] == 0]),
                       ("returning", [r for r in rows if r["round"] > 0])):  # fmt: skip
        found[name] = {
            key: statistics.median(r[key] for r in part)
            for key in ("prompt", "read", "first_token_seconds")
        }
        found[name]["most_read"] = max(r["read"] for r in part)
    say(json.dumps(found))
    return {**found, "turns": rows}


def earlier(given: dict[str, Any]) -> dict[str, Any]:
    """The ways in the result there is, if it was made with the same arguments."""
    held = read_result(RESULT)
    same = all(held.get(key) == value for key, value in given.items())
    ways: dict[str, Any] = held.get("ways", {}) if same else {}
    return ways


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--gguf", type=Path, help="the same model for llama.cpp; else left out")
    parser.add_argument("--llama-python", default=sys.executable, help="its Python's command")
    parser.add_argument("--tokens", type=int, default=8000, help="of an opening")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    args = parser.parse_args()
    texts = openings(args.artifact, args.tokens)
    threads = ["--threads", str(args.threads)]
    given = {"artifact": args.artifact.name, "tokens": args.tokens, "threads": args.threads}
    found = earlier(given)

    def measure(name: str, options: list[str], restarts: bool) -> None:
        client = Client(args.artifact, [*threads, *options])
        try:
            between = client.restart if restarts else nothing
            found[name] = summed(rounds(texts, client.ask, between))
        finally:
            client.close()

    if "ram" in args.ways:
        measure(RAM, [], restarts=False)
    if "files" in args.ways:
        with tempfile.TemporaryDirectory() as folder:
            measure(FILES, ["--state", folder], restarts=True)
    if "llama" in args.ways and args.gguf:
        ctx = read_artifact(args.artifact).plan.ctx
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder) / "log"
            peer = LlamaServer(args.llama_python, args.gguf, ctx, args.threads, log)
            try:
                found[LLAMA] = summed(rounds(texts, peer.ask, nothing))
            finally:
                peer.close()
    write_result(RESULT, {"conversations": TALKS, **given, "ways": found})


if __name__ == "__main__":
    main()
