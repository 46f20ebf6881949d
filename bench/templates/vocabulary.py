"""A tokenizer for a chat template: a small vocabulary of our own, with the special tokens that the template writes."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from jinja2 import TemplateError
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

WORDS = (
    "Hello world! What is the capital of Norway? It is Oslo, a city of rivers.",
    "12 + 34 = 46, carry 0; the weather in Oslo is 4 degrees.\n\n\n",
    "user assistant system model tool user\nassistant\nmodel\n\nHello\n\n\nHello",
) * 3
SPECIAL = re.compile(
    r"<\|[^|<>\s][^|<>\n]{0,40}?\|>|<｜[^｜<>]+｜>|<\|(?:turn|channel|tool|tool_call|tool_response|think|\")>"
    r"|<(?:turn|channel|tool|tool_call|tool_response)\|>|<(?:start|end)_of_[a-z_]+>|<escape>|\]~!?b\[?\]?|\[e~\["
    r"|<seed:[a-z_:]+>|<SPECIAL_\d+>|<(?:bos|eos|BOS_TOKEN)>|</?s>|\[gMASK\]|<sop>|<end_of_utterance>|<sep>"
)
# A line break is not joined with the word after it, and a space is: as in the vocabularies of Llama 3, Qwen and GPT-4.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BRACKETED = re.compile(
    r"\[/?(?:INST|SYSTEM_PROMPT|THINK|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|MODEL_SETTINGS|ARGS)\]"
)


@dataclass(frozen=True, slots=True)
class Family:
    """Tokens of the models that a template is for. `mark`: a string that their templates alone have.

    `stops`: what their generation_config.json names. `ends`: what ends a turn, if the template does not say.
    `spaced`: SentencePiece, which puts a space before a text; its templates have no special tokens of their own.
    """

    mark: str
    bos: str | None
    eos: str
    stops: tuple[str, ...] = ()
    ends: str | None = None
    adds_bos: bool = False
    spaced: bool = False


DEEPSEEK = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>")
# The first family whose mark a template has.
FAMILIES = (
    Family("<|return|>", "<|startoftext|>", "<|return|>", ("<|return|>", "<|endoftext|>", "<|call|>")),
    Family("[gMASK]", None, "<|endoftext|>", ("<|endoftext|>", "<|user|>", "<|observation|>"), "<|user|>"),
    Family("<｜Assistant｜>", *DEEPSEEK, adds_bos=True),
    Family("<|eot_id|>", "<|begin_of_text|>", "<|eot_id|>", adds_bos=True),
    Family("<|eot|>", "<|begin_of_text|>", "<|eot|>", adds_bos=True),
    Family("<|assistant_end|>", "<s>", "<|assistant_end|>", adds_bos=True),
    Family("<|message_sep|>", "<s>", "</s>", ("<|message_sep|>",), adds_bos=True),
    Family("</assistant>", "〈|EOS|〉", "〈|EOS|〉", ("〈|EOS|〉", "</assistant>"), "</assistant>"),
    Family("<start_of_turn>", "<bos>", "<eos>", ("<eos>", "<end_of_turn>"), adds_bos=True),
    Family("<turn|>", "<bos>", "<eos>", ("<eos>", "<turn|>"), adds_bos=True),
    Family("<|END_OF_TURN_TOKEN|>", "<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", adds_bos=True),
    Family("<|end_of_msg|>", "[BOS]", "<|end_of_msg|>"),
    Family("<end_of_sentence>", "<beginning_of_sentence>", "<end_of_sentence>"),
    Family("<|role_end|>", "<|startoftext|>", "<|role_end|>"),
    Family("<|Bot|>", "<s>", DEEPSEEK[1]),
    Family("<sep>", "<|endoftext|>", "<sep>"),
    Family("<|extra_0|>", "<|startoftext|>", "<|eos|>"),
    Family("<｜hy_", "<｜hy_begin_of_sentence:opensource｜>", "<｜hy_eos:opensource｜>"),
    Family("[e~[", "]~!b[", "[e~["),
    Family("<seed:", "<seed:bos>", "<seed:eos>"),
    Family("<SPECIAL_12>", "<s>", "<SPECIAL_12>"),
    Family("<|im_end|>", "<|startoftext|>", "<|im_end|>", ("<|im_end|>", "<|endoftext|>")),
    Family("<|end|>", "<s>", "<|endoftext|>", ("<|end|>", "<|endoftext|>")),
    Family("<|end_of_text|>", "<|end_of_text|>", "<|end_of_text|>"),
    Family("<|endoftext|>", "<|endoftext|>", "<|endoftext|>"),
    Family("[INST]", "<s>", "</s>", adds_bos=True),
    Family("", "<s>", "</s>"),
)
LLAMA_2 = Family("[INST]", "<s>", "</s>", adds_bos=True, spaced=True)


def family_of(template: str, *, spaced: bool = False) -> Family:
    """The family whose mark the template has. `spaced`: its models have the vocabulary of Llama 2."""
    return LLAMA_2 if spaced else next(family for family in FAMILIES if family.mark in template)


def tokenizer_for(template: str, family: Family) -> PreTrainedTokenizerFast:
    """The special tokens of the template, and those of the family, are tokens of the vocabulary."""
    own = {family.bos, family.eos, family.ends, *family.stops} - {None}
    written = f"{template}{_rendered(template)}"
    found = set() if family.spaced else {*SPECIAL.findall(written), *BRACKETED.findall(written)}
    backend = Backend.from_str(_spaced() if family.spaced else _byte_level())
    special = sorted({str(token) for token in own} | found)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    backend.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in _tags(template)])
    if family.adds_bos:
        bos = str(family.bos)
        pair = (bos, backend.token_to_id(bos))
        backend.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[pair])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=family.bos,
        eos_token=family.eos,
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


def _rendered(template: str) -> str:
    """A rendering of a chat: some templates compute their special tokens. Empty if the template refuses the chat."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Backend.from_str(_byte_level()), chat_template=template)
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    try:
        return str(tokenizer.apply_chat_template(chat, tokenize=False))
    except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        return ""


def _tags(template: str) -> Sequence[str]:
    """Tags that tokenizers have as tokens, but not as special ones."""
    return [tag for tag in ("<think>", "</think>", "<tool_call>", "</tool_call>") if tag in template]


@cache
def _byte_level() -> str:
    """Byte-level BPE, as most models have it."""
    backend = Backend(models.BPE())
    words = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(WORDS, trainer)
    return str(backend.to_str())


@cache
def _spaced() -> str:
    """BPE that writes a space as a character and puts one before a text, with bytes for what it has not learnt."""
    backend = Backend(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=["<unk>", *bytes_], show_progress=False)
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("▁?[^▁]+"), "isolated")  # learns words, as SentencePiece does
    backend.train_from_iterator(WORDS, trainer)
    backend.pre_tokenizer = None
    return str(backend.to_str())
