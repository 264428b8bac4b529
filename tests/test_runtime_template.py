"""Templates: transformers' environment as the oracle, and foreign templates that misbehave."""

import itertools
import json
import time

import pytest
from template_shapes import SHAPES
from templates import compare, conversations
from transformers.utils.chat_template_utils import _compile_jinja_template

from edge_kv.errors import ArtifactError, ConfigError, PromptError
from edge_kv.runtime import template as module
from edge_kv.runtime.template import Template

TURNS = [
    {"role": "user", "content": '<é> "hi"\''},
    {"role": "assistant", "content": "yo"},
    {"role": "user", "content": "q"},
]
CONVENTIONS = {
    "tools": "{% if tools is not none %}T{% endif %}{% if documents is none %}D{% endif %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}|"
    "{% endfor %}",
    "tojson": "{{ messages[0] | tojson }}{{ 'é' | tojson(ensure_ascii=True) }}"
    "{{ {'b': 1, 'a': [2]} | tojson(sort_keys=True, separators=(',', ':'), indent=2) }}",
    "loops": "{% for m in messages %}{% if loop.index0 == 1 %}{% continue %}{% endif %}"
    "{{ loop.length }}{{ loop.last }}{{ loop.previtem.role if loop.previtem }}{{ m.content }}"
    "{% endfor %}"
    "{% for x in messages[0] %}{{ x }}{% break %}{% endfor %}{% for x in none_such %}{% endfor %}",
    "clock": "{{ strftime_now('%Y') }}{{ dict(a=1).a }}{{ dict.fromkeys('ab') }}",
    "namespaces": "{% set ns = namespace(self=1, b='x') %}{% set ns.c = ns.b ~ 1 ~ none %}"
    "{{ ns.c }}",
    "blocks": "  {% if true %}\n a \n  {%- else %}\nb\n {% endif %}\n{{ '%s-%d' % ('a', 3) }}"
    "{{ '{:>5}|{}'.format('a', 2) }}{{ 'a,b'.split(',') }}{{ 'x' * 3 }}{{ [1] + [2] }}",
    "macros": "{% macro f(n, tail='.') %}{% if n %}{{ n }}{{ f(n - 1) }}{% else %}{{ tail }}"
    "{% endif %}{% endmacro %}{{ f(3) }}{% for k, v in {'z': 1, 'a': 2} | dictsort %}{{ k }}{{ v }}"
    "{% endfor %}{% for k, v in messages[0].items() %}{{ k }}={{ v }}{% endfor %}",
}
HOSTILE = {
    "division": "{{ 1 // 0 }}",
    "attribute": "{{ messages.nothing.more }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "calls": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}"
    "{{ f(40) }}",
    "range": "{% for i in range(1000000) %}x{% endfor %}",
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "doubling": "{% set ns = namespace(x='ab') %}{% for i in range(60) %}"
    "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "sums": "{% set ns = namespace(x='ab') %}{% for i in range(60) %}"
    "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "times": "{{ 'x' * 10000000000 }}",
    "power": "{{ 10 ** (10 ** 10) }}",
    "percent": "{{ '%9999999999d' % 1 }}",
    "format": "{{ '{:>9999999999}'.format('x') }}",
    "nested format": "{{ '{:{}}'.format('x', 10000000000) }}",
    "many fields": "{{ ('{0}' * 9000).format('x' * 4000000) }}",
    "method": "{{ 'a'.ljust(9999999999) }}",
    "filter": "{{ 'a' | center(9999999999) }}",
    "replace": "{{ ('a' * 1000000) | replace('a', 'b' * 1000000) }}",
    "join": "{{ ['a' * 4000000] * 9000 | join }}{{ (['a' * 4000000] * 9000) | join(',') }}",
    "output": "{{ ['a' * 4000000] * 9000 }}",
    "indent": "{{ ('a\\n' * 100000) | indent(900) }}",
    "json": "{{ messages | tojson(indent=99999999) }}",
    "underscore": "{{ namespace(__class__=1) }}",
    "internals": "{{ messages.__class__.__mro__ }}",
    "change": "{{ messages.append(1) }}",
    "own words": "{{ raise_exception('only\n  questions.') }}",
}


@pytest.mark.parametrize("name", CONVENTIONS)
def test_conventions_are_those_of_transformers(name):
    source = CONVENTIONS[name]
    given = {"messages": TURNS, "bos_token": "<bos>", "add_generation_prompt": True}
    wanted = _compile_jinja_template(source).render(**given, tools=None, documents=None)
    assert Template(source).render(TURNS, bos_token="<bos>") == wanted


def test_tools_and_variables_reach_the_template():
    source = "{{ tools | tojson }}{{ enable_thinking }}{{ add_generation_prompt }}"
    tools = [{"type": "function", "function": {"name": "f"}}]
    text = Template(source).render(
        TURNS, tools=tools, add_generation_prompt=False, enable_thinking=True
    )
    assert text == json.dumps(tools) + "TrueFalse"


@pytest.mark.parametrize("name", HOSTILE)
def test_a_misbehaving_template_is_one_sentence_soon(name):
    begin = time.thread_time()
    with pytest.raises(
        PromptError, match=r"^The chat template refuses this conversation: .+\.$"
    ) as e:
        Template(HOSTILE[name]).render(TURNS)
    assert "\n" not in str(e.value) and len(str(e.value)) < 400
    assert time.thread_time() - begin < 2 * module.SECONDS


def test_formats_do_not_reach_internals():
    spy = Template("{{ ('{0.__globals__}' | attr('format'))(raise_exception) }}")
    assert "builtins" not in spy.render(TURNS)


def test_time_is_limited_too(monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(module.time, "thread_time", lambda: float(next(clock)))
    with pytest.raises(PromptError, match="more than 10 seconds"):
        Template("{% for i in range(100) %}{{ i }}{% endfor %}").render(TURNS)


def test_a_long_conversation_renders():
    """Half a million tokens in some hundred turns stay below every limit."""
    turns = [{"role": "user", "content": "word " * 800}] * 400
    source = (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
        "<{{ m.role }}>{{ m['content'] | trim ~ messages | length }}{% endfor %}"
    )
    assert len(Template(source).render(turns)) > 1_500_000


@pytest.mark.parametrize(
    "source",
    ["{% for %}", "{{ " + "(" * 3000 + ")" * 3000 + " }}", "{% generation %}", "a" * 2**21],
)
def test_what_is_no_template_is_one_sentence(source):
    with pytest.raises(ArtifactError, match=r"^The chat template ") as e:
        Template(source)
    assert "\n" not in str(e.value)


def test_an_older_jinja_is_refused(monkeypatch):
    monkeypatch.setattr(module.jinja2, "__version__", "3.1.5")
    with pytest.raises(ConfigError, match=r"jinja2 3.1.5 .* pip install 'jinja2>=3.1.6'"):
        Template("a")


@pytest.mark.parametrize("name", SHAPES)
def test_conversations_render_as_transformers_renders_them(name):
    alike, refused, differ = compare(SHAPES[name], list(conversations(60, seed=len(name))))
    assert not differ, differ[:2]
    assert alike >= 30 and (refused == 0 or name in ("Llama 3.2", "Gemma 3"))
