"""What travels over HTTP: requests, validated, and the shapes of answers. Unknown keys are refused."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, Strict, StrictBool, StringConstraints, model_validator

from dense_reward.reward import Signal

TokenId = Annotated[int, Strict()]
# Long lists tell their first fault alone: a million floats for ids would else become a million messages.
Ids = Annotated[list[TokenId], Field(fail_fast=True)]
IdsPerToken = Annotated[list[Ids], Field(fail_fast=True)]
Spans = Annotated[list[tuple[TokenId, TokenId]], Field(fail_fast=True)]
MAX_ITEMS = 65_536
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
    content: str
    name: str | None = None
    tool_calls: list[JsonValue] | None = None
    tool_call_id: str | None = None


class Item(Strictly):
    """One prompt and its responses, in exactly one of five forms."""

    prompt: str | None = Field(None, description="rendered as one user turn by the checkpoint's renderer")
    response: str | None = None
    responses: Annotated[list[str], Field(min_length=1, fail_fast=True)] | None = Field(
        None, description="G responses to one prompt"
    )
    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)] | None = Field(
        None, description="a chat that ends with the assistant"
    )
    score: Literal["last", "all_assistant"] | None = None
    tools: list[JsonValue] | None = None
    template_kwargs: dict[str, JsonValue] | None = None
    prompt_ids: Ids | None = Field(None, description="exact ids, taken verbatim")
    response_ids: Annotated[list[Ids], Field(min_length=1, fail_fast=True)] | None = Field(
        None, description="[G][T]; an empty response is legal"
    )
    token_ids: Ids | None = Field(None, description="one multi-turn stream")
    score_mask: Annotated[list[Literal[0, 1]], Field(fail_fast=True)] | None = Field(
        None, description="1 marks the tokens to score; the first must be 0"
    )
    text: str | None = Field(None, description="every token after the first is scored")
    candidate_ids: Annotated[list[IdsPerToken], Field(fail_fast=True)] | None = Field(
        None, description="[G][T][K] ids whose rewards are wanted at each scored position"
    )
    segments: Annotated[list[Spans], Field(fail_fast=True)] | None = Field(
        None, description="[G][S][2] half-open spans of scored tokens whose signal is summed"
    )

    @property
    def form(self) -> str:
        """Which of the five forms this is."""
        return self._forms()[0]

    def _given(self) -> set[str]:
        """The fields that were sent; null is the same as nothing."""
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
        """Raise ValueError where a form lacks a part."""
        if form == "prompt" and (self.prompt is None or (self.response is None) == (self.responses is None)):
            raise ValueError("a prompt needs either response or responses, and those need a prompt")
        if form == "messages" and self.messages is None:
            raise ValueError("score, tools and template_kwargs belong to messages")
        if form == "ids" and (self.prompt_ids is None or self.response_ids is None):
            raise ValueError("prompt_ids and response_ids need each other")
        if form == "stream":
            if self.token_ids is None or self.score_mask is None:
                raise ValueError("token_ids and score_mask need each other")
            if len(self.token_ids) != len(self.score_mask):
                raise ValueError(f"{len(self.token_ids)} token_ids, but {len(self.score_mask)} entries in score_mask")


class Options(Strictly):
    """What is wanted of every item."""

    render: Literal["chat", "raw"] | None = Field(None, description="raw: the text is rendered already")
    add_eos: StrictBool | None = Field(None, description="end responses with the end of turn; refused with ids")
    model: str | None = Field(None, description="name of the pair; the only one where left out")
    signal: SignalName = Field("reward", description="what sum, mean, min, return_to_go and segments are made of")
    gamma: Annotated[float, Strict(), Field(ge=0, le=1, allow_inf_nan=False)] = Field(
        1.0, description="discount of return_to_go"
    )
    top_k: Annotated[int, Strict(), Field(ge=0, le=20)] = Field(0, description="alternatives per token")
    priority: Literal["interactive", "bulk"] = Field(
        "interactive",
        description="bulk: computed in what interactive requests leave of the batches",
    )
    tokenizer_sha256: str | None = Field(None, description="refuse (409) unless this tokenizer is served")
    expect_revision: str | None = Field(None, description="refuse (409) unless this revision is served")


class ScoreRequest(Options, Item):
    """POST /score."""

    items: Annotated[list[Item], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)] | None = None
    on_error: Literal["fail", "per_item"] = "fail"
    include: Annotated[list[ArrayName], Field(fail_fast=True)] | None = Field(None, description="arrays to return")
    encoding_format: Literal["float", "base64"] = Field(
        "float", description="base64: little-endian float32 and int32 arrays"
    )

    @model_validator(mode="after")
    def _candidates_for_their_logprobs(self) -> "ScoreRequest":
        if "candidate_sft_logprob" in (self.include or ()) and all(
            item.candidate_ids is None for item in self.listed()
        ):
            raise ValueError("include names candidate_sft_logprob, but no item has candidate_ids")
        return self

    def listed(self) -> list[Item]:
        """The items of the request; a request without `items` is its own only item."""
        return self.items if self.items is not None else [self]


class HeatmapRequest(ScoreRequest):
    """POST /heatmap: the same inputs, answered as a picture."""

    format: Literal["html", "svg", "ansi", "json"] = "html"
    compare: StrictBool = Field(True, description="one colour scale for all responses; false: each its own")
    palette: str = "blue-red"


class ModelCard(Strictly):
    """One served pair, as /models lists it and answers name it."""

    name: str
    sft: str
    reference: str
    revision: str
    tokenizer_sha256: str
    renderer: str
    end_of_turn_id: int | None
    dtype: str
    device: str
    vocabulary: int
    max_length_tokens: int
    quantities: list[str]
    related: bool = Field(description="both checkpoints come from one run")
