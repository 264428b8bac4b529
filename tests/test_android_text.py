"""The app's tokenizer, templates and chat: against Hugging Face tokenizers, Jinja and Python."""

import json
import random
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from android_artifacts import export
from android_host import HostError
from fake_artifact import TEMPLATE, edit_manifest
from test_replies import FAMILIES, make_tokenizer
from tokenizers import Tokenizer
from weights_gguf import gemma3_270m

from edge_kv.errors import PromptError
from edge_kv.runtime import load
from edge_kv.runtime.chat import RAW_TEMPLATE, Chat, Message, Options, Template
from edge_kv.runtime.replies import ReplyFormat, ReplyParser
from edge_kv.runtime.snapshot import MAGIC
from edge_kv.weights.gguf_file import GGUFFile
from edge_kv.weights.gguf_tokenizer import hf_tokenizer_json

SCRIPTS = {  # first and last code point
    "latin": (0x20, 0x17F),
    "greek": (0x370, 0x3FF),
    "cyrillic": (0x400, 0x4FF),
    "armenian": (0x531, 0x587),
    "hebrew": (0x591, 0x5F4),
    "arabic": (0x600, 0x6FF),
    "devanagari": (0x900, 0x97F),
    "bengali": (0x980, 0x9FE),
    "tamil": (0xB82, 0xBFA),
    "thai": (0xE01, 0xE5B),
    "tibetan": (0xF00, 0xFDA),
    "georgian": (0x10A0, 0x10FF),
    "ethiopic": (0x1200, 0x137C),
    "khmer": (0x1780, 0x17F9),
    "punctuation": (0x2000, 0x206F),
    "symbols": (0x2100, 0x2BFF),
    "kana": (0x3041, 0x30FF),
    "han": (0x4E00, 0x9FA5),
    "hangul": (0xAC00, 0xD7A3),
    "private": (0xE000, 0xE0FF),
    "forms": (0xFB00, 0xFFFD),
    "gothic": (0x10330, 0x1034A),
    "cuneiform": (0x12000, 0x12399),
    "mathematical": (0x1D400, 0x1D7FF),
    "emoji": (0x1F300, 0x1FAFF),
    "han b": (0x20000, 0x20100),
}
EDGES = [
    "", " ", "  ", "\n", "\n\n\n", "\t\t x", "\r\n", " \n \n", "a", " a", "a ", "a  b",
    "   a   b   ", "it's we'll I'd they're you've I'm 'tis don't DON'T",
    "\u00a0x\u2003y\u3000", "\x00\x01\x7f", "\x85", "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪🇫🇷 ☺️",
    "e\u0301 é ﬁ ſ ß İ", "\ufeffbom", "\u200b\u200d", "▁", "▁▁ ▁a", "<0x0A>", "<0xE2>",
    "<bos>", "<bos>hi<eos>", "<start_of_turn>user\nhi<end_of_turn>\n",
    "<|turn>user\nhi<turn|>", "<unused7><unused12>", "<b>bold</b><table><tr>",
    "<start_of", "<<bos>>", "1234567890 3.14159 ½ ٣ Ⅳ", "http://x.y/z?a=b&c=d#e",
    "{\"a\": [1, 2]}", "x" * 3000, "ab " * 1000, "é" * 500, "🙂" * 200, " " * 100,
    "\n" * 65, "\ufffd\ufffd", "\U0010ffff", "\ue000",
]  # fmt: skip
STRINGS = 10_500
TINY = Path(__file__).parent.parent / "edge_kv/data/tiny"
MARKS = ("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", '<|"|>')
THINKER = """{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m.role }}
{{ m.content }}{% for c in m.tool_calls %}[{{ c.function.name }}]{% endfor %}<end_of_turn>
{% endfor %}{% if add_generation_prompt %}<start_of_turn>assistant
{% if not enable_thinking %}<|channel><channel|>{% endif %}{% endif %}"""


def corpus():
    """Seeded strings in many scripts, words among them, and every edge case, alone and joined."""
    rng = random.Random(0)
    letters = {
        # a code point assigned after Unicode 13 is a letter to some libraries and nothing to others
        name: [chr(c) for c in range(a, b + 1) if unicodedata.category(chr(c)) != "Cn"]
        for name, (a, b) in SCRIPTS.items()
    }
    passage = (Path(__file__).parent.parent / "edge_kv/data/passage.txt").read_text().split()
    texts = list(EDGES)
    while len(texts) < STRINGS:
        parts = []
        for _ in range(rng.randint(1, 6)):
            kind = rng.random()
            if kind < 0.5:
                script = rng.choice(list(letters.values()))
                parts.append("".join(rng.choices(script, k=rng.randint(1, 12))))
            elif kind < 0.8:
                parts.append(" ".join(rng.choices(passage, k=rng.randint(1, 6))))
            else:
                parts.append(rng.choice(EDGES)[:50])
        texts.append(rng.choice(["", " ", "\n", "  "]).join(parts))
    return texts


@pytest.fixture(scope="module")
def gemma_tokenizer(tmp_path_factory):
    """Gemma 3's tokenizer.json, as exports write it from a GGUF."""
    path = tmp_path_factory.mktemp("gemma") / "tokenizer.json"
    file = GGUFFile(gemma3_270m())
    path.write_text(hf_tokenizer_json(file.metadata, "gemma"), encoding="utf-8")
    return path


def compare(host, path, texts):
    """Ids of every text, text of those ids, and text of random ids, as Hugging Face has them."""
    oracle = Tokenizer.from_file(str(path))
    wanted = [e.ids for e in oracle.encode_batch(texts, add_special_tokens=False)]
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, oracle.get_vocab_size(), n).tolist() for n in range(1, 40)] * 25
    ids += wanted
    answer = host.ask("tokenize", file=str(path), bos=2, add_bos=True, texts=texts, decode=ids)
    wrong = [t for t, a, b in zip(texts, answer["ids"], wanted, strict=True) if a != b]
    assert not wrong, f"{len(wrong)} of {len(texts)} differ, first {wrong[0]!r}"
    decoded = oracle.decode_batch(ids, skip_special_tokens=True)
    wrong = [i for i, a, b in zip(ids, answer["texts"], decoded, strict=True) if a != b]
    assert not wrong, f"{len(wrong)} of {len(ids)} decode differently, first {wrong[0]}"


def test_tiny_s_tokenizer_is_hugging_faces(host):
    compare(host, TINY / "tokenizer.json", corpus())


def test_gemmas_tokenizer_is_hugging_faces(host, gemma_tokenizer):
    compare(host, gemma_tokenizer, corpus())


def test_other_spellings_of_gemmas_tokenizer(host, gemma_tokenizer, tmp_path):
    """A splitting step that never splits as Google's file has, merges as lines, no bytes."""
    raw = json.loads(gemma_tokenizer.read_text(encoding="utf-8"))
    raw["pre_tokenizer"] = {
        "type": "Split",
        "pattern": {"String": " "},
        "behavior": "MergedWithPrevious",
        "invert": False,
    }
    raw["normalizer"] = {
        "type": "Sequence",
        "normalizers": [{"type": "Prepend", "prepend": "▁"}, raw["normalizer"]],
    }
    model = raw["model"]
    model["merges"] = [m for m in model["merges"] if " " not in m[0] + m[1]][:100_000]
    model["merges"] = [" ".join(m) for m in model["merges"]]
    model["byte_fallback"] = False
    raw["model"] = {k: model[k] for k in sorted(model)}  # merges before vocab
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(raw), encoding="utf-8")
    compare(host, path, corpus()[:2000])


def test_the_start_token_goes_first_once(host, gemma_tokenizer):
    def ids(add_bos, start):
        path = gemma_tokenizer if add_bos else gemma_tokenizer.with_name("plain.json")
        if not path.exists():
            path.write_bytes(gemma_tokenizer.read_bytes())
        texts = ["a", "<bos>a", ""]
        return host.ask(
            "tokenize", file=str(path), bos=2, add_bos=add_bos, start=start, texts=texts
        )["ids"]

    assert [row.count(2) for row in ids(True, True)] == [1, 1, 1]
    assert [row.count(2) for row in ids(True, False)] == [0, 1, 0]
    assert [row.count(2) for row in ids(False, True)] == [0, 1, 0]


@pytest.mark.parametrize(
    "change,words",
    [
        ({"normalizer": {"type": "NFKC"}}, "normalizer 'NFKC'"),
        ({"pre_tokenizer": {"type": "Metaspace"}}, "pre-tokenizer 'Metaspace'"),
        ({"decoder": {"type": "WordPiece"}}, "decoder 'WordPiece'"),
        ({"model": {"type": "Unigram", "vocab": {"a": 0}, "merges": []}}, "not of the BPE kind"),
        ({"model": {"type": "BPE", "vocab": {"a": 0, "b": 0}, "merges": []}}, "no id of its own"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}, "makes no token"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [], "dropout": "x"}}, "dropout"),
        ({"added_tokens": [{"content": "<x>", "id": 5, "lstrip": True}]}, "wants '<x>' found"),
        ("{", "is not a tokenizer"),
        ('{"model": {"vocab": {"a', "is not a tokenizer"),
        ("", "is not a tokenizer"),
    ],
)
def test_tokenizers_that_are_not_read_are_refused_in_words(host, tmp_path, change, words):
    path = tmp_path / "tokenizer.json"
    if isinstance(change, str):
        path.write_text(change)
    else:
        raw = json.loads((TINY / "tokenizer.json").read_text())
        path.write_text(json.dumps({**raw, **change}))
    with pytest.raises(HostError, match=words):
        host.ask("tokenize", file=str(path), bos=2, add_bos=True, texts=[])


CONVERSATIONS = [
    [("user", "Hi")],
    [("user", "  Hi there \n"), ("assistant", " Hello! "), ("user", "More\n")],
    [("system", "Be brief. "), ("user", "Hi"), ("assistant", "Yes?"), ("user", "Ünïcode 🙂")],
    [("system", "Be brief."), ("user", "")],
    [("assistant", "I begin"), ("user", "Hi")],
    [("user", "a"), ("user", "b")],
]
TURNS = """\
{#- Every construct that Gemma's templates are made of, in one. -#}
{%- macro cleaned(text, mark='<channel|>') -%}
    {%- set ns = namespace(result='', parts=0) -%}
    {%- for part in text.split(mark) -%}
        {%- if '<|channel>' in part -%}
            {%- set ns.result = ns.result + part.split('<|channel>')[0] -%}
        {%- else -%}
            {%- set ns.result = ns.result + part -%}
        {%- endif -%}
        {%- set ns.parts = ns.parts + 1 -%}
    {%- endfor -%}
    {{- ns.result | trim -}}{{ ns.parts if ns.parts > 1 }}
{%- endmacro -%}
{{ bos_token }}
{%- if (enable_thinking is defined and enable_thinking) or tools
        or messages[0]['role'] in ['system', 'developer'] %}
    {%- set head = messages[0].content + '\\n\\n' %}
    {%- set rest = messages[1:] -%}
{% else %}
    {%- set head = "" -%}
    {%- set rest = messages -%}
{% endif %}
{% for i in range(rest | length) if rest[i]['role'] != 'tool' %}
  {% set m = rest[i] %}
    {%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("roles must alternate, not " ~ m['role'] ~ " at " ~ i) }}
    {%- endif -%}
    {%- set role = 'model' if m.role == 'assistant' else m['role'] -%}
    {{ '<start_of_turn>' + role + '\\n' + (head if loop.first else '') -}}
    {%- if m['content'] is string and m.get('name') is none or not m['tool_calls'] -%}
        {{ cleaned(m['content']) if role == 'model' else m['content'] | trim }}
    {%- elif m['content'] is iterable -%}
        never
    {%- endif -%}
    {{- '<end_of_turn>\\n' }}
    {%- for key, value in {'b': 1, 'A': [2, 3]} | dictsort -%}
        {{ key }}{{ value[0] if value is sequence else -value }}{{ ',' if not loop.last }}
    {%- endfor %}
{% endfor %}
{% for x in [1, 2, 3, 4] %}{% if x == 2 %}{% continue %}{% elif x > 3 %}{% break %}{% endif %}
{{ x }}
{% else %}none{% endfor %}
{%- for x in [] %}some{% else %} empty {% endfor -%}
{{ messages[-1].content.strip()[:2] }}{{ missing | default('d') }}{{ (1, 2)[1] }}
{{ 7 // 2 * 1.5 - 1 }}
{%+ if add_generation_prompt %}<start_of_turn>model
{% endif %}
"""


@pytest.mark.parametrize("template", ["tiny", "toy", "raw", "turns"])
@pytest.mark.parametrize("turns", CONVERSATIONS, ids=range(len(CONVERSATIONS)))
def test_templates_render_as_jinja_renders_them(host, template, turns):
    source = {
        "tiny": (TINY / "chat_template.jinja").read_text(),
        "toy": TEMPLATE,
        "raw": RAW_TEMPLATE,
        "turns": TURNS,
    }[template]
    messages = [{"role": role, "content": content} for role, content in turns]
    request = {"source": source, "messages": messages, "bos": "<bos>", "eos": "<eos>"}
    try:
        wanted = Template(source).render(messages, bos_token="<bos>", eos_token="<eos>")
    except PromptError:
        with pytest.raises(HostError, match="refuses this conversation: roles must alternate"):
            host.ask("render", **request)
    else:
        assert host.ask("render", **request) == wanted


@pytest.mark.parametrize(
    "source,words",
    [
        ("{% if x %}", "line 1: expected 'endif'"),
        ("a\n{{ x", "line 2: a tag does not end"),
        ("{# x", "a comment does not end"),
        ("{{ 'x }}", "a text does not end"),
        ("{% import 'os' as os %}", "the statement 'import' is not supported"),
        ("{{ x | attr('y') }}", "the filter 'attr' is not supported"),
        ("{{ x is divisibleby(3) }}", "the test 'divisibleby' is not supported"),
        ("{{ x ? }}", "'?' is not understood"),
        ("{% endfor %}", "'endfor' has nothing to end"),
    ],
)
def test_templates_outside_the_supported_part_are_refused(host, source, words):
    with pytest.raises(HostError) as error:
        host.ask("render", source=source, messages=[], bos="", eos="")
    assert words in str(error.value) and error.value.kind == "ArtifactException"


SNIPPETS = [
    "{% for m in messages[::-1] %}{{ m.role }}{% endfor %}{{ 'abcdef'[::2] }}"
    "{{ 'abc'[-2:] }}{{ [1, 2, 3][2:0:-1] | join }}",
    "{% set a, b = 'x', 2 %}{{ a * b ~ b / 4 }}{% set t %}<{{ a }}>{% endset %}{{ t }}"
    "{{ 7 // 2 }}{{ -7 % 3 }}",
    "{{ messages | map(attribute='role') | join('+') }}"
    "|{{ messages | selectattr('role', 'equalto', 'user') | list | length }}",
    "{{ messages | rejectattr('thinking', 'defined') | map(attribute='content') | first | upper }}",
    "{{ [3, 1, 2] | sort | join }}{{ ['b', 'a', 'b'] | unique | join }}"
    "{{ [0, 1] | select | join }}",
    "{{ 'a\nb\n\nc' | indent(2) }}|{{ 'a\nb' | indent(width=3, first=true) }}"
    "|{{ 'hello wORLD' | title }}",
    "{{ {'b': [1, 2.5, none, 'ü'], 'a': {}} | tojson }}"
    "{{ {'b': 1, 'a': []} | tojson(indent=2, sort_keys=true) }}",
    "{{ 'a,b,,c'.split(',', 1) | join('|') }}{{ 'a b  c'.split() | join('|') }}"
    "{{ 'a\nb'.splitlines() | join }}",
    "{{ 'x.y.z'.rsplit('.', 1) | join(' ') }}{{ 'abcabc'.find('c') }}"
    "{{ 'abcabc'.count('bc') }}{{ 'k'.join(['a', 'b']) }}",
    "{{ 'abc'.startswith(('x', 'a')) }}{{ 'a' in ['a'] and 'a' is in ['a'] }}{{ 3 is odd }}"
    "{{ none is none }}",
    "{{ x | default('d') }}{{ '' | default('e', true) }}{{ '12' | int + 1 }}"
    "{{ 'abc' | replace('b', 'B') }}{{ 'aB' | capitalize }}",
    "{% macro f(a, b=2) %}{{ a }}-{{ b }};{% endmacro %}{{ f(1) }}{{ f(1, b=3) }}"
    "{% generation %}in{% endgeneration %}",
    "{% set ns = namespace(n=0, s='') %}{% for m in messages if m.role == 'user' %}"
    "{% set ns.n = ns.n + loop.index %}{% else %}none{% endfor %}{{ ns.n }}"
    "{% for i in range(5) %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}{% if i == 3 %}"
    "{% break %}{% endif %}{% endfor %}",
    "{% for k, v in {'q': 1, 'r': 2}.items() %}{{ k }}={{ v }}{{ ',' if not loop.last }}"
    "{% endfor %}{{ dict(a=1).a }}",
    "{{ strftime_now('%Y-%m') | length }}{% if tools is not none and tools %}t{% else %}"
    "n{% endif %}{{ 'é🙂x'[1] }}",
]  # fmt: skip


@pytest.mark.parametrize("source", SNIPPETS, ids=range(len(SNIPPETS)))
def test_what_chat_templates_are_made_of_is_jinjas(host, source):
    turns = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Yes?"), ("user", "Ünï")]
    messages = [{"role": role, "content": content} for role, content in turns]
    wanted = Template(source).render(messages, bos_token="<bos>", eos_token="<eos>")
    assert host.ask("render", source=source, messages=messages, bos="<bos>", eos="<eos>") == wanted


@pytest.mark.parametrize("think", [None, True, False])
def test_templates_are_told_whether_to_think(host, think):
    messages = [{"role": "user", "content": "Hi"}]
    asked = {} if think is None else {"think": think}
    variables = {} if think is None else {"enable_thinking": think}
    wanted = Template(THINKER).render(messages, bos_token="<bos>", eos_token="<eos>", **variables)
    request = {"source": THINKER, "messages": messages, "bos": "<bos>", "eos": "<eos>"}
    assert host.ask("render", **request, **asked) == wanted


@pytest.mark.parametrize("family", FAMILIES)
def test_replies_are_taken_apart_as_python_takes_them(host, tmp_path, family):
    """Random ids with many marks, whole calls, and texts that look like marks."""
    marks, source = FAMILIES[family]
    path = tmp_path / "tokenizer.json"
    tokenizer = make_tokenizer(path, marks)
    format = ReplyFormat.of(tokenizer, source)
    rng = random.Random(5)
    words = (
        'call:f{a:<|"|>x<|"|>,b:[1,2.5],c:{d:true}} <think> {"name": "g", "arguments": {"k": "ü"}}'
    )
    common = [*format.marks, *tokenizer.encode(words, start=False)]
    said = {"role": "assistant", "content": "Let me see. 🎉 ", "thinking": "Hm\n\nso"}
    arguments = ({"to": "x, y: {z}", "n": 3, "via": ["a", ""]}, {"on": True, "seat": {"row": -0.5}})
    turns = [
        {**said, "tool_calls": [{"function": {"name": "f", "arguments": a}}]} for a in arguments
    ]
    replies = [tokenizer.encode(Template(source).render([t]), start=False) for t in turns]
    replies += [[rng.choice(common) for _ in range(rng.randint(1, 60))] for _ in range(150)]
    for thinking in (False, True):
        wanted = []
        for ids in replies:
            parser = ReplyParser(format, thinking=thinking)
            pieces = [p for i in ids for p in parser.feed(i)] + parser.end()
            calls = [[p.call.name, p.call.arguments] if p.call else [] for p in pieces]
            wanted.append([[p.kind, p.text, *c] for p, c in zip(pieces, calls, strict=True)])
        found = host.ask(
            "parse", file=str(path), bos=1, template=source, replies=replies, thinking=thinking
        )
        for ids, a, b in zip(replies, found, wanted, strict=True):
            assert joined(a) == joined(b), tokenizer.decode(ids, special=True)
    kinds = {p[0] for reply in wanted for p in reply}
    assert kinds >= {"content", "thinking"} or family == "bare json"


def joined(pieces):
    """Pieces with neighbours of one kind joined: how finely text streams does not count."""
    out = []
    for piece in pieces:
        if out and len(piece) == 2 and out[-1][0] == piece[0] and len(out[-1]) == 2:
            out[-1] = [piece[0], out[-1][1] + piece[1]]
        elif piece[1]:
            out.append(list(piece))
    return out


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """A model of random words, marks of thoughts and calls among them."""
    return export(
        "laguna-element", tmp_path_factory.mktemp("talker") / "tiny", ctx=900, chunk=32,
        marks=MARKS, template=THINKER,
    )  # fmt: skip


def same(answer, chat):
    """Whether the app's reply is the Python chat's last."""
    last = chat.last
    assert answer["ids"] == list(last.ids)
    assert (answer["text"], answer["thinking"]) == (last.text, last.thinking)
    assert answer["calls"] == [[c.name, c.arguments, c.id] for c in last.calls]
    assert (answer["prompt"], answer["reused"]) == (last.prompt_tokens, last.reused_tokens)
    assert answer["finish"] == last.finish


@pytest.mark.parametrize("think", [None, True])
def test_conversations_are_the_python_chats(host, talker, think):
    """Six turns with a seed: pieces, ids, what was read again, why each ended."""
    sampling = {"temperature": 20.0, "top_k": 0, "top_p": 1.0}
    asked = {} if think is None else {"think": think}
    host.ask("open", root=str(talker), threads=1)
    host.ask("system", content="Be brief.")
    kinds, finishes = set(), set()
    with load(talker, "onnx-stock", threads=1) as session:
        chat = Chat(session, system="Be brief.")
        for turn, length in enumerate((60, 90, 1, 120, 60, 200)):
            chat.options = Options(max_new_tokens=length, seed=turn, think=think, **sampling)
            pieces = [[p.kind, p.text] for p in chat.ask(Message("user", f"Question {turn} 🙂?"))]
            answer = host.ask(
                "send", content=f"Question {turn} 🙂?", max_new_tokens=length,
                sampling={**sampling, "seed": turn}, **asked,
            )  # fmt: skip
            assert joined(answer["pieces"]) == joined(pieces)
            same(answer, chat)
            kinds |= {p[0] for p in pieces}
            finishes.add(chat.last.finish)
        assert host.ask("messages") == chat.messages
        list(chat.again())
        again = host.ask("again", max_new_tokens=200, sampling={**sampling, "seed": 5}, **asked)
        same(again, chat)
    assert "content" in kinds and len(finishes) > 1


def test_sampling_is_the_artifacts_unless_said_otherwise(host, talker):
    host.ask("open", root=str(talker), threads=1)
    with load(talker, "onnx-stock", threads=1) as session:
        chat = Chat(session, options=Options(max_new_tokens=40, seed=9))
        list(chat.send("Hi"))
        assert chat.generator.sampling.temperature == 0.8
        same(host.ask("send", content="Hi", max_new_tokens=40, sampling={"seed": 9}), chat)
    host.ask("open", root=str(talker), threads=1)
    greedy = host.ask("send", content="Hi", max_new_tokens=40, sampling={"temperature": 0.0})
    assert greedy["ids"] != list(chat.last.ids)


def test_no_character_is_split(host, talker):
    """The toy's ids are bytes: emoji come in four."""
    host.ask("open", root=str(talker), threads=1)
    answer = host.ask(
        "send", content="é🙂", max_new_tokens=80, sampling={"temperature": 3.0, "seed": 1}
    )
    texts = [text for kind, text in answer["pieces"] if kind == "content"]
    assert "".join(texts).strip() == answer["text"].strip()


def test_conversations_go_both_ways(host, talker, tmp_path):
    ours, theirs = tmp_path / "kotlin.kv", tmp_path / "python.kv"
    greedy = {"temperature": 0.0}
    host.ask("open", root=str(talker), threads=1)
    host.ask("system", content="Be brief.")
    host.ask("send", content="And it came to pass", max_new_tokens=12, sampling=greedy)
    host.ask("save", path=str(ours))
    assert ours.read_bytes().startswith(MAGIC)
    with load(talker, threads=1) as session:
        chat = Chat(session, options=Options(max_new_tokens=12, temperature=0.0))
        chat.load(ours)
        assert chat.messages == host.ask("messages")
        list(chat.send("In those days"))
        second = chat.last
        chat.save(theirs)
        messages = chat.messages
        chat.load(theirs)
        list(chat.send("Behold"))
        third = chat.last
    host.ask("reset")
    host.ask("load", path=str(ours))  # a loaded conversation is its text, not the ids that said it
    answer = host.ask("send", content="In those days", max_new_tokens=12, sampling=greedy)
    assert (answer["prompt"], answer["reused"]) == (second.prompt_tokens, second.reused_tokens)
    host.ask("reset")
    assert host.ask("load", path=str(theirs)) == messages
    answer = host.ask("send", content="Behold", max_new_tokens=12, sampling=greedy)
    assert (answer["prompt"], answer["reused"]) == (third.prompt_tokens, third.reused_tokens)


@pytest.mark.parametrize(
    "note",
    [{"messages": 5}, {"messages": [{"role": "boss", "content": ""}]}, {"text": 1}, {"ids": ["x"]}],
)
def test_notes_of_another_kind_are_refused(host, talker, tmp_path, note):
    path = tmp_path / "x.kv"
    with load(talker, threads=1) as session:
        session.prefill([2, 5, 6])
        session.snapshot(path, note)
    host.ask("open", root=str(talker), threads=1)
    with pytest.raises(HostError, match="a conversation that is damaged"):
        host.ask("load", path=str(path))


def test_an_artifact_without_tokenizer_takes_no_text(host, talker, tmp_path):
    root = shutil.copytree(talker, tmp_path / "toy")
    edit_manifest(root, tokenizer=None)
    host.ask("open", root=str(root), threads=1)
    with pytest.raises(HostError, match="toy has no tokenizer"):
        host.ask("send", content="Hi", max_new_tokens=1)
