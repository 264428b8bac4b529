"""Templates in the shape that each family of models ships, every construct of theirs in use."""

SHAPES = {
    "Gemma 4": """\
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
    "Laguna": """\
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
    "ZAYA1": """\
{{- bos_token -}}
{%- macro value(v) -%}
    {%- if v is string or v is not iterable -%}{{- v | string -}}
    {%- else -%}{{- v | tojson | safe -}}{%- endif -%}
{%- endmacro -%}
{%- set rest = messages[1:] if messages[0].role == 'system' else messages -%}
{%- if rest | length < messages | length or tools -%}
    {{- '<|im_start|>system\\n' -}}
    {%- if rest | length < messages | length -%}{{- messages[0].content -}}{%- endif -%}
    {%- for tool in tools or [] -%}
        {%- set f = tool.function if tool.function is defined else tool -%}
        {{- '\\n<function>\\n<name>' ~ f.name ~ '</name>' -}}
        {%- if f.description -%}
            {{- '\\n<description>' ~ f.description | trim ~ '</description>' -}}
        {%- endif -%}
        {%- for name, given in (f.parameters.properties or {}) | dictsort -%}
            {{- '\\n<parameter>\\n<name>' ~ name ~ '</name>\\n<type>' ~ given.type ~ '</type>' -}}
            {%- if given.enum is defined %}{{- '\\n<enum>' ~ given.enum | tojson | safe -}}</enum>
            {%- endif -%}{{- '\\n</parameter>' -}}
        {%- endfor -%}
        {{- '\\n<required>' ~ f.parameters.required | default([]) | tojson | safe -}}
        {{- '</required>\\n</function>' -}}
    {%- endfor -%}
    {{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in rest -%}
    {%- if message.role == 'assistant' -%}
        {{- '<|im_start|>assistant\\n' -}}
        {%- if message.reasoning_content is string -%}
            {{- '<think>\\n' ~ message.reasoning_content | trim ~ '\\n</think>\\n\\n' -}}
        {%- endif -%}
        {{- message.content.split('</think>')[-1].lstrip('\\n') -}}
        {%- for call in message.tool_calls or [] -%}
            {{- '<zyphra_tool_call>\\n<function=' ~ call.function.name ~ '>\\n' -}}
            {%- for name, given in call.function.arguments | items -%}
                {{- '<parameter=' ~ name ~ '>\\n' ~ value(given) ~ '\\n</parameter>\\n' -}}
            {%- endfor -%}
            {{- '</function>\\n</zyphra_tool_call>\\n' -}}
        {%- endfor -%}
    {%- elif message.role == 'tool' -%}
        {{- '<|im_start|>user\\n<zyphra_tool_response>\\n' ~ message.content -}}
        {{- '\\n</zyphra_tool_response>\\n' -}}
    {%- else -%}
        {{- '<|im_start|>' ~ message.role ~ '\\n' ~ message.content -}}
    {%- endif -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
    {%- if enable_thinking is defined -%}
        {{- '<think>\\n' ~ ('' if enable_thinking else '\\n</think>\\n\\n') -}}
    {%- endif -%}
{%- endif -%}
""",
    "Qwen3": """\
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
    "Llama 3.2": """\
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
    "Gemma 3": """\
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
    "SmolLM": (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}{% endif %}"
        "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
}
