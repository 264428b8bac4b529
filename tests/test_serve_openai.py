"""The server, asked by OpenAI's own client."""

import json
import re

import pytest
from fake_artifact import NumpySession, write_artifact
from openai import OpenAI
from starlette.testclient import TestClient

from edge_kv.artifact import read_artifact
from edge_kv.runtime.chat import Generator
from edge_kv.runtime.template import RAW_TEMPLATE, Template
from edge_kv.serve.app import Server, Settings, make_app
from edge_kv.serve.states import States

HELLO = [{"role": "user", "content": "Hello"}]
PERSON = {
    "type": "object",
    "properties": {"n": {"enum": [7]}},
    "required": ["n"],
    "additionalProperties": False,
}
COUNT = {"type": "function", "function": {"name": "count", "parameters": PERSON}}


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    root = write_artifact(tmp_path_factory.mktemp("asked") / "a", ctx=512, programs=False)
    session = NumpySession(read_artifact(root))
    generator = Generator(session)
    raw = Generator(session, generator.tokenizer, Template(RAW_TEMPLATE))
    server = Server(generator, raw, States(generator), Settings())
    with TestClient(make_app(server), base_url="http://localhost") as http:
        yield OpenAI(
            base_url="http://localhost/v1", api_key="unused", http_client=http, max_retries=0
        )


def merged(entries):
    """The texts of tokens, put together."""
    return bytes(b for e in entries for b in e.bytes).decode(errors="replace")


@pytest.mark.parametrize("stop", [None, "a"])
def test_every_part_of_a_streamed_chat_has_the_logprobs_of_its_tokens(client, stop):
    ask = {
        "model": "toy", "messages": HELLO, "max_tokens": 40, "seed": 5, "temperature": 0.7,
        "logprobs": True, "top_logprobs": 2, "stop": stop, "logit_bias": {"102": 9, "200": 9},
    }  # fmt: skip
    (whole,) = client.chat.completions.create(**ask).choices
    parts = [p.choices[0] for p in client.chat.completions.create(**ask, stream=True)]
    said = [p for p in parts if p.delta.content]
    assert len(said) > 5
    for part in said:
        if "\ufffd" not in part.delta.content:
            assert merged(part.logprobs.content) == part.delta.content
    listed = [e for p in parts if p.logprobs for e in p.logprobs.content]
    assert listed == whole.logprobs.content
    assert merged(listed) == "".join(p.delta.content for p in said) == whole.message.content


def test_every_part_of_a_streamed_completion_has_the_logprobs_of_its_tokens(client):
    ask = {
        "model": "toy", "prompt": "Hello", "max_tokens": 20, "seed": 5, "temperature": 0.7,
        "logprobs": 1,
    }  # fmt: skip
    (whole,) = client.completions.create(**ask).choices
    parts = [p.choices[0] for p in client.completions.create(**ask, stream=True)]
    joined = {"tokens": [], "text_offset": [], "token_logprobs": [], "top_logprobs": []}
    for part in parts:
        assert part.logprobs or not part.text
        for name, values in (part.logprobs.model_dump() if part.logprobs else {}).items():
            joined[name] += values
    assert joined == whole.logprobs.model_dump() and len(joined["tokens"]) == 20
    assert "".join(p.text for p in parts) == whole.text


def test_logprobs_of_a_call_come_with_it(client):
    ask = {
        "model": "toy", "messages": HELLO, "max_tokens": 200, "tools": [COUNT],
        "tool_choice": "required", "logprobs": True,
    }  # fmt: skip
    (whole,) = client.chat.completions.create(**ask).choices
    parts = [p.choices[0] for p in client.chat.completions.create(**ask, stream=True)]
    (called,) = [p for p in parts if p.delta.tool_calls]
    (call,) = called.delta.tool_calls
    assert call.function.arguments == whole.message.tool_calls[0].function.arguments
    body = re.search(r"{.*}", merged(called.logprobs.content))[0]
    assert json.loads(body) == {"name": "count", "arguments": {"n": 7}}
    assert [e for p in parts if p.logprobs for e in p.logprobs.content] == whole.logprobs.content


def test_penalties_keep_tokens_from_coming_again(client):
    ask = {
        "model": "toy", "messages": HELLO, "max_tokens": 9, "temperature": 0, "logprobs": True,
        "logit_bias": {"70": 100, "71": 99, "72": 98},
    }  # fmt: skip

    def ids(**penalties):
        (choice,) = client.chat.completions.create(**ask, **penalties).choices
        return [bytes(e.bytes) for e in choice.logprobs.content]

    assert len(set(ids())) == 1 and len(set(ids(presence_penalty=2.0))) > 1
    assert len(set(ids(frequency_penalty=2.0))) == 3
