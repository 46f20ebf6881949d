"""The rows of an answer: every array is its definition, and nothing that is not finite is answered."""

import base64
from dataclasses import replace
from typing import cast

import numpy as np
import orjson
import pytest
from dense_reward import reward
from dense_reward.engines.fake import EOS_ID, VOCABULARY, FakeEngine, FakeTokenizer
from dense_reward.errors import RequestError
from dense_reward.http.bodies import fragment
from dense_reward.records import FloatArray, TokenScores, Wants
from dense_reward.schemas import ArrayName, ScoreRequest, SignalName
from dense_reward.scoring.items import Limits, PreparedItem, prepare
from dense_reward.scoring.rows import Alternatives, Row, RowBuilder, wants
from dense_reward.text.encode import Encoder
from numpy.typing import NDArray

ENCODER = Encoder.of(FakeTokenizer(), "plain")
LIMITS = Limits(VOCABULARY, max_length_tokens=100, max_responses=8, max_json_depth=9)
IDS = {"prompt_ids": [1, 2], "response_ids": [[3, 200, EOS_ID], [], [7]]}
TEXT = {"prompt": "2+2=", "responses": ["4☃", ""]}
SUMMARY = {"item", "response", "sum", "mean", "min", "length"}
PER_TOKEN: tuple[ArrayName, ...] = (
    *(
        "token_ids",
        "offsets",
        "reward",
        "sft_logprob",
        "reference_logprob",
        "kl",
        "centred",
        "entropy",
        "varentropy",
        "return_to_go",
    ),
)


def scored(body: dict[str, object]) -> tuple[ScoreRequest, PreparedItem, list[TokenScores]]:
    request = ScoreRequest.model_validate(body)
    item = prepare(request, request, ENCODER, LIMITS)
    return request, item, FakeEngine().score([item.trunk], wants(request))[0]


def rows_of(**body: object) -> list[Row]:
    request, item, scores = scored(body)
    return RowBuilder(request, FakeTokenizer()).rows(5, item, scores)


def array(row: Row, name: str) -> NDArray[np.float32]:
    return cast(NDArray[np.float32], row[name])


def test_text_is_answered_with_ids_pieces_offsets_and_rewards() -> None:
    first, second = rows_of(**TEXT)
    assert set(first) == set(second) == SUMMARY | {"token_ids", "tokens", "offsets", "reward"}
    assert first["tokens"] == ["4", "\ufffd", "\ufffd", "\ufffd", "<eos>"]
    assert array(first, "offsets").tolist() == [[0, 1], [1, 1], [1, 1], [1, 2], [2, 2]]
    assert array(first, "token_ids").tolist() == [*"4☃".encode(), EOS_ID]
    assert array(second, "offsets").tolist() == [[0, 0]]


def test_ids_are_answered_with_ids_and_rewards() -> None:
    for row in rows_of(**IDS):
        assert set(row) == SUMMARY | {"token_ids", "reward"}


@pytest.mark.parametrize("signal", ["centred", "sft_logprob"])
def test_another_signal_is_answered_beside_the_reward(signal: SignalName) -> None:
    for row in rows_of(**IDS, signal=signal):
        assert set(row) == SUMMARY | {"token_ids", "reward", signal}


def test_rows_know_their_item_and_response_and_keep_their_order() -> None:
    rows = rows_of(**IDS)
    assert [(row["item"], row["response"], row["length"]) for row in rows] == [(5, 0, 3), (5, 1, 0), (5, 2, 1)]


def test_exactly_the_included_arrays_are_answered() -> None:
    for names in ([], ["kl"], ["offsets"], ["text"], [*PER_TOKEN, "tokens", "text"]):
        for row in rows_of(**IDS, include=names):
            assert set(row) == SUMMARY | set(names)


def test_every_array_is_its_definition() -> None:
    body: dict[str, object] = {**IDS, "include": list(PER_TOKEN), "signal": "centred", "gamma": 0.5}
    _, _, scores = scored(body)
    for row, score in zip(rows_of(**body), scores, strict=True):
        assert array(row, "sft_logprob").tolist() == score.sft_logprob_S.tolist()
        assert array(row, "reference_logprob").tolist() == score.reference_logprob_S.tolist()
        assert array(row, "reward").tolist() == reward.reward(score).tolist()
        assert array(row, "kl").tolist() == cast(FloatArray, score.kl_S).tolist()
        assert array(row, "entropy").tolist() == cast(FloatArray, score.entropy_S).tolist()
        assert array(row, "varentropy").tolist() == cast(FloatArray, score.varentropy_S).tolist()
        assert array(row, "centred").tolist() == reward.centred(score).tolist()
        assert array(row, "return_to_go").tolist() == reward.return_to_go(reward.centred(score), 0.5).tolist()


def alternatives(row: Row) -> Alternatives:
    return cast(Alternatives, row["alternatives"])


@pytest.mark.parametrize("name", ["reward", "centred", "sft_logprob"])
def test_summaries_and_segments_are_of_the_chosen_signal(name: SignalName) -> None:
    body: dict[str, object] = {**IDS, "signal": name, "segments": [[[0, 2], [2, 2]], [], [[0, 1]]]}
    _, _, scores = scored(body)
    spans: list[list[tuple[int, int]]] = [[(0, 2), (2, 2)], [], [(0, 1)]]
    for row, score, of_response in zip(rows_of(**body), scores, spans, strict=True):
        values_S = reward.signal(name, score)
        summary = reward.summarise(values_S)
        assert (row["sum"], row["mean"], row["min"]) == (summary.sum, summary.mean, summary.min)
        assert array(row, "segments").tolist() == reward.segment_sums(values_S, of_response).tolist()


def test_an_empty_response_has_empty_arrays_sum_0_and_no_mean() -> None:
    row = rows_of(**IDS, include=[*PER_TOKEN, "tokens", "text"], top_k=2)[1]
    assert (row["sum"], row["mean"], row["min"], row["length"]) == (0.0, None, None, 0)
    assert [len(array(row, name)) for name in PER_TOKEN] == [0] * len(PER_TOKEN)
    assert array(row, "offsets").shape == (0, 2)
    assert (row["tokens"], row["text"], list(alternatives(row))) == ([], "", [])


def test_base64_holds_the_very_bits_of_the_numbers() -> None:
    body: dict[str, object] = {
        **IDS,
        "include": list(PER_TOKEN),
        "segments": [[[0, 2]], [], [[0, 1]]],
        "candidate_ids": [[[1, 2]] * 3, [], [[4, 5]]],
    }
    for plain, packed in zip(rows_of(**body), rows_of(**body, encoding_format="base64"), strict=True):
        assert plain.keys() == packed.keys()
        arrays = [name for name, value in plain.items() if isinstance(value, np.ndarray)]
        assert set(arrays) - {"candidate_reward"} == {*PER_TOKEN, "segments"}
        for name in arrays:
            numbers = array(plain, name)
            wire = "<i4" if name in ("token_ids", "offsets") else "<f4"
            decoded = np.frombuffer(base64.b64decode(cast(str, packed[name])), dtype=wire)
            assert decoded.tobytes() == numbers.astype(wire).tobytes()
            assert decoded.reshape(numbers.shape).tolist() == numbers.tolist()


def test_numbers_survive_json() -> None:
    body: dict[str, object] = {
        **IDS,
        "include": list(PER_TOKEN),
        "top_k": 3,
        "candidate_ids": [[[1, 2]] * 3, [], [[4]]],
    }
    for row in rows_of(**body):
        read = orjson.loads(orjson.dumps(fragment(row)))
        assert read["alternatives"] == list(alternatives(row))
        for name in PER_TOKEN:
            assert np.array(read[name], dtype=array(row, name).dtype).tolist() == array(row, name).tolist()


def test_candidate_rewards_have_a_row_per_token_and_a_column_per_candidate() -> None:
    rows = rows_of(**IDS, candidate_ids=[[[3, 9], [200, 9], [EOS_ID, 9]], [], [[7]]])
    assert array(rows[0], "candidate_reward").shape == (3, 2)
    np.testing.assert_allclose(array(rows[0], "candidate_reward")[:, 0], array(rows[0], "reward"), atol=1e-6)
    np.testing.assert_allclose(array(rows[2], "candidate_reward")[0], array(rows[2], "reward"), atol=1e-6)
    assert "candidate_sft_logprob" not in rows[0]


def test_the_log_probs_of_candidates_come_when_they_are_asked_for() -> None:
    include = ["sft_logprob", "candidate_sft_logprob"]
    rows = rows_of(**IDS, include=include, candidate_ids=[[[3, 9], [200, 9], [EOS_ID, 9]], [], [[7]]])
    assert array(rows[0], "candidate_sft_logprob").shape == (3, 2)
    for row in (rows[0], rows[2]):
        own_T = array(row, "candidate_sft_logprob")[:, 0]
        np.testing.assert_allclose(own_T, array(row, "sft_logprob"), atol=1e-6)


def test_alternatives_name_the_likeliest_tokens_with_their_rewards() -> None:
    rows = rows_of(**IDS, top_k=3, include=["entropy"])
    for row in rows:
        listed = alternatives(row)
        assert listed[1:] == list(listed)[1:]
        assert [len(of_token) for of_token in listed] == [3] * cast(int, row["length"])
        for of_token in listed:
            assert [set(one) for one in of_token] == [{"id", "token", "sft_logprob", "reward"}] * 3
            logprobs = [float(one["sft_logprob"]) for one in of_token]
            assert logprobs == sorted(logprobs, reverse=True)
            assert [one["token"] for one in of_token] == FakeTokenizer().pieces([int(one["id"]) for one in of_token])
    assert all("alternatives" not in row for row in rows_of(**IDS))


def test_the_reward_of_an_alternative_is_that_of_a_candidate() -> None:
    listed = alternatives(rows_of(**IDS, top_k=2)[2])[0]
    candidates = rows_of(**IDS, candidate_ids=[[[0]] * 3, [], [[int(one["id"]) for one in listed]]])[2]
    np.testing.assert_allclose(
        [float(one["reward"]) for one in listed], array(candidates, "candidate_reward")[0], atol=1e-5
    )


def test_ids_get_text_and_pieces_when_they_ask() -> None:
    body = {"prompt_ids": [1], "response_ids": [[*"a☃".encode(), EOS_ID], [0xE2, 0x98]]}
    whole, broken = rows_of(**body, include=["tokens", "offsets", "text"])
    assert whole["text"] == "a☃<eos>"
    assert whole["tokens"] == ["a", "\ufffd", "\ufffd", "\ufffd", "<eos>"]
    assert array(whole, "offsets").tolist() == [[0, 1], [1, 1], [1, 1], [1, 2], [2, 7]]
    assert broken["text"] == "\ufffd"
    assert array(broken, "offsets").tolist() == [[0, 0], [0, 1]]


def test_only_scored_tokens_of_a_stream_are_answered() -> None:
    body = {"token_ids": [1, *b"abc"], "score_mask": [0, 1, 0, 1]}
    (row,) = rows_of(**body, include=["token_ids", "text", "offsets", "reward"])
    assert array(row, "token_ids").tolist() == list(b"ac")
    assert (row["text"], row["length"]) == ("ac", 2)
    assert array(row, "offsets").tolist() == [[0, 1], [1, 2]]


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        ({}, Wants()),
        ({"signal": "sft_logprob"}, Wants()),
        ({"signal": "centred"}, Wants(kl=True)),
        ({"include": ["centred"]}, Wants(kl=True)),
        ({"include": ["kl"]}, Wants(kl=True)),
        ({"include": ["entropy"]}, Wants(entropy=True)),
        ({"include": ["varentropy"]}, Wants(varentropy=True)),
        ({"top_k": 4}, Wants(top_k=4)),
    ],
)
def test_the_engine_computes_only_what_the_request_needs(body: dict[str, object], wanted: Wants) -> None:
    assert wants(ScoreRequest.model_validate(IDS | body)) == wanted


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "name",
    [
        *("sft_logprob_S", "reference_logprob_S", "kl_S", "entropy_S", "varentropy_S"),
        *("candidate_sft_logprob_SK", "candidate_reference_logprob_SK"),
        *("top_sft_logprob_SK", "top_reference_logprob_SK"),
    ],
)
def test_no_number_that_is_not_finite_gets_out(name: str, number: float) -> None:
    body: dict[str, object] = {
        **IDS,
        "include": ["kl", "entropy", "varentropy"],
        "top_k": 2,
        "candidate_ids": [[[1]] * 3, [], [[4]]],
    }
    request, item, scores = scored(body)
    broken = np.array(getattr(scores[0], name))
    broken.flat[-1] = number
    scores[0] = replace(scores[0], **{name: broken})  # type: ignore[arg-type] # the name is that of an array
    with pytest.raises(RequestError) as refused:
        RowBuilder(request, FakeTokenizer()).rows(0, item, scores)
    assert (refused.value.code, refused.value.status) == ("non_finite", 500)


def test_an_array_that_the_engine_was_not_asked_for_is_never_left_out_in_silence() -> None:
    request, item, _ = scored({**IDS, "include": ["kl"]})
    with pytest.raises(ValueError, match="kl"):
        RowBuilder(request, FakeTokenizer()).rows(0, item, FakeEngine().score([item.trunk], Wants())[0])
