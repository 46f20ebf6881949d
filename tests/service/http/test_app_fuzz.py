"""POST /score with bodies that are almost valid: none causes an internal error or a number that is not finite."""

import json
import math
from collections.abc import Iterator

import pytest
from dense_reward.schemas import ScoreRequest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from running_service import Served, served

pytestmark = pytest.mark.slow

REFUSALS = {400, 404, 409, 413, 415, 422}


@pytest.fixture(scope="module")
def service() -> Iterator[Served]:
    with served(max_length_tokens=60) as running:
        yield running


WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
IDS = st.lists(st.integers(-1, 259) | st.integers(0, 20), max_size=6)
SOME_IDS = st.lists(st.integers(0, 257), min_size=1, max_size=6)
JUNK: st.SearchStrategy[object] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False, width=32)
    | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=6,
)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "tool"]), "content": WORDS}),
    max_size=4,
)
INPUTS: st.SearchStrategy[dict[str, object]] = st.one_of(
    st.fixed_dictionaries({"prompt": WORDS, "response": WORDS}),
    st.fixed_dictionaries({"prompt": WORDS, "responses": st.lists(WORDS, max_size=3)}),
    st.fixed_dictionaries({"prompt_ids": SOME_IDS, "response_ids": st.lists(IDS, max_size=4)}),
    st.fixed_dictionaries({"prompt_ids": IDS, "response_ids": st.lists(IDS, max_size=4)}),
    st.fixed_dictionaries({"token_ids": SOME_IDS, "score_mask": st.lists(st.integers(0, 1), max_size=6)}),
    st.fixed_dictionaries({"text": WORDS}),
    st.fixed_dictionaries({"messages": MESSAGES}, optional={"score": st.sampled_from(["last", "all_assistant"])}),
)
DETAILS = {
    "candidate_ids": st.lists(st.lists(IDS, max_size=3), max_size=3),
    "segments": st.lists(st.lists(st.tuples(st.integers(-1, 4), st.integers(0, 6)), max_size=3), max_size=3),
}
ITEM = st.builds(lambda one, more: one | more, INPUTS, st.fixed_dictionaries({}, optional=DETAILS))
ARRAYS = ["token_ids", "tokens", "offsets", "text", "reward", "kl", "centred", "entropy", "varentropy", "return_to_go"]
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "render": st.sampled_from(["chat", "raw"]),
        "add_eos": st.booleans(),
        "signal": st.sampled_from(["reward", "centred", "sft_logprob"]),
        "gamma": st.floats(0, 1),
        "top_k": st.integers(0, 21),
        "include": st.lists(st.sampled_from(ARRAYS), max_size=9),
        "encoding_format": st.sampled_from(["float", "base64"]),
        "on_error": st.sampled_from(["fail", "per_item"]),
    },
)
SPOILED = st.dictionaries(st.sampled_from(sorted(ScoreRequest.model_fields)) | WORDS, JUNK, max_size=1)
BODIES = st.builds(
    lambda asked, options, spoiled: {**asked, **options, **spoiled},
    ITEM | st.fixed_dictionaries({"items": st.lists(ITEM, max_size=3)}),
    OPTIONS,
    st.just({}) | SPOILED,
)
FUZZ = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


def assert_sound(status: int, text: str) -> None:
    def refuse(name: str) -> float:
        raise AssertionError(f"{name} in an answer")

    answer = json.loads(text, parse_constant=refuse)
    if status == 200:
        assert all(all_finite(row) for row in answer["results"])
    else:
        assert status in REFUSALS, text
        assert answer["error"]["message"]


def all_finite(value: object) -> bool:
    """Whether no number is infinite, and only the mean and min of a response without tokens are null."""
    if isinstance(value, dict):
        empty = value.get("length") == 0
        return all(
            all_finite(entry)
            for key, entry in value.items()
            if not (empty and key in {"mean", "min"}) and key != "error"
        )
    if isinstance(value, list):
        return all(map(all_finite, value))
    return value is not None and (not isinstance(value, float) or math.isfinite(value))


@FUZZ
@given(body=BODIES)
def test_a_body_that_almost_makes_sense_is_answered_or_refused(service: Served, body: dict[str, object]) -> None:
    answer = service.score(body)
    assert_sound(answer.status_code, answer.text)


@FUZZ
@given(body=JUNK)
def test_any_json_is_refused_politely(service: Served, body: object) -> None:
    answer = service.score(body)
    assert_sound(answer.status_code, answer.text)


@FUZZ
@given(body=BODIES, cut=st.integers(0, 400), spoil=st.binary(max_size=4))
def test_any_bytes_are_refused_politely(service: Served, body: dict[str, object], cut: int, spoil: bytes) -> None:
    content = json.dumps(body).encode()
    spoiled = content[:cut] + spoil + content[cut + len(spoil) :]
    answer = service.client.post("/score", content=spoiled, headers={"Content-Type": "application/json"})
    assert_sound(answer.status_code, answer.text)


def test_the_fuzz_reaches_answers_and_many_refusals(service: Served) -> None:
    """Otherwise the tests above would test nothing."""
    seen: set[int] = set()

    @settings(deadline=None, max_examples=100, database=None)
    @given(body=BODIES)
    def collect(body: dict[str, object]) -> None:
        seen.add(service.score(body).status_code)

    collect()
    assert {200, 422} <= seen
