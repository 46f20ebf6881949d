"""SFT decides what precedes a response before it trains, and its checkpoints stop where their turns end."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from dense_reward.checkpoints.adopt import adopt
from dense_reward.engines.tokenizer import load_tokenizer
from dense_reward.engines.torch.load import LoadContext, ServingOptions, load_pair
from dense_reward.errors import CheckpointError
from dense_reward.hashed_files import MANIFEST_NAME
from dense_reward.manifest import load_manifest
from dense_reward.text.encode import Encoder
from dense_reward_trainer.cli import main
from dense_reward_trainer.configs.sft import SftConfig
from dense_reward_trainer.rl.policy import load_policy
from dense_reward_trainer.sft.chat import InitialFolder, training_encoder
from kinds_of_templates import KINDS
from tiny_models import tiny_model, write_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

pytestmark = [
    pytest.mark.slow,
    # peft 0.21 asks transformers 5.23 for an attribute by its old name
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

SPECIALS = ("<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>", "<|stop|>")
END = 256 + SPECIALS.index("<|im_end|>")


def base_model(folder: Path, kind: str, *, eos: str = "<|endoftext|>", pad: str | None = "<|pad|>") -> Path:
    """A base model: its texts end with <|endoftext|>, unless `eos` is another token."""
    folder.mkdir()
    write_tokenizer(folder, specials=SPECIALS, template=KINDS[kind])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token, tokenizer.pad_token = eos, pad
    tokenizer.save_pretrained(folder)
    model = tiny_model(dtype=torch.float32)
    model.resize_token_embeddings(256 + len(SPECIALS), mean_resizing=False)
    model.config.eos_token_id = tokenizer.eos_token_id
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
    model.save_pretrained(folder)
    return folder


def data(folder: Path, response: str = "ok", **columns: str) -> Path:
    path = folder / "data.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": response, **columns}]}
        for n in range(12)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sft(folder: Path, base: Path, source: Path, *overrides: str, recipe: str = "sft_full_tiny") -> int:
    given = [f"data={{source: {source}, held_out_fraction: 0}}", f"base_model={base}", f"output_dir={folder}"]
    fixed = ["threads=1", "max_steps=6", "batch_size=4", "eval_every_steps=null", "max_length_tokens=120"]
    return main(["sft", recipe, *given, *fixed, "precision=float32", *overrides])


def eos_of(folder: Path) -> tuple[str, int, list[int]]:
    """The ends that the tokenizer, config.json and generation_config.json name."""
    generation = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    config = json.loads((folder / "config.json").read_text())["eos_token_id"]
    return AutoTokenizer.from_pretrained(folder).eos_token, config, generation


def test_an_undecided_template_is_refused_before_training_with_the_keys_that_decide(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, source = base_model(tmp_path / "base", "an empty thought"), data(tmp_path)
    assert sft(tmp_path / "run", base, source) == 2
    error = capsys.readouterr().err
    assert "'template_kwargs={\"enable_thinking\": false}'" in error
    assert "'response_prefix=\"\"'" in error
    assert not (tmp_path / "run").exists()
    assert sft(tmp_path / "run", base, source, 'template_kwargs={"enable_thinking": false}') == 0
    folder = tmp_path / "run" / "checkpoints"
    for name in ("sft", "reference"):
        assert load_manifest(folder / name).template_kwargs == {"enable_thinking": False}
    serving = ServingOptions(max_batch_tokens=1024)
    assert load_pair(folder / "sft", folder / "reference", serving, LoadContext(lambda _: None))[0].info.related
    undecided = adopt(str(folder / "sft"), role="policy", out=tmp_path / "undecided", ignore_manifest=True)
    with pytest.raises(CheckpointError, match="must be decided once"):
        load_policy(undecided, precision="float32", device="cpu")


@pytest.mark.parametrize("pad", ["<|pad|>", None])
def test_checkpoints_carry_their_end_of_turn_and_generate_stops_at_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], pad: str | None
) -> None:
    base = base_model(tmp_path / "base", "plain ChatML", pad=pad)
    assert sft(tmp_path / "run", base, data(tmp_path), "max_steps=60", "learning_rate=1e-2", "schedule=linear") == 0
    assert "teaches the chat template's end of turn '<|im_end|>'" in capsys.readouterr().err
    for name in ("sft", "reference"):
        folder = tmp_path / "run" / "checkpoints" / name
        assert eos_of(folder) == ("<|im_end|>", END, [END, 256])
        assert load_manifest(folder).end_of_turn_id == END
        assert AutoTokenizer.from_pretrained(folder).pad_token == pad
        assert json.loads((folder / "config.json").read_text()).get("pad_token_id") != END
    model = AutoModelForCausalLM.from_pretrained(folder.with_name("sft"))
    tokenizer = AutoTokenizer.from_pretrained(folder.with_name("sft"))
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Say 5."}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = model.generate(**prompt, do_sample=False, max_new_tokens=20, pad_token_id=1)[0]
    assert tokenizer.decode(ids[prompt["input_ids"].shape[1] :]) == "ok<|im_end|>"


def test_an_adapters_folder_names_its_end_of_turn(tmp_path: Path) -> None:
    base = base_model(tmp_path / "base", "plain ChatML")
    assert sft(tmp_path / "run", base, data(tmp_path), recipe="sft_lora_tiny") == 0
    folder = tmp_path / "run" / "checkpoints" / "sft"
    assert AutoTokenizer.from_pretrained(folder).eos_token == "<|im_end|>"
    assert GenerationConfig.from_pretrained(folder).eos_token_id == [END, 256]


def test_an_end_of_turn_that_is_not_clear_must_be_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = base_model(tmp_path / "base", "two ends", eos="<|im_end|>")
    source = data(tmp_path)
    assert sft(tmp_path / "run", base, source) == 2
    assert "what ends a turn is not clear: the chat template writes '<|stop|>' after" in capsys.readouterr().err
    assert sft(tmp_path / "run", base, source, 'end_of_turn="<|stop|>"') == 0
    assert load_manifest(tmp_path / "run" / "checkpoints" / "sft").end_of_turn_id == 256 + SPECIALS.index("<|stop|>")


def test_the_eos_stays_if_the_template_writes_it_elsewhere(tmp_path: Path) -> None:
    base = base_model(tmp_path / "base", "plain ChatML")
    template = (base / "chat_template.jinja").read_text()
    (base / "chat_template.jinja").write_text("{{ eos_token }}" + template)
    assert sft(tmp_path / "run", base, data(tmp_path)) == 0
    assert eos_of(tmp_path / "run" / "checkpoints" / "sft") == ("<|endoftext|>", END, [END, 256])


def test_responses_that_repeat_their_prompt_or_end_are_shortened_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = base_model(tmp_path / "base", "an opened thought")
    source = data(tmp_path, "<think>\nhm</think>ok<|im_end|>")
    assert sft(tmp_path / "run", base, source, 'response_prefix=""') == 0
    assert "12 of 12 responses repeated the end of their prompt" in capsys.readouterr().err
    probe = load_manifest(tmp_path / "run" / "checkpoints" / "sft").probe
    learnt = AutoTokenizer.from_pretrained(base).decode(probe[0].responses[0].ids)
    assert learnt == "hm</think>ok<|im_end|>"
    assert sft(tmp_path / "plain", base, data(tmp_path), 'response_prefix=""') == 0
    assert "in 12 of 12 demonstrations the prompt opens a thought that the" in capsys.readouterr().err


def test_thoughts_of_a_data_set_are_learnt_as_the_template_writes_them(tmp_path: Path) -> None:
    base = base_model(tmp_path / "base", "an empty thought")
    source = data(tmp_path, "ok", reasoning_content="hm")
    assert sft(tmp_path / "run", base, source, 'response_prefix=""') == 0
    probe = load_manifest(tmp_path / "run" / "checkpoints" / "sft").probe
    assert (
        AutoTokenizer.from_pretrained(base).decode(probe[0].responses[0].ids) == "<think>\nhm\n</think>\nok<|im_end|>"
    )


def test_the_date_of_the_first_start_is_that_of_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, source = base_model(tmp_path / "base", "the date"), data(tmp_path)
    assert sft(tmp_path / "run", base, source, "template_date=2024-07-26") == 0
    assert "it is 2024-07-26 in all checkpoints" in capsys.readouterr().err
    assert load_manifest(tmp_path / "run" / "checkpoints" / "reference").template_date == "2024-07-26"
    assert sft(tmp_path / "other", base, source) == 0
    run = json.loads((tmp_path / "other" / "run.json").read_text())
    started = load_manifest(tmp_path / "other" / "checkpoints" / "sft").template_date
    assert run["identity"]["template date"] == started
    run["identity"]["template date"] = "2020-02-02"
    (tmp_path / "other" / "run.json").write_text(json.dumps(run))
    shutil.rmtree(tmp_path / "other" / "checkpoints")
    assert sft(tmp_path / "other", base, source) == 2, "the ids of another day"
    assert "writes a date" in capsys.readouterr().err


@pytest.mark.parametrize("side", [False, True])
def test_the_decision_of_an_adopted_base_model_is_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], side: bool
) -> None:
    base, source = base_model(tmp_path / "base", "an empty thought", eos="<|im_end|>"), data(tmp_path)
    kwargs = {"enable_thinking": False}
    out = tmp_path / "side" if side else None
    folder = adopt(str(base), role="policy", template_kwargs=kwargs, end_of_turn="<|stop|>", out=out)
    assert sft(tmp_path / "run", folder, source) == 0
    line = f'as {folder / MANIFEST_NAME} decides: end_of_turn "<|stop|>", template_kwargs {{"enable_thinking": false}}'
    assert line in capsys.readouterr().err
    taken = load_manifest(tmp_path / "run" / "checkpoints" / "reference")
    assert (taken.template_kwargs, taken.end_of_turn_id) == (kwargs, 256 + SPECIALS.index("<|stop|>"))


def encoder_of(base: Path, tmp_path: Path, **keys: object) -> tuple[Encoder, list[str]]:
    values = {"data": {"source": "x"}, "base_model": str(base), "output_dir": tmp_path / "run", **keys}
    config = SftConfig.model_validate(values)
    return training_encoder(config, load_tokenizer(base), "chat", InitialFolder(base, base), {})


def test_keys_of_the_configuration_come_before_the_base_models_manifest(tmp_path: Path) -> None:
    base = base_model(tmp_path / "base", "an empty thought", eos="<|im_end|>")
    adopt(str(base), role="policy", template_kwargs={"enable_thinking": False})
    encoder, lines = encoder_of(base, tmp_path, response_prefix="")
    assert (encoder.choices.template_kwargs, encoder.choices.response_prefix) == ({}, "")
    assert not any("template_kwargs" in line for line in lines), "a decision is taken as a whole"
    encoder, _ = encoder_of(base, tmp_path, end_of_turn="<|stop|>")
    assert encoder.end_of_turn_id == 256 + SPECIALS.index("<|stop|>")
    assert encoder.choices.template_kwargs == {"enable_thinking": False}


def test_the_date_of_an_adopted_base_model_is_taken(tmp_path: Path) -> None:
    base = base_model(tmp_path / "base", "the date", eos="<|im_end|>")
    adopt(str(base), role="policy", template_date="2024-07-26")
    assert encoder_of(base, tmp_path)[0].choices.template_date == "2024-07-26"
    assert encoder_of(base, tmp_path, template_date="2024-07-27")[0].choices.template_date == "2024-07-27"


@pytest.mark.parametrize("other", ["template", "file"])
def test_a_manifest_that_is_not_about_this_template_is_not_taken(tmp_path: Path, other: str) -> None:
    base = base_model(tmp_path / "base", "plain ChatML", eos="<|im_end|>")
    adopt(str(base), role="policy", end_of_turn="<|stop|>")
    if other == "file":
        (base / MANIFEST_NAME).write_text('{"name": "of another program"}')
    else:
        (base / "chat_template.jinja").write_text("{# changed #}" + KINDS["plain ChatML"])
    encoder, lines = encoder_of(base, tmp_path)
    assert encoder.end_of_turn_id == END
    assert any("nothing is taken from" in line for line in lines)
