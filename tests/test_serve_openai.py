"""The server, asked by OpenAI's own client."""

import json
import re
from contextlib import contextmanager

import pytest
from fake_artifact import NumpySession, write_artifact
from openai import BadRequestError, OpenAI
from starlette.testclient import TestClient

from edge_kv.artifact import read_artifact
from edge_kv.serve.app import Settings, make_app
from edge_kv.serve.command import make_server

HELLO = [{"role": "user", "content": "Hello"}]
PERSON = {
    "type": "object",
    "properties": {"n": {"enum": [7]}},
    "required": ["n"],
    "additionalProperties": False,
}
COUNT = {"type": "function", "function": {"name": "count", "parameters": PERSON}}


@contextmanager
def asking(server):
    with TestClient(make_app(server), base_url="http://localhost") as http:
        yield OpenAI(
            base_url="http://localhost/v1", api_key="unused", http_client=http, max_retries=0
        )


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    root = write_artifact(tmp_path_factory.mktemp("asked") / "a", ctx=512, programs=False)
    with asking(make_server(NumpySession(read_artifact(root)), Settings())) as client:
        yield client


@pytest.fixture(scope="module")
def thinker(tmp_path_factory):
    """The same of a model that thinks, and a way to script what it says next."""
    root = write_artifact(
        tmp_path_factory.mktemp("thinks") / "a", ctx=2048, programs=False, verify=False,
        marks=["<think>", "</think>", "<tool_call>", "</tool_call>", "<|im_start|>", "<|im_end|>"],
        template=CHATML,
    )  # fmt: skip
    session = Scripted(read_artifact(root))
    server = make_server(session, Settings(), drafts="off")
    encode = server.generator.tokenizer.encode
    with asking(server) as client:
        yield client, lambda text: session.script(encode(text, start=False))


class Scripted(NumpySession):
    """Says given ids, then ends its turn."""

    def script(self, ids):
        self.left = [*ids, 1]

    def _run_decode(self, ids, pos):
        logits = super()._run_decode(ids, pos)
        logits[-1, self.left.pop(0)] = 1e6
        return logits


CHATML = """{{ bos_token }}{% if tools %}{{ tools | tojson }}{% endif %}
{%- for m in messages %}<|im_start|>{{ m.role }}
{% if m.thinking %}<think>{{ m.thinking }}</think>{% endif %}{{ m.content }}
{%- for c in m.tool_calls %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


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


def test_calls_have_ids_of_their_own_and_come_one_by_one_if_asked_so(thinker):
    client, says = thinker
    seen = []
    for only, count in (None, 2), (True, 2), (False, 1):
        says(CALL + CALL)
        choice = client.chat.completions.create(
            model="toy", messages=HELLO, tools=[COUNT],
            **({} if only is None else {"parallel_tool_calls": only}),
        ).choices[0]  # fmt: skip
        assert choice.finish_reason == "tool_calls" and len(choice.message.tool_calls) == count
        seen += [call.id for call in choice.message.tool_calls]
    says(CALL + CALL)
    response = client.responses.create(
        model="toy", input="Hello", tools=[FLAT], parallel_tool_calls=False
    )
    assert response.parallel_tool_calls is False
    seen += [item.call_id for item in response.output]
    assert len(seen) == len(set(seen)) == 6


# --- responses -----------------------------------------------------------------------------------

FLAT = {"type": "function", "name": "count", "parameters": PERSON}
CALL = '<tool_call>{"name": "count", "arguments": {"n": 7}}</tool_call>'


def test_a_response_is_thought_text_and_calls(thinker):
    client, says = thinker
    says(f"<think>\nhm\n</think>Let me count. {CALL}")
    response = client.responses.create(
        model="toy", input="How many?", instructions="Be brief.", tools=[FLAT], temperature=0
    )
    thought, message, call = response.output
    assert (thought.type, thought.content[0].text) == ("reasoning", "hm")
    assert message.content[0].text == response.output_text == "Let me count."
    assert (call.type, call.name, json.loads(call.arguments)) == (
        "function_call",
        "count",
        {"n": 7},
    )
    assert response.status == "completed" and response.instructions == "Be brief."
    assert response.usage.output_tokens_details.reasoning_tokens == len(["<think>", *"\nhm"])
    given = {"type": "function_call_output", "call_id": call.call_id, "output": "seven"}
    says("Seven.")
    asked = [{"role": "user", "content": "How many?"}, *response.output, given]
    more = client.responses.create(model="toy", input=asked, instructions="Be brief.", tools=[FLAT])
    assert more.output_text == "Seven."
    read_again = response.usage.input_tokens - more.usage.input_tokens_details.cached_tokens
    assert read_again == len(["<|im_start|>", *"assistant\n"])  # a thought is written otherwise


def test_a_streamed_response_grows_to_the_whole_one(thinker):
    client, says = thinker
    ask = {"model": "toy", "input": [{"role": "user", "content": [
        {"type": "input_text", "text": "How many?"}]}], "tools": [FLAT]}  # fmt: skip
    said = f"<think>\nhm\n</think>T\u00fcr. {CALL}"
    says(said)
    kinds, told = [], {}
    with client.responses.stream(**ask) as stream:
        for event in stream:
            kinds.append(event.type.removeprefix("response."))
            if event.type.endswith(".delta"):
                told[event.output_index] = told.get(event.output_index, "") + event.delta
        final = stream.get_final_response()
    says(said)
    whole = client.responses.create(**ask)
    assert list(told.values()) == ["hm", "T\u00fcr. ", '{"n": 7}']
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-1] == "completed" and kinds.count("output_item.done") == 3
    assert {k: kinds.count(k) for k in ("output_text.done", "reasoning_text.done")} == {
        "output_text.done": 1, "reasoning_text.done": 1
    }  # fmt: skip
    assert final.output_text.rstrip() == whole.output_text
    assert [item.type for item in final.output] == [item.type for item in whole.output]
    assert final.usage.output_tokens == whole.usage.output_tokens


def test_a_response_follows_its_schema_or_is_incomplete(client):
    form = {"format": {"type": "json_schema", "name": "number", "schema": PERSON}}
    ask = {"model": "toy", "input": "Hello", "text": form, "temperature": 1.0, "top_p": 0.9}
    assert json.loads(client.responses.create(**ask).output_text) == {"n": 7}
    cut = client.responses.create(model="toy", input="Hello", max_output_tokens=2, temperature=0)
    assert cut.status == "incomplete" and cut.incomplete_details.reason == "max_output_tokens"
    parts = list(client.responses.create(model="toy", input="Hi", max_output_tokens=2, stream=True))
    assert parts[-1].type == "response.incomplete"
    assert [p.sequence_number for p in parts] == list(range(len(parts)))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id: nothing is stored here"),
        ({"store": True}, "store: only false"),
        ({"background": True}, "background: only false"),
        ({"include": ["message.output_text.logprobs"]}, "include: only []"),
        ({"max_tool_calls": 3}, "max_tool_calls"),
        ({"extra_body": {"seed": 3}}, "seed: this is not served"),
        ({"tools": [{"type": "web_search"}]}, "tools: 'web_search' is not served"),
        ({"tools": [{"type": {}}]}, "tools: {} is not served"),
        ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format must be"),
        (
            {"input": [{"type": "item_reference", "id": "a"}]},
            "input[0] is of type 'item_reference'",
        ),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "text only"),
        ({"input": []}, "input"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
    ],
)
def test_responses_refuse_by_name(client, change, says):
    with pytest.raises(BadRequestError) as refused:
        client.responses.create(**{"model": "toy", "input": "Hello", **change})
    assert says in refused.value.body["message"] and "\n" not in refused.value.body["message"]
