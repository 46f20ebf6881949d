"""A small pair, an adapter and its base, and changes of their files from which hostile checkpoints are made."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import torch
from dense_reward.checkpoints.adopt import adopt
from dense_reward.hashed_files import MANIFEST_NAME, hash_files
from dense_reward.manifest import Role, sha256_of_text
from peft import LoraConfig
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Change = Callable[[Path], object]
Json = dict[str, object]
TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message.role }}\n{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
CONFIG, INDEX, WEIGHTS, TOKENIZER = "config.json", "model.safetensors.index.json", "model.safetensors", "tokenizer.json"
VOCABULARY, CONTEXT_TOKENS = 320, 256


def write_parts(root: Path) -> None:
    """Write sft, reference, base, and an adapter on base; all but base have manifests, which belong to one run."""
    for seed, name in enumerate(("sft", "reference", "base")):
        _write_model(root / name, seed)
    _write_adapter(root / "adapter", (root / "base").resolve())
    for name in ("sft", "reference", "adapter"):
        role: Role = "reference" if name == "reference" else "sft"
        adopt(str(root / name), role=role, run_id="hostile", renderer="chat", dtype="float32")


def _model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT_TOKENS,
        eos_token_id=VOCABULARY - 1,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


def _write_model(folder: Path, seed: int) -> None:
    _model(seed).save_pretrained(folder)
    _tokenizer().save_pretrained(folder)


def _write_adapter(folder: Path, base: Path) -> None:
    LoraConfig(r=4, target_modules=["q_proj"], base_model_name_or_path=str(base)).save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    torch.manual_seed(3)
    places = [f"base_model.model.model.layers.{layer}.self_attn.q_proj" for layer in range(2)]
    shapes = {"lora_A": (4, 32), "lora_B": (32, 4)}
    weights = {f"{place}.{name}.weight": torch.randn(shape) for place in places for name, shape in shapes.items()}
    save_file(weights, folder / "adapter_model.safetensors")


def _tokenizer() -> PreTrainedTokenizerFast:
    """A token for every byte, and two special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={piece: at for at, piece in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|end|>",
        additional_special_tokens=["<|start|>"],
        chat_template=TEMPLATE,
    )


def copied(source: Path, folder: Path) -> Path:
    """A copy that a change can break; the base of an adapter is found where it was."""
    shutil.copytree(source, folder)
    if (folder / "adapter_config.json").is_file():
        change_json(folder / MANIFEST_NAME, adapter_base=str((source.parent / "base").resolve()))
    return folder


def rehash(folder: Path) -> None:
    """State the present hashes in the manifest, as a writer of it would: only then is more than a hash looked at."""
    change_json(folder / MANIFEST_NAME, files=hash_files(folder))


def change_json(path: Path, **entries: object) -> None:
    """Change entries of a JSON object; None removes one."""
    changed = {**json.loads(path.read_text()), **entries}
    path.write_text(json.dumps({name: value for name, value in changed.items() if value is not None}))


def entries(name: str, **changed: object) -> Change:
    return lambda folder: change_json(folder / name, **changed)


def content(name: str, text: str | bytes) -> Change:
    def apply(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())

    return apply


def template(text: str) -> Change:
    """The chat template, and its hash in the manifest."""
    return all_of(
        content("chat_template.jinja", text), entries(MANIFEST_NAME, template_sha256=sha256_of_text(f"chat\n{text}"))
    )


def outside(name: str) -> Change:
    """Move a file out of the folder of checkpoints, and link to it."""

    def apply(folder: Path) -> None:
        target = outside_of(folder) / f"{folder.parent.name}-{folder.name}-{name}"
        shutil.move(folder / name, target)
        (folder / name).symlink_to(target)

    return apply


def outside_of(folder: Path) -> Path:
    """A folder beside the one in which all checkpoints must be."""
    found = folder.parent.parent.parent.with_name("outside")
    found.mkdir(exist_ok=True)
    return found


def link(name: str, target: str) -> Change:
    def apply(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return apply


def pipe(name: str) -> Change:
    def apply(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return apply


def removed(*names: str) -> Change:
    def apply(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return apply


def all_of(*changes: Change) -> Change:
    return lambda folder: [change(folder) for change in changes]


def shard_at(place: Callable[[Path], str]) -> Change:
    """An index that names one file of weights at a place, where they are moved to."""

    def apply(folder: Path) -> None:
        with (folder / WEIGHTS).open("rb") as file:
            names = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        name = place(folder)
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.move(folder / WEIGHTS, folder / name)
        weight_map = dict.fromkeys(set(names) - {"__metadata__"}, name)
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    return apply


def hole(name: str, size: int, header: bytes = b"") -> Change:
    """A file that takes no space: its first bytes, and then nothing."""

    def apply(folder: Path) -> None:
        with (folder / name).open("wb") as file:
            file.write(header)
            file.truncate(size)

    return apply


def safetensors_header(**tensors: tuple[str, list[int], int]) -> bytes:
    """The start of a file with tensors: dtype, shape, bytes."""
    described: Json = {}
    at = 0
    for name, (dtype, shape, size) in tensors.items():
        described[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(described).encode()
    return struct.pack("<Q", len(text)) + text


def probe(prompt: list[int], response: list[int], copies: int = 1) -> Change:
    """A probe of one prompt and copies of a response; right log-probs are not needed to be refused."""

    def apply(folder: Path) -> None:
        logprob = -1.0 if folder.name == "sft" else -2.0
        one = {"ids": response, "logprobs": [logprob] * len(response)}
        change_json(folder / MANIFEST_NAME, probe=[{"prompt_ids": prompt, "responses": [one] * copies}])

    return apply
