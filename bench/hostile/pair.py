"""A pair for attacks: a tiny random model with a chat template, a BPE tokenizer and a context of 32,768 tokens.

A long context lets more through: texts of megabytes are tokenised, and chats of hundreds of turns are rendered. The
model computes next to nothing: every caller waits for the batch that is being computed, and that is not measured here.
"""

from pathlib import Path

import torch
from dense_reward.checkpoints.adopt import adopt
from dense_reward.manifest import Role
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

FOLDER = Path("runs/hostile")
CONTEXT_TOKENS, VOCABULARY = 32_768, 4_096
SPECIAL = ("<|end|>", "<|start|>")
# The core of several well-known templates: a message of a role that it does not know is not written.
TEMPLATE = """\
{% if tools %}<|start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|end|>
{% endif %}{% for message in messages %}{% if message.role in ('system', 'user', 'assistant', 'tool') %}<|start|>\
{{ message.role }}
{{ message.content }}{% for call in message.tool_calls or () %}<call>{{ call.function.name }}
{{ call.function.arguments | tojson }}</call>{% endfor %}<|end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|start|>assistant
{% endif %}"""


def options_of_pair() -> list[str]:
    """The service's options for the pair; all others have their defaults."""
    sft, reference = hostile_pair()
    return ["--sft", str(sft), "--reference", str(reference), "--allow-unrelated"]


def hostile_pair() -> tuple[Path, Path]:
    """The folders of sft and reference, built if they are not there."""
    folders = FOLDER / "sft", FOLDER / "reference"
    for seed, folder in enumerate(folders):
        if not (folder / "manifest.json").exists():
            _build(folder, seed)
    return folders


def _build(folder: Path, seed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    _tokenizer().save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=CONTEXT_TOKENS,
        eos_token_id=0,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    role: Role = "reference" if seed else "sft"
    adopt(str(folder), role=role, run_id="hostile", renderer="chat", report=lambda _: None)


def _tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, learnt from this project's own documents."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    backend.train([str(file) for file in sorted(Path("docs").rglob("*.md"))], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=SPECIAL[0], additional_special_tokens=[SPECIAL[1]], chat_template=TEMPLATE
    )
