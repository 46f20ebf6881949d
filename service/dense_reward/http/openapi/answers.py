"""The answers of this service's own routes, as types. They exist for the document and for tests alone.

Answers are written as bytes without them, because these types would cost more than scoring a short text. Tests hold
every answer to them. A key that is NotRequired can be absent, and is never null unless its type says so.

Shapes: T scored tokens of a response, K candidate ids or alternatives at each, S segments.
"""

from typing import Annotated, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict  # pydantic refuses typing's before Python 3.12

from dense_reward.schemas import ModelCard

Float32s = Annotated[
    str,
    Field(
        description="base64 of little-endian float32, row-major (encoding_format base64)",
        json_schema_extra={"contentEncoding": "base64"},
    ),
]
Int32s = Annotated[
    str,
    Field(
        description="base64 of little-endian int32, row-major (encoding_format base64)",
        json_schema_extra={"contentEncoding": "base64"},
    ),
]
Floats = list[float] | Float32s
FloatRows = list[list[float]] | Float32s
Nats = "[T] in nats"


class ItemFault(TypedDict):
    """What is wrong with one item of a request."""

    item: Annotated[int, Field(description="index of the item")]
    code: Annotated[str, Field(description="as the code of an error")]
    message: str
    param: Annotated[str | None, Field(description="the field at fault, if it is known")]


class ErrorDetails(TypedDict):
    """The first fault, and all faults of items."""

    code: Annotated[str, Field(description="for programs; a newer service can have codes that an older one has not")]
    message: Annotated[str, Field(description="for people: what is wrong, the limit, and the cure")]
    param: Annotated[str | None, Field(description="the field at fault, if it is known")]
    items: Annotated[list[ItemFault] | None, Field(description="every item at fault; null if no item is")]
    request_id: Annotated[str, Field(description="as in the header X-Request-Id and in the service's log")]


class ErrorAnswer(TypedDict):
    """The body of every error."""

    error: ErrorDetails


class Alternative(TypedDict):
    """One of the likeliest ids at a scored token under the sft model."""

    id: int
    token: Annotated[str, Field(description="the text of the id alone")]
    sft_logprob: Annotated[float, Field(description="nats")]
    reward: Annotated[float, Field(description="nats: what the reward would be if this id stood here")]


class ScoredResponse(TypedDict):
    """One response, with the arrays that `include` names, in the order of the scored tokens."""

    item: Annotated[int, Field(description="index of the item in the request")]
    response: Annotated[int, Field(description="index of the response in its item")]
    token_ids: NotRequired[Annotated[list[int] | Int32s, Field(description="[T]")]]
    tokens: NotRequired[Annotated[list[str], Field(description="[T] text of each id alone")]]
    offsets: NotRequired[
        Annotated[
            list[tuple[int, int]] | Int32s,
            Field(description="[T, 2] half-open span of each token in `text`, in code points"),
        ]
    ]
    text: NotRequired[Annotated[str, Field(description="the response as it was sent, or its ids as text")]]
    reward: NotRequired[
        Annotated[Floats, Field(description="[T] sft_logprob - reference_logprob in nats; of a token head its values")]
    ]
    sft_logprob: NotRequired[Annotated[Floats, Field(description=Nats)]]
    reference_logprob: NotRequired[Annotated[Floats, Field(description=Nats)]]
    kl: NotRequired[Annotated[Floats, Field(description="[T] KL(sft || reference) before each token, in nats")]]
    centred: NotRequired[Annotated[Floats, Field(description="[T] reward - kl, in nats")]]
    entropy: NotRequired[
        Annotated[Floats, Field(description="[T] entropy of the sft model before each token, in nats")]
    ]
    varentropy: NotRequired[Annotated[Floats, Field(description="[T] variance of its log-probs, in nats squared")]]
    return_to_go: NotRequired[
        Annotated[Floats, Field(description="[T] sum of the signal from each token on, discounted by gamma")]
    ]
    candidate_reward: NotRequired[
        Annotated[FloatRows, Field(description="[T, K] rewards of candidate_ids, if the request has them")]
    ]
    candidate_sft_logprob: NotRequired[Annotated[FloatRows, Field(description="[T, K] in nats")]]
    segments: NotRequired[
        Annotated[Floats, Field(description="[S] sum of the signal in each of the request's segments")]
    ]
    alternatives: NotRequired[
        Annotated[list[list[Alternative]], Field(description="[T, K] the top_k likeliest ids, if top_k is above 0")]
    ]
    sum: Annotated[float, Field(description="of the signal over the scored tokens")]
    mean: Annotated[float | None, Field(description="null for a response without tokens")]
    min: Annotated[float | None, Field(description="null for a response without tokens")]
    length: Annotated[int, Field(description="number of scored tokens")]


class FailedItem(TypedDict):
    """An item that could not be scored. Only with on_error per_item."""

    item: int
    error: ItemFault


class ScoredBy(TypedDict):
    """The pair or token head that answered."""

    name: str
    sft: Annotated[str | None, Field(description="folder of the sft checkpoint; null for a token head")]
    reference: Annotated[str | None, Field(description="folder of the reference; null for a token head")]
    token_head: Annotated[str | None, Field(description="folder of the token head; null for a pair")]
    tokenizer_sha256: str
    revision: Annotated[str, Field(description="changes if a checkpoint changes; send it as expect_revision")]
    related: Annotated[bool, Field(description="both checkpoints come from one run; true for a token head")]


class Usage(TypedDict):
    """Token counts."""

    prompt_tokens: Annotated[int, Field(description="of all prompts, one for each item")]
    response_tokens: Annotated[int, Field(description="of all responses")]
    scored_tokens: Annotated[int, Field(description="those of the responses that got a reward")]


class Timing(TypedDict):
    """Seconds of each stage of the request."""

    encode_s: Annotated[float, Field(description="checks and tokenisation")]
    queue_s: Annotated[float, Field(description="until its first batch began")]
    compute_s: Annotated[float, Field(description="its batches")]
    describe_s: Annotated[float, Field(description="building the results")]
    total_s: float


class ScoreAnswer(TypedDict):
    """The answer of POST /score, and of POST /heatmap with format json."""

    wire_version: Annotated[
        str, Field(description="a new minor number adds keys; a new major one changes their meaning")
    ]
    id: Annotated[str, Field(description="as in the header X-Request-Id")]
    model: ScoredBy
    results: Annotated[list[ScoredResponse | FailedItem], Field(description="item by item, response by response")]
    usage: Usage
    timing: Timing


class ModelsAnswer(TypedDict):
    """The answer of GET /models."""

    models: Annotated[list[ModelCard], Field(description="the first one answers requests without a model")]


class Loading(TypedDict):
    """A pair that is being loaded."""

    name: str
    progress: str


class AdminModelsAnswer(TypedDict):
    """The answer of GET /admin/models."""

    models: list[ModelCard]
    loading: Annotated[Loading | None, Field(description="the pair that is being loaded over HTTP, if there is one")]


class RemovedAnswer(TypedDict):
    """The answer of DELETE /admin/models/NAME."""

    removed: str


class HealthAnswer(TypedDict):
    """The answer of GET /health: 503 if the state is failed."""

    state: Literal["starting", "ready", "draining", "failed"]


class ReadyAnswer(TypedDict):
    """The answer of GET /ready: 200 if the state is ready, otherwise 503."""

    state: Literal["starting", "ready", "draining", "failed", "unavailable"]
    progress: NotRequired[
        Annotated[str, Field(description="the latest step, or the reason; only of a service without keys")]
    ]
