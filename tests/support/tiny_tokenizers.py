"""Tokenizers of the families in use, trained in memory on a few sentences, and texts whose characters span tokens.

Needs no files and no network. Each tokenizer is trained once per process.
"""

import json
from collections.abc import Callable, Sequence
from functools import cache

from dense_reward.engines.fake import FakeTokenizer
from dense_reward.engines.tokenizer import TransformersTokenizer
from dense_reward.text.tokenizer import Tokenizer
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

SENTENCES = (
    "Hello world! The quick brown fox jumps over the lazy dog.",
    "12 + 34 = 46, carry 0; 7 * 8 = 56\n\n#### 56",
    "naïve café, Привет мир, 数学の問題を解く。",
    "user assistant system model\nuser\nassistant\nmodel\n\n\nHello\n\n\nHello\n\n\nHello",
    "👩‍🔬🚀 🚀🚀 ééé",
) * 3

# A line break is a separate word, whatever follows it.
LLAMA_3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHATML = (
    "{% if tools %}<|im_start|>system\nTools: {{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_LIKE = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n"
    "{{ message.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA_LIKE = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>"
    "{{ 'model' if message.role == 'assistant' else message.role }}\n{{ message.content }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL_LIKE = (
    "{% for message in messages %}{% if message.role == 'user' %}[INST] {{ message.content }} [/INST]"
    "{% else %} {{ message.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
NOTHING_AFTER = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
# Like Qwen3: the thoughts of earlier turns are dropped once the conversation continues.
FORGETS_THOUGHTS = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content if loop.last else message.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Emoji joined by ZWJ, flags, combining marks, CJK, Hangul, ligatures, odd spaces, and strings of special tokens.
FRAGMENTS = (
    *("👩‍🔬", "🏳️‍🌈", "🇺🇦", "👍🏽", "e\u0301", "ä\u0323\u0308", "数学", "안녕", "ﬁ", "﷽", "\u200b", "\u2028", "\r\n"),
    *("\n\n", "  ", "\t", "\x00", "\x7f", "Hello world!", " the", "12", "<|im_end|>", "</s>", "<eos>", "<0x41>", "▁"),
)
TEXTS = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=5), max_size=8).map("".join)


@cache
def chatml(
    template: str | None = CHATML, eos: str | None = "<|endoftext|>", more_specials: tuple[str, ...] = ()
) -> TransformersTokenizer:
    """The family of GPT-2 and Qwen: byte-level BPE that adds no BOS. Its EOS is not the token that ends a turn."""
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend = _byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>", *more_specials], words)
    return _wrapped(backend, template, additional_special_tokens=["<|im_start|>", "<|im_end|>"], eos_token=eos)


@cache
def llama_like() -> TransformersTokenizer:
    """The family of Llama 3: byte-level BPE. Its post-processor adds BOS; its template writes BOS and trims."""
    specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    words = pre_tokenizers.Split(Regex(LLAMA_3_WORDS), "isolated")
    backend = _byte_level(
        specials, pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    )
    backend.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=True), _adds_bos(backend, "<|begin_of_text|>")]
    )
    return _wrapped(backend, LLAMA_LIKE, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>")


@cache
def gemma_like() -> TransformersTokenizer:
    """SentencePiece BPE that adds BOS, puts a space before the text, and falls back to bytes for unknown characters."""
    specials = ["<unk>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"]
    backend = Backend(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    _train(backend, special_tokens=specials + byte_tokens, limit_alphabet=40)
    backend = _without_added(backend, byte_tokens)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = _adds_bos(backend, "<bos>")
    return _wrapped(backend, GEMMA_LIKE, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")


@cache
def unigram() -> TransformersTokenizer:
    """SentencePiece Unigram. Its special tokens are ordinary pieces of its vocabulary; unknown characters are <unk>."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("▁", -3.0)]
    pieces += [(character, -6.0) for character in sorted({c for text in SENTENCES[:2] for c in text if c != "\n"})]
    pieces += [("▁Hello", -4.0), ("▁the", -4.0), ("ell", -5.0), ("user", -5.0), ("▁world", -4.5)]
    backend = Backend(models.Unigram(pieces, 0))
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return _wrapped(backend, MISTRAL_LIKE, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


FAMILIES: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": chatml,
    "byte-level that adds BOS": llama_like,
    "SentencePiece BPE": gemma_like,
    "SentencePiece Unigram": unigram,
    "fake": FakeTokenizer,
}


def made(family: str) -> Tokenizer:
    """The tokenizer of a family."""
    return FAMILIES[family]()


def names(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Each id as a string: special tokens by their names, others by their text."""
    return tokenizer.pieces([int(i) for i in ids])


def controls(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """The special tokens among the ids, without <unk>."""
    specials = [int(i) for i in ids if int(i) in tokenizer.special_ids]
    return [name for name in tokenizer.pieces(specials) if name != "<unk>"]


def _byte_level(specials: Sequence[str], words: pre_tokenizers.PreTokenizer) -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = words
    backend.decoder = decoders.ByteLevel()
    _train(backend, special_tokens=list(specials), initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    return backend


def _train(
    backend: Backend, special_tokens: list[str], initial_alphabet: Sequence[str] = (), limit_alphabet: int = 1_000
) -> None:
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        special_tokens=special_tokens,
        initial_alphabet=initial_alphabet,
        limit_alphabet=limit_alphabet,
    )
    backend.train_from_iterator(SENTENCES, trainer)


def _without_added(backend: Backend, tokens: Sequence[str]) -> Backend:
    """The tokenizer without these added tokens, which would be matched in text; they stay in the model's vocabulary."""
    description = json.loads(backend.to_str())
    description["added_tokens"] = [t for t in description["added_tokens"] if t["content"] not in tokens]
    return Backend.from_str(json.dumps(description))


def _adds_bos(backend: Backend, bos: str) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))])


def _wrapped(backend: Backend, template: str | None, **specials: str | list[str] | None) -> TransformersTokenizer:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **specials)
    tokenizer.chat_template = template
    return TransformersTokenizer(tokenizer)
