"""A resumed SFT run must have the tokens that it was started with; if not, the refusal says what changed."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import pytest
from dense_reward.engines.tokenizer import TransformersTokenizer
from dense_reward.text.encode import Encoder
from dense_reward_trainer.configs.sft import SftConfig
from dense_reward_trainer.data.records import ChatMessage, Demonstration
from dense_reward_trainer.data.tokenised import TokenisedRow, encode_demonstrations
from dense_reward_trainer.errors import ConfigError
from dense_reward_trainer.sft.from_scratch import CHATML, train_tokenizer
from dense_reward_trainer.sft.initial_model import InitialModel
from dense_reward_trainer.sft.pinned_inputs import open_pinned_run
from transformers import PreTrainedTokenizerBase

CHATS = (("Add 1 and 2.", "3"), ("Add 3 and 4.", "7"))


@dataclass(frozen=True, slots=True)
class Start:
    """What a run starts with. No model is needed."""

    tokenizer: PreTrainedTokenizerBase
    encoder: Encoder
    tokenizer_sha256: str = "t"
    base: Path | None = None


def start(template: str = CHATML) -> Start:
    tokenizer = train_tokenizer(["Add 12 and 34."], 270)
    tokenizer.chat_template = template
    return Start(tokenizer, Encoder.of(TransformersTokenizer(tokenizer), "chat"))


def rows_of(begun: Start) -> tuple[TokenisedRow, ...]:
    chats = [
        Demonstration((ChatMessage("user", question), ChatMessage("assistant", answer)), None, "here:1")
        for question, answer in CHATS
    ]
    return encode_demonstrations(chats, begun.encoder, every_turn=False, limit_tokens=200, skip_bad=False).rows


def opened(
    folder: Path, begun: Start, *, data: str = "d", rows: tuple[TokenisedRow, ...] | None = None, processes: int = 1
) -> dict[str, str]:
    """The identity that is recorded."""
    config = SftConfig.model_validate({"output_dir": folder, "base_model": "base", "data": {"source": "arithmetic"}})
    open_pinned_run(config, cast(InitialModel, begun), data, rows_of(begun) if rows is None else rows, processes)
    identity: dict[str, str] = json.loads((folder / "run.json").read_text())["identity"]
    return identity


def refusal(
    folder: Path, begun: Start, *, data: str = "d", rows: tuple[TokenisedRow, ...] | None = None
) -> tuple[str, bool]:
    """The error, and whether run.json is as it was."""
    before = (folder / "run.json").read_bytes()
    with pytest.raises(ConfigError) as refused:
        opened(folder, begun, data=data, rows=rows)
    return str(refused.value), before == (folder / "run.json").read_bytes()


def test_the_same_inputs_go_on_and_are_recorded(tmp_path: Path) -> None:
    identity = opened(tmp_path, start())
    assert list(identity) == ["data", "tokenizer", "chat template", "encoded rows", "processes"]
    assert opened(tmp_path, start()) == identity


def test_a_changed_template_is_named_with_its_cure_and_nothing_is_written(tmp_path: Path) -> None:
    opened(tmp_path, start())
    message, kept = refusal(tmp_path, start("Hello. " + CHATML))
    assert "started with a different chat template: restore it, or name the hub's older revision" in message
    assert "another output_dir. The run so far is kept" in message
    assert kept


def test_changed_data_explains_all_other_changes(tmp_path: Path) -> None:
    opened(tmp_path, start())
    message, kept = refusal(tmp_path, start(), data="other", rows=rows_of(start())[:1])
    assert "started with different data (the demonstrations): restore the source" in message
    assert kept


def test_other_weights_of_the_base_model_are_named(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    (base / "model.safetensors").write_bytes(b"first")
    begun = replace(start(), base=base)
    opened(tmp_path / "run", begun)
    (base / "model.safetensors").write_bytes(b"other")
    message, kept = refusal(tmp_path / "run", begun)
    assert "started with other weights of the base model: restore its files" in message
    assert kept


def test_another_number_of_processes_is_refused(tmp_path: Path) -> None:
    opened(tmp_path, start(), processes=1)
    with pytest.raises(
        ConfigError, match=r"started with another number of processes \(1 -> 2\): launch it on as many GPUs as before"
    ):
        opened(tmp_path, start(), processes=2)


def test_a_date_in_the_template_is_named_if_only_the_rows_changed(tmp_path: Path) -> None:
    dated = "{% set today = strftime_now('%d') if strftime_now is defined else '1' %}" + CHATML
    opened(tmp_path, start(dated))
    message, _ = refusal(tmp_path, start(dated), rows=rows_of(start(dated))[::-1])
    assert "although data, tokenizer and chat template are the same: the chat template writes a date" in message


def test_a_changed_library_is_named_if_only_the_rows_changed(tmp_path: Path) -> None:
    opened(tmp_path, start())
    assert "reads something that changed" in refusal(tmp_path, start(), rows=rows_of(start())[::-1])[0]
    record = json.loads((tmp_path / "run.json").read_text())
    record["versions"]["transformers"] = "1.0"
    (tmp_path / "run.json").write_text(json.dumps(record))
    assert "libraries changed (transformers 1.0 -> " in refusal(tmp_path, start(), rows=rows_of(start())[::-1])[0]


def test_a_run_of_an_older_version_which_pinned_less_goes_on_and_pins_more(tmp_path: Path) -> None:
    whole = opened(tmp_path, start())
    record = json.loads((tmp_path / "run.json").read_text())
    record["identity"] = {"data": "d", "tokenizer": "t"}
    (tmp_path / "run.json").write_text(json.dumps(record))
    assert opened(tmp_path, start()) == whole
