"""The wire formats of model servers: the requests that are sent, and the answers that are accepted."""

import base64
import io
import json
from typing import Any

import numpy as np
import pytest
from dense_reward.engines.remote.dialects import Dialect, Sglang, VllmCompletions, VllmTokens, WireError
from dense_reward.engines.remote.pair import Query, query_of
from dense_reward.records import Branch, IdArray, Trunk

VOCABULARY = 20
SGLANG = Sglang(VOCABULARY)
DIALECTS: list[Dialect] = [VllmCompletions("m"), VllmTokens("m"), VllmTokens("m", scores_candidates=True), SGLANG]


def ids(*values: int) -> IdArray:
    return np.array(values, dtype=np.int32)


def query(candidates: IdArray | None = None) -> Query:
    """Prompt 5 6, response 7 8 9 of which 8 and 9 are scored."""
    branch = Branch(ids(7, 8, 9), np.array([False, True, True]), candidates)
    found = query_of(Trunk(ids(5, 6), (branch,)), branch)
    assert found is not None
    return found


def sent(dialect: Dialect, asked: Query, *, skip_cache: bool = False) -> tuple[str, dict[str, Any]]:
    path, body = dialect.request(asked, skip_cache=skip_cache)
    return path, json.loads(body)


def read(dialect: Dialect, answer: object, asked: Query | None = None) -> list[list[float]] | None:
    logprobs_TK = dialect.logprobs(asked or query(), json.dumps(answer).encode())
    return None if logprobs_TK is None else logprobs_TK.tolist()


def npy(*rows: list[float]) -> str:
    file = io.BytesIO()
    np.save(file, np.array(rows, dtype=np.float32))
    return base64.b64encode(file.getvalue()).decode()


def prompt_entries(*entries: tuple[int, float]) -> list[object]:
    return [None, *({str(i): {"logprob": value, "rank": 1, "decoded_token": None}} for i, value in entries)]


def test_the_first_scored_token_is_where_log_probs_begin_and_what_follows_the_last_is_not_sent() -> None:
    branch = Branch(ids(7, 8, 9, 10), np.array([False, True, True, False]))
    found = query_of(Trunk(ids(5, 6), (branch,)), branch)
    assert found is not None
    assert (found.ids_L.tolist(), found.prompt_tokens, found.start) == ([5, 6, 7, 8, 9], 2, 3)
    assert found.wanted_TK.tolist() == [[8], [9]]
    assert query_of(Trunk(ids(5), (branch,)), Branch(ids(7), np.array([False]))) is None


def test_candidates_are_named_beside_the_scored_ids_and_own_ids_stand_between() -> None:
    branch = Branch(ids(7, 8, 9), np.array([True, False, True]), np.array([[1, 2], [3, 4]], dtype=np.int32))
    found = query_of(Trunk(ids(5), (branch,)), branch)
    assert found is not None
    assert found.wanted_TK.tolist() == [[7, 1, 2], [8, 8, 8], [9, 3, 4]]


def test_vllm_is_asked_for_the_prompts_own_log_probs_and_samples_one_token_that_nobody_reads() -> None:
    path, body = sent(VllmCompletions("m"), query())
    assert path == "/v1/completions"
    assert body == {"model": "m", "prompt": [5, 6, 7, 8, 9], "max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 0}
    path, body = sent(VllmTokens("m"), query())
    assert (path, body["token_ids"]) == ("/inference/v1/generate", [5, 6, 7, 8, 9])
    assert body["sampling_params"] == {"max_tokens": 1, "temperature": 1.0, "detokenize": False, "prompt_logprobs": 0}


@pytest.mark.parametrize("skip_cache", [False, True])
def test_fixed_id_scoring_names_a_row_for_each_position_from_the_one_before_the_first(skip_cache: bool) -> None:
    asked = query(np.array([[1], [2]], dtype=np.int32))
    _, body = sent(VllmTokens("m", scores_candidates=True), asked, skip_cache=skip_cache)
    parameters = body["sampling_params"]
    assert parameters["prompt_logprob_token_ids"] == [[8, 1], [9, 2]]
    assert parameters["prompt_logprob_start"] == 2
    assert (
        len(parameters["prompt_logprob_token_ids"]) == len(body["token_ids"]) - 1 - parameters["prompt_logprob_start"]
    )
    assert parameters["skip_reading_prefix_cache"] is skip_cache


def test_sglang_is_asked_for_one_position_more_because_its_first_has_no_log_prob() -> None:
    path, body = sent(SGLANG, query())
    assert (path, body["input_ids"], body["logprob_start_len"]) == ("/generate", [5, 6, 7, 8, 9], 2)
    assert body["sampling_params"]["max_new_tokens"] == 0
    assert "lora_path" not in body
    assert sent(Sglang(VOCABULARY, lora="a"), query())[1]["lora_path"] == "a"


def test_sglang_writes_0_for_the_last_id_of_its_vocabulary_and_for_no_other() -> None:
    answer = {"meta_info": {"input_token_logprobs": [[None, 7, None], [-3.0, 8, None], [-4.0, 0, None]]}}
    assert read(Sglang(vocab_size=10), answer) == [[-3.0], [-4.0]]
    with pytest.raises(WireError, match="other ids"):
        read(SGLANG, answer)


def test_answers_are_read_at_the_positions_of_the_ids() -> None:
    rows = prompt_entries((6, -1.0), (7, -2.0), (8, -3.0), (9, -4.0))
    assert read(VllmCompletions("m"), {"choices": [{"prompt_logprobs": rows}]}) == [[-3.0], [-4.0]]
    assert read(VllmTokens("m"), {"choices": [{}], "prompt_logprobs": rows}) == [[-3.0], [-4.0]]
    entries = [[None, 7, None], [-3.0, 8, None], [-4.0, 9, None]]
    assert read(SGLANG, {"meta_info": {"input_token_logprobs": entries}}) == [[-3.0], [-4.0]]
    fixed_ids = VllmTokens("m", scores_candidates=True)
    assert read(fixed_ids, {"prompt_token_id_logprobs": npy([-3.0], [-4.0])}) == [[-3.0], [-4.0]]
    assert read(fixed_ids, {"prompt_token_id_logprobs": None}) is None


def test_what_json_has_no_number_for_is_not_a_log_prob_of_minus_9999() -> None:
    rows = prompt_entries((6, -1.0), (7, -2.0), (8, -9999.0), (9, -4.0))
    assert read(VllmCompletions("m"), {"choices": [{"prompt_logprobs": rows}]}) == [[-np.inf], [-4.0]]


@pytest.mark.parametrize(
    ("dialect", "answer"),
    [
        (VllmCompletions("m"), {"choices": [{"prompt_logprobs": None}]}),
        (VllmCompletions("m"), {"choices": []}),
        (VllmCompletions("m"), {"error": "no"}),
        (VllmCompletions("m"), [1]),
        (VllmCompletions("m"), {"choices": [{"prompt_logprobs": prompt_entries((6, -1.0), (8, -3.0), (9, -4.0))}]}),
        (
            VllmCompletions("m"),
            {"choices": [{"prompt_logprobs": prompt_entries((6, -1.0), (7, -2.0), (9, -3.0), (8, -4.0))}]},
        ),
        (VllmTokens("m", scores_candidates=True), {"prompt_token_id_logprobs": npy([-3.0])}),
        (VllmTokens("m", scores_candidates=True), {"prompt_token_id_logprobs": npy([-3.0, -3.0], [-4.0, -4.0])}),
        (VllmTokens("m", scores_candidates=True), {"prompt_token_id_logprobs": "AAAA"}),
        (VllmTokens("m", scores_candidates=True), {"prompt_token_id_logprobs": ""}),
        (VllmCompletions("m"), {"choices": ["text"]}),
        (SGLANG, {"meta_info": {}}),
        (SGLANG, {"meta_info": {"input_token_logprobs": [[None, 8, None], [-4.0, 9, None]]}}),
        (SGLANG, {"meta_info": {"input_token_logprobs": [[None, 7, None], [-3.0, 9, None], [-4.0, 8, None]]}}),
    ],
)
def test_an_answer_to_something_else_is_refused(dialect: Dialect, answer: object) -> None:
    with pytest.raises(WireError):
        read(dialect, answer)


@pytest.mark.parametrize("dialect", DIALECTS, ids=repr)
def test_what_is_no_json_is_refused(dialect: Dialect) -> None:
    with pytest.raises(WireError, match="JSON"):
        dialect.logprobs(query(), b"<html>")


@pytest.mark.parametrize("value", [True, "-1.0", 5.0, float("nan"), None])
@pytest.mark.parametrize("dialect", [VllmCompletions("m"), SGLANG])
def test_what_is_no_log_prob_is_refused(dialect: Dialect, value: object) -> None:
    entries: list[object] = [None, *({str(i): {"logprob": value}} for i in (6, 7, 8, 9))]
    rows = [[None, 6, None], [-1.0, 7, None], [value, 8, None], [value, 9, None]]
    answer = {"choices": [{"prompt_logprobs": entries}], "meta_info": {"input_token_logprobs": rows}}
    with pytest.raises(WireError):
        read(dialect, answer)
