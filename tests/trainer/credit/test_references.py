"""The references of one SFT model: which pairs are compared, what each is asked, and what is refused."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from dense_reward import Client, ScoredResponse, ScoreOptions
from dense_reward.client.requests import ItemToScore
from dense_reward.records import FloatArray
from dense_reward.schemas import ModelCard
from dense_reward_trainer.credit.references import References, pair_of
from dense_reward_trainer.errors import JobError
from dense_reward_trainer.rl.reward_service import PinnedPair, cards_of_one_sft

CHATS = [[{"role": "user", "content": "?"}, {"role": "assistant", "content": text}] for text in ("one", "two")]
SFT_T = np.array([-1.0, -2.0], dtype=np.float32)


def card(name: str, sft: str = "sft", tokenizer: str = "t", quantities: Sequence[str] = ("centred", "kl")) -> ModelCard:
    return ModelCard(
        name=name,
        sft=sft,
        reference=f"{name}/reference",
        revision="r",
        tokenizer_sha256=tokenizer,
        renderer="plain",
        end_of_turn_id=None,
        dtype="float32",
        device="cpu",
        vocabulary=8,
        max_length_tokens=64,
        quantities=[*quantities],
        related=True,
    )


class FakeClient:
    """Answers every item with two tokens: the given sft log-probs, and a reward of its own."""

    def __init__(self, sft_T: FloatArray, reward: float) -> None:
        self.sft_T, self.reward_T = sft_T, np.full(len(sft_T), reward, dtype=np.float32)
        self.asked: list[ScoreOptions] = []

    def score_items(self, items: Sequence[ItemToScore], *, options: ScoreOptions) -> SimpleNamespace:
        self.asked.append(options)
        found = SimpleNamespace(
            sft_logprob=self.sft_T, reward=self.reward_T, centred=self.reward_T - 1, alternatives=None
        )
        return SimpleNamespace(results=tuple(cast(ScoredResponse, found) for _ in items))


def pinned(client: FakeClient, name: str, quantities: Sequence[str] = ("centred", "kl")) -> PinnedPair:
    return PinnedPair(cast(Client, client), card(name, quantities=quantities), request_tokens=1000)


def test_every_answer_has_the_signals_of_the_sft_model_once_and_those_of_each_reference() -> None:
    first, second = FakeClient(SFT_T, 3.0), FakeClient(SFT_T, 5.0)
    references = References((pinned(first, "early"), pinned(second, "base")))
    answers = list(references.score_chats(CHATS, ["offsets"]))
    assert references.columns == ("sft_logprob", "reward:early", "centred:early", "reward:base", "centred:base")
    assert len(answers) == 2
    for answer in answers:
        assert tuple(answer.signals) == references.columns
        assert {column: float(values_T[0]) for column, values_T in answer.signals.items()} == {
            "sft_logprob": -1.0,
            "reward:early": 3.0,
            "centred:early": 2.0,
            "reward:base": 5.0,
            "centred:base": 4.0,
        }
    (asked_first,), (asked_second,) = first.asked, second.asked
    assert asked_first.include == ["centred", "offsets", "reward", "sft_logprob"]
    assert asked_second.include == ["centred", "reward", "sft_logprob"]
    assert (asked_first.model, asked_second.model) == ("early", "base")


def test_what_an_engine_does_not_compute_is_left_out_by_name() -> None:
    references = References((pinned(FakeClient(SFT_T, 0.0), "early", ()), pinned(FakeClient(SFT_T, 0.0), "base")))
    assert references.columns == ("sft_logprob", "reward:early", "reward:base", "centred:base")
    assert references.left_out == ("entropy_corrected", "z_score", "margin", "centred:early")
    assert references.names == {"early": "early/reference", "base": "base/reference"}


def test_likeliest_ids_are_requested_of_the_first_pair_only() -> None:
    first, second = FakeClient(SFT_T, 0.0), FakeClient(SFT_T, 0.0)
    quantities = ("centred", "alternatives")
    references = References((pinned(first, "early", quantities), pinned(second, "base", quantities)))
    with pytest.raises(JobError, match="returned no alternatives"):
        list(references.score_chats(CHATS))
    assert [options.top_k for options in (*first.asked, *second.asked)] == [1, 0]


def test_pairs_whose_sft_models_have_one_name_and_other_weights_are_refused() -> None:
    references = References((pinned(FakeClient(SFT_T, 0.0), "early"), pinned(FakeClient(SFT_T - 1, 0.0), "base")))
    with pytest.raises(JobError, match=r"early and base name the same SFT model, sft, .* differ by 1.00 .*Restart"):
        list(references.score_chats(CHATS))


def test_the_pair_of_a_column_is_what_follows_its_signal() -> None:
    assert [pair_of(column) for column in ("sft_logprob", "reward:early", "centred:a.b")] == [None, "early", "a.b"]


def test_all_pairs_of_one_sft_model_are_chosen_or_those_that_are_named() -> None:
    cards = [card("base"), card("early"), card("other", sft="another")]
    assert [one.name for one in cards_of_one_sft(cards[:2], None)] == ["base", "early"]
    assert [one.name for one in cards_of_one_sft(cards, ["early", "base"])] == ["early", "base"]
    assert [one.name for one in cards_of_one_sft(cards, ["other"])] == ["other"]


@pytest.mark.parametrize(
    ("cards", "names", "complaint"),
    [
        ([card("a"), card("b", sft="x")], None, r"several SFT models \(a: sft, b: x\): set service_pairs"),
        ([card("a"), card("b", sft="x")], ["a", "b"], "several SFT models"),
        ([card("a"), card("b", tokenizer="u")], None, "a, b have several tokenizers: set service_pairs"),
        ([card("a")], ["c"], "'c' does not name one pair; served: a"),
        ([], None, "serves nothing yet"),
    ],
    ids=["of two models", "named of two models", "of two tokenizers", "unknown", "nothing"],
)
def test_pairs_that_cannot_be_compared_are_refused(
    cards: list[ModelCard], names: list[str] | None, complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        cards_of_one_sft(cards, names)
