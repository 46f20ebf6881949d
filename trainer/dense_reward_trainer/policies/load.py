"""Loads the policy that a configuration names: a checkpoint as it is, tilted, or extrapolated. Must not know jobs."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from dense_reward.errors import CheckpointError
from dense_reward.manifest import Manifest, adapter_base_folder, check_pair, files_folder, load_manifest
from dense_reward.records import Report

from dense_reward_trainer.configs.dpr import Precision
from dense_reward_trainer.configs.evaluate import ExtrapolateOptions, PolicyOptions, TiltOptions
from dense_reward_trainer.rl.policy import Policy, PolicyCheckpoint, load_encoder, load_policy
from dense_reward_trainer.rl.tilt import Tilt

_DROPOUT = re.compile(r"dropout|drop$")  # of layers or attention; off outside training
# Keys of a model's configuration that do not change what it computes from given weights.
NO_COMPUTATION = frozenset(
    {
        "_name_or_path",
        "architectures",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "initializer_range",
        "pad_token_id",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)


def check_sampled(options: PolicyOptions) -> dict[str, Manifest]:
    """The manifests of all checkpoints that a policy needs, by folder. Loads no weights.

    Raises CheckpointError for a checkpoint without a readable manifest or of which a file is missing, for a tilt of
    two checkpoints that are no pair, and for a policy whose text cannot be encoded.
    """
    manifests = {str(folder): _with_files(folder) for folder in folders_of(options)}
    if options.tilt is not None:
        own, other = manifests[str(options.checkpoint)], manifests[str(options.tilt.reference)]
        _check_tilt(own, other, options.tilt, options.checkpoint)
    load_encoder(options.checkpoint, manifests[str(options.checkpoint)])
    return manifests


def folders_of(options: PolicyOptions) -> list[Path]:
    """The folders of all checkpoints that a policy needs; its own is the first."""
    folders = [options.checkpoint]
    folders += [] if options.tilt is None else [options.tilt.reference]
    return folders if options.extrapolate is None else [*folders, options.extrapolate.base]


def _with_files(folder: Path) -> Manifest:
    manifest = load_manifest(folder)
    places = [(files_folder(folder, manifest), manifest.files)]
    base = adapter_base_folder(folder, manifest)
    places += [] if base is None else [(base, manifest.adapter_base_files)]
    missing = next((place / name for place, files in places for name in files if not (place / name).is_file()), None)
    if missing is not None:
        raise CheckpointError(f"{missing} is missing, which the manifest of {folder} lists: copy the checkpoint again")
    return manifest


def load_sampled(options: PolicyOptions, report: Report, *, precision: Precision, device: str) -> PolicyCheckpoint:
    """The checkpoint of `options`, tilted or extrapolated if they say so; adapters are merged.

    Reports a reference of another run. Raises CheckpointError, naming the cure, if a checkpoint cannot be used or two
    do not belong together.
    """
    checkpoint = load_policy(options.checkpoint, precision=precision, device=device)
    if options.tilt is not None:
        other = load_policy(options.tilt.reference, precision=precision, device=device)
        policy = tilted(checkpoint, other, options.tilt, options.checkpoint)
        if not check_pair(checkpoint.manifest, other.manifest, allow_unrelated=True):
            report(
                f"the tilt's reference {options.tilt.reference} comes from another run than {options.checkpoint}, or "
                "from a later step"
            )
        return policy
    if options.extrapolate is not None:
        other = load_policy(options.extrapolate.base, precision=precision, device=device)
        return extrapolated(checkpoint, other, options.extrapolate, options.checkpoint)
    return checkpoint


def tilted(
    checkpoint: PolicyCheckpoint, reference: PolicyCheckpoint, options: TiltOptions, folder: Path
) -> PolicyCheckpoint:
    """`checkpoint`, from `folder`, tilted away from the reference. Raises CheckpointError if they are no pair."""
    _check_tilt(checkpoint.manifest, reference.manifest, options, folder)
    own = checkpoint.policy
    tilt = Tilt(reference.policy.model, options.strength)
    policy = Policy(own.model, own.end_of_turn_id, own.vocab_size, own.autocast, tilt)
    return PolicyCheckpoint(policy, checkpoint.encoder, checkpoint.manifest)


def _check_tilt(own: Manifest, reference: Manifest, options: TiltOptions, folder: Path) -> None:
    try:
        check_pair(own, reference, allow_unrelated=True)
    except CheckpointError as error:
        raise CheckpointError(
            f"{folder} (sft) cannot be tilted away from {options.reference} (reference): {error}"
        ) from error


def extrapolated(
    checkpoint: PolicyCheckpoint, base: PolicyCheckpoint, options: ExtrapolateOptions, folder: Path
) -> PolicyCheckpoint:
    """`checkpoint`, from `folder`, with its weights changed to theta_sft + a (theta_sft - theta_base), in place.

    Raises CheckpointError if the two differ in tokenizer or architecture, because their weights then do not correspond,
    and if their weights are equal.
    """
    reason = _not_corresponding(checkpoint, base)
    if reason is not None:
        raise CheckpointError(
            f"{folder} cannot be extrapolated from {options.base}: {reason}. Name the checkpoint that its training "
            "started from"
        )
    base_weights = dict(base.policy.model.named_parameters())
    with torch.no_grad():
        for name, weight in checkpoint.policy.model.named_parameters():
            weight.add_(weight - base_weights[name], alpha=options.strength)
    return checkpoint


def _not_corresponding(checkpoint: PolicyCheckpoint, base: PolicyCheckpoint) -> str | None:
    if checkpoint.manifest.tokenizer_sha256 != base.manifest.tokenizer_sha256:
        return "they have different tokenizers"
    configs = [_computation(one.policy.model.config.to_dict()) for one in (checkpoint, base)]
    different = sorted(key for key in {*configs[0], *configs[1]} if configs[0].get(key) != configs[1].get(key))
    if different:
        return f"their config.json differ in {', '.join(different)}"
    shapes = [{name: p.shape for name, p in one.policy.model.named_parameters()} for one in (checkpoint, base)]
    if shapes[0] != shapes[1]:
        return "their weights have different names or shapes"
    weights = [dict(one.policy.model.named_parameters()) for one in (checkpoint, base)]
    if all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items()):
        return "their weights are equal, so nothing would change"
    return None


def _computation(values: Mapping[str, object]) -> dict[str, object]:
    """The keys of a configuration, nested ones included, that change what the model computes."""
    kept = {key: value for key, value in values.items() if key not in NO_COMPUTATION and not _DROPOUT.search(str(key))}
    return {key: _computation(value) if isinstance(value, dict) else value for key, value in kept.items()}
