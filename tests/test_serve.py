"""The server: OpenAI's API over one decoder, fair, bounded, and closed to whom it should be."""

import asyncio
import json
import re
import threading
import time

import numpy as np
import pytest
from fake_artifact import TEMPLATE, NumpySession, write_artifact
from starlette.testclient import TestClient

from edge_kv.artifact import read_artifact
from edge_kv.errors import ConfigError, RuntimeFault
from edge_kv.memory import predict_artifact
from edge_kv.runtime.chat import Generator, Message, Reply
from edge_kv.runtime.generation import feed
from edge_kv.runtime.messages import Tool
from edge_kv.serve.app import Server, Settings, make_app, most_bytes, serve
from edge_kv.serve.command import make_server, run_server
from edge_kv.serve.schema import ChatRequest, finish_reason, parse
from edge_kv.serve.states import WORTH_KEEPING, States, kept_bytes
from edge_kv.serve.worker import Job, QueueFull, TimeIsUp, Worker

ASK = {"model": "any", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return read_artifact(write_artifact(tmp_path_factory.mktemp("served") / "a", ctx=512))


def serving(artifact, folder, settings=None, most=4, ram=None):
    return make_server(
        NumpySession(artifact), settings or Settings(), state=folder, conversations=most,
        kept_ram=ram,
    )  # fmt: skip


@pytest.fixture
def server(artifact, tmp_path):
    return serving(artifact, tmp_path)


@pytest.fixture
def client(server):
    with TestClient(make_app(server), base_url="http://localhost") as client:
        yield client


def events(response):
    """The documents of a stream, which has to end as OpenAI's do."""
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_a_reply_in_one_document(client, server):
    document = client.post(CHAT, json=ASK).json()
    assert document["object"] == "chat.completion" and document["model"] == server.model
    (choice,) = document["choices"]
    assert choice["message"]["role"] == "assistant" and choice["finish_reason"] == "length"
    assert document["usage"]["completion_tokens"] == 4
    assert document["usage"]["total_tokens"] == document["usage"]["prompt_tokens"] + 4


def test_a_streamed_reply_is_the_same_text(client):
    ask = {**ASK, "max_tokens": 12, "seed": 3, "temperature": 1.0}
    whole = client.post(CHAT, json=ask).json()
    stream = {**ask, "stream": True, "stream_options": {"include_usage": True}}
    *parts, usage = events(client.post(CHAT, json=stream))
    text = "".join(p["choices"][0]["delta"].get("content", "") for p in parts)
    assert text == (whole["choices"][0]["message"]["content"] or "")
    assert parts[0]["choices"][0]["delta"]["role"] == "assistant"
    assert parts[-1]["choices"][0]["finish_reason"] == "length"
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 12
    assert all(p["usage"] is None for p in parts)  # as OpenAI's own streams have it


def test_a_completion_continues_text_as_it_stands(client, server):
    document = client.post("/v1/completions", json={"prompt": "Hello", "max_tokens": 3}).json()
    assert document["object"] == "text_completion"
    prompt = server.generator.tokenizer.encode("Hello")
    assert document["usage"]["prompt_tokens"] == len(prompt)
    streamed = client.post(
        "/v1/completions", json={"prompt": "Hello", "max_tokens": 3, "stream": 1}
    )
    text = "".join(e["choices"][0]["text"] for e in events(streamed))
    assert text == document["choices"][0]["text"]


def test_logprobs_are_those_of_the_drawn_tokens(client):
    ask = {**ASK, "temperature": 0, "logprobs": True, "top_logprobs": 2}
    choice = client.post(CHAT, json=ask).json()["choices"][0]
    listed = choice["logprobs"]["content"]
    assert len(listed) == 4
    for entry in listed:  # greedy: the drawn token is the likeliest
        assert entry["logprob"] == entry["top_logprobs"][0]["logprob"] <= 0
        assert bytes(entry["bytes"]).decode(errors="replace") == entry["token"]


def test_an_answer_follows_its_schema(client):
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer"}},
        "required": ["n"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "number", "schema": schema}}
    ask = {**ASK, "max_tokens": 60, "response_format": form, "seed": 1, "temperature": 1.0}
    choice = client.post(CHAT, json=ask).json()["choices"][0]
    assert list(json.loads(choice["message"]["content"])) == ["n"]
    bad = {**form, "json_schema": {"name": "number", "schema": {"type": "numbr"}}}
    response = client.post(CHAT, json={**ask, "response_format": bad})
    assert response.status_code == 400 and "schema" in response.json()["error"]["message"]


def test_a_call_that_is_asked_for_comes(client):
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer"}},
        "required": ["n"],
        "additionalProperties": False,
    }
    tool = {"type": "function", "function": {"name": "count", "parameters": schema}}
    ask = {**ASK, "max_tokens": 200, "tools": [tool], "tool_choice": "required"}
    choice = client.post(CHAT, json=ask).json()["choices"][0]
    (called,) = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls" and called["function"]["name"] == "count"
    assert list(json.loads(called["function"]["arguments"])) == ["n"]
    parts = events(client.post(CHAT, json={**ask, "stream": True}))
    deltas = [p["choices"][0]["delta"] for p in parts]
    assert [d["tool_calls"][0]["function"]["name"] for d in deltas if "tool_calls" in d] == [
        "count"
    ]


@pytest.mark.parametrize(
    ("syntax", "definition"), [("regex", "[ab]{3}-[0-9]"), ("lark", 'start: /[ab]{3}/ "-" /[0-9]/')]
)
def test_an_answer_follows_its_grammar(client, syntax, definition):
    form = {"type": "grammar", "syntax": syntax, "definition": definition}
    ask = {**ASK, "max_tokens": 9, "response_format": form, "seed": 1, "temperature": 1.0}
    choice = client.post(CHAT, json=ask).json()["choices"][0]
    assert re.fullmatch("[ab]{3}-[0-9]", choice["message"]["content"])


def test_the_model_is_found_by_its_name(client, server):
    assert client.get(f"/v1/models/{server.model}").json()["id"] == server.model
    response = client.get("/v1/models/another")
    assert response.status_code == 404 and response.json()["error"]["code"] == "model_not_found"


def test_fields_that_change_nothing_are_served(client):
    neutral = {
        "n": 1,
        "frequency_penalty": 0.0,
        "presence_penalty": 0,
        "echo": False,
        "suffix": None,
    }
    assert client.post(CHAT, json={**ASK, **neutral}).status_code == 200


def test_token_ids_are_a_prompt_special_ones_too(client, server):
    ids = server.generator.tokenizer.encode("<start_of_turn>Hello")
    for prompt in (ids, [ids]):
        document = client.post("/v1/completions", json={"prompt": prompt, "max_tokens": 1}).json()
        assert document["usage"]["prompt_tokens"] == len(ids)


@pytest.mark.parametrize(
    ("said", "think"),
    [
        ({}, None), ({"reasoning_effort": "low"}, True), ({"reasoning_effort": "none"}, False),
        ({"chat_template_kwargs": {"enable_thinking": False}, "reasoning_effort": "high"}, False),
        ({"chat_template_kwargs": {"other": 3}}, None),
    ],
)  # fmt: skip
def test_an_effort_of_reasoning_asks_for_thinking(said, think):
    asked = parse(ChatRequest, json.dumps({**ASK, **said}).encode())
    assert asked.options(8).think is think


def test_offsets_of_logprobs_lie_in_the_text(client):
    ask = {"prompt": "Hello", "max_tokens": 5, "logprobs": 0, "seed": 1, "temperature": 1.0}
    choice = client.post("/v1/completions", json=ask).json()["choices"][0]
    tokens, offsets = choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"]
    assert [0, *np.cumsum([len(t) for t in tokens])[:-1]] == offsets


@pytest.mark.parametrize(
    ("finish", "word"),
    [("stop", "stop"), ("length", "length"), ("full", "length"), ("calls", "tool_calls"),
     ("cancelled", "length")],
)  # fmt: skip
def test_a_reply_that_was_cut_off_is_not_called_whole(finish, word):
    assert finish_reason(Reply("a", (1,), 1, 0, 0.0, 0.0, finish=finish)) == word


def test_who_shares_a_key_takes_turns_all_the_same(artifact, tmp_path, monkeypatch):
    server = serving(artifact, tmp_path, Settings(api_key="s3cret"))
    clients, submit = [], server.worker.submit
    monkeypatch.setattr(server.worker, "submit", lambda j: (clients.append(j.client), submit(j)))
    right = {"Authorization": "Bearer s3cret"}
    for host in ("192.0.2.1", "192.0.2.2"):
        app = TestClient(make_app(server), base_url="http://localhost", client=(host, 50000))
        assert app.post(CHAT, json=ASK, headers=right).status_code == 200
    assert len(set(clients)) == 2
    server.worker.stop(5)


def test_a_conversation_that_goes_on_reads_its_new_turn_alone(client):
    first = client.post(CHAT, json=ASK).json()
    answer = first["choices"][0]["message"]["content"] or ""
    turns = [*ASK["messages"], {"role": "assistant", "content": answer}]
    turns.append({"role": "user", "content": "And?"})
    usage = client.post(CHAT, json={**ASK, "messages": turns}).json()["usage"]
    held = usage["prompt_tokens_details"]["cached_tokens"]
    assert held >= first["usage"]["prompt_tokens"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "robot"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "text only"),
        ({"messages": "hello"}, "messages"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"n": 2}, "n: only 1"),
        ({"frequency_penalty": 2.5}, "frequency_penalty"),
        ({"best_of": 2}, "best_of: only 1"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"logit_bias": {"many": 1}}, "logit_bias"),
        ({"stop": ["a"] * 99}, "stop"),
        ({"tools": [{"function": {}}]}, "tools[0]"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"tool_choice": "required"}, "there are no tools"),
        ({"response_format": {"type": "yaml"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": []}}}, "must be"),
        ({"response_format": {"type": "grammar", "syntax": "gbnf", "definition": ""}}, "'lark'"),
        ({"response_format": {"type": "grammar", "syntax": "regex", "definition": "["}}, "usable"),
        ({"max_completion_tokens": "many"}, "max_completion_tokens"),
    ],
)
def test_requests_that_are_refused_by_name(client, change, says):
    response = client.post(CHAT, json={**ASK, **change})
    assert response.status_code == 400
    message = response.json()["error"]["message"]
    assert says in message and "\n" not in message


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000])
def test_bodies_that_are_no_request(client, body):
    response = client.post(CHAT, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400 and response.json()["error"]["message"]


def test_other_content_types_paths_methods_and_sizes(artifact, tmp_path):
    server = serving(artifact, tmp_path, Settings(body=1000))
    with TestClient(make_app(server), base_url="http://localhost") as client:
        assert client.post(CHAT, content=json.dumps(ASK)).status_code == 400
        assert client.get("/v1/nothing").status_code == 404
        refused = client.get(CHAT)
        assert (refused.status_code, refused.headers["allow"]) == (405, "POST")
        assert "error" in client.get("/v1/nothing").json()
        large = {**ASK, "user": "x" * 2000}
        assert client.post(CHAT, json=large).status_code == 413


def test_a_prompt_longer_than_the_context_says_so(client):
    long = [{"role": "user", "content": "word " * 2000}]
    for stream in (False, True):
        response = client.post(CHAT, json={**ASK, "messages": long, "stream": stream})
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "context_length_exceeded"


def test_a_key_is_asked_for_and_compared(artifact, tmp_path):
    server = serving(artifact, tmp_path, Settings(api_key="s3cret"))
    with TestClient(make_app(server), base_url="http://localhost") as client:
        for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic s3cret"}):
            response = client.post(CHAT, json=ASK, headers=given)
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
        assert client.get("/status").status_code == 401
        assert client.get("/healthz").status_code == 200 == client.get("/").status_code
        right = {"Authorization": "Bearer s3cret"}
        assert client.post(CHAT, json=ASK, headers=right).status_code == 200


def test_other_names_and_other_sites_are_kept_out(client):
    assert client.get("/v1/models", headers={"Host": "evil.example"}).status_code == 403
    assert client.get("/v1/models", headers={"Origin": "http://evil.example"}).status_code == 403
    same = client.get("/v1/models", headers={"Origin": "http://localhost"})
    assert same.status_code == 200
    assert "access-control-allow-origin" not in same.headers


@pytest.mark.parametrize("host", ["\udc80", "..", "a" * 300])
def test_a_host_that_is_none_is_refused(artifact, tmp_path, host):
    with pytest.raises(RuntimeFault, match="Cannot listen on"):
        serve(serving(artifact, tmp_path), host, 0, ready=print)


def test_a_name_that_is_none_is_no_way_in(artifact, tmp_path):
    """What stands in Host becomes neither another name nor another path."""
    server = serving(artifact, tmp_path, Settings(api_key="geheimß"))
    right = {"Authorization": "Bearer geheimß".encode()}
    with TestClient(make_app(server), base_url="http://localhost") as client:
        for host in ("localhost/healthz?", "localhost/healthz#", "u@localhost", "[::1", "a:b:80",
                     "localhost:999999", "", "évil.example".encode("latin-1")):  # fmt: skip
            response = client.get("/v1/models", headers={"Host": host, **right})
            assert response.status_code == 403, host
        for host in ("LOCALHOST", "127.0.0.1:80", "[::1]", "[::1]:8080"):
            assert client.get("/v1/models", headers={"Host": host}).status_code == 401
            response = client.get("/v1/models", headers={"Host": host, **right})
            assert response.status_code == 200, host


def test_a_site_that_was_named_may_ask(artifact, tmp_path):
    site = "https://app.example"
    server = serving(artifact, tmp_path, Settings(origins=(site,)))
    with TestClient(make_app(server), base_url="http://localhost") as client:
        own = {"Access-Control-Request-Headers": "authorization,x-stainless-os"}
        for more, heard in ({}, "Authorization"), (own, "x-stainless-os"):
            asked = client.options(CHAT, headers={"Origin": site, **more})
            assert asked.status_code == 204
            assert asked.headers["access-control-allow-origin"] == site
            assert heard in asked.headers["access-control-allow-headers"]
        response = client.post(CHAT, json=ASK, headers={"Origin": site})
        assert response.headers["access-control-allow-origin"] == site


def test_a_server_for_other_machines_wants_a_key_or_a_word(artifact):
    with pytest.raises(ConfigError, match="--no-auth"):
        run_server(NumpySession(artifact), Settings(), host="0.0.0.0", port=0, ready=print)


def test_the_page_the_status_and_the_figures(client):
    client.post(CHAT, json=ASK)
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "http://" not in page.text.replace("http://www.w3.org", "")  # nothing from elsewhere
    assert client.get("/page.js").status_code == 200 == client.get("/page.css").status_code
    status = client.get("/status").json()
    assert status["used"] > 0 and set(status["memory"]) == {"state", "heap", "mapped"}
    figures = client.get("/metrics").text
    assert 'edge_kv_requests_total{outcome="answered"} 1.0' in figures
    assert "edge_kv_generated_tokens_total 4.0" in figures


def test_a_reply_that_nobody_heard_to_its_end_is_counted(artifact, tmp_path):
    server = serving(artifact, tmp_path)
    server.generator.session._run_decode = slowly(server.generator.session._run_decode)
    ask = json.dumps({**ASK, "max_tokens": 300, "stream": True, "logit_bias": {"1": -99}}).encode()
    scope = {
        "type": "http", "method": "POST", "path": CHAT, "query_string": b"",
        "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
    }  # fmt: skip
    asked, heard = iter([{"type": "http.request", "body": ask}]), []

    async def receive():
        if first := next(asked, None):
            return first
        while len(heard) < 5:
            await asyncio.sleep(0.01)
        return {"type": "http.disconnect"}

    async def send(message):
        heard.append(message)

    asyncio.run(make_app(server)(scope, receive, send))
    server.worker.stop(10)
    figures = server.prometheus().decode()
    assert 'edge_kv_requests_total{outcome="disconnected"} 1.0' in figures
    assert 'outcome="answered"' not in figures
    assert f"edge_kv_generated_tokens_total {float(len(server.last.ids))}" in figures
    assert 0 < len(server.last.ids) < 300


def slowly(run):
    """`run`, so that there is something left to leave."""
    return lambda *args: time.sleep(0.01) or run(*args)


# --- the queue -----------------------------------------------------------------------------------


class SlowTurn:
    """A turn that waits for a signal, then ends."""

    def __init__(self, release):
        self.release, self.reply = release, None

    def __iter__(self):
        self.release.wait(10)
        self.reply = "reply"
        return iter(())

    def close(self):
        pass


def test_clients_take_turns_and_the_queue_is_bounded():
    worker, release, order = Worker(4), threading.Event(), []

    def job(client, name):
        turn = SlowTurn(release)
        return Job(client, lambda _: turn, lambda e: order.append(name), time.monotonic() + 60)

    worker.submit(job("first", "running"))
    while not worker.busy:
        time.sleep(0.01)
    for client, name in (("greedy", "g1"), ("greedy", "g2"), ("greedy", "g3"), ("modest", "m1")):
        worker.submit(job(client, name))
    with pytest.raises(QueueFull, match="4 requests wait"):
        worker.submit(job("late", "late"))
    release.set()
    worker_done = time.monotonic() + 10
    while len(order) < 5 and time.monotonic() < worker_done:
        time.sleep(0.01)
    assert order == ["running", "g1", "m1", "g2", "g3"]
    worker.stop(5)
    with pytest.raises(QueueFull, match="stopping"):
        worker.submit(job("after", "after"))


def test_a_cancelled_request_makes_room_and_is_not_answered():
    worker, release, heard = Worker(1), threading.Event(), []
    first = Job("a", lambda _: SlowTurn(release), heard.append, time.monotonic() + 60)
    worker.submit(first)
    while not worker.busy:
        time.sleep(0.01)
    gone = Job("b", lambda _: pytest.fail("not wanted"), heard.append, time.monotonic() + 60)
    worker.submit(gone)
    gone.cancelled.set()
    late = Job("c", lambda _: SlowTurn(release), heard.append, time.monotonic() + 60)
    worker.submit(late)
    release.set()
    until = time.monotonic() + 10
    while len(heard) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    worker.stop(5)
    assert heard == ["reply", "reply"]


# --- conversations kept aside --------------------------------------------------------------------


def tokens(seed, count):
    return [(seed + 7 * i) % 250 + 2 for i in range(count)]


def hold(server, talk, checkpoints=()):
    """Have the session read `talk` as a reply to it would; how many tokens it had."""
    server.states.enter(talk)
    return feed(server.generator.session, talk, checkpoints)


@pytest.mark.parametrize("where", ["memory", "files"])
def test_coming_back_to_a_conversation_reads_nothing_again(artifact, tmp_path, where):
    server = serving(artifact, tmp_path if where == "files" else None)
    session, states = server.generator.session, server.states
    talks = [tokens(seed, WORTH_KEEPING + 50) for seed in range(4)]
    for talk in talks:
        hold(server, talk)
    for talk in talks * 2:
        states.enter(talk)
        assert list(session.tokens) == talk
    assert states.restored == 8 and states.count <= 4
    for _ in range(2):
        assert b"edge_kv_restored_conversations_total 8.0" in server.prometheus()
    assert states.ram == (states.bytes if where == "memory" else 0) and states.bytes > 0
    session.reset()
    fresh = NumpySession(artifact)
    fresh.prefill([*talks[0], 7])
    hold(server, talks[0])
    session.prefill([7])
    np.testing.assert_array_equal(session.decode(9), fresh.decode(9))


@pytest.mark.parametrize("where", ["memory", "files", "restarted"])
def test_coming_back_to_a_turn_that_history_shortens_reads_that_turn_alone(
    artifact, tmp_path, where
):
    server = serving(artifact, None if where == "memory" else tmp_path)
    turn, other = tokens(1, 200), tokens(2, 200)
    hold(server, [*turn, *tokens(3, 80)], [len(turn)])  # a thought that history leaves out
    hold(server, other)
    if where == "restarted":
        server.stop()
        server = serving(artifact, tmp_path)
    asked = [*turn, 9, 8, 7]
    assert hold(server, asked) == len(turn)
    fresh = NumpySession(artifact)
    fresh.prefill(asked)
    session = server.generator.session
    np.testing.assert_array_equal(session.decode(9), fresh.decode(9))


TOOL = {"type": "function", "function": {"name": "look_up", "description": "Looks. " * 50}}
WITH_TOOLS = TEMPLATE.replace("{% for", "{{ tools | tojson if tools }}{% for", 1)


@pytest.mark.parametrize("where", ["memory", "files"])
@pytest.mark.parametrize("tools", [[], [TOOL]])
def test_a_long_system_prompt_is_read_once_for_all_conversations(tmp_path, where, tools):
    root = write_artifact(
        tmp_path / "a", ctx=4096, chunk=16, programs=False, verify=False, template=WITH_TOOLS
    )
    server = serving(read_artifact(root), tmp_path if where == "files" else None)
    shared = [{"role": "system", "content": "Be kind. " * 110}]

    def length(turns, ends=""):
        """Of the ids that `turns` are read as, with `ends` behind them."""
        text = server.generator.template.render(
            turns,
            tools=[Tool.of(t).as_dict() for t in tools] or None,
            bos_token="<bos>",
            add_generation_prompt=False,
        )
        return len(server.generator.tokenizer.encode(text + ends))

    begins = length(shared, "<start_of_turn>user\n")
    assert begins > 1000 + 300 * len(tools)
    with TestClient(make_app(server), base_url="http://localhost") as client:

        def ask(*turns):
            """How many tokens of the prompt were held already, and the turns with the reply."""
            body = {**ASK, "messages": turns, "tools": tools, "tool_choice": "auto"}
            document = client.post(CHAT, json=body).json()
            held = document["usage"]["prompt_tokens_details"]["cached_tokens"]
            answer = document["choices"][0]["message"]["content"] or ""
            return held, [*turns, {"role": "assistant", "content": answer}]

        long = {"role": "user", "content": "A question of some length. " * 9}
        none, first = ask(*shared, long)
        held, second = ask(*shared, {"role": "user", "content": "Another, as long as that. " * 9})
        assert (none, held) == (0, begins)
        ask({"role": "system", "content": "A stranger's. " * 9}, {"role": "user", "content": "Hi"})
        assert (
            ask(*shared, {"role": "user", "content": "A third"})[0] == begins
        )  # of one kept aside
        more = {"role": "user", "content": "And?"}
        for turns in (first, second):  # which are whole, though others began with theirs
            assert ask(*turns, more)[0] >= length(turns[:-1])


def test_an_answer_made_again_keeps_no_copy_of_the_first(artifact):
    server = serving(artifact, None)
    question = tokens(1, 100)
    for _ in range(3):
        hold(server, question)
        server.generator.session.prefill(tokens(5, 100))  # the reply
    assert server.states.count == 0


def test_kept_conversations_are_bounded_in_ram(artifact):
    server = serving(artifact, None)
    for seed in range(3):
        hold(server, tokens(seed, 100))
    assert server.states.count == 2
    one = server.states.bytes // 2
    server = serving(artifact, None, ram=one * 3 // 2)
    for seed in range(3):
        hold(server, tokens(seed, 100))
    assert server.states.count == 1 and 0 < server.states.ram <= one * 3 // 2
    assert hold(server, tokens(1, 100)) == 100  # the newest one is the one kept
    memory = predict_artifact(artifact)
    assert one < kept_bytes(memory, 1) and kept_bytes(memory, 4) == 4 * kept_bytes(memory, 1)


def test_a_prompt_that_nobody_waits_for_is_not_read_to_its_end(artifact, tmp_path):
    server = serving(artifact, tmp_path)
    session, heard = server.generator.session, []
    question = [Message("user", "word " * 80)]

    def begin(cancelled):
        return server.generator.reply(question, cancelled=cancelled)

    def run(stop_after):
        job = Job("a", begin, heard.append, time.monotonic() + 60)
        steps, write = [], session._write

        def counting(ids, pos):
            steps.append(len(ids))
            if len(steps) == stop_after:
                job.cancelled.set()
            write(ids, pos)

        session._write = counting
        server.worker.submit(job)
        until = time.monotonic() + 10
        while not (heard and not server.worker.busy) and time.monotonic() < until:
            time.sleep(0.01)
        session._write = write
        return sum(steps)

    read = run(stop_after=3)
    assert isinstance(heard.pop(), TimeIsUp) and list(session.tokens) and session.pos == read
    assert 3 * session.plan.chunk == read
    run(stop_after=None)  # asked again: it goes on from there
    assert isinstance(heard[-1], Reply) and heard[-1].reused_tokens == read
    server.worker.stop(5)


def test_kept_conversations_outlive_the_process_and_are_bounded(artifact, tmp_path):
    server = serving(artifact, tmp_path, most=2)
    for seed in range(4):
        hold(server, tokens(seed, WORTH_KEEPING + 20))
    server.stop()
    assert len(list(tmp_path.glob("*.kv"))) == 2
    (tmp_path / "conversation-99.kv").write_bytes(b"damaged")
    again = serving(artifact, tmp_path, most=2)
    again.states.enter(tokens(3, WORTH_KEEPING + 20))
    assert list(again.generator.session.tokens) == tokens(3, WORTH_KEEPING + 20)


def test_drafts_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(NumpySession, "rounding", np.inf)
    root = write_artifact(tmp_path / "a", ctx=512, chunk=9, drafts=7, programs=False)
    session = NumpySession(read_artifact(root))
    generator = Generator(session, drafts=7)
    server = Server(generator, generator, States(generator, None), Settings())
    ask = {**ASK, "max_tokens": 60, "messages": [{"role": "user", "content": "ab" * 40}]}
    with TestClient(make_app(server), base_url="http://localhost") as client:
        usage = client.post(CHAT, json=ask).json()["usage"]
        figures = client.get("/metrics").text
    details = usage["completion_tokens_details"]
    came, others = details["accepted_prediction_tokens"], details["rejected_prediction_tokens"]
    assert came + others == session.stats.drafted_tokens > 0
    assert came == session.stats.accepted_tokens
    assert f"edge_kv_drafted_tokens_total {came + others:.1f}" in figures
    assert f"edge_kv_accepted_tokens_total {came:.1f}" in figures
    assert f"edge_kv_ties_total {server.last.ties:.1f}" in figures and server.last.ties > came
    assert f"edge_kv_decode_passes_total {session.stats.decode_passes:.1f}" in figures


def test_odd_ids_and_texts_are_refused_in_a_sentence(client):
    for change in ({"logit_bias": {"9" * 20: 1}}, {"prompt": [10**30]}, {"prompt": [-1]}):
        path = "/v1/completions" if "prompt" in change else CHAT
        response = client.post(path, json={**ASK, **change})
        assert response.status_code == 400 and "token id" in response.json()["error"]["message"]
    odd = b'{"messages": [{"role": "user", "content": "x"}], "logit_bias": {"\\ud800": 1}}'
    response = client.post(CHAT, content=odd, headers={"content-type": "application/json"})
    assert response.status_code == 400 and "logit_bias" in response.json()["error"]["message"]


def test_bodies_are_bounded_by_the_context():
    assert most_bytes(512) < 100_000 < most_bytes(32_768) < most_bytes(10**9) == 4 << 20
