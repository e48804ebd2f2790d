# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Chat templates in the style of the popular families, written for the tests, and conversations."""

LLAMA2 = """
{%- if messages[0]['role'] == 'system' %}
    {%- set turns = messages[1:] %}
    {%- set preamble = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}
{%- else %}
    {%- set turns = messages %}
    {%- set preamble = '' %}
{%- endif %}
{%- for turn in turns %}
    {%- if (turn['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must take turns: user, assistant, user, ...') }}
    {%- endif %}
    {%- set body = preamble + turn['content'] if loop.first else turn['content'] %}
    {%- if turn['role'] == 'user' %}
        {{- bos_token + '[INST] ' + body.strip() + ' [/INST]' }}
    {%- else %}
        {{- ' ' + body | trim + ' ' + eos_token }}
    {%- endif %}
{%- endfor %}
"""

LLAMA3 = """
{{- bos_token }}
{%- if custom_tools is defined %}{% set tools = custom_tools %}{% endif %}
{%- if not tools is defined %}{% set tools = none %}{% endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- macro header(role) %}
    {{- '<|start_header_id|>' ~ role ~ '<|end_header_id|>\\n\\n' }}
{%- endmacro %}
{{- header('system') }}
{%- if tools is not none %}{{ 'Environment: ipython\\n' }}{% endif %}
{{- 'Today Date: ' + date_string + '\\n\\n' }}
{%- if tools is not none %}
    {%- for tool in tools %}{{ tool | tojson(indent=4) + '\\n\\n' }}{% endfor %}
{%- endif %}
{%- if messages[0].role == 'system' %}
    {{- messages[0].content | trim }}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- '<|eot_id|>' }}
{%- for message in messages %}
    {%- if message.tool_calls %}
        {%- if message.tool_calls | length != 1 %}
            {{- raise_exception('One call at a time!') }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- header('assistant') + '{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson }}{{ '}<|eot_id|>' }}
    {%- elif message.role in ['tool', 'ipython'] %}
        {{- header('ipython') }}
        {%- if message.content is mapping or message.content is not string %}
            {{- message.content | tojson }}
        {%- else %}{{ message.content }}{% endif %}{{ '<|eot_id|>' }}
    {%- else %}
        {{- header(message.role) + message.content | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ header('assistant') }}{% endif %}
"""

CHATML = """
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""

QWEN2 = """
{%- if messages[0]["role"] != "system" %}
    {{- "<|im_start|>system\\nYou are helpful.<|im_end|>\\n" }}
{%- endif %}
{%- if tools %}{{ "<tools>" }}
    {%- for tool in tools %}{{ "\\n" }}{{ tool | tojson }}{% endfor %}
    {{- "\\n</tools>\\n" }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "assistant" and message.tool_calls %}
        {{- "<|im_start|>" + message.role }}
        {%- if message.content %}{{ "\\n" + message.content }}{% endif %}
        {%- for call in message.tool_calls %}
            {%- if call.function is defined %}{% set call = call.function %}{% endif %}
            {{- '\\n<tool_call>\\n{"name": "' }}{{ call.name }}{{ '", "arguments": ' }}
            {{- call.arguments | tojson }}{{ '}\\n</tool_call>' }}
        {%- endfor %}
        {{- "<|im_end|>\\n" }}
    {%- elif message.role == "tool" %}
        {%- if loop.index0 == 0 or messages[loop.index0 - 1].role != "tool" %}
            {{- "<|im_start|>user" }}
        {%- endif %}
        {{- "\\n<tool_response>\\n" + message.content + "\\n</tool_response>" }}
        {%- if loop.last or messages[loop.index0 + 1].role != "tool" %}
            {{- "<|im_end|>\\n" }}
        {%- endif %}
    {%- else %}
        {{- "<|im_start|>" + message.role + "\\n" + message.content + "<|im_end|>" + "\\n" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|im_start|>assistant\\n" }}{% endif %}
"""

QWEN3 = """
{%- set ns = namespace(searching=true, last=messages | length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = messages | length - 1 - loop.index0 %}
    {%- if ns.searching and message.role == "user" and message.content is string
          and not message.content.startswith('<tool_response>') %}
        {%- set ns.searching = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- if tools %}
    {{- '<tools>\\n' ~ (tools | map('tojson') | join('\\n')) ~ '\\n</tools>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- set thoughts = '' %}
        {%- if message.reasoning_content is string %}
            {%- set thoughts = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thoughts = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and (loop.last or thoughts) %}
            {{- '<think>\\n' + thoughts.strip('\\n') + '\\n</think>\\n\\n' }}
        {%- endif %}
        {%- generation %}
        {{- content }}
        {%- for call in message.tool_calls or [] %}
            {%- set call = call.function or call %}
            {{- '\\n<tool_call>\\n' }}{{ call.name }}: {% if call.arguments is string %}
                {{- call.arguments }}
            {%- else %}
                {{- call.arguments | tojson(ensure_ascii=False, sort_keys=True) }}
            {%- endif %}
            {{- '\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- else %}
        {{- content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

MISTRAL = """
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] %}{% set turns = messages[1:] %}
{%- else %}{% set turns = messages %}{% endif %}
{%- if tools is not none and tools is defined %}
    {%- set names = namespace(all=[]) %}
    {%- for tool in tools %}{% set names.all = names.all + [tool.function.name] %}{% endfor %}
{%- endif %}
{{- bos_token }}
{%- for turn in turns %}
    {%- if turn['role'] == 'user' %}
        {%- if names and loop.last %}
            {{- '[AVAILABLE_TOOLS]' + (tools | tojson(separators=(',', ':'))) }}
            {{- '[/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {{- '[INST] ' }}{% if loop.last and system is defined %}{{ system + '\\n\\n' }}{% endif %}
        {{- turn['content'] + '[/INST]' }}
    {%- elif turn.tool_calls is defined and turn.tool_calls is not none %}
        {{- '[TOOL_CALLS]' }}
        {%- for call in turn.tool_calls %}
            {%- set out = call.function | tojson %}
            {{- out[:-1] }}{% if call.id is defined %}{{ ', "id": "' + call.id + '"}' }}{% endif %}
            {%- if not loop.last %}{{ ', ' }}{% else %}{{ eos_token }}{% endif %}
        {%- endfor %}
    {%- elif turn['role'] == 'assistant' %}
        {{- ' ' + turn['content'] | trim + eos_token }}
    {%- elif turn['role'] in ('tool', 'tool_results') %}
        {{- '[TOOL_RESULTS]' + turn.content | string + '[/TOOL_RESULTS]' }}
    {%- else %}
        {{- raise_exception('Only user, assistant and tool are known, not ' + turn['role']) }}
    {%- endif %}
{%- endfor %}
"""

GEMMA = """
{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first = messages[0]['content'] + '\\n\\n' -%}
    {%- else -%}
        {%- set first = messages[0]['content'][0]['text'] + '\\n\\n' -%}
    {%- endif -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set first = '' -%}{%- set turns = messages -%}
{%- endif -%}
{%- for turn in turns -%}
    {%- if turn['role'] == 'assistant' -%}{%- set role = 'model' -%}
    {%- else -%}{%- set role = turn['role'] -%}{%- endif -%}
    {{ '<start_of_turn>' + role + '\\n' + (first if loop.first else '') }}
    {%- if turn['content'] is string -%}
        {{ turn['content'] | trim }}
    {%- elif turn['content'] is iterable -%}
        {%- for part in turn['content'] -%}
            {%- if part['type'] == 'text' -%}{{ part['text'] | trim }}{%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}
"""

PHI = """{% for message in messages %}
{% if message['role'] == 'system' and message['content'] %}
{{ '<|system|>' + message['content'] + '<|end|>' }}
{% elif message['role'] == 'user' %}
{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}
{% elif message['role'] == 'assistant' %}
{% generation %}
{{ '<|assistant|>' + message['content'] + '<|end|>' }}
{% endgeneration %}
{% else %}{% continue %}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}
"""

DEEPSEEK = """
{%- if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}
{%- set ns = namespace(is_tool=false, system='') %}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}
        {%- set ns.system = ns.system + ('\\n\\n' if ns.system else '') + message['content'] %}
    {%- endif %}
{%- endfor %}
{{- bos_token ~ ns.system }}
{%- for message in messages if message['role'] != 'system' %}
    {%- set content = message['content'] %}
    {%- if message['role'] == 'user' %}
        {{- '<\uff5cUser\uff5c>' + content }}{% set ns.is_tool = false %}
    {%- elif message['role'] == 'assistant' and 'tool_calls' in message %}
        {%- for call in message['tool_calls'] %}
            {{- '<\uff5ccall\uff5c>' + call['type'] + call['function']['name'] + '\\n' }}
            {{- call['function']['arguments'] | tojson(indent=2) }}{{ '<\uff5cend\uff5c>' }}
            {%- if loop.index == 9 %}{% break %}{% endif %}
        {%- endfor %}
    {%- elif message['role'] == 'assistant' %}
        {%- if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}
        {{- '<\uff5cAssistant\uff5c>' + content + eos_token }}
    {%- elif message['role'] == 'tool' %}
        {%- set ns.is_tool = true %}{{ '<\uff5ctool\uff5c>' + content }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt and not ns.is_tool %}
    {{- '<\uff5cAssistant\uff5c><think>\\n' }}
{%- endif %}
"""

# Goes through parts in a macro, sorts documents, and prints whatever it is given.
PARTS = """
{%- macro words(content, sep='|') -%}
    {%- if content is string -%}{{ content }}{%- else -%}
        {%- for part in content -%}
            {{ part.text if part.type == 'text' else part }}{{ sep if not loop.last }}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- for d in (documents or []) | sort(attribute='title') %}{{ d.title }}: {{ d.text }}; {% endfor %}
{%- for m in messages %}[{{ m.role }}|{{ m.name if m.name is defined }}|{{ words(m.content) }}]
{% endfor %}
{%- if tools is none %}no tools{% endif %}{% if documents is none %} no documents{% endif %}
{{ unknown_token }}{{ unknown is defined }} {{ pad_token }} {{ image_token }}
{{ {'b': '\u00e9<&', 'a': [1.5, none]} | tojson(indent=1, ensure_ascii=true, sort_keys=true) }}
{{ range(3) | list }} {{ dict(a=1).a }} {{ cycler('x', 'y').next() }}
{{ eos_token is defined }} {{ strftime_now('%Y') | length }}
{{- mode | default('plain') }} {{ add_generation_prompt }}
"""

FAMILIES = {
    "llama2": LLAMA2,
    "llama3": LLAMA3,
    "chatml": CHATML,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "mistral": MISTRAL,
    "gemma": GEMMA,
    "phi": PHI,
    "deepseek": DEEPSEEK,
    "parts": PARTS,
}

_USER = {"role": "user", "content": ' Qu\u00e9 "tiempo" <b>hace</b>\nen \u6771\u4eac? \U0001f98a '}
_SYSTEM = {"role": "system", "content": "Be brief & kind."}
_REPLY = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nSol.\n"}
_CALL = {
    "role": "assistant", "content": None,
    "tool_calls": [{"type": "function", "id": "call00001", "function": {
        "name": "weather", "arguments": {"city": "M\u00e1laga", "days": [1, 2.5, None, True]}}}],
}  # fmt: skip
_PARTS = [{"type": "text", "text": "first "}, {"type": "text", "text": "second"}]
TOOLS = [{"type": "function", "function": {
    "name": "weather", "description": "El tiempo, <hoy> \u2014 o ma\u00f1ana",
    "parameters": {"type": "object", "required": ["city"], "properties": {
        "city": {"type": "string"}, "days": {"type": "array", "items": {"type": "number"}}}},
}}]  # fmt: skip

# Messages, and options.
CONVERSATIONS = {
    "one turn": ([_USER], {}),
    "no prompt": ([_USER], {"add_generation_prompt": False}),
    "system": ([_SYSTEM, _USER, _REPLY, _USER], {"date_string": "1 Jan 2026"}),
    "reply last": ([_USER, _REPLY], {"add_generation_prompt": False}),
    "no user": ([_SYSTEM], {"add_generation_prompt": False}),
    "two users": ([_USER, _USER], {}),
    "other role": ([_USER, {"role": "critic", "content": "no"}], {}),
    "no content": ([{"role": "user"}], {}),
    "reasoning": ([_USER, {"role": "assistant", "content": "Sol.", "reasoning_content": "hm\n"}],
                  {"add_generation_prompt": False}),
    "older reasoning": ([_USER, {"role": "assistant", "content": "Sol.", "reasoning": "hm"}],
                        {"add_generation_prompt": False}),
    "no thinking": ([_USER], {"enable_thinking": False}),
    "thinking": ([_USER], {"enable_thinking": True}),
    "tools": ([_SYSTEM, _USER], {"tools": TOOLS}),
    "empty tools": ([_USER], {"tools": []}),
    "call": ([_USER, _CALL, {"role": "tool", "name": "weather", "content": "22 \u00b0C"},
              {"role": "tool", "content": "23"}], {"tools": TOOLS}),
    "results": ([_USER, _CALL, {"role": "tool", "content": {"degrees": 22, "sky": "azul \u00e9"}},
                 {"role": "tool", "content": [1, {"degrees": 2}]}], {"tools": TOOLS}),
    "call with text": ([_USER, _CALL | {"content": "Un momento"}],
                       {"tools": TOOLS, "add_generation_prompt": False}),
    "arguments as text": ([_USER, {"role": "assistant", "content": "", "tool_calls": [
        {"type": "function", "id": "call00002",
         "function": {"name": "f", "arguments": "{\"a\": 1}"}}]}], {}),
    "documents": ([_USER], {"documents": [{"title": "z", "text": "1"},
                                          {"title": "a", "text": "2"}]}),
    "variables": ([_USER | {"name": "Eva", "weight": 1}], {"mode": "loud", "bos_token": "<bos>"}),
    "continue": ([_USER, {"role": "assistant", "content": "Hace sol"}],
                 {"continue_final_message": True, "add_generation_prompt": False}),
    "continue a space": ([_USER, {"role": "assistant", "content": "Hace "}],
                         {"continue_final_message": True, "add_generation_prompt": False}),
}  # fmt: skip
# What only templates that go through parts lay out as transformers does.
IN_PARTS = {
    "parts": ([{"role": "user", "content": _PARTS}], {}),
    "system in parts": (
        [
            {"role": "system", "content": _PARTS[:1]},
            {"role": "user", "content": [{"type": "text", "text": "x"}]},
        ],
        {},
    ),
    "continue parts": (
        [_USER, {"role": "assistant", "content": _PARTS}],
        {"continue_final_message": True, "add_generation_prompt": False},
    ),
}
