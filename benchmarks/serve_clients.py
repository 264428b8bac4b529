"""What real clients get from `edge-kv serve`: OpenAI's, LiteLLM, curl, many at once, and odd ones.

    python benchmarks/serve_clients.py artifacts/tiny --seconds 600

Starts the server on a free port of this machine, asks everything a client library asks (streams,
tools, JSON schemas, log-probabilities, responses, cancelling), lets eight clients talk at once,
sends malformed requests, and writes `results/serve_clients.json`. Needs the pip packages openai and
litellm, and curl.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from common import say, write_result

KEY = "a-key-for-the-benchmark"
QUESTION = {"role": "user", "content": "And it came to pass in those days, that"}
CLIENTS = 8
SAMPLE = 5.0  # seconds between two looks at the server's memory
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("artifact")
    parser.add_argument("--engine", default="onnx")
    parser.add_argument("--seconds", type=float, default=600.0, help="of eight clients at once")
    parser.add_argument("--malformed", type=int, default=500)
    args = parser.parse_args()
    command = [
        sys.executable, "-m", "edge_kv", "serve", args.artifact, "--port", "0", "--api-key", KEY,
        "--engine", args.engine, "--queue", "64",
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout
            base = server.stdout.readline().split()[2]
            model = httpx.get(f"{base}/v1/models", headers=key()).json()["data"][0]["id"]
            result = {
                "artifact": Path(args.artifact).name,
                "engine": args.engine,
                "checks": checks(base, model),
                "many": many(base, model, args.seconds, server.pid),
                "malformed": malformed(base, args.malformed),
            }
        finally:
            server.terminate()
            server.wait(60)
    result["exit_status"] = server.returncode
    write_result("serve_clients", result)


def key() -> dict[str, str]:
    return {"Authorization": f"Bearer {KEY}"}


def checks(base: str, model: str) -> dict[str, str]:
    """Every ability, asked for by the client libraries: name -> "passed" or what went wrong."""
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks a host for prices
    import litellm
    import openai

    client = openai.OpenAI(base_url=f"{base}/v1", api_key=KEY, max_retries=0)
    ask: Callable[..., Any] = client.chat.completions.create
    plain = {"model": model, "messages": [QUESTION], "max_tokens": 24}

    def whole() -> bool:
        reply = ask(**plain)
        return bool(reply.choices[0].message.content) and reply.usage.completion_tokens == 24

    def streamed() -> bool:
        parts = list(ask(**plain, temperature=0, stream=True))
        text = "".join(p.choices[0].delta.content or "" for p in parts)
        return bool(text == ask(**plain, temperature=0).choices[0].message.content)

    def schema() -> bool:
        form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
        reply = ask(**{**plain, "max_tokens": 80}, response_format=form)
        return set(json.loads(reply.choices[0].message.content)) == {"name", "age"}

    def tools() -> bool:
        reply = ask(**{**plain, "max_tokens": 80}, tools=[WEATHER], tool_choice="required")
        (called,) = reply.choices[0].message.tool_calls
        arguments = json.loads(called.function.arguments)
        return bool(called.function.name == "weather" and isinstance(arguments["city"], str))

    def logprobs() -> bool:
        reply = ask(**plain, temperature=0, logprobs=True, top_logprobs=3)
        listed = reply.choices[0].logprobs.content
        return len(listed) == 24 and all(t.logprob == t.top_logprobs[0].logprob for t in listed)

    def streamed_logprobs() -> bool:
        asked = {**plain, "temperature": 0, "logprobs": True, "top_logprobs": 3}
        choices = [p.choices[0] for p in ask(**asked, stream=True)]
        (whole,) = ask(**asked).choices
        listed = [token for c in choices if c.logprobs for token in c.logprobs.content]
        early = sum(1 for c in choices if c.delta.content and c.logprobs)
        pairs = list(zip(listed, whole.logprobs.content, strict=True))  # equal but for rounding
        alike = all(a.token == b.token and abs(a.logprob - b.logprob) < 0.05 for a, b in pairs)
        return early > 1 and alike and all(len(t.top_logprobs) == 3 for t in listed)

    def responses() -> bool:
        asked = {"model": model, "input": QUESTION["content"], "max_output_tokens": 24}
        reply = client.responses.create(**asked, temperature=0)
        said = [QUESTION, *reply.output, QUESTION]
        more = client.responses.create(**{**asked, "input": said}, temperature=0)
        held = more.usage.input_tokens_details.cached_tokens
        return bool(reply.output_text and more.output_text and held > reply.usage.input_tokens)

    def streamed_responses() -> bool:
        asked = {"model": model, "input": QUESTION["content"], "max_output_tokens": 24}
        events = list(client.responses.create(**asked, temperature=0, stream=True))
        text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
        whole = client.responses.create(**asked, temperature=0)
        return bool(text and text == events[-1].response.output_text == whole.output_text)

    def tools_of_responses() -> bool:
        flat = {"type": "function", **WEATHER["function"]}
        asked = {"model": model, "input": [QUESTION], "tools": [flat], "tool_choice": "required"}
        whole = client.responses.create(**asked, temperature=0)
        with client.responses.stream(**asked, temperature=0) as stream:
            told = stream.get_final_response()
        (called,), (again,) = (
            [i for i in reply.output if i.type == "function_call"] for reply in (whole, told)
        )
        given = {"type": "function_call_output", "call_id": called.call_id, "output": "Rain."}
        said = [QUESTION, *whole.output, given]
        after = client.responses.create(model=model, input=said, tools=[flat], max_output_tokens=8)
        city = json.loads(called.arguments)["city"]
        return isinstance(city, str) and called.arguments == again.arguments and bool(after.output)

    def cancelled() -> bool:
        stream = ask(**{**plain, "max_tokens": 1000}, stream=True)
        next(iter(stream))
        stream.close()
        begin = time.monotonic()
        ask(**{**plain, "max_tokens": 1})
        return time.monotonic() - begin < 10

    def completion() -> bool:
        reply = client.completions.create(model=model, prompt=QUESTION["content"], max_tokens=8)
        return bool(reply.choices[0].text)

    def with_litellm() -> bool:
        reply = litellm.completion(
            model=f"openai/{model}", api_base=f"{base}/v1", api_key=KEY, messages=[QUESTION],
            max_tokens=8,
        )  # fmt: skip
        return bool(reply.choices[0].message.content)

    def with_curl() -> bool:
        body = json.dumps({"messages": [QUESTION], "max_tokens": 8})
        words = ["curl", "-sS", f"{base}/v1/chat/completions", "-d", body]
        for header in ("Content-Type: application/json", f"Authorization: Bearer {KEY}"):
            words += ["-H", header]
        said = subprocess.run(words, capture_output=True, check=True, text=True).stdout
        return bool(json.loads(said)["choices"][0]["message"]["content"])

    def refused() -> bool:
        other = openai.OpenAI(base_url=f"{base}/v1", api_key="wrong", max_retries=0)
        try:
            other.models.list()
        except openai.AuthenticationError:
            return True
        return False

    asked: tuple[Callable[[], bool], ...] = (
        whole, streamed, schema, tools, logprobs, streamed_logprobs, responses, streamed_responses,
        tools_of_responses, cancelled, completion, with_litellm, with_curl, refused,
    )  # fmt: skip
    found = {}
    for check in asked:
        try:
            found[check.__name__] = "passed" if check() else "another answer than expected"
        except Exception as e:  # a benchmark reports what a client library raises
            found[check.__name__] = f"{type(e).__name__}: {e}"[:200]
        say(f"{check.__name__}: {found[check.__name__]}")
    return found


def many(base: str, model: str, seconds: float, server: int) -> dict[str, Any]:
    """Eight clients with a conversation each, for `seconds`: latencies, losses, memory."""
    until = time.monotonic() + seconds
    first_token: list[float] = []
    lost: list[str] = []
    memory = [resident(server)]

    def watch() -> None:
        while time.monotonic() < until:
            time.sleep(min(SAMPLE, seconds / 20))
            memory.append(resident(server))

    def talk(number: int) -> None:
        turns: list[dict[str, str]] = []
        with httpx.Client(timeout=300, headers=key()) as client:
            while time.monotonic() < until:
                turns.append({"role": "user", "content": f"{number}: {QUESTION['content']}"})
                body = {"model": model, "messages": turns, "max_tokens": 16, "stream": True}
                begin, text = time.monotonic(), ""
                url = f"{base}/v1/chat/completions"
                with client.stream("POST", url, json=body) as answer:
                    if answer.status_code != 200:
                        lost.append(f"status {answer.status_code}")
                        turns = []
                        continue
                    ended = False
                    for line in answer.iter_lines():
                        if not line.startswith("data: {"):
                            continue
                        choice = json.loads(line[6:])["choices"][0]
                        delta = choice.get("delta", {})
                        if delta.get("content") and not text:
                            first_token.append(time.monotonic() - begin)
                        text += delta.get("content") or ""
                        ended = ended or bool(choice["finish_reason"])
                if not ended:
                    lost.append("a stream without an end")
                turns.append({"role": "assistant", "content": text})
                if len(turns) > 8:
                    turns = []

    threads = [threading.Thread(target=talk, args=(n,)) for n in range(CLIENTS)]
    threads.append(threading.Thread(target=watch))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    say(f"{len(first_token)} replies, {len(lost)} lost")
    half = len(memory) // 2
    return {
        "clients": CLIENTS,
        "seconds": seconds,
        "replies": len(first_token),
        "lost": lost,
        "first_token_p50": statistics.median(first_token),
        "first_token_p95": statistics.quantiles(first_token, n=20)[18],
        "rss_before": memory[0],
        "rss_peak_of_first_half": max(memory[:half]),
        "rss_peak_of_second_half": max(memory[half:]),
    }


def malformed(base: str, count: int) -> dict[str, Any]:
    """Requests that are wrong in seeded ways: what they were answered with, and how late.

    Some turn out to be right (`"max_tokens": null` asks for as long a reply as the server gives):
    they are answered with a reply, whose time says nothing of how long a refusal takes.
    """
    draw = random.Random(0)
    odd: list[Any] = [None, -1, 10**30, "x", [], {}, [1], {"a": 1}, True, "\ud800", 1e308, "ÿ" * 99]
    fields = [
        "messages", "max_tokens", "temperature", "top_p", "stop", "tools", "tool_choice", "n",
        "logit_bias", "response_format", "stream_options", "seed", "top_logprobs", "prompt",
    ]  # fmt: skip
    statuses: dict[str, int] = {}
    longest: dict[str, float] = {}
    with httpx.Client(timeout=300, headers=key()) as client:
        for _ in range(count):
            body: dict[str, Any] = {"messages": [QUESTION], "max_tokens": 1}
            for name in draw.sample(fields, draw.randint(1, 3)):
                body[name] = draw.choice(odd)
            content = json.dumps(body).encode()
            if draw.random() < 0.3:
                content = content[: draw.randrange(len(content))]
            kind = draw.choice(["application/json"] * 5 + ["text/plain", ""])
            path = draw.choice(["/v1/chat/completions"] * 5 + ["/v1/completions", "/v1/nothing"])
            begin = time.monotonic()
            answer = client.post(f"{base}{path}", content=content, headers={"Content-Type": kind})
            seconds = time.monotonic() - begin
            answer.json()  # an error is a document too
            name = str(answer.status_code)
            statuses[name] = statuses.get(name, 0) + 1
            longest[name] = max(longest.get(name, 0.0), seconds)
    say(f"malformed requests by status: {statuses}")
    return {"requests": count, "statuses": statuses, "longest_seconds": longest}


def resident(process: int) -> int:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


if __name__ == "__main__":
    main()
