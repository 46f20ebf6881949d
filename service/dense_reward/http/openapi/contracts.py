"""The answers of routes whose contract others wrote: OpenRLHF's reward model, vLLM's and SGLang's log-probs.

As the types of answers.py, they exist for the document and for tests alone.
"""

from typing import Annotated, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict


class Logs(TypedDict):
    """What every response has. If one has no tokens, the mean and the min of all are left out."""

    dense_reward_sum: list[float]
    dense_reward_length: list[int]
    dense_reward_mean: NotRequired[list[float]]
    dense_reward_min: NotRequired[list[float]]


class GetRewardAnswer(TypedDict):
    """The answer of POST /get_reward: one number for each query, in their order."""

    rewards: list[float]
    scores: Annotated[list[float], Field(description="equal to rewards")]
    extra_logs: Logs


class Logprob(TypedDict):
    """The log-prob of one id."""

    logprob: Annotated[float, Field(description="nats, at the temperature of the request")]
    rank: Annotated[int, Field(description="1 for the likeliest id")]


PromptLogprobs = Annotated[
    list[dict[str, Logprob] | None],
    Field(description="for each id of the sequence, itself first and then the likeliest ids; null for the first"),
]


class TeacherUsage(TypedDict):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class EchoedLogprobs(TypedDict):
    """OpenAI's arrays, with an entry for each id of the sequence and of the generated token."""

    tokens: Annotated[list[str], Field(description="token_id:ID")]
    token_logprobs: Annotated[list[float | None], Field(description="nats; null for the first and the generated id")]
    top_logprobs: list[dict[str, float] | None]


class CompletionChoice(TypedDict):
    """One sequence. `text` and `token_ids` hold the likeliest next token if max_tokens is 1."""

    index: int
    text: str
    logprobs: Annotated[EchoedLogprobs | None, Field(description="if echo is true")]
    finish_reason: Literal["length"]
    stop_reason: None
    token_ids: list[int]
    prompt_logprobs: PromptLogprobs | None


class CompletionAnswer(TypedDict):
    """The answer of POST /v1/completions, as vLLM gives it."""

    id: str
    object: Literal["text_completion"]
    created: Annotated[int, Field(description="seconds since 1970")]
    model: Annotated[str, Field(description="the teacher")]
    choices: list[CompletionChoice]
    usage: TeacherUsage


class GenerateChoice(TypedDict):
    """The sequence. `token_ids` holds the likeliest next token if max_tokens is 1."""

    index: int
    logprobs: None
    finish_reason: Literal["length"]
    token_ids: list[int]


class GenerateAnswer(TypedDict):
    """The answer of POST /inference/v1/generate, as vLLM gives it."""

    request_id: str
    model: Annotated[str, Field(description="the teacher")]
    created: Annotated[int, Field(description="seconds since 1970")]
    choices: list[GenerateChoice]
    prompt_logprobs: PromptLogprobs
    usage: TeacherUsage


SglangLogprob = tuple[float | None, int, None]
"""[log-prob in nats, id, null]"""


class FinishReason(TypedDict):
    """Nothing was written."""

    type: Literal["length"]
    length: int


class SglangMeta(TypedDict):
    """Log-probs from the position logprob_start_len on; the first one is null."""

    id: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    input_token_logprobs: Annotated[list[SglangLogprob], Field(description="of the sequence's own ids")]
    output_token_logprobs: Annotated[list[SglangLogprob], Field(description="empty")]
    input_top_logprobs: NotRequired[
        Annotated[list[list[SglangLogprob] | None], Field(description="of the top_logprobs_num likeliest ids")]
    ]
    input_token_ids_logprobs: NotRequired[
        Annotated[list[list[SglangLogprob] | None], Field(description="of the ids that were asked for")]
    ]


class SglangAnswer(TypedDict):
    """The answer of POST /generate, as SGLang gives it; a list of them for a list of sequences."""

    text: str
    output_ids: list[int]
    meta_info: SglangMeta


class Teacher(TypedDict):
    """One teacher, as OpenAI's and vLLM's lists have models."""

    id: Annotated[str, Field(description="name to send as model")]
    object: Literal["model"]
    created: int
    owned_by: str
    root: Annotated[str | None, Field(description="folder of its checkpoint")]
    max_model_len: Annotated[int, Field(description="most tokens of a sequence")]


class TeachersAnswer(TypedDict):
    """The answer of GET /v1/models."""

    object: Literal["list"]
    data: list[Teacher]
