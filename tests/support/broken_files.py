"""Folders whose files are no checkpoint's, and the words of each refusal; each changes a healthy tiny Llama.

damaged_checkpoints has the damage of weights and configurations that programs make; here is what disks, copies and
editors make of files: links, pipes, folders, deep or huge JSON, tokenizers and templates that are broken.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from damaged_checkpoints import Change, Damage, both, config, content, removed, weights
from safetensors.torch import load_file
from tiny_models import CHAT

WEIGHTS, DEEP = "model.safetensors", "[" * 100_000
NORM = "model.norm.weight"


def replaced(name: str, make: Callable[[Path], object]) -> Change:
    """Remove a file, and put something else under its name."""

    def apply(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return apply


def linked(name: str, target: str) -> Change:
    return replaced(name, lambda path: path.symlink_to(target))


def header(change: Callable[[dict[str, dict[str, object]]], object]) -> Change:
    """Change the header of the weights, and not their bytes."""

    def apply(folder: Path) -> None:
        whole = (folder / WEIGHTS).read_bytes()
        end = 8 + int.from_bytes(whole[:8], "little")
        entries = json.loads(whole[8:end])
        change(entries)
        text = json.dumps(entries).encode()
        (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + whole[end:])

    return apply


def header_text(text: bytes) -> Change:
    return content(WEIGHTS, len(text).to_bytes(8, "little") + text)


def edited(file: str, change: Callable[[dict[str, dict[str, object]]], object]) -> Change:
    """Change a JSON object."""

    def apply(folder: Path) -> None:
        entries = json.loads((folder / file).read_text())
        change(entries)
        (folder / file).write_text(json.dumps(entries))

    return apply


def template(text: str) -> Change:
    return content("chat_template.jinja", text)


def _as_ints(old: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.to(torch.int32) for name, tensor in old.items()}


def _pickled(folder: Path) -> None:
    saved = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
    torch.save(saved, folder / "saved")
    (folder / "saved").replace(folder / WEIGHTS)


def _vocabulary(tokenizer: dict[str, dict[str, object]], *, ids: int) -> None:
    old = tokenizer["model"]["vocab"]
    assert isinstance(old, dict)
    tokenizer["model"]["vocab"] = {token: i for token, i in old.items() if i < ids}


def _huge_id(tokenizer: dict[str, dict[str, object]]) -> None:
    old = tokenizer["model"]["vocab"]
    assert isinstance(old, dict)
    old["zz"] = 1 << 31


NOTHING_THERE = "is a link to a file that is not there: copy the file itself"
BROKEN: Mapping[str, Damage] = {
    "weights linked to nothing": Damage(linked(WEIGHTS, "gone"), NOTHING_THERE),
    "weights linked to themselves": Damage(linked(WEIGHTS, WEIGHTS), NOTHING_THERE),
    "configuration linked to nothing": Damage(linked("config.json", "gone"), NOTHING_THERE),
    "another file linked to nothing": Damage(linked("extra.json", "gone"), NOTHING_THERE),
    "a folder for weights": Damage(replaced(WEIGHTS, Path.mkdir), "but is a folder"),
    "a folder for the configuration": Damage(replaced("config.json", Path.mkdir), "but is a folder"),
    "a folder for the tokenizer": Damage(replaced("tokenizer.json", Path.mkdir), "but is a folder"),
    "a folder for the template": Damage(replaced("chat_template.jinja", Path.mkdir), "but is a folder"),
    "a folder for the index": Damage(replaced("model.safetensors.index.json", Path.mkdir), "but is a folder"),
    "a folder for the manifest": Damage(replaced("manifest.json", Path.mkdir), "manifest.json cannot be written"),
    "a pipe": Damage(replaced("config.json", os.mkfifo), "but is no ordinary file"),
    "pickled weights under another name": Damage(_pickled, "is cut off, or is not a safetensors file"),
    "a deep header": Damage(header_text(DEEP.encode()), "its header is broken"),
    "a header that is a list": Damage(header_text(b"[]"), "its header is broken"),
    "a header without tensors": Damage(header_text(b"{}"), "21 weights of the model missing from its files"),
    "a header longer than the file": Damage(
        content(WEIGHTS, b"\xff" * 8 + b"{}"), "is cut off, or is not a safetensors"
    ),
    "a header with another dtype": Damage(header(lambda old: old[NORM].update(dtype="I8")), "invalid shape, data type"),
    "a header with an unknown dtype": Damage(header(lambda old: old[NORM].update(dtype="F1")), "cannot load it"),
    "a header with a negative shape": Damage(header(lambda old: old[NORM].update(shape=[-16])), "expected usize"),
    "overlapping tensors": Damage(
        header(lambda old: old[NORM].update(data_offsets=old["lm_head.weight"]["data_offsets"])),
        "cut off or overwritten",
    ),
    "integers for floats, by the header": Damage(
        header(lambda old: old[NORM].update(dtype="I32")), r"1 weight not stored as floats \(model.norm.weight I32\)"
    ),
    "integers": Damage(weights(_as_ints), "21 weights not stored as floats"),
    "bytes of FP8 without scales": Damage(
        weights(lambda old: old | {NORM: old[NORM].to(torch.float8_e4m3fn)}), "norm.weight F8_E4M3.*are quantised"
    ),
    "a weight without dimensions": Damage(weights(lambda old: old | {NORM: torch.tensor(1.0)}), "another shape"),
    "a deep configuration": Damage(content("config.json", DEEP), "config.json is not JSON"),
    "a configuration in UTF-16": Damage(
        lambda f: (f / "config.json").write_text((f / "config.json").read_text(), "utf-16"), "no usable config.json"
    ),
    "a model_type that computes otherwise": Damage(
        config(model_type="gemma"),
        "contradicts itself: model_type is 'gemma', but architectures names LlamaForCausalLM",
    ),
    "no vocabulary": Damage(config(vocab_size=0), "states vocab_size 0, which no model has"),
    "no positions": Damage(config(max_position_embeddings=0), "states max_position_embeddings 0"),
    "too many layers": Damage(config(num_hidden_layers=10**9), "states num_hidden_layers 1000000000"),
    "padding beyond the vocabulary": Damage(config(pad_token_id=99_999), "Padding_idx must be within"),
    "a text_config of another model": Damage(config(text_config={"hidden_size": 3}), "has a text_config of another"),
    "a dtype that is none": Damage(config(dtype="int8"), "cannot be served in dtype 'int8': choose one of bfloat16"),
    "an activation that is none": Damage(config(hidden_act="nope"), "transformers cannot load it .'nope'"),
    "a deep tokenizer": Damage(content("tokenizer.json", DEEP), "tokenizer.json is not JSON"),
    "a tokenizer without merges": Damage(
        edited("tokenizer.json", lambda old: old["model"].pop("merges")), "no usable tokenizer .Missing vocab/merges"
    ),
    "a tokenizer of another type": Damage(
        edited("tokenizer.json", lambda old: old["model"].update(type="Nope")), "no usable tokenizer"
    ),
    "a tokenizer without half of its bytes": Damage(
        edited("tokenizer.json", lambda old: _vocabulary(old, ids=128)), "but gives none for ' '"
    ),
    "a tokenizer without its pre-tokenizer": Damage(
        edited("tokenizer.json", lambda old: old.update(pre_tokenizer=None)),  # type: ignore[call-overload]
        "but gives none for ' '",
    ),
    "an id of 2^31": Damage(edited("tokenizer.json", _huge_id), "has the id 2147483648, beyond any vocabulary"),
    "a tokenizer of code": Damage(
        lambda f: (f / "tokenizer_config.json").write_text(
            json.dumps({"auto_map": {"AutoTokenizer": ["x.T", None]}, "tokenizer_class": "X"})
        ),
        "contains custom code",
    ),
    "an EOS that is a number": Damage(
        edited("tokenizer_config.json", lambda old: old.update(eos_token=5)),  # type: ignore[call-overload]
        "no usable tokenizer",
    ),
    "a template in UTF-16": Damage(content("chat_template.jinja", CHAT.encode("utf-16")), "no usable tokenizer"),
    "an unknown filter": Damage(template("{{ 1 | nope }}" + CHAT), "No filter named 'nope'.*correct the template"),
    "a template that includes another": Damage(template("{% include 'x' %}" + CHAT), "no loader"),
    "a template without end": Damage(
        template("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}" + CHAT),
        "not finished after",
    ),
    "a template that calls itself": Damage(
        template("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}"), "maximum recursion depth"
    ),
    "a deep template": Damage(template("{{ " + "(" * 5_000 + "1" + ")" * 5_000 + " }}"), "maximum recursion depth"),
    "a template that writes too much": Damage(template("{{ 'x' * 2000000 }}" + CHAT), "more than 1000000"),
    "a template that draws words": Damage(
        template("{{ range(99999) | random }}" + CHAT), "renders one chat in different ways"
    ),
    "a template that is a number": Damage(
        both(removed("*.jinja"), edited("tokenizer_config.json", lambda old: old.update(chat_template=7))),  # type: ignore[call-overload]
        "correct the template",
    ),
    "an end of turn that is no id": Damage(
        content("generation_config.json", '{"eos_token_id": "</s>"}'), "eos_token_id is '</s>', not an id"
    ),
    "a deep generation_config": Damage(content("generation_config.json", DEEP), "generation_config.json is not JSON"),
    "generation that no model can do": Damage(
        content("generation_config.json", '{"max_new_tokens": -1}'), "must be greater than 0"
    ),
}
