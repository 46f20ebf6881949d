"""Adoption reports what it found, with the next command; a check reports the same and writes nothing."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from dense_reward.checkpoints.adopt import adopt
from dense_reward.cli import main
from dense_reward.errors import CheckpointError
from dense_reward.hashed_files import MANIFEST_NAME
from dense_reward.heatmap.example import ExampleTokens
from kinds_of_templates import KINDS
from peft import LoraConfig, get_peft_model
from tiny_models import CHAT, tiny_model, write_tokenizer

SPECIALS = ("<|im_end|>", "<|im_start|>", "<|stop|>")
# peft 0.21 asks transformers 5.23 for an attribute by its old name
OLD_NAME_IN_PEFT = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def made(folder: Path, template: str | None = CHAT, *, seed: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    model = tiny_model(seed=seed, dtype=torch.float32)
    model.resize_token_embeddings(256 + len(SPECIALS), mean_resizing=False)
    model.generation_config.eos_token_id = 256
    model.save_pretrained(folder)
    write_tokenizer(folder, specials=SPECIALS, template=template)
    return folder


def lines_of(folder: Path, **options: object) -> list[str]:
    lines: list[str] = []
    adopt(str(folder), report=lines.append, **options)  # type: ignore[arg-type]
    return lines


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_facts_of_model_template_and_tokenizer(tmp_path: Path) -> None:
    folder = made(tmp_path / "a", KINDS["plain ChatML"])
    model = tiny_model()
    model.resize_token_embeddings(256 + len(SPECIALS), mean_resizing=False)
    lines = lines_of(folder, role="sft", run_id="mine")
    assert lines[0] == f"architecture: LlamaForCausalLM, {model.num_parameters():,} parameters"
    assert lines[1:6] == [
        "dtype: float32",
        "path: packed",
        "longest sequence: 256 tokens",
        "vocabulary: 259 output rows, 259 ids in the tokenizer",
        "chat template: texts are served; prompt, response and end of turn have the ids of its own rendering",
    ]
    assert lines[6:] == [
        "template variables: none",
        "end of turn: '<|im_end|>', named by the chat template, the tokenizer, generation_config.json",
        f"adopted: {folder}",
        "next: dense-reward adopt EARLIER_CHECKPOINT --role reference --run-id mine",
    ]


def test_a_template_that_needs_a_decision_has_no_example(tmp_path: Path) -> None:
    folder = made(tmp_path / "a", KINDS["an empty thought"])
    drawn: list[ExampleTokens] = []

    def draw(example: ExampleTokens) -> str:
        drawn.append(example)
        return "drawn"

    lines = lines_of(folder, role="sft", draw=draw)
    assert any(line.startswith("chat template: needs a decision; texts and chats will be refused") for line in lines)
    assert "template variables: enable_thinking (not set)" in lines
    assert lines[-1] == f"next: dense-reward adopt {folder} CHOICE, with one of the choices above, for both checkpoints"
    assert drawn == []
    lines = lines_of(folder, response_prefix="<think>\n\n</think>\n", draw=draw)
    assert any(line.startswith("chat template: texts are served; prompt, response and end") for line in lines)
    assert "example, as tokens:\ndrawn" in lines
    (example,) = drawn
    assert "".join(example.prompt).endswith("Norway?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n")
    assert ("".join(example.response), example.end) == ("It is Oslo.", ("<|im_end|>",))
    as_generated = lines_of(folder, response_prefix="")
    assert "chat template: texts are served; response_prefix decides what precedes a response" in as_generated
    assert lines[-1].endswith(r"--response-prefix $'<think>\n\n</think>\n'"), "the other needs the same decision"


def test_a_tokenizer_without_chat_template(tmp_path: Path) -> None:
    lines = lines_of(made(tmp_path / "a", None), role="sft", run_id="mine", renderer="plain")
    assert "chat template: not used, because the renderer is plain; texts are served" in lines
    assert "end of turn: '<|im_end|>', named by the tokenizer" in lines
    assert lines[-1].endswith("--run-id mine --renderer plain")


def test_an_end_of_turn_that_only_the_user_names_is_in_the_next_command(tmp_path: Path) -> None:
    lines = lines_of(made(tmp_path / "a"), role="sft", run_id="mine", end_of_turn="<|stop|>")
    assert "end of turn: '<|stop|>', named by --end-of-turn" in lines
    assert lines[-1].endswith("--run-id mine --end-of-turn '<|stop|>'")


@OLD_NAME_IN_PEFT
def test_an_adapter_and_its_base(tmp_path: Path) -> None:
    base = made(tmp_path / "base")
    model = tiny_model(dtype=torch.float32)
    model.resize_token_embeddings(256 + len(SPECIALS), mean_resizing=False)
    adapter = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    adapter.peft_config["default"].base_model_name_or_path = str(base)
    adapter.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    write_tokenizer(tmp_path / "adapter", specials=SPECIALS, template=CHAT)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # a user cannot act on what peft calls in transformers
        lines = lines_of(tmp_path / "adapter", role="sft")
    assert lines[1] == f"adapter: LoRA, rank 2; base model: {base} (in the manifest: ../base)"


def test_a_pair_is_served_next(tmp_path: Path) -> None:
    sft, reference = made(tmp_path / "a"), made(tmp_path / "my reference", seed=1)
    adopt(str(sft), role="sft", run_id="mine")
    served = f"next: dense-reward serve --sft {sft} --reference '{reference}'"
    assert lines_of(reference, role="reference", run_id="mine")[-1] == served
    assert lines_of(sft)[-1] == served
    evaluated = f"next: dense-reward-train evaluate evaluate_full 'policies={{sft: SFT_CHECKPOINT, policy: {sft}}}'"
    assert lines_of(sft, role="policy")[-1] == f"{evaluated} held_out=HELD_OUT_FILE"
    assert "dense-reward adopt FINISHED_CHECKPOINT --role sft --run-id other" in lines_of(reference, run_id="other")[-1]


def test_a_check_reports_the_same_and_writes_nothing(tmp_path: Path) -> None:
    folder = made(tmp_path / "a")
    before = contents(folder)
    checked = lines_of(folder, check=True)
    assert checked[-1] == f"checked: {folder} can be adopted; nothing was written"
    lines_of(folder, check=True, out=tmp_path / "side")
    assert contents(tmp_path) == {f"a/{name}": content for name, content in before.items()}
    adopted = lines_of(folder, role="sft")
    assert adopted[:-2] == checked[:-1]
    before = contents(folder)
    lines = lines_of(folder, check=True)
    assert lines[-2] == f"manifest.json: matches files, tokenizer, chat template and probe ({folder})"
    assert contents(folder) == before


def changed_weights(folder: Path) -> None:
    made(folder, seed=1)


def changed_template(folder: Path) -> None:
    write_tokenizer(folder, specials=SPECIALS, template=KINDS["plain ChatML"])


def changed_probe(folder: Path) -> None:
    path = folder / MANIFEST_NAME
    content = json.loads(path.read_text())
    content["probe"][0]["responses"][0]["logprobs"][0] -= 1.0
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (changed_weights, "model.safetensors does not match its hash"),
        (changed_template, "does not match its hash"),
        (changed_probe, "their log-probs differ from its probe"),
    ],
)
def test_a_check_finds_a_manifest_that_does_not_match(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Path], None], reason: str
) -> None:
    folder = made(tmp_path / "a")
    adopt(str(folder), role="sft")
    change(folder)
    before = contents(folder)
    assert main(["adopt", str(folder), "--check"]) == 2
    output = capsys.readouterr()
    (error,) = [line for line in output.err.splitlines() if line.startswith("dense-reward: ")]
    assert "manifest.json does not match any more: " in error
    assert reason in error
    assert "architecture: " in output.out, "what was found is reported all the same"
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"out": "file/side"}, "cannot be written: name a folder that can be written (--out)"),
        ({"dtype": "float99"}, "dtype 'float99' cannot be served: name one of float32, bfloat16"),
        ({"end_of_turn": "bye"}, "must be one token"),
        ({"device": "cuda"}, "device cuda: torch can use no GPU"),
    ],
)
def test_what_adoption_refuses_a_check_refuses(tmp_path: Path, options: dict[str, str], reason: str) -> None:
    if options.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    folder = made(tmp_path / "a")
    (tmp_path / "file").write_text("")
    given: dict[str, object] = {**options}
    if "out" in options:
        given["out"] = tmp_path / options["out"]
    messages = []
    for check in (True, False):
        with pytest.raises(CheckpointError) as caught:
            adopt(str(folder), role="sft", check=check, **given)  # type: ignore[arg-type]
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert reason in messages[0]


def test_the_command_draws_no_colour_into_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = made(tmp_path / "a", KINDS["plain ChatML"])
    assert main(["adopt", str(folder), "--check"]) == 0
    output = capsys.readouterr().out
    assert "\x1b" not in output
    assert "response (scored):\n  I|t|␣|i|s|␣|O|s|l|o|.|\n" in output
