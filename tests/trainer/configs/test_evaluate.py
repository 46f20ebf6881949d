"""The policies of an `evaluate` configuration: short form, what they share, and what is refused."""

from pathlib import Path

import pytest
from dense_reward_trainer.configs.base import load_config
from dense_reward_trainer.configs.evaluate import EvaluateConfig, PolicyOptions
from dense_reward_trainer.errors import ConfigError


def config_of(folder: Path, policies: str) -> EvaluateConfig:
    path = folder / "evaluate.yaml"
    path.write_text(f"output_dir: out\nheld_out: held_out.jsonl\npolicies: {policies}\n")
    return load_config(EvaluateConfig, path)


def test_a_path_alone_is_a_checkpoint_as_it_is(tmp_path: Path) -> None:
    config = config_of(tmp_path, "{sft: runs/sft, cold: {checkpoint: runs/sft, temperature: 0.5}}")
    assert config.policies["sft"] == PolicyOptions(checkpoint=Path("runs/sft"))
    assert config.policies["cold"].temperature == 0.5


def test_policies_that_differ_only_in_their_choice_are_sampled_alike(tmp_path: Path) -> None:
    choices = "a: {checkpoint: x, choose: {by: majority}}, b: {checkpoint: x, choose: {by: power, power: 2}}"
    config = config_of(tmp_path, f"{{plain: x, {choices}, cold: {{checkpoint: x, temperature: 0.5}}}}")
    sampled = [policy.sampled for policy in config.policies.values()]
    assert sampled[0] == sampled[1] == sampled[2] != sampled[3]
    assert len(set(sampled)) == 2


@pytest.mark.parametrize(
    ("policies", "complaint"),
    [
        ("{}", "at least 1 item"),
        (
            "{a: {checkpoint: x, temprature: 1}}",
            "unknown key policies.a.temprature: did you mean policies.a.temperature",
        ),
        ("{a: {checkpoint: x, choose: {by: majority, sampels: 4}}}", "did you mean policies.a.choose.samples"),
        ("{a: {temperature: 1}}", "policies.a.checkpoint: Field required"),
        ("{a: {checkpoint: x, temperature: 0}}", "greater than or equal to 0.001"),
        ("{a: {checkpoint: x, top_p: 0}}", "greater than 0"),
        ("{a: {checkpoint: x, min_p: 1}}", "less than 1"),
        ("{a: {checkpoint: x, tilt: {reference: y, strength: .inf}}}", "finite"),
        ("{a: {checkpoint: x, tilt: {reference: y, strength: 1e9}}}", "less than or equal to 100"),
        ("{a: {checkpoint: x, tilt: {reference: y}, extrapolate: {base: y}}}", "give each its own name"),
        ("{a: {checkpoint: x, choose: {by: power}}}", "set both, or neither"),
        ("{a: {checkpoint: x, choose: {by: majority, power: 2}}}", "set both, or neither"),
        ("{a: {checkpoint: x, choose: {by: reward}}}", "set it if `by` is a signal, and only then"),
        ("{a: {checkpoint: x, choose: {by: majority, aggregate: min}}}", "set it if `by` is a signal, and only then"),
        ("{a: {checkpoint: x, choose: {by: majority, pair: base}}}", "pair to null"),
        ("{a: {checkpoint: x, choose: {by: reward, aggregate: min, window: 4}}}", "set aggregate to window_min"),
        ("{a: {checkpoint: x, choose: {by: reward, aggregate: min}}}", "policies.a chooses by reward.*set service_url"),
        ("{a: {checkpoint: x, choose: {by: rewards, aggregate: min}}}", "policies.a.choose.by"),
        ("{a: {checkpoint: x, choose: {by: majority, samples: 1}}}", "greater than or equal to 2"),
        ("{'../a': x}", "pattern"),
        ("{a: 3}", "policies.a"),
    ],
)
def test_policies_that_mean_nothing_are_refused_by_their_key(tmp_path: Path, policies: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        config_of(tmp_path, policies)


def test_the_keys_of_older_recipes_are_refused_with_the_new_form(tmp_path: Path) -> None:
    path = tmp_path / "evaluate.yaml"
    path.write_text("output_dir: out\nheld_out: x\ncheckpoints: {sft: runs/sft}\ntemperatures: {sft: 0.5}\n")
    with pytest.raises(ConfigError, match=r"checkpoints is now part of policies: write `policies: \{NAME: FOLDER\}`"):
        load_config(EvaluateConfig, path)
