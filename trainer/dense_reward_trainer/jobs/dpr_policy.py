"""What both engines of the `dpr` job leave: the policy, and the last line."""

from collections.abc import Mapping, Sequence

from dense_reward.checkpoints.probe import ProbeIds
from dense_reward.checkpoints.write_manifest import ManifestFacts
from dense_reward.manifest import files_folder
from dense_reward.records import IdArray
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from dense_reward_trainer.configs.dpr import DprConfig
from dense_reward_trainer.rl.optimiser import learning_rate
from dense_reward_trainer.rl.policy import PolicyCheckpoint
from dense_reward_trainer.rl.prompts import prompts_sha256
from dense_reward_trainer.runs.checkpoint import write_checkpoint
from dense_reward_trainer.runs.next_step import finished, job
from dense_reward_trainer.runs.run_folder import Run, without_secrets


def last_line(config: DprConfig) -> str:
    """What is finished, and what to run next."""
    policy = config.output_dir / "checkpoints" / "policy"
    keys: dict[str, object] = {"policies": f"{{start: {config.policy}, dpr: {policy}}}"}
    if config.held_out is not None:
        keys["held_out"] = config.held_out
    keys["service_url"] = without_secrets(config.service_url)
    if config.service_key_file is not None:
        keys["service_key_file"] = config.service_key_file
    keys |= {"output_dir": config.output_dir / "evaluation"}
    return finished(policy, job("evaluate", **keys))


def write_policy(
    config: DprConfig,
    checkpoint: PolicyCheckpoint,
    run: Run,
    model: PreTrainedModel,
    prompts: Sequence[IdArray],
    *,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes the final policy as a checkpoint, with the probe sequences of the checkpoint that it started from.

    `weights`: the whole weights of a model that several processes share.
    """
    manifest = checkpoint.manifest
    probe = [ProbeIds(s.prompt_ids, tuple(response.ids for response in s.responses)) for s in manifest.probe]
    facts = ManifestFacts(
        role="policy",
        run_id=run.run_id,
        renderer=manifest.renderer,
        end_of_turn_id=manifest.end_of_turn_id,
        choices=manifest.choices,
        optimiser_step=config.steps,
        learning_rate=learning_rate(config, config.steps),
        base_model=str(config.policy),
        data_sha256=prompts_sha256(prompts),
        seed=config.seed,
    )
    write_checkpoint(
        run.folder / "checkpoints" / "policy",
        model,
        AutoTokenizer.from_pretrained(
            files_folder(config.policy, manifest), local_files_only=True, trust_remote_code=False
        ),
        facts,
        lambda *_: probe,
        device=str(checkpoint.policy.device),
        weights=weights,
    )
