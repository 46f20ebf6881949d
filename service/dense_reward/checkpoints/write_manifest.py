"""Writes a checkpoint's manifest, the last step of making one: reads the files back, hashes them, measures the probe.

Manifests of the trainer's checkpoints and of adopted ones are made only here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from dense_reward.checkpoints.atomic_file import write_whole
from dense_reward.checkpoints.float32_layers import load_float32
from dense_reward.checkpoints.probe import ProbedModel, ProbeIds, measure_probe
from dense_reward.checkpoints.versions import library_versions
from dense_reward.engines.token_head.engine import load_head
from dense_reward.engines.tokenizer import TransformersTokenizer, load_tokenizer
from dense_reward.engines.torch.architecture import load_config
from dense_reward.engines.torch.model import DTYPES
from dense_reward.engines.torch.weights import stored_dtype
from dense_reward.errors import CheckpointError
from dense_reward.folders import folder_name
from dense_reward.hashed_files import MANIFEST_NAME, hash_files
from dense_reward.manifest import Manifest, Role
from dense_reward.text.encode import Encoder, end_of_turn_id
from dense_reward.text.template import TemplateChoices
from dense_reward.text.tokenizer import RendererName

ChooseProbe = Callable[[Encoder, int], Sequence[ProbeIds]]
"""Takes the encoder and the model's limit in tokens, and returns the sequences that the probe is measured on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestFacts:
    """The fields of a manifest that cannot be read from the checkpoint's files. Names as in Manifest.

    If `end_of_turn_id` is None, it is derived from the template or the tokenizer; if `dtype` is None, it is that of the
    model's configuration. `choices` are template_kwargs, response_prefix and template_date. `source` is the folder of
    the files if it is not the manifest's folder.
    """

    role: Role
    run_id: str
    renderer: RendererName
    end_of_turn_id: int | None = None
    choices: TemplateChoices = field(default_factory=TemplateChoices)
    optimiser_step: int | None = None
    samples_processed: int | None = None
    samples_total: int | None = None
    unique_samples: int | None = None
    learning_rate: float | None = None
    base_model: str | None = None
    data_sha256: str | None = None
    seed: int | None = None
    dtype: str | None = None
    source: Path | None = None
    adapter_base: Path | None = None


def write_manifest(folder: Path, facts: ManifestFacts, choose_probe: ChooseProbe, *, device: str = "cpu") -> Manifest:
    """Write and return the manifest of a checkpoint whose files are in `facts.source`, or in `folder` if that is None.

    The probe is measured on the weights as they were written, through the loader that the service uses. Raises
    CheckpointError if the files cannot be served.
    """
    manifest, _ = measured_manifest(folder, facts, choose_probe, device=device)
    save_manifest(folder, manifest)
    return manifest


def measured_manifest(
    folder: Path, facts: ManifestFacts, choose_probe: ChooseProbe, *, device: str = "cpu", hashed: bool = True
) -> tuple[Manifest, ProbedModel]:
    """The manifest that `folder` would get, and the model in float32. Writes nothing; `folder` need not exist.

    Without `hashed` the manifest has no hashes of files. Raises CheckpointError if the files cannot be served.
    """
    manifest, encoder = unmeasured_manifest(folder, facts, hashed=hashed)
    if facts.role == "token_head":
        model: ProbedModel = load_head(folder, manifest, dtype="float32", device=device)
    else:
        model = load_float32(folder, manifest, device=device)
    # What precedes a response may be undecided: the probe measures log-probs, for which any ids serve.
    decided = replace(encoder, choices=replace(facts.choices, response_prefix=facts.choices.response_prefix or ""))
    probe = measure_probe(model, choose_probe(decided, model.max_length_tokens))
    return manifest.model_copy(update={"probe": probe}), model


def save_manifest(folder: Path, manifest: Manifest) -> None:
    """Write a manifest into its folder, whole or not at all. Raises CheckpointError if it cannot be written."""
    try:
        write_whole(folder / MANIFEST_NAME, manifest.model_dump_json(indent=2).encode() + b"\n")
    except OSError as error:
        raise CheckpointError(
            f"{folder / MANIFEST_NAME} cannot be written ({error.strerror}): make space or name a writable folder "
            "(--out)"
        ) from error


def unmeasured_manifest(folder: Path, facts: ManifestFacts, *, hashed: bool) -> tuple[Manifest, Encoder]:
    """The manifest with an empty probe, and the encoder that it describes. Loads no weights.

    Raises CheckpointError if the configuration or the tokenizer cannot be read.
    """
    files = facts.source or folder
    weights = facts.adapter_base or files
    tokenizer = load_tokenizer(files)
    end = facts.end_of_turn_id
    if end is None:
        end = end_of_turn_id(tokenizer, facts.renderer, facts.choices)
    encoder = Encoder(tokenizer, facts.renderer, end, choices=facts.choices)
    dtype = facts.dtype or stored_dtype(weights)
    if dtype not in DTYPES:
        raise CheckpointError(
            f"{files} cannot be served in dtype {dtype!r}: choose one of {', '.join(sorted(DTYPES))} (--dtype), or "
            "correct it in config.json"
        )
    manifest = Manifest(
        role=facts.role,
        run_id=facts.run_id,
        optimiser_step=facts.optimiser_step,
        samples_processed=facts.samples_processed,
        samples_total=facts.samples_total,
        unique_samples=facts.unique_samples,
        learning_rate=facts.learning_rate,
        base_model=facts.base_model,
        renderer=facts.renderer,
        end_of_turn_id=encoder.end_of_turn_id,
        template_kwargs=dict(facts.choices.template_kwargs),
        response_prefix=facts.choices.response_prefix,
        template_date=facts.choices.template_date,
        vocabulary=_vocab_size(weights),
        tokenizer_sha256=tokenizer.sha256(),
        template_sha256=tokenizer.template_sha256(facts.renderer),
        data_sha256=facts.data_sha256,
        seed=facts.seed,
        dtype=dtype,
        source=None if facts.source is None else folder_name(folder, facts.source),
        adapter_base=None if facts.adapter_base is None else folder_name(folder, facts.adapter_base),
        files=hash_files(files) if hashed else {},
        adapter_base_files=hash_files(facts.adapter_base) if hashed and facts.adapter_base is not None else {},
        probe=(),
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=library_versions(),
    )
    return manifest, encoder


def default_renderer(tokenizer: TransformersTokenizer, folder: Path) -> RendererName:
    """The renderer chat, if the tokenizer has a chat template. Raises CheckpointError if it has none."""
    if tokenizer.has_chat_template:
        return "chat"
    raise CheckpointError(
        f"{folder}: its tokenizer has no chat template, so the renderer must be named: "
        "--renderer plain or --renderer instruction (in a configuration, renderer: plain)"
    )


def _vocab_size(folder: Path) -> int:
    """Output rows, by config.json."""
    return int(load_config(folder).get_text_config().vocab_size)
