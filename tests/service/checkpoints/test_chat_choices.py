"""Adoption asks what precedes a response, what ends a turn and which date is written, and stores the answers."""

import json
from pathlib import Path

import pytest
import torch
from dense_reward.checkpoints.adopt import adopt
from dense_reward.cli import main
from dense_reward.engines.proof import Checkpoint, encoder_of, pair_info, report_template
from dense_reward.engines.tokenizer import load_tokenizer
from dense_reward.engines.torch.load import LoadContext, ServingOptions, load_pair
from dense_reward.errors import CheckpointError
from dense_reward.hashed_files import MANIFEST_NAME
from dense_reward.manifest import Manifest, check_pair, load_manifest
from dense_reward.text.encode import Encoder
from kinds_of_templates import AGREE, DIFFER, KINDS
from tiny_models import tiny_model, write_tokenizer
from tiny_tokenizers import gemma_like

SPECIALS = ("<|im_end|>", "<|endoftext|>", "<|im_start|>", "<|stop|>")
UNCLEAR = "what ends a turn is not clear"


def made(
    folder: Path,
    kind: str,
    *,
    seed: int = 0,
    eos: int | list[int] | None = None,
    specials: tuple[str, ...] = SPECIALS,
) -> Path:
    """A checkpoint of another program; its EOS is the first of its special tokens."""
    folder.mkdir(parents=True)
    model = tiny_model(seed=seed, dtype=torch.float32)
    model.resize_token_embeddings(256 + len(SPECIALS), mean_resizing=False)
    model.generation_config.eos_token_id = eos
    model.save_pretrained(folder)
    write_tokenizer(folder, specials=specials, template=KINDS[kind])
    return folder


def adopted(folder: Path, kind: str, *, role: str = "sft", seed: int = 0, **options: object) -> Manifest:
    made(folder, kind, seed=seed)
    adopt(str(folder), role=role, run_id="mine", **options)  # type: ignore[arg-type]
    return load_manifest(folder)


def refusal(folder: Path, **options: object) -> str:
    with pytest.raises(CheckpointError) as caught:
        adopt(str(folder), role="sft", **options)  # type: ignore[arg-type]
    assert not (folder / MANIFEST_NAME).exists()
    return str(caught.value)


@pytest.mark.parametrize("kind", [kind for kind in AGREE if kind != "two ends"])
def test_a_template_that_agrees_with_itself_needs_no_decision(tmp_path: Path, kind: str) -> None:
    lines: list[str] = []
    manifest = adopted(tmp_path / "a", kind, report=lines.append)
    assert (manifest.template_kwargs, manifest.response_prefix) == ({}, None)
    verdict = "chat template: texts are served; prompt, response and end of turn have the ids of its own rendering"
    assert verdict in lines
    assert "end of turn: '<|im_end|>', named by the chat template, the tokenizer" in lines


@pytest.mark.parametrize("kind", DIFFER)
def test_a_checkpoint_without_a_decision_is_adopted_and_says_that_texts_are_refused(tmp_path: Path, kind: str) -> None:
    lines: list[str] = []
    manifest = adopted(tmp_path / "a", kind, report=lines.append)
    assert manifest.response_prefix is None
    assert len(manifest.probe) > 1, "ids are served"
    assert any("will be refused until this is decided" in line and "--response-prefix ''" in line for line in lines)
    reported: list[str] = []
    tokenizer = load_tokenizer(tmp_path / "a")
    report_template(encoder_of(tokenizer, manifest, tmp_path), tokenizer, manifest, reported.append)
    assert "undecided_template" in reported[0]


def test_the_decision_is_kept_and_both_checkpoints_must_have_the_same(tmp_path: Path) -> None:
    sft = adopted(tmp_path / "a", "an empty thought", template_kwargs={"enable_thinking": False})
    reference = adopted(tmp_path / "b", "an empty thought", role="reference", seed=1, response_prefix="")
    assert sft.template_kwargs == {"enable_thinking": False}
    with pytest.raises(CheckpointError, match=r"differ in template_kwargs .*same --template-kwargs"):
        check_pair(sft, reference, allow_unrelated=True)
    same = reference.model_copy(update={"template_kwargs": {"enable_thinking": False}})
    with pytest.raises(CheckpointError, match=r'differ in response_prefix \(nothing and ""\).*same --response-prefix'):
        check_pair(sft, same, allow_unrelated=True)
    check_pair(sft, same.model_copy(update={"response_prefix": None}), allow_unrelated=True)


def test_manifests_of_earlier_versions_load(tmp_path: Path) -> None:
    adopted(tmp_path / "a", "plain ChatML")
    path = tmp_path / "a" / MANIFEST_NAME
    fields = json.loads(path.read_text())
    for name in ("template_kwargs", "response_prefix", "template_date"):
        del fields[name]
    path.write_text(json.dumps(fields))
    assert load_manifest(tmp_path / "a").choices.response_prefix is None


def test_the_decision_is_part_of_the_revision(tmp_path: Path) -> None:
    manifest = adopted(tmp_path / "a", "plain ChatML")

    def revision(**changes: object) -> str:
        changed = Checkpoint("sft", tmp_path, manifest.model_copy(update=changes), "float32")
        limits = {"vocab_size": 1, "max_length_tokens": 1}
        none: frozenset[str] = frozenset()
        return pair_info([changed] * 2, options=[], device="cpu", quantities=none, related=True, **limits).revision

    revisions = [
        revision(),
        revision(response_prefix=""),
        revision(template_kwargs={"enable_thinking": False}),
        revision(template_date="2024-07-26"),
    ]
    assert len(set(revisions)) == 4


def test_a_variable_that_the_template_does_not_read_is_refused(tmp_path: Path) -> None:
    folder = made(tmp_path / "a", "an empty thought")
    message = refusal(folder, template_kwargs={"enable_thinkin": False})
    assert "no variable 'enable_thinkin'; it reads enable_thinking" in message
    assert "is for chat templates" in refusal(folder, renderer="plain", response_prefix="")


def test_a_template_that_drops_words_is_refused(tmp_path: Path) -> None:
    folder = made(tmp_path / "a", "plain ChatML")
    write_tokenizer(folder, specials=SPECIALS, template="{{ messages[0].content }}<|im_end|>")
    assert "drops or changes the words of the user or the assistant" in refusal(folder)
    write_tokenizer(folder, specials=SPECIALS, template="{% if %}")
    assert "the chat template refuses these messages" in refusal(folder)


@pytest.mark.parametrize(
    ("kind", "eos", "named"),
    [
        ("no end of turn", None, "<|im_end|>"),
        ("two ends", None, "<|im_end|>"),
        ("no end of turn", [256, 257], "<|endoftext|>"),
    ],
)
def test_where_template_tokenizer_and_generation_disagree_the_end_of_turn_must_be_named(
    tmp_path: Path, kind: str, eos: list[int] | None, named: str
) -> None:
    folder = made(tmp_path / "a", kind, eos=eos)
    message = refusal(folder)
    assert UNCLEAR in message
    assert "the tokenizer's eos_token is '<|im_end|>'" in message
    assert "--end-of-turn TOKEN" in message
    adopt(str(folder), role="sft", end_of_turn=named)
    assert load_manifest(folder).end_of_turn_id == SPECIALS.index(named) + 256


def test_generation_config_can_confirm_the_templates_end_of_turn(tmp_path: Path) -> None:
    base_eos = ("<|endoftext|>", "<|im_end|>", "<|im_start|>")
    assert UNCLEAR in refusal(made(tmp_path / "a", "plain ChatML", specials=base_eos))
    folder = made(tmp_path / "b", "plain ChatML", specials=base_eos, eos=[256, 257])
    adopt(str(folder), role="sft")
    assert load_manifest(folder).end_of_turn_id == 257
    (folder / "generation_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="is not a JSON object"):
        adopt(str(folder), role="sft")


def test_a_date_is_kept_in_the_manifest_and_two_days_are_no_pair(tmp_path: Path) -> None:
    lines: list[str] = []
    today = adopted(tmp_path / "a", "the date", report=lines.append)
    assert today.template_date is not None
    assert any(today.template_date in line for line in lines)
    other = adopted(tmp_path / "b", "the date", role="reference", seed=1, template_date="2024-07-26")
    with pytest.raises(CheckpointError, match=r"differ in template_date .*same --template-date"):
        check_pair(today, other, allow_unrelated=True)
    assert "which is not a date" in refusal(made(tmp_path / "c", "the date"), template_date="26 July")


def test_a_manifest_without_a_date_is_reported_at_load(tmp_path: Path) -> None:
    for name, role, seed in (("a", "sft", 0), ("b", "reference", 1)):
        manifest = adopted(tmp_path / name, "the date", role=role, seed=seed)
        undated = manifest.model_copy(update={"template_date": None})
        (tmp_path / name / MANIFEST_NAME).write_text(undated.model_dump_json())
    lines: list[str] = []
    serving, tokenizer = ServingOptions(max_batch_tokens=1024), load_tokenizer(tmp_path / "a")
    load_pair(tmp_path / "a", tmp_path / "b", serving, LoadContext(lines.append))
    manifest = load_manifest(tmp_path / "a")
    report_template(encoder_of(tokenizer, manifest, tmp_path), tokenizer, manifest, lines.append)
    assert "will get different rewards tomorrow: adopt both" in lines[-1]


def test_a_pair_that_an_earlier_version_trained_with_a_dummy_prefix_is_reported(tmp_path: Path) -> None:
    manifest = adopted(tmp_path / "a", "plain ChatML")
    encoder, tokenizer = Encoder.of(gemma_like(), "plain"), load_tokenizer(tmp_path / "a")
    fields = {**manifest.model_dump(), "data_sha256": "d", "renderer": "plain"}
    lines: list[str] = []
    report_template(encoder, tokenizer, Manifest.model_validate(fields), lines.append)
    assert not lines, "of this version"
    del fields["response_prefix"]
    report_template(encoder, tokenizer, Manifest.model_validate(fields), lines.append)
    assert "train the pair again, or send ids" in lines[0]


def test_the_command_takes_the_choices_and_prints_what_it_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = made(tmp_path / "a", "an empty thought")
    command = ["adopt", str(folder), "--role", "sft"]
    assert main(command) == 0
    assert "--template-kwargs '{\"enable_thinking\": false}'" in capsys.readouterr().out
    assert main([*command, "--template-kwargs", '{"enable_thinking": false}']) == 0
    assert "have the ids of its own rendering" in capsys.readouterr().out
    assert main([*command, "--response-prefix", ""]) == 0
    assert load_manifest(folder).response_prefix == ""
    for wrong in ("{enable_thinking: false}", "[]"):
        assert main([*command, "--template-kwargs", wrong]) == 2
        assert "--template-kwargs" in capsys.readouterr().err
