"""A pair that was trained in a template with thoughts: texts and ids get the same rewards, or texts are refused."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from dense_reward.checkpoints.adopt import adopt
from dense_reward.manifest import Role
from dense_reward.serving.loaders import loader
from dense_reward_trainer.cli import main
from dense_reward_trainer.configs.sft import ScratchOptions
from dense_reward_trainer.data.sources import DataSource, Demonstration, load
from dense_reward_trainer.sft.from_scratch import random_model, train_tokenizer
from kinds_of_templates import KINDS
from running_service import Served, served
from transformers import AutoTokenizer, PreTrainedTokenizerBase

pytestmark = pytest.mark.slow

ADDITIONS = {"source": "arithmetic", "held_out_fraction": 0.1, "arithmetic": {"demonstrations": 400, "digits": 2}}
SIZES = ScratchOptions(vocabulary=300, hidden_size=64, layers=2, heads=2, intermediate_size=128)
OFF = {"enable_thinking": False}
Rewards = list[list[float]]


@pytest.fixture(scope="module")
def additions() -> tuple[Demonstration, ...]:
    return load(DataSource.model_validate(ADDITIONS)).demonstrations[-20:]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of a run that learnt additions without thoughts, in a template that can think."""
    folder = tmp_path_factory.mktemp("thinking")
    demonstrations = load(DataSource.model_validate(ADDITIONS)).demonstrations
    texts = [message.content for one in demonstrations for message in one.messages]
    tokenizer = train_tokenizer(texts, SIZES.vocabulary)
    tokenizer.chat_template = KINDS["an empty thought"]
    tokenizer.save_pretrained(folder / "base")
    random_model(SIZES, tokenizer, seed=0).save_pretrained(folder / "base")
    given = [f"base_model={folder / 'base'}", f"output_dir={folder}", f"data={json.dumps(ADDITIONS)}", "threads=1"]
    how = ["milestones.reference=0.1", "max_steps=150", "batch_size=16", "learning_rate=3e-3", "eval_every_steps=null"]
    how += ["max_length_tokens=128"]
    assert main(["sft", "sft_full_tiny", *given, *how, "precision=float32", f"template_kwargs={json.dumps(OFF)}"]) == 0
    return folder / "checkpoints"


@pytest.fixture(scope="module")
def service(pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The pair as its run left it, and adopted without a decision."""
    folder = tmp_path_factory.mktemp("undecided")
    roles: list[Role] = ["sft", "reference"]
    for role in roles:
        adopt(str(pair / role), role=role, run_id="undecided", out=folder / role, ignore_manifest=True)
    pairs = [
        {"name": name, "sft": str(where / "sft"), "reference": str(where / "reference")}
        for name, where in (("decided", pair), ("undecided", folder))
    ]
    (folder / "pairs.json").write_text(json.dumps(pairs))
    with served(loader("torch"), pairs_file=folder / "pairs.json", device="cpu", threads=1) as running:
        yield running


def rewards(service: Served, bodies: list[dict[str, object]], name: str) -> tuple[Rewards, float]:
    """The rewards of each body, and the mean log-prob of a response under the sft model."""
    found, logprobs = [], 0.0
    for body in bodies:
        answer = service.score({**body, "model": name, "include": ["reward", "sft_logprob"]})
        assert answer.status_code == 200, answer.text
        result = answer.json()["results"][0]
        found.append(result["reward"])
        logprobs += sum(result["sft_logprob"]) / len(bodies)
    return found, logprobs


def messages_of(one: Demonstration) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in one.messages]


def exact(tokenizer: PreTrainedTokenizerBase, one: Demonstration) -> dict[str, object]:
    """The ids that a training program makes of the template's own rendering of the whole chat."""
    ids = tokenizer(tokenizer.apply_chat_template(messages_of(one), tokenize=False), add_special_tokens=False)[
        "input_ids"
    ]
    end = len(ids) - ids[::-1].index(tokenizer.eos_token_id)
    response = tokenizer(one.response, add_special_tokens=False)["input_ids"]
    return {"prompt_ids": ids[: end - 1 - len(response)], "response_ids": [ids[end - 1 - len(response) : end]]}


def test_texts_with_the_decision_texts_with_variables_and_exact_ids_get_equal_rewards(
    service: Served, pair: Path, additions: tuple[Demonstration, ...]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pair / "sft")
    chats: list[dict[str, object]] = [{"messages": messages_of(one)} for one in additions]
    texts: list[dict[str, object]] = [
        {"prompt": one.messages[0].content, "response": one.response} for one in additions
    ]
    by_ids, logprob = rewards(service, [exact(tokenizer, one) for one in additions], "undecided")
    with_variables: list[dict[str, object]] = [{**chat, "template_kwargs": OFF} for chat in chats]
    for bodies, name in ((texts, "decided"), (chats, "decided"), (with_variables, "undecided")):
        by_text, _ = rewards(service, bodies, name)
        for one, other in zip(by_text, by_ids, strict=True):
            assert one == pytest.approx(other, abs=1e-4)
    # What texts got before: the response straight after the generation prompt.
    start = [
        tokenizer.apply_chat_template(messages_of(one)[:1], add_generation_prompt=True, return_dict=False)
        for one in additions
    ]
    straight: list[dict[str, object]] = [
        {"prompt_ids": ids, "response_ids": exact(tokenizer, one)["response_ids"]}
        for ids, one in zip(start, additions, strict=True)
    ]
    assert rewards(service, straight, "undecided")[1] < logprob - 2.0, "it matters what precedes a response"


def test_without_a_decision_texts_are_refused_and_models_say_so(service: Served) -> None:
    for body in (
        {"prompt": "Add 1 and 2.", "response": "3"},
        {"messages": [{"role": "user", "content": "Add 1 and 2."}, {"role": "assistant", "content": "3"}]},
    ):
        answer = service.score({**body, "model": "undecided"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (422, "undecided_template")
        assert "--template-kwargs" in answer.json()["error"]["message"]
    raw = {"prompt": "<|im_start|>user\nHi<|im_end|>\n", "response": "3", "render": "raw", "model": "undecided"}
    assert service.score(raw).status_code == 200
    decided, undecided = service.client.get("/models").json()["models"]
    assert (decided["template_kwargs"], decided["text_refused"]) == (OFF, None)
    assert (undecided["template_kwargs"], undecided["response_prefix"]) == ({}, None)
    assert "must be decided once" in undecided["text_refused"]


def test_a_response_that_contradicts_its_prompt_is_refused(service: Served) -> None:
    answer = service.score({"prompt": "Add 1 and 2.", "response": "<think>hm</think>3", "model": "decided"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "repeated_text")
