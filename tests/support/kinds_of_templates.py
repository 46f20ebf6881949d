"""Small chat templates, one for each kind of what real ones put around a response. All are our own."""

from dense_reward.engines.tokenizer import TransformersTokenizer
from dense_reward.text.encode import Encoder
from dense_reward.text.template import TemplateChoices
from dense_reward.text.tokenizer import Tokenizer
from tiny_tokenizers import CHATML, chatml

_USER = "<|im_start|>user\n{{ m.content }}<|im_end|>\n"
_HEADER = "<|im_start|>assistant\n"


def _template(assistant: str, prompt: str, user: str = _USER, before: str = "") -> str:
    return (
        before
        + "{% for m in messages %}{% if m.role == 'user' %}"
        + user
        + "{% elif m.role == 'assistant' %}"
        + assistant
        + "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}" + prompt + "{% endif %}"
    )


_THINKS = "{% if not loop.last and '</think>' in m.content %}{{ m.content.split('</think>')[-1] }}{% else %}"
KINDS = {
    "plain ChatML": CHATML,
    "an empty thought": _template(
        _HEADER + "<think>\n{{ m.reasoning_content or '' }}\n</think>\n{{ m.content }}<|im_end|>\n",
        _HEADER + "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n{% endif %}",
    ),
    "an opened thought": _template(_HEADER + "{{ m.content }}<|im_end|>\n", _HEADER + "<think>\n"),
    "a channel": _template(_HEADER + "<|channel|>final<|text|>{{ m.content }}<|im_end|>\n", _HEADER),
    "earlier thoughts dropped": _template(_HEADER + _THINKS + "{{ m.content }}{% endif %}<|im_end|>\n", _HEADER),
    "a blank of difference": _template("<|im_start|>assistant: {{ m.content }}<|im_end|>\n", "<|im_start|>assistant:"),
    "no end of turn": _template(
        "<|im_start|>assistant\n{{ m.content }}", _HEADER, user="<|im_start|>user\n{{ m.content }}\n"
    ),
    "two ends": _template(_HEADER + "{{ m.content }}<|stop|><|im_end|>\n", _HEADER),
    "the date": _template(
        _HEADER + "{{ m.content }}<|im_end|>\n",
        _HEADER,
        before="<|im_start|>system\nToday is {{ strftime_now('%d %b %Y') }}.<|im_end|>\n",
    ),
    "parts alone": _template(
        _HEADER + "{% for p in m.content %}{{ p.text }}{% endfor %}<|im_end|>\n",
        _HEADER,
        user="<|im_start|>user\n{% for p in m.content %}{{ p.text }}{% endfor %}<|im_end|>\n",
    ),
    "no system": "{% for m in messages %}{% if m.role in ('user', 'assistant') %}<|im_start|>{{ m.role }}\n"
    "{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}" + _HEADER + "{% endif %}",
}
"""Name of the kind -> template."""
AGREE = ("plain ChatML", "earlier thoughts dropped", "the date", "parts alone", "two ends", "no system")
DIFFER = ("an empty thought", "an opened thought", "a channel", "a blank of difference")


def tokenizer_of(kind: str, eos: str = "<|im_end|>") -> TransformersTokenizer:
    return chatml(KINDS[kind], eos, ("<|channel|>", "<|text|>", "<|stop|>"))


def decided(tokenizer: Tokenizer) -> Encoder:
    """An encoder whose responses follow the generation prompt, whatever the template's own rendering is."""
    return Encoder.of(tokenizer, "chat", TemplateChoices(response_prefix=""))
