"""Items become trunks, or are refused with the field, the limit and the cure."""

from dataclasses import dataclass

import pytest
from dense_reward.engines.fake import BOS_ID, EOS_ID, VOCABULARY, FakeTokenizer
from dense_reward.errors import Fault, RequestError
from dense_reward.schemas import ScoreRequest
from dense_reward.scoring.items import MAX_RENDERED_MESSAGES, MAX_TURNS, Limits, PreparedItem, prepare
from dense_reward.text.encode import Encoder
from tiny_tokenizers import chatml
from tool_templates import TAGS

MESSAGES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
HI = list(b"hi")


@dataclass(frozen=True, slots=True)
class Pair:
    """The encoder and the limits of a served pair."""

    encoder: Encoder
    limits: Limits

    def prepared(self, **body: object) -> PreparedItem:
        request = ScoreRequest.model_validate(body)
        return prepare(request, request, self.encoder, self.limits)

    def fault(self, **body: object) -> Fault:
        with pytest.raises(RequestError) as refused:
            self.prepared(**body)
        assert len(refused.value.faults) == 1
        assert refused.value.status == 422
        return refused.value.faults[0]

    def refusal(self, **body: object) -> tuple[str, str | None]:
        found = self.fault(**body)
        return found.code, found.param


FAKE = Pair(
    Encoder.of(FakeTokenizer(), "plain"), Limits(VOCABULARY, max_length_tokens=12, max_responses=3, max_json_depth=9)
)
CHAT = Pair(
    Encoder.of(chatml(), "chat"), Limits(vocab_size=400, max_length_tokens=100, max_responses=3, max_json_depth=9)
)


def branches(item: PreparedItem) -> list[list[int]]:
    return [branch.ids_T.tolist() for branch in item.trunk.branches]


def test_a_prompt_with_responses_is_one_trunk_with_a_branch_each() -> None:
    item = FAKE.prepared(prompt="hi", responses=["a", "", "☃"])
    assert item.trunk.prompt_P.tolist() == [BOS_ID, *HI, 10]
    assert branches(item) == [[97, EOS_ID], [EOS_ID], [*"☃".encode(), EOS_ID]]
    assert all(branch.scored_T.all() for branch in item.trunk.branches)
    assert [response.text for response in item.responses] == ["a", "", "☃"]
    assert item.from_text


def test_one_response_is_the_same_as_a_list_of_one() -> None:
    one, several = FAKE.prepared(prompt="hi", response="a"), FAKE.prepared(prompt="hi", responses=["a"])
    assert (one.trunk.prompt_P.tolist(), branches(one)) == (several.trunk.prompt_P.tolist(), branches(several))


def test_without_add_eos_a_response_is_only_its_text() -> None:
    item = FAKE.prepared(prompt="hi", responses=["a", ""], add_eos=False)
    assert branches(item) == [[97], []]


def test_exact_ids_are_taken_verbatim_and_a_response_may_be_empty() -> None:
    item = FAKE.prepared(prompt_ids=[0, VOCABULARY - 1], response_ids=[[EOS_ID, EOS_ID, 0], []])
    assert item.trunk.prompt_P.tolist() == [0, VOCABULARY - 1]
    assert branches(item) == [[EOS_ID, EOS_ID, 0], []]
    assert [response.text for response in item.responses] == [None, None]
    assert not item.from_text


def test_a_stream_is_split_before_its_first_scored_token() -> None:
    item = FAKE.prepared(token_ids=[1, 2, 3, 4, 5], score_mask=[0, 0, 1, 0, 1])
    assert item.trunk.prompt_P.tolist() == [1, 2]
    assert branches(item) == [[3, 4, 5]]
    assert item.trunk.branches[0].scored_T.tolist() == [True, False, True]


def test_a_stream_without_scored_tokens_is_an_empty_response() -> None:
    item = FAKE.prepared(token_ids=[1, 2], score_mask=[0, 0])
    assert item.trunk.prompt_P.tolist() == [1, 2]
    assert branches(item) == [[]]


def test_of_a_text_every_token_after_bos_is_scored_and_no_end_is_added() -> None:
    assert branches(FAKE.prepared(text="hi")) == [HI]
    assert branches(FAKE.prepared(text="hi", add_eos=True)) == [[*HI, EOS_ID]]
    assert branches(FAKE.prepared(text="")) == [[]]


def test_raw_text_is_not_rendered_and_its_special_strings_are_special() -> None:
    item = FAKE.prepared(prompt="<bos>hi", response="a<eos>", render="raw", add_eos=False)
    assert item.trunk.prompt_P.tolist() == [BOS_ID, *HI]
    assert branches(item) == [[97, EOS_ID]]
    assert branches(FAKE.prepared(text="<eos>", render="raw")) == [[EOS_ID]]
    assert branches(FAKE.prepared(text="<eos>")) == [list(b"<eos>")]


def test_messages_are_scored_as_a_prompt_and_its_response() -> None:
    chat = CHAT.prepared(messages=MESSAGES)
    assert chat.trunk.prompt_P.tolist() == CHAT.encoder.prompt("a").tolist()
    assert branches(chat) == [CHAT.encoder.response("b", add_eos=True).ids_T.tolist()]
    assert chat.from_text
    both = CHAT.prepared(messages=[*MESSAGES, *MESSAGES], score="all_assistant", add_eos=False)
    assert both.responses[0].scored_T.tolist().count(True) == 2
    last = CHAT.prepared(messages=[*MESSAGES, *MESSAGES], score="last")
    assert last.responses[0].scored_T.all()


def test_render_chat_is_what_a_chat_checkpoint_does_anyway() -> None:
    asked = CHAT.prepared(prompt="a", response="b", render="chat")
    assert asked.trunk.prompt_P.tolist() == CHAT.encoder.prompt("a").tolist()


@pytest.mark.parametrize("unknown", [-1, VOCABULARY, 2**31, 2**63, -(2**63) - 1, 10**30])
def test_unknown_ids_are_refused_wherever_they_stand(unknown: int) -> None:
    bodies: dict[str, dict[str, object]] = {
        "prompt_ids": {"prompt_ids": [1, unknown], "response_ids": [[1]]},
        "response_ids[1]": {"prompt_ids": [1], "response_ids": [[1], [1, unknown]]},
        "token_ids": {"token_ids": [1, unknown], "score_mask": [0, 1]},
        "candidate_ids[0]": {"prompt_ids": [1], "response_ids": [[1]], "candidate_ids": [[[0, unknown]]]},
    }
    for param, body in bodies.items():
        found = FAKE.fault(**body)
        assert (found.code, found.param) == ("unknown_token_id", param)
        assert f"id {unknown} at position 1" in found.message
        assert f"[0, {VOCABULARY})" in found.message


def test_text_that_the_tokenizer_knows_and_the_model_does_not_is_refused() -> None:
    small = Pair(FAKE.encoder, Limits(vocab_size=BOS_ID, max_length_tokens=12, max_responses=3, max_json_depth=9))
    assert small.fault(prompt="hi", response="a").code == "unknown_token_id"
    assert branches(small.prepared(prompt_ids=[1], response_ids=[[255]])) == [[255]]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt_ids": [], "response_ids": [[1]]}, "prompt_ids"),
        ({"token_ids": [], "score_mask": []}, "token_ids"),
        ({"token_ids": [1, 2], "score_mask": [1, 1]}, "score_mask"),
    ],
)
def test_ids_without_anything_before_the_first_scored_one_are_refused(body: dict[str, object], param: str) -> None:
    assert FAKE.refusal(**body) == ("empty_prompt", param)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": "", "response": "a"}, "prompt"),
        ({"prompt": "", "response": "a", "render": "raw"}, "prompt"),
        ({"text": ""}, "text"),
        ({"messages": MESSAGES[1:]}, "messages"),
    ],
)
def test_empty_text_before_the_first_scored_token_is_refused_without_a_bos(body: dict[str, object], param: str) -> None:
    assert CHAT.refusal(**body) == ("empty_prompt", param)


def test_an_empty_prompt_is_legal_where_the_tokenizer_has_a_bos() -> None:
    assert FAKE.prepared(prompt="", response="a").trunk.prompt_P.tolist() == [BOS_ID, 10]


@pytest.mark.parametrize(
    "body",
    [
        {"prompt_ids": [1] * 6, "response_ids": [[1] * 7]},
        {"prompt_ids": [1] * 12, "response_ids": [[], [1]]},
        {"token_ids": [1] * 13, "score_mask": [0] * 13},
        {"prompt": "hi", "response": "12345678"},
        {"text": "123456789012"},
    ],
)
def test_what_is_too_long_is_refused_and_never_cut(body: dict[str, object]) -> None:
    found = FAKE.fault(**body)
    assert found.code == "too_long"
    assert "have 13 tokens; the limit is 12" in found.message


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": "hi", "response": "1" * 61}, "response"),
        ({"prompt": "1" * 61, "response": ""}, "prompt"),
        ({"prompt": "1" * 61, "response": "", "render": "raw"}, "prompt"),
        ({"text": "☃" * 21}, "text"),
    ],
)
def test_a_text_that_no_tokenizer_could_fit_is_refused_by_its_bytes(body: dict[str, object], param: str) -> None:
    found = FAKE.fault(**body)
    assert (found.code, found.param) == ("too_long", param)
    assert "bytes of text, more than the limit of 12 tokens (--max-length-tokens) can hold (60 bytes)" in found.message


def test_a_long_text_of_few_tokens_is_taken() -> None:
    item = FAKE.prepared(prompt="<bos>" * 6, response="<eos>" * 6, render="raw", add_eos=False)
    assert (len(item.trunk.prompt_P), branches(item)) == (6, [[EOS_ID] * 6])


def test_what_is_just_as_long_as_allowed_is_taken() -> None:
    assert FAKE.prepared(prompt_ids=[1] * 6, response_ids=[[1] * 6, []])
    assert FAKE.prepared(prompt="hi", response="1234567")


def test_a_chat_of_very_many_turns_is_scored_by_its_last_alone() -> None:
    wide = Pair(CHAT.encoder, Limits(vocab_size=400, max_length_tokens=10_000, max_responses=1, max_json_depth=9))
    turns = MESSAGES * 257
    assert wide.refusal(messages=turns, score="all_assistant") == ("too_long", "messages")
    assert wide.prepared(messages=turns).responses[0].text == "b"


def test_too_many_responses_are_refused() -> None:
    found = FAKE.fault(prompt="hi", responses=["a"] * 4)
    assert (found.code, found.param) == ("too_long", "responses")
    assert "4 responses to one prompt; the limit is 3" in found.message


@pytest.mark.parametrize(
    "body", [{"prompt_ids": [1], "response_ids": [[1]]}, {"token_ids": [1, 2], "score_mask": [0, 1]}]
)
@pytest.mark.parametrize("add_eos", [True, False])
def test_nothing_is_added_to_ids(body: dict[str, object], add_eos: bool) -> None:
    assert FAKE.refusal(**body, add_eos=add_eos) == ("invalid_request", "add_eos")


@pytest.mark.parametrize(
    "body",
    [
        {"messages": MESSAGES, "render": "raw"},
        {"prompt": "hi", "response": "a", "render": "chat"},  # the checkpoint has the plain renderer
    ],
)
def test_a_rendering_that_cannot_be_is_refused(body: dict[str, object]) -> None:
    assert FAKE.refusal(**body) == ("invalid_request", "render")


def test_candidates_are_named_per_scored_token() -> None:
    item = FAKE.prepared(prompt_ids=[1], response_ids=[[2, 3], [4]], candidate_ids=[[[5, 6], [7, 8]], [[9]]])
    first, second = (branch.candidates_SK for branch in item.trunk.branches)
    assert first is not None
    assert second is not None
    assert first.tolist() == [[5, 6], [7, 8]]
    assert second.tolist() == [[9]]
    assert first.dtype == "int32"


def test_candidates_of_a_stream_and_of_text_are_counted_by_scored_tokens() -> None:
    stream = FAKE.prepared(token_ids=[1, 2, 3, 4], score_mask=[0, 1, 0, 1], candidate_ids=[[[5], [6]]])
    text = FAKE.prepared(prompt="h", response="a", candidate_ids=[[[5], [6]]])  # the end of turn is a scored token
    for item in (stream, text):
        candidates_SK = item.trunk.branches[0].candidates_SK
        assert candidates_SK is not None
        assert candidates_SK.tolist() == [[5], [6]]


def test_a_token_has_at_most_1024_candidates() -> None:
    def body(count: int) -> dict[str, object]:
        return {"prompt_ids": [1], "response_ids": [[2]], "candidate_ids": [[[5] * count]]}

    assert FAKE.prepared(**body(1024))
    found = FAKE.fault(**body(1025))
    assert (found.code, found.param) == ("too_long", "candidate_ids")
    assert "1025 ids at each token; the limit is 1024" in found.message


def test_a_response_without_tokens_has_no_candidates() -> None:
    item = FAKE.prepared(prompt_ids=[1], response_ids=[[], [2]], candidate_ids=[[], [[]]])
    assert [branch.candidates_SK for branch in item.trunk.branches] == [None, None]


@pytest.mark.parametrize(
    "candidates",
    [
        [],
        [[[1], [2]]],
        [[[1], [2]], [[1]], [[1]]],
        [[[1]], [[1]]],
        [[[1], [2], [3]], [[1]]],
        [[[1], [2, 3]], [[1]]],
        [[[1], []], [[1]]],
    ],
)
def test_candidates_of_another_shape_are_refused(candidates: list[list[list[int]]]) -> None:
    body: dict[str, object] = {"prompt_ids": [1], "response_ids": [[2, 3], [4]], "candidate_ids": candidates}
    assert FAKE.refusal(**body) == ("wrong_shape", "candidate_ids")


def test_segments_are_half_open_spans_of_scored_tokens() -> None:
    item = FAKE.prepared(prompt_ids=[1], response_ids=[[2, 3], []], segments=[[[0, 2], [1, 1], [0, 1]], [[0, 0]]])
    assert item.segments == (((0, 2), (1, 1), (0, 1)), ((0, 0),))
    assert FAKE.prepared(prompt_ids=[1], response_ids=[[2]]).segments is None


@pytest.mark.parametrize(
    "segments",
    [[], [[[0, 1]]], [[], [], []], [[[0, 3]], []], [[[2, 1]], []], [[[-1, 1]], []], [[], [[0, 2]]], [[[0, 2**70]], []]],
)
def test_segments_outside_their_response_are_refused(segments: list[list[list[int]]]) -> None:
    body: dict[str, object] = {"prompt_ids": [1], "response_ids": [[2, 3], [4]], "segments": segments}
    assert FAKE.refusal(**body) == ("wrong_shape", "segments")


def test_segments_of_a_stream_count_scored_tokens_alone() -> None:
    body: dict[str, object] = {"token_ids": [1, 2, 3, 4], "score_mask": [0, 1, 0, 1]}
    assert FAKE.prepared(**body, segments=[[[0, 2]]]).segments == (((0, 2),),)
    assert FAKE.refusal(**body, segments=[[[0, 3]]]) == ("wrong_shape", "segments")


@pytest.mark.parametrize("long", ["a" * 20_000, "a b " * 100])
def test_what_is_too_long_is_named_as_its_caller_sent_it(long: str) -> None:
    assert CHAT.refusal(prompt=long, response="b") == ("too_long", "prompt")
    assert CHAT.refusal(prompt="a", responses=["b", long]) == ("too_long", "response")
    assert CHAT.refusal(messages=[{"role": "user", "content": long}, MESSAGES[1]]) == ("too_long", "messages")


def calling(**others: object) -> list[dict[str, object]]:
    """A chat in OpenAI's form whose response is a call. The keys are those that its client sends."""
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    nothing = dict.fromkeys(("refusal", "audio", "function_call"))
    answer = {"role": "assistant", **nothing, "annotations": [], "tool_calls": [call], **others}
    return [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, answer]


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}], ids=["absent", "null", "empty"])
def test_a_call_in_the_form_of_openai_is_a_response(content: dict[str, object]) -> None:
    pair = Pair(Encoder.of(TAGS.tokenizer(), "chat"), CHAT.limits)
    item = pair.prepared(messages=calling(**content))
    assert item.responses[0].text == '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
    assert item.from_text


def test_what_a_chat_cannot_hold_is_refused_with_its_place() -> None:
    assert "messages.1 has refusal" in CHAT.fault(messages=calling(refusal="No.")).message
    image = [{"type": "image_url", "image_url": {"url": "a"}}]
    assert "messages.0.content.0" in CHAT.fault(messages=[{"role": "user", "content": image}, MESSAGES[1]]).message


def test_the_messages_that_are_rendered_for_all_turns_are_bounded() -> None:
    """Messages that a template does not write have no tokens: 4,096 of them before 256 turns took minutes."""
    unseen = [{"role": "x", "content": ""}] * (MAX_RENDERED_MESSAGES // MAX_TURNS)
    fault = CHAT.fault(messages=unseen + MESSAGES * MAX_TURNS, score="all_assistant")
    assert (fault.code, fault.param) == ("too_long", "messages")
    assert f"the limit is {MAX_RENDERED_MESSAGES}" in fault.message
    assert "turns" in CHAT.fault(messages=MESSAGES * (MAX_TURNS + 1), score="all_assistant").message
    plain = CHAT.fault(messages=MESSAGES * MAX_TURNS, score="all_assistant")
    assert "--max-length-tokens" in plain.message, "as many turns as are allowed are rendered"
