"""Hostile checkpoints: each changes a healthy one, and the service must refuse it in words, beside served pairs."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dense_reward.hashed_files import MANIFEST_NAME

from bench.hostile.checkpoint_parts import (
    CONFIG,
    CONTEXT_TOKENS,
    TOKENIZER,
    VOCABULARY,
    WEIGHTS,
    Change,
    Json,
    all_of,
    content,
    copied,
    entries,
    hole,
    link,
    outside,
    outside_of,
    pipe,
    probe,
    rehash,
    removed,
    safetensors_header,
    shard_at,
    template,
)


@dataclass(frozen=True, slots=True)
class Hostile:
    """A change of a healthy checkpoint, and a regular expression of what the refusal must say.

    `listed`: its manifest states the hashes of the changed files. `source`: the checkpoint that is changed. `both`: the
    reference is changed as well, so that they still belong together.
    """

    change: Change
    says: str
    listed: bool = True
    source: str = "sft"
    both: bool = False


def write_hostile(root: Path, name: str, folder: Path) -> tuple[Path, Path]:
    """Write a pair of the corpus into a new folder below that of all checkpoints; `root` holds the healthy ones.

    Returns sft and reference.
    """
    hostile = HOSTILE[name]
    folders = [copied(root / source, folder / source) for source in (hostile.source, "reference")]
    for each in folders if hostile.both else folders[:1]:
        hostile.change(each)
        if hostile.listed:
            rehash(each)
    return folders[0], folders[1]


def writes(text: str, says: str) -> Hostile:
    """A chat template."""
    return Hostile(template(text), says, both=True)


def adapter(says: str, **options: object) -> Hostile:
    return Hostile(entries("adapter_config.json", **options), says, source="adapter")


ADAPTER_WEIGHTS = "adapter_model.safetensors"
BACKTRACKS = r"([\w.]+)+[\w.]+([\w.]+)+!"
LOOPS = "{% for i in range(90000) %}" * 4 + "{% endfor %}" * 4
DOUBLES = "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}"
RECURS = "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}"
BRANCHES = "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}"
DEEP = "[" * 200_000
HUGE = 64 << 30
GROWS: Json = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}
ADDED: Json = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
PIECE: Json = {"SpecialToken": {"id": "<|end|>", "type_id": 0}}

HOSTILE: Mapping[str, Hostile] = {
    # files of other folders
    "an index names an absolute path": Hostile(
        shard_at(lambda folder: str(outside_of(folder) / "shard.safetensors")), "names the file /.* of another folder"
    ),
    "an index names a path upwards": Hostile(
        shard_at(lambda folder: "../../../../outside/shard.safetensors"), r"names the file \.\./.* of another folder"
    ),
    "an index names a folder below": Hostile(
        shard_at(lambda _: "shards/model.safetensors"), "names the file shards/.* of another folder: move the shard"
    ),
    "weights are a link to the outside": Hostile(outside(WEIGHTS), "is not below .*--checkpoints-folder"),
    "the tokenizer is a link to the outside": Hostile(outside(TOKENIZER), "is not below .*--checkpoints-folder"),
    "the configuration is a link to the outside and not listed": Hostile(
        all_of(outside(CONFIG), entries(MANIFEST_NAME, files={})), "is not below .*--checkpoints-folder", listed=False
    ),
    "the manifest names files outside": Hostile(
        all_of(outside_of, entries(MANIFEST_NAME, source="../../../../outside")),
        "outside is not below",
        listed=False,
    ),
    "the base of an adapter is outside": Hostile(
        all_of(outside_of, entries(MANIFEST_NAME, adapter_base="../../../../outside")),
        "outside is not below",
        source="adapter",
    ),
    "config.json names the weights": Hostile(
        entries(CONFIG, transformers_weights="shards/model.safetensors"), r"\(transformers_weights\): remove it"
    ),
    "the tokenizer's files are named in another folder": Hostile(
        entries("tokenizer_config.json", fast_tokenizer_files=["../../../../outside/tokenizer.4.0.0.json"]),
        r"names the file \.\./.* of another folder",
    ),
    "a vocabulary in another folder": Hostile(
        all_of(
            removed(TOKENIZER), content("vocab.json", "{}"), entries("tokenizer_config.json", vocab_file="/etc/x.json")
        ),
        "names the file /etc/x.json of another folder",
    ),
    # files that no hash covers
    "an unlisted configuration of generation": Hostile(
        content("generation_config.json", '{"eos_token_id": 7}'), "not match its hash|is not in manifest", listed=False
    ),
    "an unlisted chat template": Hostile(
        content("chat_template.json", '{"chat_template": "x"}'), "is not in manifest.json: remove it", listed=False
    ),
    "an unlisted template in a folder": Hostile(
        content("additional_chat_templates/tool_use.jinja", "x"), "tool_use.jinja is not in manifest.json", listed=False
    ),
    "an unlisted vocabulary": Hostile(content("added.tiktoken", "x"), "is not in manifest.json", listed=False),
    "an adapter inside a whole model": Hostile(
        content("adapter_config.json", '{"base_model_name_or_path": "/models/other"}'),
        "would add that adapter to the model",
    ),
    "only pickled weights": Hostile(
        all_of(removed(WEIGHTS), content("pytorch_model.bin", b"PK")), "only safetensors are loaded"
    ),
    "an adapter of pickled weights": Hostile(
        all_of(removed(ADAPTER_WEIGHTS), content("adapter_model.bin", b"PK")),
        "has no adapter_model.safetensors",
        source="adapter",
    ),
    "changed weights": Hostile(
        lambda folder: _flip(folder / WEIGHTS), "does not match its hash in manifest.json", listed=False
    ),
    # files that are none, or far too large
    "a pipe": Hostile(pipe("x.json"), "x.json .* no ordinary file", listed=False),
    "weights from a pipe": Hostile(pipe(WEIGHTS), "no ordinary file", listed=False),
    "a manifest from a pipe": Hostile(pipe(MANIFEST_NAME), "has no manifest.json", listed=False),
    "a tokenizer from a device": Hostile(link(TOKENIZER, "/dev/zero"), "no ordinary file|is not below", listed=False),
    "three thousand files": Hostile(
        all_of(*(content(f"{at}.md", "") for at in range(3_000))), "more than 2000 files", listed=False
    ),
    "a deep configuration": Hostile(content(CONFIG, '{"a":' + DEEP), "config.json is not JSON"),
    "a deep manifest": Hostile(content(MANIFEST_NAME, '{"files":' + DEEP), "is not a manifest", listed=False),
    "a large manifest": Hostile(
        content(MANIFEST_NAME, " " * 20_000_000), "20000000 bytes, more than 8000000", listed=False
    ),
    "a large configuration": Hostile(content(CONFIG, '{"a":"' + "x" * 20_000_000 + '"}'), "more than 4000000"),
    "a tokenizer of a gigabyte": Hostile(hole(TOKENIZER, 1 << 30), "a hole|more than 64000000", listed=False),
    "a header of exabytes": Hostile(content(WEIGHTS, b"\xff" * 7 + b"\x7f" + b"{}"), "is cut off, or is not"),
    "a header of 90 MB": Hostile(
        content(WEIGHTS, (90_000_000).to_bytes(8, "little") + b" " * 90_000_000), "is cut off, or is not"
    ),
    "weights of 64 GB that are a hole": Hostile(
        hole(
            WEIGHTS,
            HUGE + len(safetensors_header(w=("U8", [HUGE], HUGE))),
            safetensors_header(w=("U8", [HUGE], HUGE)),
        ),
        "is mostly a hole",
        listed=False,
    ),
    # a probe that the model cannot compute, or only in a long time
    "an id beyond the model": Hostile(
        all_of(entries(MANIFEST_NAME, vocabulary=10**6), probe([1, 2], [VOCABULARY + 7])),
        f"the model has {VOCABULARY} output rows, but its manifest states 1000000",
        both=True,
    ),
    "a negative id": Hostile(probe([1, -1], [2]), "the id -1 is not in the vocabulary"),
    "a probe longer than the context": Hostile(probe([1] * 200, [2] * 100), f"300 tokens, .* hold {CONTEXT_TOKENS}"),
    "a probe of 50,000 tokens": Hostile(probe([1] * 100, [2] * 100, copies=250), "its probe has 250 sequences"),
    "a probe of 5,000 responses": Hostile(probe([1], [2], copies=5_000), "its probe has 5000 sequences"),
    # sizes that the files do not have
    "a wide configuration": Hostile(entries(CONFIG, intermediate_size=2_000_000), "describes a model of [0-9,]+ numb"),
    "a deep model": Hostile(entries(CONFIG, num_hidden_layers=9_000), "states 9000 layers, but the files hold"),
    "a large vocabulary": Hostile(
        all_of(entries(CONFIG, vocab_size=9_000_000), entries(MANIFEST_NAME, vocabulary=9_000_000)),
        "describes a model of [0-9,]+ numbers",
        both=True,
    ),
    "an id beyond all vocabularies": Hostile(
        content(TOKENIZER, '{"model": {"vocab": {"a": 1099511627776}}}'), "beyond any vocabulary"
    ),
    "a tokenizer that multiplies its text": Hostile(
        entries(TOKENIZER, normalizer={"type": "Sequence", "normalizers": [GROWS] * 12}), "cannot encode a short text"
    ),
    "a tokenizer that puts 2 MB before each text": Hostile(
        entries(TOKENIZER, normalizer={"type": "Prepend", "prepend": "x" * 2_000_000}), "cannot encode a short text"
    ),
    "a tokenizer with 100,000 added tokens": Hostile(
        entries(TOKENIZER, added_tokens=[ADDED | {"id": 400 + at, "content": f"<{at}>"} for at in range(100_000)]),
        "has 100000 added tokens, more than",
    ),
    "a tokenizer with 100,000 pieces around a text": Hostile(
        entries(TOKENIZER, post_processor={"type": "TemplateProcessing", "single": [PIECE] * 100_000}),
        "100000 pieces around",
    ),
    "an adapter of rank 1e9": adapter("states r 1000000000, larger than anything", r=10**9),
    "an adapter with ranks of 1e9": adapter("states rank_pattern .* larger", rank_pattern={"q_proj": 10**9}),
    # what a library would compute without an end
    "an adapter's modules by a pattern that backtracks": adapter("by a pattern that", target_modules=BACKTRACKS),
    "an adapter without modules by such a pattern": adapter("by a pattern that", exclude_modules=BACKTRACKS),
    "an adapter's ranks by such a pattern": adapter("by a pattern that", rank_pattern={BACKTRACKS: 2}),
    "an adapter's layers by such a pattern": adapter(
        "by a pattern that", layers_to_transform=[0], layers_pattern=BACKTRACKS
    ),
    "an adapter that repeats layers": adapter("sets layer_replication", layer_replication=[[0, 10**9]]),
    "an adapter that imports a module": adapter(
        "sets megatron_config", megatron_config={"a": 1}, megatron_core="antigravity"
    ),
    "a template of loops": writes(LOOPS, r"cannot render a short chat \(it takes more than 1 second"),
    "a template that writes a gigabyte": writes("{{ 'a' * 10 ** 9 }}", "it makes more than"),
    "a template that doubles its text": writes(DOUBLES, "it makes more than"),
    "a template of a large power": writes("{{ 7 ** 1000000000 }}", "cannot render a short chat"),
    "a template that recurs": writes(RECURS, "refuses|cannot render|recursion"),
    "a template that branches": writes(BRANCHES, "cannot render a short chat"),
    "a template of long chats": writes(
        "{% for m in messages %}{{ m.content }}{% if loop.index > 50 %}{{ 'a' * 10 ** 9 }}{% endif %}{% endfor %}",
        "cannot render a short chat",
    ),
    "a template of 5 MB": Hostile(template("x" * 5_000_000), "more than 1000000", listed=False),
    "a template of nested blocks": writes("{% if 1 %}" * 300 + "{% endif %}" * 300, "template|nested"),
}


def _flip(path: Path) -> None:
    changed = bytearray(path.read_bytes())
    changed[-1] ^= 1
    path.write_bytes(changed)
