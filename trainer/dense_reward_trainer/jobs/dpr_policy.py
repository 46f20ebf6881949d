"""What both engines of the `dpr` job leave: the policy, and the last line."""

from collections.abc import Iterator, Mapping, Sequence

from dense_reward.checkpoints.probe import ProbeIds
from dense_reward.checkpoints.write_manifest import ManifestFacts
from dense_reward.manifest import files_folder
from dense_reward.records import IdArray
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from dense_reward_trainer.configs.dpr import DprConfig
from dense_reward_trainer.data.final_answers import AnswerChecker, meaning_of_right
from dense_reward_trainer.rl.optimiser import learning_rate
from dense_reward_trainer.rl.policy import PolicyCheckpoint
from dense_reward_trainer.rl.prompts import prompts_sha256
from dense_reward_trainer.runs.checkpoint import write_checkpoint
from dense_reward_trainer.runs.next_step import evaluate, finished
from dense_reward_trainer.runs.run_folder import METRICS_NAME, MetricsLog, Run

CHANGES = {
    "greedy_accuracy": "greedy accuracy",
    "sampled_accuracy": "sampled accuracy",
    "kl_to_sft": "KL to SFT in nats",
    "length_tokens": "length in tokens",
}


def last_line(config: DprConfig) -> str:
    """How the held-out figures changed; then what is finished, and what to run next."""
    metrics = MetricsLog(config.output_dir / METRICS_NAME).read()
    return "\n".join([*_changes(metrics, config.held_out_options.checker), _finished(config)])


def _changes(metrics: Sequence[Mapping[str, float | None]], checker: AnswerChecker) -> Iterator[str]:
    """The held-out figures before the first step and after the last one, if they were measured."""
    measured = [line for line in metrics if "held_out_length_tokens" in line]
    if len(measured) < 2:
        return
    before, after = measured[0], measured[-1]
    shown = [
        f"{title} {_with_error(before, name)} -> {_with_error(after, name)}"
        for name, title in CHANGES.items()
        if None not in {before.get(f"held_out_{name}"), after.get(f"held_out_{name}")}
    ]
    yield f"held out, steps {before['step']} -> {after['step']}: {'; '.join(shown)} (± standard error)"
    if before.get("held_out_sampled_accuracy") is not None:
        yield meaning_of_right(checker)


def _with_error(line: Mapping[str, float | None], name: str) -> str:
    error = line.get(f"held_out_{name}_se")
    return f"{line[f'held_out_{name}']:z.3f}" + ("" if error is None else f" ± {error:.3f}")


def _finished(config: DprConfig) -> str:
    policy = config.output_dir / "checkpoints" / "policy"
    keys = {
        "service_url": config.service_url,
        "service_key_file": config.service_key_file,
        "held_out_options.max_new_tokens": config.held_out_options.max_new_tokens,
        "device": config.device,
        "precision": config.precision,
        "output_dir": config.output_dir / "evaluation",
    }
    return finished(policy, evaluate({"start": config.policy, "dpr": policy}, config.held_out, keys))


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
