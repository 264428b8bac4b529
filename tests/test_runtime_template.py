"""Templates: transformers' environment as the oracle, and foreign templates that misbehave."""

import itertools
import json
import time

import pytest
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


# Templates in the shape that families of models ship, every construct of theirs in use.
SHAPES = {
    "channels": """\
{%- macro value(v, bare=False) -%}
    {%- if v is string -%}{{- '<|"|>' + v + '<|"|>' -}}
    {%- elif v is boolean -%}{{- 'true' if v else 'false' -}}
    {%- elif v is mapping -%}{{- '{' -}}
        {%- set ns = namespace(some=false) -%}
        {%- for key, item in v | dictsort -%}
            {%- if ns.some %},{% endif -%}{%- set ns.some = true -%}
            {{- key -}}:{{- value(item, bare=bare) -}}
        {%- endfor -%}{{- '}' -}}
    {%- elif v is sequence -%}[{%- for item in v -%}{{- value(item) -}}
        {%- if not loop.last %},{% endif -%}{%- endfor -%}]
    {%- else -%}{{- v -}}{%- endif -%}
{%- endmacro -%}
{%- macro visible(text) -%}
    {%- set ns = namespace(out='') -%}
    {%- for part in text.split('<channel|>') -%}
        {%- set ns.out = ns.out + part.split('<|channel>')[0] -%}
    {%- endfor -%}{{- ns.out | trim -}}
{%- endmacro -%}
{%- set rest = messages -%}
{{- bos_token -}}
{%- if (enable_thinking is defined and enable_thinking) or tools
       or messages[0]['role'] in ['system', 'developer'] -%}
    {{- '<|turn>system\\n' -}}{%- if enable_thinking is defined and enable_thinking -%}<|think|>
    {%- endif -%}
    {%- if messages[0]['role'] in ['system', 'developer'] -%}
        {{- messages[0]['content'] | trim -}}{%- set rest = messages[1:] -%}
    {%- endif -%}
    {%- for tool in tools or [] -%}<|tool>{{ tool['function']['name'] }}
        {{- value(tool['function']['parameters']) | upper -}}<tool|>{%- endfor -%}
    {{- '<turn|>\\n' -}}
{%- endif -%}
{%- for m in rest -%}
    {%- if m['role'] != 'tool' -%}
        {{- '<|turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\\n' -}}
        {%- set thought = m.get('reasoning') or m.get('reasoning_content') -%}
        {%- if thought and m.get('tool_calls') -%}
            {{- '<|channel>thought\\n' + thought + '\\n<channel|>' -}}
        {%- endif -%}
        {%- for call in m['tool_calls'] or [] -%}
            {{- '<|tool_call>call:' + call['function']['name'] -}}
            {{- value(call['function']['arguments']) -}}<tool_call|>
        {%- endfor -%}
        {%- for k in range(loop.index0 + 1, rest | length) if rest[k]['role'] == 'tool' -%}
            {%- if loop.first -%}<|tool_response>{{ rest[k].get('name') | default('?') }}
                {{- value(rest[k]['content']) -}}<tool_response|>{%- endif -%}
        {%- endfor -%}
        {{- visible(m['content']) if m['role'] == 'assistant' else m['content'] | trim -}}
        {{- '<turn|>\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|turn>model\\n' -}}
    {%- if not enable_thinking | default(false) -%}{{- '<|channel>thought\\n<channel|>' -}}
{%- endif -%}{%- endif -%}
""",
    "pairs": """\
{{- "[start]" -}}
{%- set enable_thinking = enable_thinking | default(false) -%}
{%- set head = messages[0].content if messages and messages[0].role == "system" else "" -%}
{%- if head.strip() or tools -%}
{{- "<system>\\n" ~ head.rstrip() -}}
{%- if tools -%}{%- set ns = namespace(text="\\n### Tools\\n") -%}
{%- for tool in tools -%}{%- set ns.text = ns.text ~ (tool | tojson) ~ "\\n" -%}{%- endfor -%}
{{- ns.text -}}{%- endif -%}{{- "</system>\\n" -}}
{%- endif -%}
{%- for message in messages -%}
{%- set content = message.content if message.content is string else "" -%}
{%- if message.role == "user" -%}{{- "<user>\\n" + content + "\\n</user>\\n" -}}
{%- elif message.role == "assistant" -%}
{%- generation -%}<assistant>
{% if '</think>' in content %}{% set content = content.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{%- if message.reasoning_content is string -%}<think>{{ message.reasoning_content.strip() }}</think>
{%- else -%}</think>{%- endif -%}
{{- content.strip() ~ "\\n" if content.strip() -}}
{%- for call in message.tool_calls or [] -%}<tool_call>{{ call.function.name }}
{% set given = call.function.arguments %}{%- for k, v in given.items() -%}
<arg_key>{{ k }}</arg_key>
<arg_value>{{ v | tojson(ensure_ascii=False) if v is not string else v }}</arg_value>
{% endfor -%}</tool_call>{%- endfor -%}</assistant>
{% endgeneration -%}
{%- elif message.role == "tool" -%}{{- "<tool_response>" + content + "</tool_response>\\n" -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<assistant>{{ '<think>' if enable_thinking else '</think>' }}
{%- endif -%}
""",
    "json": """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "<|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(seeking=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.seeking and message.role == "user" and not (message.content.startswith('<r>')
           and message.content.endswith('</r>')) %}
        {%- set ns.seeking = false %}{%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content %}{%- set thought = '' %}
        {%- if message.reasoning_content is string %}{%- set thought = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1] %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>' + message.role + '\\n' }}
        {%- if loop.index0 > ns.last and (loop.last or (not loop.last and thought)) %}
            {{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}{{- content }}{%- endif %}
        {%- for call in message.tool_calls %}
            {%- if (loop.first and content) or (not loop.first) %}{{- '\\n' }}{%- endif %}
            {%- if call.function %}{%- set call = call.function %}{%- endif %}
            {{- '<tool_call>\\n{"name": "' }}{{- call.name }}{{- '", "arguments": ' }}
            {%- if call.arguments is string %}{{- call.arguments }}
            {%- else %}{{- call.arguments | tojson }}{%- endif %}{{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' }}{{- message.content }}{{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
""",
    "bare json": """\
{{- bos_token }}
{%- if not date_string is defined %}{%- if strftime_now is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set head = messages[0]['content']|trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set head = "" %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" + "Today Date: " + date_string + "\\n\\n" }}
{{- head + "<|eot_id|>" }}
{%- if tools is not none %}
    {%- if messages | length == 0 %}{{- raise_exception("no first user message") }}{%- endif %}
    {{- '<|start_header_id|>user<|end_header_id|>\\n\\n' -}}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\\n\\n" }}{%- endfor %}
    {{- messages[0]['content']|trim + "<|eot_id|>" }}{%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'
            + message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}{{- raise_exception("one call") }}{%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '{"name": "' + call.name + '", "parameters": ' }}{{- call.arguments | tojson }}
        {{- "}<|eot_id|>" }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}{{- message.content }}{%- endif %}{{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
""",
    "turns": """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '

' %}{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}
{% for message in rest %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Roles must alternate") }}
    {%- endif -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\\n' + (first if loop.first else '') }}
    {%- if message['content'] is string -%}{{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}{{ item['text'] | trim }}{%- endfor -%}
    {%- else -%}{{ raise_exception("Invalid content type") }}{%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}
""",
    "lines": (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}{% endif %}"
        "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_conversations_render_as_transformers_renders_them(name):
    alike, refused, differ = compare(SHAPES[name], list(conversations(60, seed=len(name))))
    assert not differ, differ[:2]
    assert alike >= 30 and (refused == 0 or name in ("bare json", "turns"))
