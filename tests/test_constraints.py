"""Constrained replies: whatever a model would say, what comes out is of the grammar."""

import json
import random
import re

import jsonschema
import numpy as np
import pytest
from fake_artifact import NumpySession, write_artifact
from test_replies import FAMILIES, TOOLS, make_tokenizer

from edge_kv.artifact import read_artifact
from edge_kv.errors import ConfigError, RuntimeFault
from edge_kv.runtime.chat import Generator, Message, Options
from edge_kv.runtime.constraints import Engine, Grammar, ReplyConstraint
from edge_kv.runtime.messages import Tool
from edge_kv.runtime.replies import ReplyFormat, ReplyParser

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
SCHEMAS = [
    PERSON,
    {"type": "boolean"},
    {"type": "array", "items": {"type": "number"}, "minItems": 2},
    {"type": "string"},
    {"enum": ["north", "south", 3, None]},
    {"type": "object", "additionalProperties": {"type": "integer"}},
    {"anyOf": [{"type": "null"}, PERSON]},
    {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
]


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    root = tmp_path_factory.mktemp("grammar") / "a"
    return Generator(NumpySession(read_artifact(write_artifact(root, ctx=400, programs=False))))


def say(generator, grammar, seed=0, tokens=120, **options):
    options = Options(max_new_tokens=tokens, temperature=1.5, seed=seed, **options)
    turn = generator.reply([Message("user", "x")], options=options, grammar=grammar)
    for _ in turn:
        pass
    return turn.reply


@pytest.mark.parametrize("number", range(len(SCHEMAS)))
def test_json_is_valid_however_short_the_limit(generator, number):
    schema = SCHEMAS[number]
    for seed, tokens in enumerate((300, 60, 48, 40)):
        reply = say(generator, Grammar.json_schema(schema), seed, tokens)
        jsonschema.validate(json.loads(reply.text), schema)
        assert reply.finish == "stop"


def test_other_grammars(generator):
    assert say(generator, Grammar.regex("(ab|c/d){2,3}")).text in {
        a + b + c for a in ("ab", "c/d") for b in ("ab", "c/d") for c in ("ab", "c/d", "")
    }
    assert say(generator, Grammar.regex(r"a/b\/c\\\\/")).text == "a/b/c\\\\/"
    for pattern in ("[0-9]+ (km|m)", "[0-9]{5,} (km|m)", "[a-z ]+: [0-9]+ of [0-9]+\\."):
        text = say(generator, Grammar.regex(pattern), tokens=24).text
        assert re.fullmatch(pattern, text), text
    lark = 'start: greeting " " name\ngreeting: "hi" | "hello"\nname: /[A-Z][a-z]{1,5}/'
    greeting, name = say(generator, Grammar.lark(lark)).text.split(" ")
    assert greeting in ("hi", "hello") and name.isalpha() and name.istitle()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Grammar.json_schema("{"), "JSON schema is not JSON"),
        (lambda: Grammar.json_schema("[]"), "JSON schema must be an object"),
        (lambda: Grammar.json_schema({"type": "objekt"}), "JSON schema is not usable: .*objekt"),
        (lambda: Grammar.json_schema({"$ref": "#/nowhere"}), "JSON schema is not usable"),
        (lambda: Grammar.regex("a("), "regular expression is not usable"),
        (lambda: Grammar.lark("start: nothing"), 'Lark grammar is not usable: .*"nothing"'),
        (lambda: Grammar.lark(""), "Lark grammar is not usable"),
    ],
)
def test_bad_grammars_are_one_sentence(generator, make, words):
    with pytest.raises(ConfigError, match=words) as e:
        generator.reply([Message("user", "x")], grammar=make())
    assert "\n" not in str(e.value)


def made(engine, constraint, vocab, rng, left, opening=()):
    """Ids that random logits give under a constraint, up to a stop or until calls have ended."""
    ids = []
    for token in opening:
        constraint.accept(token)
    while left:
        logits = rng.standard_normal(vocab).astype(np.float32) * 3
        token = int(constraint.mask(logits, left).argmax())
        constraint.accept(token)
        left -= 1
        ids.append(token)
        if token in engine.stop_ids or (opening and constraint._call is None):
            break
    return ids


@pytest.mark.parametrize("family", FAMILIES)
def test_tool_arguments_are_valid_whatever_the_model_would_say(tmp_path, family):
    marks, source = FAMILIES[family]
    tokenizer = make_tokenizer(tmp_path / "t.json", marks)
    format = ReplyFormat.of(tokenizer, source)
    engine = Engine(tokenizer, tokenizer.vocab_size + 7, [0])
    schema = {**TOOLS[0].parameters, "additionalProperties": False}
    rng = np.random.default_rng(0)
    for _ in range(5):
        choice = random.choice(["required", TOOLS[0].name])
        constraint = ReplyConstraint(engine, format, tools=TOOLS, choice=choice)
        ids = made(engine, constraint, engine.vocab_size, rng, 200)
        parser = ReplyParser(format, tools=TOOLS)
        pieces = [p for i in ids if i not in engine.stop_ids for p in parser.feed(i)]
        calls = [p.call for p in pieces + parser.end() if p.call]
        assert calls, tokenizer.decode(ids, special=True)
        assert calls[0].name == TOOLS[0].name
        jsonschema.validate(calls[0].arguments, schema)


def test_a_call_that_is_asked_for_begins_with_its_mark_whichever_tool_it_is_of(tmp_path):
    marks, source = FAMILIES["json"]
    tokenizer = make_tokenizer(tmp_path / "t.json", marks[:4])  # the marks of calls are text
    format = ReplyFormat.of(tokenizer, source)
    engine = Engine(tokenizer, tokenizer.vocab_size, [0])
    tools = [Tool(name, "", {"type": "object"}) for name in ("first", "second")]
    constraint = ReplyConstraint(engine, format, tools=tools, choice="required")
    for name in ("first", "second"):
        call = f'{{"name": "{name}", "arguments": '
        bare, marked = (tokenizer.encode(t, start=False) for t in (call, f"<tool_call>\n{call}"))
        assert constraint.possible(bare) == 0 and constraint.possible(marked) == len(marked)


STRICT = {
    "type": "object",
    "properties": {
        "code": {"type": "string", "pattern": "^[A-Z]{2}/[0-9]{3}\\\\/$"},
        "found": {"type": "string", "pattern": "[0-9]{2}", "maxLength": 6},
        "word": {"type": "string", "minLength": 2, "maxLength": 5},
        "age": {"type": "integer", "minimum": 3, "maximum": 17},
        "share": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
        "unit": {"const": "C"},
        "seats": {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 3},
        "none": {"type": "array", "maxItems": 0},
        "at": {"anyOf": [{"$ref": "#/$defs/point"}, {"type": "null"}]},
        "way": {"type": ["boolean", "null"]},
    },
    "required": ["code", "found", "word", "age", "share", "unit", "seats", "none", "at", "way"],
    "$defs": {
        "point": {
            "type": "object",
            "properties": {"x": {"enum": [1, 2.5]}, "next": {"$ref": "#/$defs/point"}},
            "required": ["x"],
            "additionalProperties": False,
        }
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_arguments_follow_all_of_their_schema(tmp_path, family):
    marks, source = FAMILIES[family]
    tokenizer = make_tokenizer(tmp_path / "t.json", marks)
    format = ReplyFormat.of(tokenizer, source)
    engine = Engine(tokenizer, tokenizer.vocab_size, [0])
    tools = [Tool("fill", "", STRICT)]
    for seed in range(4):
        rng = np.random.default_rng(seed)
        constraint = ReplyConstraint(
            engine, format, tools=tools, choice="required", may_think=False
        )
        ids = made(engine, constraint, engine.vocab_size, rng, 600)
        parser = ReplyParser(format, tools=tools)
        pieces = [p for i in ids if i not in engine.stop_ids for p in parser.feed(i)]
        calls = [p.call for p in pieces + parser.end() if p.call]
        assert calls, tokenizer.decode(ids, special=True)
        for call in calls:  # random logits may ask for more of them
            jsonschema.validate(call.arguments, STRICT)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": 5}, {"type": "string", "pattern": "a("},
        {"type": "string", "pattern": "(?=a)"}, {"type": "string", "minLength": "few"},
        {"type": "string", "minLength": 10**9}, {"type": "array", "minItems": "x"},
        {"type": "integer", "minimum": "x"}, {"type": []}, {"$ref": "#/$defs/nothing"},
        {"type": "object", "properties": []}, {"anyOf": 3}, {"anyOf": [3]}, {"enum": 5},
        {"type": "object", "properties": {"a": {}}, "required": 7},
    ],
)  # fmt: skip
def test_schemas_of_tools_that_are_none_are_one_sentence_or_ignored(tmp_path, family, schema):
    marks, source = FAMILIES[family]
    tokenizer = make_tokenizer(tmp_path / "t.json", marks)
    engine = Engine(tokenizer, tokenizer.vocab_size, [0])
    tool = Tool("f", "", {"type": "object", "properties": {"a": schema}})
    try:
        ReplyConstraint(engine, ReplyFormat.of(tokenizer, source), tools=[tool])
    except ConfigError as e:
        assert str(e).startswith("The schema of a tool") and "\n" not in str(e)


def test_thinking_is_free_and_the_answer_is_not(tmp_path):
    marks, source = FAMILIES["json"]
    tokenizer = make_tokenizer(tmp_path / "t.json", marks)
    format = ReplyFormat.of(tokenizer, source)
    engine = Engine(tokenizer, tokenizer.vocab_size, [0])
    grammar = Grammar.json_schema({"type": "boolean"})
    constraint = ReplyConstraint(engine, format, grammar=grammar, thinking=True)
    logits = np.zeros(engine.vocab_size, np.float32)
    assert np.isfinite(constraint.mask(logits, 99)).sum() == engine.vocab_size - 1  # no stop yet
    closing = constraint.mask(logits, 5)
    assert np.flatnonzero(np.isfinite(closing)) == tokenizer.id_of("</think>")
    for token in tokenizer.encode("any thing</think>", start=False):
        constraint.accept(token)
    left = {
        tokenizer.token(int(i)) for i in np.flatnonzero(np.isfinite(constraint.mask(logits, 99)))
    }
    assert left == {"t", "f"}


def test_choices_that_are_none_are_refused(generator):
    with pytest.raises(ConfigError, match="Did you mean 'find_flights'"):
        generator.reply([Message("user", "x")], tools=TOOLS, tool_choice="find_flight")
    with pytest.raises(ConfigError, match="no tools"):
        generator.reply([Message("user", "x")], tool_choice="required")


MISSHAPEN = [
    {"properties": [["a", 1]]},
    {"properties": {"a": 3}},
    {"properties": {"a": {"type": "string"}}, "required": 5},
    {"properties": {"a": {"type": "object", "properties": [1]}}},
    {"properties": {"a": {"type": "object", "properties": {"b": {}}, "required": "b"}}},
    {"properties": {"a": {"type": "string", "enum": 5}}},
]


@pytest.mark.parametrize("family", FAMILIES)
def test_misshapen_schemas_of_tools_are_refused_or_mean_anything(tmp_path, family):
    marks, source = FAMILIES[family]
    tokenizer = make_tokenizer(tmp_path / "t.json", marks)
    engine = Engine(tokenizer, tokenizer.vocab_size, [0])
    for schema in MISSHAPEN:
        tool = Tool("f", parameters={"type": "object", **schema})
        format = ReplyFormat.of(tokenizer, source)
        try:
            ReplyConstraint(engine, format, tools=[tool], choice="required")
        except ConfigError as e:
            assert "schema of a tool" in str(e) and "\n" not in str(e)
            continue
        assert schema == MISSHAPEN[1]  # a schema that is none: any value


def test_a_text_whose_grammar_cannot_be_gone_on_with_is_no_answer(generator):
    endless = {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}
    with pytest.raises(RuntimeFault, match="cannot be held to its grammar"):
        say(generator, Grammar.json_schema(endless), tokens=300)
