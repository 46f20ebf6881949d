"""Options of vLLM's and SGLang's requests. What would change log-probs, or needs more than one token, is refused."""

from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Strict, StrictBool, Tag

from dense_reward.records import MAX_CANDIDATES
from dense_reward.schemas import Ids, Strictly

LOWEST_TEMPERATURE = 0.01


def only(*values: object, cure: str) -> AfterValidator:
    """Accepts these values only."""

    def check(value: object) -> object:
        if value not in values:
            accepted = " or ".join(repr(each) for each in values if each is not None) or "null"
            raise ValueError(f"a teacher takes only {accepted} here: {cure}")
        return value

    return AfterValidator(check)


def _no_text(value: object) -> object:
    if isinstance(value, str) or (isinstance(value, list) and any(isinstance(each, str) for each in value[:1])):
        raise ValueError("a teacher takes token ids, not text: send the ids of your model")
    return value


def _shape(value: object) -> str:
    return "several" if isinstance(value, list) and value and isinstance(value[0], list) else "one"


def _temperature(value: float) -> float:
    if 0 < value < LOWEST_TEMPERATURE:
        raise ValueError(f"must be 0 (the same as 1) or at least {LOWEST_TEMPERATURE}")
    return value


WHOLE = "log-probs are of the whole distribution, so leave it out"
ONE = "it answers with log-probs and at most one token"
Temperature = Annotated[
    float, Field(ge=0, le=100, allow_inf_nan=False), AfterValidator(_temperature), Field(description="0: as 1")
]
LikeliestIds = Annotated[
    int,
    Strict(),
    Field(ge=0, le=MAX_CANDIDATES, description="how many of the likeliest ids are answered, beside the token itself"),
]
Nothing = Annotated[object | None, only(None, cure="leave it out")]
NotStreamed = Annotated[StrictBool | None, only(None, False, cure="answers are sent whole")]
OneAnswer = Annotated[int | None, only(None, 1, cure=ONE)]


class WholeDistribution(Strictly):
    """Sampling options, which must leave the distribution whole. `temperature` alone changes it.

    Options that can only change which token is drawn, or how text is written, change nothing here.
    """

    temperature: Temperature = 1.0
    top_p: Annotated[float | None, only(None, 1.0, cure=WHOLE)] = None
    top_k: Annotated[int | None, only(None, -1, 0, cure=WHOLE)] = None
    min_p: Annotated[float | None, only(None, 0.0, cure=WHOLE)] = None
    presence_penalty: Annotated[float | None, only(None, 0.0, cure=WHOLE)] = None
    frequency_penalty: Annotated[float | None, only(None, 0.0, cure=WHOLE)] = None
    repetition_penalty: Annotated[float | None, only(None, 1.0, cure=WHOLE)] = None
    logit_bias: Annotated[dict[str, float] | None, only(None, {}, cure=WHOLE)] = None
    n: OneAnswer = None
    seed: int | None = None
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    detokenize: bool = True
    ignore_eos: bool = False

    @property
    def divisor(self) -> float:
        """What logits are divided by: vLLM and SGLang compute log-probs at temperature 0 as at 1."""
        return self.temperature or 1.0


OneOrSeveral = Annotated[
    Annotated[Ids, Tag("one")] | Annotated[list[Ids], Field(min_length=1, fail_fast=True), Tag("several")],
    Discriminator(_shape),
    BeforeValidator(_no_text),
    Field(description="token ids of a sequence, or of several"),
]


def listed(ids: list[int] | list[list[int]]) -> list[list[int]]:
    """The sequences, of which there may be one."""
    several = [each for each in ids if isinstance(each, list)]
    return several or [[each for each in ids if isinstance(each, int)]]
