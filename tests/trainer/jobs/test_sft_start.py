"""Milestone 0: the model before training is a reference of its run, and rewards against it are exact."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from dense_reward.checkpoints.adopt import adopt
from dense_reward.engines.torch.load import LoadContext, ServingOptions, load_pair
from dense_reward.manifest import Manifest, files_folder, load_manifest, verify_files
from dense_reward.records import Wants
from dense_reward_trainer.cli import main
from dense_reward_trainer.configs.sft import ScratchOptions
from dense_reward_trainer.runs.run_folder import MetricsLog
from dense_reward_trainer.sft import checkpoint_writer
from dense_reward_trainer.sft.from_scratch import random_model, train_tokenizer
from peft import PeftModel
from tiny_models import plain_logprobs, random_trunk
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

pytestmark = [
    pytest.mark.slow,
    # peft 0.21 asks transformers 5.23 for an attribute by its old name
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

SIZES = ScratchOptions(vocabulary=270, hidden_size=16, layers=2, heads=2, intermediate_size=32)
SHORT = (
    "threads=1",
    "milestones={base: 0, reference: 0.5}",
    "data.arithmetic.demonstrations=12",
    "max_steps=2",
    "batch_size=4",
    "gradient_accumulation=1",
    "learning_rate=0.01",
    "warmup_steps=0",
    "eval_every_steps=null",
    "max_length_tokens=128",
    "precision=float32",
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model without a manifest; its weights are enlarged, so that log-probs are far from uniform."""
    folder = tmp_path_factory.mktemp("base") / "model"
    tokenizer = train_tokenizer(["Add 12 and 34.", "46"], SIZES.vocabulary)
    model = random_model(SIZES, tokenizer, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(10.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def trained(recipe: str, folder: Path, *overrides: str) -> Path:
    assert main(["sft", recipe, f"output_dir={folder}", *SHORT, *overrides]) == 0
    return folder / "checkpoints"


def manifest_of(checkpoint: Path) -> Manifest:
    manifest = load_manifest(checkpoint)
    verify_files(checkpoint, manifest)
    return manifest


def assert_is_the_start(checkpoints: Path) -> Manifest:
    """The reference `base` is from before the first step of the run of `sft`."""
    start, sft = manifest_of(checkpoints / "base"), manifest_of(checkpoints / "sft")
    assert (start.role, start.run_id) == ("reference", sft.run_id)
    assert (start.optimiser_step, start.samples_processed, start.sample_fraction) == (0, 0, 0.0)
    return start


def assert_rewards(checkpoints: Path, sft: PreTrainedModel, base: PreTrainedModel) -> None:
    """The service relates the pair, and its rewards are log pi_sft - log pi_base of transformers' own models."""
    serving, context = ServingOptions(max_batch_tokens=512), LoadContext(lambda _: None)
    engine, _, _ = load_pair(checkpoints / "sft", checkpoints / "base", serving, context)
    assert engine.info.related
    trunk = random_trunk(3, lengths=(5, 9))
    for branch, scores in zip(trunk.branches, engine.score([trunk], Wants())[0], strict=True):
        at = range(len(branch.ids_T)), torch.from_numpy(branch.ids_T).long()
        sft_T, base_T = (plain_logprobs(model, trunk.prompt_P, branch.ids_T)[at].numpy() for model in (sft, base))
        reward_T = scores.sft_logprob_S - scores.reference_logprob_S
        np.testing.assert_allclose(reward_T, sft_T - base_T, atol=1e-4)
        assert np.abs(sft_T - base_T).max() > 0.1


def in_float32(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def full(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained("sft_full_tiny", tmp_path_factory.mktemp("full") / "run", f"base_model={base}")


def test_a_base_model_is_a_reference_of_its_run_without_a_copy_of_its_weights(full: Path, base: Path) -> None:
    start = assert_is_the_start(full)
    assert [path.name for path in (full / "base").iterdir()] == ["manifest.json"]
    assert files_folder(full / "base", start) == base
    assert_rewards(full, in_float32(full / "sft"), in_float32(base))


def test_an_adapter_is_rewarded_against_its_base_model_without_an_adapter(base: Path, tmp_path: Path) -> None:
    checkpoints = trained("sft_lora_tiny", tmp_path / "run", f"base_model={base}")
    assert assert_is_the_start(checkpoints).adapter_base is None
    assert [path.name for path in (checkpoints / "base").iterdir()] == ["manifest.json"]
    adapted = PeftModel.from_pretrained(in_float32(base), checkpoints / "sft").eval()
    assert_rewards(checkpoints, adapted, in_float32(base))


def test_a_base_in_bfloat16_is_served_in_the_float32_that_training_started_from(base: Path, tmp_path: Path) -> None:
    """The run also sets another end of turn than the base model's own manifest."""
    short = tmp_path / "short"
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(short)
    AutoTokenizer.from_pretrained(base).save_pretrained(short)
    adopt(str(short), role="sft", run_id="another", renderer="chat")
    checkpoints = trained("sft_full_tiny", tmp_path / "run", f"base_model={short}", "end_of_turn=<|bos|>")
    start = assert_is_the_start(checkpoints)
    bos = AutoTokenizer.from_pretrained(base).bos_token_id
    assert (start.dtype, start.end_of_turn_id, manifest_of(short).end_of_turn_id != bos) == ("float32", bos, True)
    assert files_folder(checkpoints / "base", start) == short
    assert_rewards(checkpoints, in_float32(checkpoints / "sft"), in_float32(short))


def test_a_side_folder_as_the_base_model_is_named_by_its_files(base: Path, tmp_path: Path) -> None:
    side = adopt(str(base), role="reference", run_id="another", out=tmp_path / "side")
    assert not (side / "config.json").exists()
    checkpoints = trained("sft_full_tiny", tmp_path / "run", f"base_model={side}")
    assert files_folder(checkpoints / "base", assert_is_the_start(checkpoints)) == base


@pytest.mark.parametrize("recipe", ["sft_full_tiny", "sft_lora_tiny"])
def test_a_base_that_would_not_fit_the_run_is_written_instead_of_named(
    base: Path, full: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    monkeypatch.setattr(checkpoint_writer, "writes_same_texts", lambda *_: False)
    checkpoints = trained(recipe, tmp_path / "run", f"base_model={base}")
    start = assert_is_the_start(checkpoints)
    assert start.source is None
    assert start.probe == manifest_of(full / "base").probe, "the same model"
    loaded = in_float32(checkpoints / "sft" if recipe == "sft_full_tiny" else base)
    sft = loaded if recipe == "sft_full_tiny" else PeftModel.from_pretrained(loaded, checkpoints / "sft").eval()
    assert_rewards(checkpoints, sft, in_float32(base))


def test_the_start_is_there_after_an_interrupt_in_the_first_steps_and_is_not_written_again(
    base: Path, full: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    run = tmp_path / "run"
    arguments = ["sft", "sft_full_tiny", f"output_dir={run}", *SHORT, f"base_model={base}", "save_every_steps=1"]
    with monkeypatch.context() as patched:
        patched.setattr(MetricsLog, "append", interrupted)
        assert main([*arguments, "log_every_steps=2"]) == 130, "at step 1"
    first = load_manifest(run / "checkpoints" / "base")
    with monkeypatch.context() as patched:
        append = MetricsLog.append
        patched.setattr(
            MetricsLog, "append", lambda log, at, values: interrupted() if at == 2 else append(log, at, values)
        )
        assert main(arguments) == 130
    assert load_manifest(run / "checkpoints" / "base").files == first.files, "no step was saved, so it began again"
    written = (run / "checkpoints" / "base" / "manifest.json").read_bytes()
    shutil.move(run / "checkpoints" / "base", tmp_path / "moved")
    assert main(arguments) == 2
    assert "base is gone, and the run is past its step 0" in capsys.readouterr().err
    shutil.move(tmp_path / "moved", run / "checkpoints" / "base")

    assert main(arguments) == 0
    assert "resumed at step 1" in capsys.readouterr().err
    assert (run / "checkpoints" / "base" / "manifest.json").read_bytes() == written
    assert_is_the_start(run / "checkpoints")
    assert manifest_of(run / "checkpoints" / "sft").files == manifest_of(full / "sft").files


def test_a_base_that_changed_after_its_run_is_refused_when_served(base: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(base, tmp_path / "model")
    checkpoints = trained("sft_full_tiny", tmp_path / "run", f"base_model={copy}")
    shutil.copy(checkpoints / "reference" / "model.safetensors", copy)
    with pytest.raises(Exception, match=r"model\.safetensors does not match its hash"):
        manifest_of(checkpoints / "base")


@pytest.mark.parametrize("place", ["", "checkpoints/base", "checkpoints/sft", "resume/checkpoint"])
def test_a_run_does_not_write_over_its_own_base_model(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    own = shutil.copytree(base, tmp_path / "run" / place)
    arguments = ["sft", "sft_full_tiny", f"output_dir={tmp_path / 'run'}", *SHORT, f"base_model={own}"]
    assert main(arguments) == 2
    assert "would write over its base model" in capsys.readouterr().err
    assert sorted(path.name for path in own.iterdir()) == sorted(path.name for path in base.iterdir())


@pytest.mark.parametrize("recipe", ["sft_full", "sft_lora", "sft_qlora"])
def test_a_recipe_for_a_real_model_runs_to_its_end_as_it_stands(base: Path, tmp_path: Path, recipe: str) -> None:
    """Only the model, the data and what needs a GPU are replaced."""
    given = [f"base_model={base}", "data={source: arithmetic, held_out_fraction: 0.05}", "data.arithmetic.digits=1"]
    given += [
        "data.arithmetic.demonstrations=60",
        f"output_dir={tmp_path / 'run'}",
        "device=cpu",
        "max_length_tokens=128",
    ]
    given += ["lora.quantise=null"] if recipe == "sft_qlora" else []
    assert main(["sft", recipe, *given]) == 0
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["base", "early", "reference", "sft"]
    assert_is_the_start(tmp_path / "run" / "checkpoints")
