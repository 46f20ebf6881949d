"""Ways in which checkpoints are damaged in practice, and healthy ones that look odd; each changes a tiny checkpoint.

Damage that adoption, loading and training must refuse, with the words of the cure that each must name.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny_configs import VOCABULARY
from tiny_models import CHAT, ENLARGED, tiny_model, write_tokenizer
from transformers import (
    AutoModel,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

Tensors = dict[str, torch.Tensor]
Change = Callable[[Path], object]
LFS_POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 548118077\n"
SIZES: Mapping[str, int] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
_IDS = {"bos_token_id": None, "eos_token_id": 256, "pad_token_id": 257}


@dataclass(frozen=True, slots=True)
class Damage:
    """A change of a healthy checkpoint, and a regular expression of what the refusal must say."""

    change: Change
    says: str


def tiny_llama(seed: int = 0, **options: object) -> PreTrainedModel:
    return _enlarged(LlamaForCausalLM, LlamaConfig(**SIZES, **_IDS, **options), seed)


def tiny_qwen(seed: int = 0, **options: object) -> PreTrainedModel:
    """With biases in its attention, and with the embedding as its output layer."""
    return _enlarged(Qwen2ForCausalLM, Qwen2Config(**SIZES, **_IDS, tie_word_embeddings=True, **options), seed)


def tiny_gpt2(seed: int = 0) -> PreTrainedModel:
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=256, **_IDS)
    return _enlarged(GPT2LMHeadModel, config, seed)


def tiny_gemma3(seed: int = 0) -> PreTrainedModel:
    """The multimodal form, with a vision tower that text does not use."""
    text = {**SIZES, **_IDS, "head_dim": 8, "query_pre_attn_scalar": 8}
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    torch.manual_seed(seed)
    return Gemma3ForConditionalGeneration(config).eval()


def write_model(folder: Path, model: PreTrainedModel) -> Path:
    """A checkpoint as any training program writes it, in float32 and without a manifest."""
    model.save_pretrained(folder)
    write_tokenizer(folder, template=CHAT)
    return folder


def _enlarged(kind: type[PreTrainedModel], config: object, seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(ENLARGED) if parameter.ndim > 1 else parameter.add_(torch.rand_like(parameter))
    return model


def weights(change: Callable[[Tensors], Tensors], file: str = "model.safetensors") -> Change:
    """Replace the weights of a file."""

    def apply(folder: Path) -> None:
        changed = {name: tensor.contiguous().clone() for name, tensor in change(load_file(folder / file)).items()}
        save_file(changed, folder / file, metadata={"format": "pt"})

    return apply


def renamed(rename: Callable[[str], str | None], file: str = "model.safetensors") -> Change:
    """Rename weights, and remove those whose new name is None."""
    return weights(lambda old: {new: tensor for name, tensor in old.items() if (new := rename(name))}, file)


def without(part: str) -> Change:
    return renamed(lambda name: None if part in name else name)


def content(name: str, text: str | bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())


def removed(*patterns: str) -> Change:
    def apply(folder: Path) -> None:
        for path in [path for pattern in patterns for path in folder.glob(pattern)]:
            path.unlink()

    return apply


def config(**entries: object) -> Change:
    """Change entries of config.json; None removes one."""

    def apply(folder: Path) -> None:
        changed = json.loads((folder / "config.json").read_text()) | entries
        kept = {name: value for name, value in changed.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(kept))

    return apply


def cut(file: str, end: int) -> Change:
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:end])


def both(*changes: Change) -> Change:
    def apply(folder: Path) -> None:
        for change in changes:
            change(folder)

    return apply


def shards(folder: Path) -> None:
    """Split the weights into shards with an index."""
    model = LlamaForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="8KB")


def _reward_model(folder: Path) -> None:
    read = LlamaConfig.from_pretrained(folder)
    read.num_labels = 1
    LlamaForSequenceClassification(read).save_pretrained(folder)


def _backbone(folder: Path) -> None:
    AutoModel.from_pretrained(folder).save_pretrained(folder)


def _first_shard(folder: Path) -> Path:
    return min(folder.glob("model-*.safetensors"))


def _shard_of_another(folder: Path) -> None:
    shards(folder)
    first, *_, last = sorted(folder.glob("model-*.safetensors"))
    first.write_bytes(last.read_bytes())


def _one_value(name: str, row: int, value: float) -> Change:
    def change(old: Tensors) -> Tensors:
        old[name][row, 0] = value
        return old

    return weights(change)


def _third_layer(old: Tensors) -> Tensors:
    third = {name.replace("layers.1", "layers.2"): tensor for name, tensor in old.items() if "layers.1" in name}
    return old | third


def _rows(rows: int) -> Change:
    return weights(lambda old: {n: t[:rows] if "embed" in n or "lm_head" in n else t for n, t in old.items()})


def _stale_weights(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    shards(folder)
    (folder / "model.safetensors").write_bytes(whole)


BIAS = "model.layers.0.self_attn.q_proj.bias"
DAMAGED: Mapping[str, Damage] = {
    "compiled": Damage(renamed("_orig_mod.{}".format), "torch.compile put '_orig_mod.' into them: strip it"),
    "compiled inside": Damage(
        renamed(lambda name: name.replace("model.", "model._orig_mod.")), "torch.compile put '_orig_mod.' into them"
    ),
    "data parallel": Damage(renamed("module.{}".format), "put 'module.' into them: strip it"),
    "another prefix": Damage(renamed("policy.{}".format), "the files put 'policy.' before the names: strip it"),
    "no output layer": Damage(without("lm_head"), "save the causal language model"),
    "backbone": Damage(_backbone, r"backbone was saved \(AutoModel\), without its output layer: save the causal"),
    "reward model": Damage(_reward_model, "a reward, value or classification model"),
    "value head": Damage(
        weights(lambda old: old | {"v_head.summary.weight": torch.zeros(1, 16)}), "a reward, value or classification"
    ),
    "no final norm": Damage(
        without("model.norm"), r"1 weight of the model missing from its files \(model.norm.weight\)"
    ),
    "no layer norms": Damage(without("layernorm"), "4 weights of the model missing from its files"),
    "one matrix missing": Damage(without("1.mlp.down_proj"), r"\(model.layers.1.mlp.down_proj.weight\): copy config"),
    "fewer layers in the files": Damage(without("layers.1."), "states 2 layers, but the files hold 1: copy both"),
    "fewer layers in the configuration": Damage(
        config(num_hidden_layers=1), "states 1 layers, but the files hold more"
    ),
    "more layers in the files": Damage(weights(_third_layer), "states 2 layers, but the files hold more"),
    "biases not in the files": Damage(config(attention_bias=True), "with these biases .* but the files lack them"),
    "biases not in the configuration": Damage(
        weights(lambda old: old | {BIAS: torch.ones(16)}), "without these biases .* but the files have them"
    ),
    "resized vocabulary": Damage(_rows(200), r"with another shape .* the vocabulary was resized"),
    "another configuration": Damage(config(intermediate_size=32), r"\[24, 16\] instead of \[32, 16\]"),
    "adapter inside": Damage(
        weights(lambda old: old | {"model.layers.0.self_attn.q_proj.lora_A.default.weight": torch.ones(2, 16)}),
        "an adapter was saved inside the model: merge it first",
    ),
    "NaN": Damage(_one_value("model.embed_tokens.weight", 3, float("nan")), r"hold NaN or infinity \(model.embed"),
    "infinity": Damage(_one_value("lm_head.weight", 7, float("inf")), r"hold NaN or infinity \(lm_head.weight\)"),
    "pointer for weights": Damage(content("model.safetensors", LFS_POINTER), "a git-lfs pointer, .* `git lfs pull`"),
    "pointer for the tokenizer": Damage(content("tokenizer.json", LFS_POINTER), "tokenizer.json is a git-lfs pointer"),
    "pointer for the configuration": Damage(content("config.json", LFS_POINTER), "config.json is a git-lfs pointer"),
    "empty weights": Damage(content("model.safetensors", b""), r"is empty \(0 bytes\): copy or download"),
    "cut weights": Damage(cut("model.safetensors", -500), "it is cut off or overwritten, so copy"),
    "cut header": Damage(cut("model.safetensors", 100), "is cut off, or is not a safetensors file"),
    "no safetensors": Damage(content("model.safetensors", b"PK" * 400), "is cut off, or is not a safetensors file"),
    "a page instead of weights": Damage(content("model.safetensors", "<html>" * 99), "not a safetensors file"),
    "missing shard": Damage(both(shards, lambda f: _first_shard(f).unlink()), "is missing, but .* names it: copy"),
    "shard of another split": Damage(_shard_of_another, "the shard is of another model or was split differently"),
    "shard not in the index": Damage(
        both(shards, lambda f: _first_shard(f).rename(f / "model-00009-of-00009.safetensors")),
        "is missing, but",
    ),
    "shards without an index": Damage(
        both(shards, removed("*.index.json")), "but no model.safetensors.index.json: copy"
    ),
    "weights twice": Damage(_stale_weights, "model.safetensors is not in .*: remove the one of them"),
    "broken index": Damage(both(shards, content("model.safetensors.index.json", "{}")), "has no weight_map: copy"),
    "only pickled weights": Damage(
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "only safetensors are loaded"
    ),
    "no configuration": Damage(removed("config.json"), "has no usable config.json: copy it"),
    "configuration that is no JSON": Damage(content("config.json", "{'a': 1}"), r"config.json is not JSON .*: copy"),
    "configuration that is a list": Damage(content("config.json", "[]"), "config.json is not a JSON object: copy"),
    "no model_type": Damage(config(model_type=None), "has no model_type, .*: copy config.json again"),
    "unknown architecture": Damage(config(model_type="llama9"), "does not support its architecture 'llama9': correct"),
    "invalid configuration": Damage(config(num_hidden_layers="two"), "no usable config.json"),
    "encoder-decoder": Damage(config(model_type="t5", is_encoder_decoder=True), "is an encoder-decoder model"),
    "encoder": Damage(config(model_type="bert"), r"is an encoder \(bert with is_decoder false\)"),
    "vision-language model": Damage(
        config(model_type="llava", vision_config={}, text_config={"model_type": "llama"}),
        "is a multimodal model without a text path",
    ),
    "GPTQ": Damage(config(quantization_config={"quant_method": "gptq", "bits": 4}), r"is quantised \(gptq\)"),
    "AWQ": Damage(config(quantization_config={"quant_method": "awq", "bits": 4}), "use the unquantised checkpoint"),
    "bitsandbytes": Damage(
        config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}), "quantised"
    ),
    "FP8": Damage(config(quantization_config={"quant_method": "fp8"}), r"is quantised \(fp8\).* dequantise it"),
    "quantised without saying so": Damage(
        renamed(lambda name: name.replace("q_proj.weight", "q_proj.qweight")), "the weights are quantised, but"
    ),
    "no tokenizer": Damage(removed("tokenizer*", "special_tokens_map.json", "*.jinja"), "holds no tokenizer"),
    "cut tokenizer": Damage(cut("tokenizer.json", 300), "tokenizer.json is not JSON"),
    "another tokenizer.json": Damage(content("tokenizer.json", '{"version": "1.0"}'), "no usable tokenizer"),
}
"""Damage of a tiny Llama with its own output layer."""


def _as_gpt2_saves(old: Tensors) -> Tensors:
    """Names without the model's prefix, and with masks, as the oldest files have them."""
    plain = {name.removeprefix("transformer."): tensor for name, tensor in old.items()}
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 256, 256).tril() for i in range(2)}
    return plain | masks | {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}


def _rotary(old: Tensors) -> Tensors:
    names = [f"model.layers.{i}.self_attn.rotary_emb." for i in range(2)]
    caches = {name + kind: torch.ones(4) for name in names for kind in ("cos_cached", "sin_cached")}
    return old | {name + "inv_freq": torch.ones(4) for name in names} | caches


def _next_token_layer(old: Tensors) -> Tensors:
    """A layer that predicts the token after the next, with the number after the last, as DeepSeek-V3 and GLM do."""
    third = {name.replace("layers.1.", "layers.2."): tensor for name, tensor in old.items() if "layers.1." in name}
    own = {"eh_proj.weight": (32, 64), "enorm.weight": (32,), "hnorm.weight": (32,), "shared_head.norm.weight": (32,)}
    return old | third | {f"model.layers.2.{name}": torch.ones(shape) for name, shape in own.items()}


def _one_file_with_index(folder: Path) -> None:
    names = load_file(folder / "model.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


HEALTHY: Mapping[str, tuple[Callable[[], PreTrainedModel], Change]] = {
    "as saved": (tiny_llama, lambda _: None),
    "shards": (tiny_llama, shards),
    "rotary buffers of old files": (tiny_llama, weights(_rotary)),
    "biases": (lambda: tiny_llama(attention_bias=True), lambda _: None),
    "tied": (tiny_qwen, lambda _: None),
    "tied, output layer saved too": (
        tiny_qwen,
        weights(lambda old: old | {"lm_head.weight": old["model.embed_tokens.weight"]}),
    ),
    "tied, saved as a backbone": (tiny_qwen, renamed(lambda name: name.removeprefix("model."))),
    "masks of old files": (tiny_gpt2, weights(_as_gpt2_saves)),
    "multimodal": (tiny_gemma3, lambda _: None),
    "layers for several tokens at once": (
        lambda: tiny_model("qwen3-next", dtype=torch.float32),
        weights(lambda old: old | {"mtp.fc.weight": torch.ones(3, 3)}),
    ),
    "layers for several tokens at once, numbered": (
        lambda: tiny_model("deepseek-v3", dtype=torch.float32),
        weights(_next_token_layer),
    ),
    "one file with an index": (tiny_llama, _one_file_with_index),
    "without metadata": (
        tiny_llama,
        lambda f: save_file(
            {n: t.clone() for n, t in load_file(f / "model.safetensors").items()}, f / "model.safetensors"
        ),
    ),
    "another format beside": (tiny_llama, lambda f: (f / "pytorch_model.bin").write_bytes(b"PK")),
    "the original format beside": (
        tiny_llama,
        lambda f: save_file({"layers.0.w": torch.ones(1)}, f / "consolidated.safetensors"),
    ),
}
"""Checkpoints that must keep loading, although they are not as a current transformers saves them."""
