"""Chat templates with tool calls, one for each kind in use, by our own hand, and their tokenizers."""

from dataclasses import dataclass
from functools import cache

from dense_reward.engines.tokenizer import TransformersTokenizer
from tiny_tokenizers import chatml


@dataclass(frozen=True, slots=True)
class ToolTemplate:
    """A template, its special tokens besides ChatML's, and the EOS token."""

    source: str
    specials: tuple[str, ...] = ()
    eos: str = "<|endoftext|>"

    def tokenizer(self) -> TransformersTokenizer:
        return _tokenizer(self)


@cache
def _tokenizer(template: ToolTemplate) -> TransformersTokenizer:
    return chatml(template.source, eos=template.eos, more_specials=template.specials)


# Like Qwen: tools in the system message, each call in tags, results in a user's turn.
TAGS = ToolTemplate(
    """{%- if tools %}<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content }}

{% endif %}You may call:
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% elif messages[0].role == 'system' %}<|im_start|>system
{{ messages[0].content }}<|im_end|>
{% endif %}
{%- for message in messages %}
{%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% elif message.role == 'assistant' %}<|im_start|>assistant
{{ message.content }}
{%- for call in message.tool_calls or [] %}
{%- if not loop.first or message.content %}{{ '\\n' }}{% endif %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor %}<|im_end|>
{% elif message.role == 'tool' %}<|im_start|>user
<tool_response>
{{ message.content }}
</tool_response><|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
)
# Like Llama 3.1: a call is one JSON object, a turn has at most one, and text beside it is dropped.
ONE_OBJECT = ToolTemplate(
    """{{- '<|begin|>' }}
{%- if tools is defined and tools is not none %}<|head|>system<|body|>

{% for tool in tools %}{{ tool | tojson(indent=2) }}

{% endfor %}<|eot|>{% endif %}
{%- for message in messages %}
{%- if message.tool_calls %}
{%- if message.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}
{%- set call = message.tool_calls[0].function %}<|head|>assistant<|body|>

{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}<|eot|>
{%- elif message.role == 'tool' %}<|head|>ipython<|body|>

{{ message.content | tojson if message.content is mapping else message.content }}<|eot|>
{%- else %}<|head|>{{ message.role }}<|body|>

{{ message.content | trim }}<|eot|>
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|head|>assistant<|body|>

{% endif %}""",
    ("<|begin|>", "<|head|>", "<|body|>", "<|eot|>"),
)
# Like Mistral: tools before the last question, calls as a list of whole functions after a special token, no header.
LIST = ToolTemplate(
    """{%- set system = messages[0].content if messages[0].role == 'system' else '' %}
{%- set turns = messages[1:] if system else messages %}
{%- set asked = turns | selectattr('role', 'equalto', 'user') | list %}
{%- for message in turns %}
{%- if message.role == 'user' %}
{%- if tools and message == asked[-1] %}[TOOLS]{{ tools | tojson }}[/TOOLS]{% endif %}[INST]
{%- if system and loop.first %}{{ system }}

{% endif %}{{ message.content }}[/INST]
{%- elif message.tool_calls is defined and message.tool_calls is not none %}[CALLS][
{%- for call in message.tool_calls %}{% set written = call.function | tojson %}
{{- written[:-1] }}, "id": "{{ call.id }}"}
{%- if not loop.last %}, {% endif %}{% endfor %}]{{ eos_token }}
{%- elif message.role == 'tool' %}[RESULT]
{{- '{"content"' }}: {{ message.content }}, "id": "{{ message.tool_call_id }}"}[/RESULT]
{%- elif message.role == 'assistant' %}{{ message.content }}{{ eos_token }}
{%- else %}{{ raise_exception('unknown role') }}{% endif %}
{%- endfor %}""",
    ("[TOOLS]", "[/TOOLS]", "[INST]", "[/INST]", "[CALLS]", "[RESULT]", "[/RESULT]", "</s>"),
    "</s>",
)
# Like Idefics 3: content is a list of parts; a string would be rendered as nothing.
PARTS = ToolTemplate(
    """{%- if tools %}<|im_start|>system
{{ tools | tojson }}<|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message['role'] | capitalize }}: {% if message['role'] == 'tool' -%}
{{ message['content'] }}
{%- else %}
{%- for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}
{%- endif %}
{%- for call in message['tool_calls'] or [] %}<call>{{ call | tojson }}</call>{% endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>Assistant: {% endif %}"""
)
# Like Qwen3.5: a macro takes content as a string or as parts; each argument is written in its own tag.
MACRO = ToolTemplate(
    """{%- macro written(value, trimmed) %}
{%- if value is string %}{{ value | trim if trimmed else value }}
{%- elif value is iterable and value is not mapping %}
{%- for item in value %}{% if 'text' in item %}{{ item.text }}{% else %}{{ raise_exception('no text') }}{% endif %}
{%- endfor %}{% endif %}
{%- endmacro %}
{%- if tools %}<|im_start|>tools
{{ tools | tojson }}<|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ written(message.content, true) | trim }}
{%- for call in message.tool_calls or [] %}
<function={{ call.function.name }}>
{%- for name, value in call.function.arguments | items %}
<parameter={{ name }}>{{ value if value is string else value | tojson }}</parameter>
{%- endfor %}
</function>
{%- endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
)
# Like GLM: no token ends a turn; the header of the next one does.
HEADERS_ONLY = ToolTemplate(
    """{%- if tools %}<|system|>
{% for tool in tools %}{{ tool | tojson(ensure_ascii=False) }}
{% endfor %}{% endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}<|observation|>
{{ message.content }}
{%- else %}<|{{ message.role }}|>
{%- if message.content %}
{{ message.content }}{% endif %}
{%- for call in message.tool_calls or [] %}
<tool_call>{{ call.function.name }}
{% for name, value in call.function.arguments.items() %}<key>{{ name }}</key>
<value>{{ value | tojson(ensure_ascii=False) if value is not string else value }}</value>
{% endfor %}</tool_call>
{%- endfor %}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}""",
    ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
)
# Like gpt-oss: it knows the role developer, and a call has another end than a text.
CHANNELS = ToolTemplate(
    """{%- if tools %}<|start|>system<|message|>namespace functions {
{% for tool in tools %}// {{ tool.function.description }}
type {{ tool.function.name }} = {{ tool.function.parameters | tojson }};
{% endfor %}}<|end|>{% endif %}
{%- for message in messages %}
{%- if message.role == "developer" or message.role == "system" %}<|start|>{{ message.role }}<|message|>
{{- message.content }}<|end|>
{%- elif message.role == 'tool' %}<|start|>functions<|message|>{{ message.content | tojson }}<|end|>
{%- elif message.tool_calls %}
{%- for call in message.tool_calls %}<|start|>assistant to=functions.{{ call.function.name }}<|message|>
{{- call.function.arguments | tojson }}<|call|>{% endfor %}
{%- elif message.role == 'assistant' %}<|start|>assistant<|message|>{{ message.content }}
{{- '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}
{%- else %}<|start|>{{ message.role }}<|message|>{{ message.content }}<|end|>
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|start|>assistant{% endif %}""",
    ("<|start|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>"),
)
TOOL_TEMPLATES = {
    "tags": TAGS,
    "one object": ONE_OBJECT,
    "list": LIST,
    "parts": PARTS,
    "macro": MACRO,
    "headers only": HEADERS_ONLY,
    "channels": CHANNELS,
}
