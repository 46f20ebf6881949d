"""The requests of the HTTP API, validated, and the card of a served pair. Unknown keys are refused.

Shapes: G responses to one prompt, T tokens of a response, S segments of a response, K candidate ids at each token.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, Strict, StrictBool, StringConstraints, model_validator

from dense_reward.limits import MAX_ITEMS
from dense_reward.reward import Signal

# The format of answers: a new minor number adds keys, a new major number changes the meaning of existing ones.
WIRE_VERSION = "1.0"
TokenId = Annotated[int, Strict()]
MaskEntry = Annotated[int, Strict(), Field(ge=0, le=1)]  # a Literal would take true and 1.0
# fail_fast: only the first fault of a list is reported. A million floats instead of ids would make a million messages.
Ids = Annotated[list[TokenId], Field(fail_fast=True)]
IdsPerToken = Annotated[list[Ids], Field(fail_fast=True)]
Spans = Annotated[list[tuple[TokenId, TokenId]], Field(fail_fast=True)]
MAX_MESSAGES, MAX_CALLS, MAX_TOOLS, MAX_VARIABLES = 4_096, 1_024, 1_024, 1_024
ArrayName = Literal[
    "token_ids",
    "tokens",
    "offsets",
    "text",
    "reward",
    "sft_logprob",
    "reference_logprob",
    "kl",
    "centred",
    "entropy",
    "varentropy",
    "return_to_go",
    "candidate_sft_logprob",
]
SignalName = Signal
FORMS: dict[str, frozenset[str]] = {
    "prompt": frozenset({"prompt", "response", "responses"}),
    "messages": frozenset({"messages", "score", "tools", "template_kwargs"}),
    "ids": frozenset({"prompt_ids", "response_ids"}),
    "stream": frozenset({"token_ids", "score_mask"}),
    "text": frozenset({"text"}),
}
FORM_FIELDS = frozenset().union(*FORMS.values())


class Strictly(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ChatMessage(Strictly):
    role: Annotated[str, StringConstraints(min_length=1)]
    content: str | list[JsonValue] | None = Field(
        None, description="a text, a list of text parts, or null beside tool_calls"
    )
    name: str | None = None
    tool_calls: Annotated[list[JsonValue], Field(max_length=MAX_CALLS)] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = Field(None, description="what the model thought before it wrote content")
    reasoning: str | None = Field(None, description="another name of reasoning_content")
    thinking: str | None = Field(None, description="another name of reasoning_content, for templates that read it")
    refusal: JsonValue = Field(None, description="only null: OpenAI's clients send it")
    audio: JsonValue = Field(None, description="only null")
    function_call: JsonValue = Field(None, description="only null: send tool_calls")
    annotations: JsonValue = Field(None, description="only null or empty")


class Item(Strictly):
    """One prompt and its responses, in exactly one of five forms."""

    prompt: str | None = Field(None, description="rendered as one user turn by the checkpoint's renderer")
    response: str | None = Field(None, description="the only response to the prompt")
    responses: Annotated[list[str], Field(min_length=1, fail_fast=True)] | None = Field(
        None, description="G responses to the prompt"
    )
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)] | None = Field(
        None, description="a chat whose last message is the assistant's"
    )
    score: Literal["last", "all_assistant"] | None = Field(
        None, description="which assistant messages of a chat are scored; last if left out"
    )
    tools: Annotated[list[JsonValue], Field(max_length=MAX_TOOLS)] | None = Field(
        None, description="passed to the chat template"
    )
    template_kwargs: Annotated[dict[str, JsonValue], Field(max_length=MAX_VARIABLES)] | None = Field(
        None, description="passed to the chat template"
    )
    prompt_ids: Ids | None = Field(None, description="token ids of the prompt, used unchanged")
    response_ids: Annotated[list[Ids], Field(min_length=1, fail_fast=True)] | None = Field(
        None, description="[G][T] token ids of the responses, used unchanged; a response can be empty"
    )
    token_ids: Ids | None = Field(None, description="token ids of one sequence of several turns, used unchanged")
    score_mask: Annotated[list[MaskEntry], Field(fail_fast=True)] | None = Field(
        None, description="1 marks the tokens of token_ids to score; the first must be 0"
    )
    text: str | None = Field(None, description="a text without a prompt; every token after the first is scored")
    candidate_ids: Annotated[list[IdsPerToken], Field(fail_fast=True)] | None = Field(
        None, description="[G][T][K] ids to score instead of each scored token; K is equal within a response"
    )
    segments: Annotated[list[Spans], Field(fail_fast=True)] | None = Field(
        None, description="[G][S][2] half-open spans of scored tokens; the signal of each span is summed"
    )

    @property
    def form(self) -> str:
        """The form of this item: a key of FORMS."""
        return self._forms()[0]

    def _given(self) -> set[str]:
        """The fields that were sent. A field that is null counts as left out."""
        return {name for name in self.model_fields_set if getattr(self, name) is not None}

    def _forms(self) -> list[str]:
        given = self._given()
        return [name for name, fields in FORMS.items() if fields & given]

    @model_validator(mode="after")
    def _one_form(self) -> "Item":
        if isinstance(self, ScoreRequest) and self.items is not None:
            given = sorted((FORM_FIELDS | {"candidate_ids", "segments"}) & self._given())
            if given:
                raise ValueError(f"a request has either items or one input: remove {given[0]}, or move it into items")
            return self
        forms = self._forms()
        if len(forms) != 1:
            wanted = "prompt + response(s), messages, prompt_ids + response_ids, token_ids + score_mask, or text"
            raise ValueError(f"give exactly one input ({wanted}); this has {' and '.join(forms) or 'none'}")
        self._complete(forms[0])
        return self

    def _complete(self, form: str) -> None:
        """Raise ValueError if a part of the form is missing."""
        if form == "prompt" and (self.prompt is None or (self.response is None) == (self.responses is None)):
            raise ValueError("give a prompt together with either response or responses")
        if form == "messages" and self.messages is None:
            raise ValueError("score, tools and template_kwargs belong to messages")
        if form == "ids" and (self.prompt_ids is None or self.response_ids is None):
            raise ValueError("give prompt_ids and response_ids together")
        if form == "stream":
            if self.token_ids is None or self.score_mask is None:
                raise ValueError("give token_ids and score_mask together")
            if len(self.token_ids) != len(self.score_mask):
                raise ValueError(f"{len(self.token_ids)} token_ids, but {len(self.score_mask)} entries in score_mask")


class Options(Strictly):
    """Options that apply to every item of a request."""

    render: Literal["chat", "raw"] | None = Field(None, description="raw: the text is already rendered")
    add_eos: StrictBool | None = Field(
        None, description="end each response with the end-of-turn token; refused with token ids"
    )
    model: str | None = Field(None, description="name of the pair or token head; the first one if left out")
    signal: SignalName = Field(
        "reward", description="per-token values that sum, mean, min, return_to_go and segments are computed from"
    )
    gamma: Annotated[float, Strict(), Field(ge=0, le=1, allow_inf_nan=False)] = Field(
        1.0, description="discount of return_to_go"
    )
    top_k: Annotated[int, Strict(), Field(ge=0, le=20)] = Field(
        0, description="number of likeliest ids to return at each scored token"
    )
    priority: Literal["interactive", "bulk"] = Field(
        "interactive",
        description="bulk: computed in batch space that interactive requests leave free, at the latest in every fifth "
        "batch",
    )
    tokenizer_sha256: str | None = Field(None, description="refuse the request (409) if another tokenizer is served")
    expect_revision: str | None = Field(None, description="refuse the request (409) if another revision is served")


class ScoreRequest(Options, Item):
    """The body of POST /score: one item, or several in `items`, and the options of all."""

    items: Annotated[list[Item], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)] | None = Field(
        None, description="several items; the request itself then has no input"
    )
    on_error: Literal["fail", "per_item"] = Field(
        "fail", description="per_item: answer the good items, and put an error in the place of each bad one"
    )
    include: Annotated[list[ArrayName], Field(fail_fast=True)] | None = Field(
        None, description="arrays to return; if left out: token_ids, reward and signal, with text also tokens, offsets"
    )
    encoding_format: Literal["float", "base64"] = Field(
        "float", description="base64: arrays as little-endian float32 and int32"
    )

    @model_validator(mode="after")
    def _candidates_for_their_logprobs(self) -> "ScoreRequest":
        if "candidate_sft_logprob" in (self.include or ()) and all(
            item.candidate_ids is None for item in self.listed()
        ):
            raise ValueError("include names candidate_sft_logprob, but no item has candidate_ids")
        return self

    def listed(self) -> list[Item]:
        """The items of the request. A request without `items` is itself the only item."""
        return self.items if self.items is not None else [self]


class HeatmapRequest(ScoreRequest):
    """The body of POST /heatmap: a ScoreRequest, and how to draw its answer."""

    format: Literal["html", "svg", "ansi", "json"] = Field("html", description="json: the data that it is drawn from")
    compare: StrictBool = Field(
        True, description="true: one colour scale for all responses; false: a separate one for each"
    )
    palette: str = Field("blue-red", description="name of the colours; an unknown name is refused with the known ones")


class ModelCard(Strictly):
    """One served pair, or one token head, as GET /models lists it."""

    model_config = ConfigDict(json_schema_serialization_defaults_required=True)  # answers have every key

    name: str
    sft: str | None = Field(description="folder of the sft checkpoint; null for a token head")
    reference: str | None = Field(description="folder of the reference; null for a token head")
    token_head: str | None = Field(
        default=None, description="folder of a token head, whose value after each token is the reward; null for a pair"
    )
    revision: str
    tokenizer_sha256: str
    renderer: str
    end_of_turn_id: int | None
    template_kwargs: dict[str, JsonValue] = Field(
        default_factory=dict, description="variables that the chat template always gets"
    )
    response_prefix: str | None = Field(
        default=None, description="text between the generation prompt and a response, not scored; null: not decided"
    )
    template_date: str | None = Field(default=None, description="the day that the chat template writes")
    text_refused: str | None = Field(
        default=None,
        description="why texts and chats are refused (undecided_template), with the cure; null: they are served",
    )
    dtype: str
    device: str
    vocabulary: int
    max_length_tokens: int
    quantities: list[str]
    related: bool = Field(description="both checkpoints come from one run; true for a token head")

    @property
    def offered(self) -> frozenset[str]:
        """What it can compute in addition to the reward: the quantities, and of a pair the two log-probs."""
        logprobs = {"sft_logprob", "reference_logprob"} if self.token_head is None else set()
        return frozenset({*self.quantities, *logprobs})
