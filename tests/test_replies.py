"""Replies by token id: the marks of every family, text that looks like them, broken calls."""

import json
import random

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Engine

from edge_kv.errors import PromptError
from edge_kv.runtime.messages import Message, Tool, ToolCall
from edge_kv.runtime.replies import CALL, CONTENT, THINKING, Holdback, ReplyFormat, ReplyParser
from edge_kv.runtime.template import Template
from edge_kv.runtime.text import Tokenizer

TOOLS = (
    Tool(
        "find_flights",
        "Look up flights.",
        {
            "type": "object",
            "properties": {
                "to": {"type": "string"},
                "stops": {"type": "integer"},
                "via": {"type": "array", "items": {"type": "string"}},
                "seat": {"type": "object", "properties": {"row": {"type": "number"}}},
                "now": {"type": "boolean"},
            },
            "required": ["to"],
        },
    ),
)
VALUE = """{%- macro value(v) -%}
{%- if v is string -%}<|"|>{{ v }}<|"|>
{%- elif v is boolean -%}{{ 'true' if v else 'false' }}
{%- elif v is mapping -%}{ {%- for k, x in v | dictsort -%}
{{ k }}:{{ value(x) }}{{ ',' if not loop.last }}{%- endfor -%} }
{%- elif v is sequence -%}[{%- for x in v -%}{{ value(x) }}{{ ',' if not loop.last }}{%- endfor -%}]
{%- else -%}{{ v }}{%- endif -%}
{%- endmacro -%}"""
# How each family writes a turn of its own: the part of a template that renders `m`.
FAMILIES = {
    "channels": (
        ["<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", '<|"|>'],
        VALUE + "{%- for m in messages -%}{%- if m.thinking -%}<|channel>thought\n{{ m.thinking }}"
        "\n<channel|>{%- endif -%}{{ m.content }}{%- for c in m.tool_calls -%}<|tool_call>call:"
        "{{ c.function.name }}{{ value(c.function.arguments) }}<tool_call|>{%- endfor -%}"
        "{%- endfor -%}",
    ),
    "pairs": (
        ["<think>", "</think>", "<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>"],
        "{%- for m in messages -%}{%- if m.thinking -%}<think>{{ m.thinking }}</think>\n"
        "{%- endif -%}{{ m.content }}{%- for c in m.tool_calls -%}<tool_call>{{ c.function.name }}"
        "\n{%- for k, v in c.function.arguments.items() -%}<arg_key>{{ k }}</arg_key>\n<arg_value>"
        "{{ v if v is string else v | tojson }}</arg_value>\n{%- endfor -%}</tool_call>\n"
        "{%- endfor -%}{%- endfor -%}",
    ),
    "parameters": (
        ["<think>", "</think>", "<zyphra_tool_call>", "</zyphra_tool_call>"],
        "{%- for m in messages -%}{%- if m.thinking -%}<think>\n{{ m.thinking }}\n</think>\n\n"
        "{%- endif -%}{{ m.content }}{%- for c in m.tool_calls -%}<zyphra_tool_call>\n<function="
        "{{ c.function.name }}>\n{% for k, v in c.function.arguments.items() %}"
        "<parameter={{ k }}>\n{{ v if v is string else v | tojson }}\n</parameter>\n{% endfor %}"
        "</function>\n"
        "</zyphra_tool_call>{%- endfor -%}{%- endfor -%}",
    ),
    "json": (
        ["<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>"],
        "{%- for m in messages -%}{%- if m.thinking -%}<think>\n{{ m.thinking }}\n</think>\n\n"
        "{%- endif -%}{{ m.content }}{%- for c in m.tool_calls -%}\n<tool_call>\n"
        '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n'
        "</tool_call>{%- endfor -%}{%- endfor -%}",
    ),
    "bare json": (
        ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>"],
        "{%- for m in messages -%}{{ m.content }}{%- for c in m.tool_calls -%}"
        '{"name": "{{ c.function.name }}", "parameters": {{ c.function.arguments | tojson }}}'
        "{%- endfor -%}{%- endfor -%}",
    ),
}


def make_tokenizer(path, marks, special=True):
    """A byte-level vocabulary with `marks` as added tokens."""
    names = ["<eos>", "<bos>", *marks]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {t: i for i, t in enumerate([*names, *letters])}
    engine = Engine(models.BPE(vocab=vocab, merges=[]))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    engine.decoder = decoders.ByteLevel()
    engine.add_tokens([AddedToken(m, special=special, normalized=False) for m in names])
    engine.save(str(path))
    return Tokenizer(path, bos_id=1)


@pytest.fixture(params=FAMILIES)
def family(request, tmp_path):
    marks, source = FAMILIES[request.param]
    tokenizer = make_tokenizer(tmp_path / "tokenizer.json", marks)
    return request.param, tokenizer, source


def parse(parser, ids):
    pieces = [p for i in ids for p in parser.feed(i)] + parser.end()
    texts = {
        kind: "".join(p.text for p in pieces if p.kind == kind) for kind in (CONTENT, THINKING)
    }
    return texts[CONTENT], texts[THINKING], [p.call for p in pieces if p.kind == CALL]


def random_call(rng):
    words = [
        "Oslo",
        'a "quoted" one',
        "ünï 🎉",
        "x, y: {z} [w]",
        "<b>",
        "",
        " spaced ",
        "1.5",
        "true",
    ]
    arguments = {"to": rng.choice(words)}
    if rng.random() < 0.6:
        arguments["stops"] = rng.randint(-3, 10**9)
    if rng.random() < 0.6:
        arguments["via"] = rng.choices(words, k=rng.randint(0, 3))
    if rng.random() < 0.4:
        arguments["seat"] = {"row": rng.choice([1, 2.5, -0.125])}
    if rng.random() < 0.4:
        arguments["now"] = rng.random() < 0.5
    return ToolCall("find_flights", arguments)


def test_what_a_template_writes_is_read_back(family):
    """200 generated turns of each family: content, thinking and calls round-trip."""
    name, tokenizer, source = family
    template, rng = Template(source), random.Random(0)
    format = ReplyFormat.of(tokenizer, source)
    assert format.grammar.name == name
    for _ in range(200):
        calls = tuple(random_call(rng) for _ in range(rng.choice([0, 0, 1, 2])))
        if name == "bare json":
            calls = calls[:1]
        content = rng.choice(["", "Let me see.", "Two\n\nlines, ünï 🎉", "1 < 2"])
        thinking = rng.choice(["", "Hm.", "First\n\nthen <b>"]) if name != "bare json" else ""
        if calls and name == "bare json":
            content = ""
        turn = Message("assistant", content, thinking, calls)
        ids = tokenizer.encode(template.render([turn.as_dict()]), start=False)
        answer, thought, called = parse(ReplyParser(format, tools=TOOLS), ids)
        assert (answer.strip(), thought) == (content, thinking)
        assert [(c.name, c.arguments) for c in called] == [(c.name, c.arguments) for c in calls]


def test_text_that_looks_like_a_mark_is_text(family):
    """The ids of the letters of a mark are not the mark."""
    _, tokenizer, source = family
    format = ReplyFormat.of(tokenizer, source)
    for mark in format.ids:
        spelled = [i for c in f"a{mark}b" for i in tokenizer.encode(c, start=False)]
        assert parse(ReplyParser(format), spelled) == (f"a{mark}b", "", [])


def test_a_thought_that_the_prompt_opened(tmp_path):
    tokenizer = make_tokenizer(tmp_path / "t.json", FAMILIES["json"][0], special=False)
    format = ReplyFormat.of(tokenizer, "")
    opened = tokenizer.encode("<|im_start|>assistant\n<think>\n", start=False)
    assert format.opened(opened) and not format.opened(
        [*opened, *tokenizer.encode("\n</think>", start=False)]
    )
    ids = tokenizer.encode("so it is \n</think>\n\nYes.", start=False)
    assert parse(ReplyParser(format, thinking=True), ids) == ("Yes.", "so it is", [])


def test_thinking_and_answers_stream(tmp_path):
    tokenizer = make_tokenizer(tmp_path / "t.json", FAMILIES["json"][0])
    parser = ReplyParser(ReplyFormat.of(tokenizer, ""))
    pieces = [parser.feed(i) for i in tokenizer.encode("<think>\nab</think>\ncd", start=False)]
    assert [(p.kind, p.text) for step in pieces for p in step] == [
        (THINKING, "a"), (THINKING, "b"), (CONTENT, "c"), (CONTENT, "d"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "body", ["{", "not json", '{"arguments": {}}', '{"name": "f", "arguments": [1]}', "[" * 5000]
)
def test_calls_that_are_none_stay_text(tmp_path, body):
    tokenizer = make_tokenizer(tmp_path / "t.json", FAMILIES["json"][0])
    format = ReplyFormat.of(tokenizer, "")
    text = f"<tool_call>{body}</tool_call>"
    assert parse(ReplyParser(format), tokenizer.encode(text, start=False)) == (text, "", [])
    cut = tokenizer.encode(f"<tool_call>{body}", start=False)
    assert parse(ReplyParser(format), cut)[0] == f"<tool_call>{body}"


def test_values_written_bare_follow_the_schema_of_the_tool(tmp_path):
    tokenizer = make_tokenizer(tmp_path / "t.json", FAMILIES["parameters"][0])
    format = ReplyFormat.of(tokenizer, "")
    given = {"to": "True", "now": "False", "stops": "3", "via": '["a"]', "other": "as it is"}
    text = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in given.items())
    text = f"<zyphra_tool_call>\n<function=find_flights>\n{text}</function>\n</zyphra_tool_call>"
    _, _, calls = parse(ReplyParser(format, tools=TOOLS), tokenizer.encode(text, start=False))
    assert calls[0].arguments == {
        "to": "True", "now": False, "stops": 3, "via": ["a"], "other": "as it is",
    }  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
def test_random_ids_never_break_a_parser(family, seed):
    _, tokenizer, source = family
    rng = random.Random(seed)
    format = ReplyFormat.of(tokenizer, source)
    common = [*format.marks, *tokenizer.encode('call:f{a:<|"|>{}[],:="', start=False)]
    for _ in range(200):
        ids = [rng.choice(common) for _ in range(rng.randint(1, 40))]
        parse(ReplyParser(format, thinking=rng.random() < 0.5, tools=TOOLS), ids)


def test_marks_that_are_no_tokens_are_found_as_text(tmp_path):
    tokenizer = make_tokenizer(tmp_path / "t.json", ["<|im_start|>", "<|im_end|>"])
    format = ReplyFormat.of(tokenizer, "… <tool_call> … </tool_call> …")
    assert format.grammar.name == "json" and not format.ids
    text = 'Wait <tool_call>\n[{"name": "f", "arguments": {"a": 1}}]\n</tool_call> done'
    answer, _, calls = parse(ReplyParser(format), tokenizer.encode(text, start=False))
    assert answer == "Wait  done" and calls == [ToolCall("f", {"a": 1}, "call_1")]


def test_turn_ends_count_where_the_template_writes_them(tmp_path):
    tokenizer = make_tokenizer(tmp_path / "t.json", ["<|im_end|>", "<end_of_turn>"])
    format = ReplyFormat.of(tokenizer, "{{ m.content }}<|im_end|>")
    assert format.ends == {tokenizer.id_of("<|im_end|>")}


def test_holdback_finds_texts_however_they_are_cut():
    rng = random.Random(0)
    for _ in range(500):
        text = "".join(rng.choices("abEND", k=rng.randint(0, 14)))
        wanted = rng.sample(["END", "EN", "ab", "bb", "a"], k=2)
        at, hit = min(
            ((text.find(w), -len(w), w) for w in wanted if w in text), default=(None, 0, "")
        )[::2]
        holdback, got, found = Holdback(wanted), "", ""
        rest = text
        while rest and not found:
            n = rng.randint(1, 4)
            given, found = holdback.feed(rest[:n])
            got, rest = got + given, rest[n:]
        if not found:
            got += holdback.flush()
        assert (got, found) == (text if at is None else text[:at], hit) or (
            found and text.startswith(got + found) and text.find(found) == len(got) == at
        )


def test_messages_are_read_in_the_shape_clients_send():
    data = {
        "role": "assistant",
        "content": None,
        "reasoning_content": "hm",
        "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": [1]}'}}
        ],
    }
    message = Message.of(data)
    assert message == Message("assistant", "", "hm", (ToolCall("f", {"a": [1]}, "c1"),))
    assert Message.of(json.loads(json.dumps(message.as_dict()))) == message
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert Message.of({"role": "developer", "content": parts}) == Message("system", "ab")
    assert Tool.of(TOOLS[0].as_dict()) == TOOLS[0]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([], "must be an object"),
        ({"role": "usr", "content": ""}, "Did you mean 'user'"),
        ({"role": 3}, "has role 3"),
        ({"role": "user", "content": 5}, "must be text, not int"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "reads text only"),
        ({"role": "assistant", "tool_calls": "x"}, "no list"),
        ({"role": "assistant", "tool_calls": [{}]}, "a function that has a name"),
        ({"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}, "not JSON"),
        ({"role": "assistant", "tool_calls": [{"name": "f", "arguments": "3"}]}, "no JSON object"),
    ],
)
def test_messages_of_another_shape_are_one_sentence(data, words):
    with pytest.raises(PromptError, match=words):
        Message.of(data)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (3, "must be an object"),
        ({"name": "a b"}, "use letters"),
        ({"name": "f", "parameters": 1}, "no JSON"),
    ],
)
def test_tools_of_another_shape_are_one_sentence(data, words):
    with pytest.raises(PromptError, match=words):
        Tool.of(data)
