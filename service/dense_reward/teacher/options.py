"""Options of vLLM's and SGLang's requests. What would change log-probs, or needs more than one token, is refused."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import (
    AfterValidator,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    GetPydanticSchema,
    Strict,
    StrictBool,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from dense_reward.limits import MAX_ITEMS
from dense_reward.records import MAX_CANDIDATES
from dense_reward.schemas import Ids, Strictly

LOWEST_TEMPERATURE = 0.01


@dataclass(frozen=True, slots=True)
class _Only(AfterValidator):
    """Accepts these values only, also in the schema."""

    values: tuple[object, ...] = ()

    def __get_pydantic_json_schema__(self, _: CoreSchema, __: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"enum": [*self.values]}


def only(*values: object, cure: str) -> AfterValidator:
    """Accepts these values only."""

    def check(value: object) -> object:
        if value not in values:
            accepted = " or ".join(repr(each) for each in values if each is not None) or "null"
            raise ValueError(f"a teacher takes only {accepted} here: {cure}")
        return value

    return _Only(check, values)


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


def _one_or_several(_: object, handler: GetCoreSchemaHandler) -> CoreSchema:
    """A union without Python functions: before these, pydantic would make objects of a whole list, however long."""
    several = Annotated[list[Ids], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)]
    return core_schema.union_schema(
        [handler.generate_schema(Ids), handler.generate_schema(several)],
        mode="left_to_right",
        custom_error_type="token_ids",
        custom_error_message=f"a teacher takes token ids, not text: a list of integers, or at most {MAX_ITEMS} lists",
    )


OneOrSeveral = Annotated[
    list[int] | list[list[int]],
    GetPydanticSchema(_one_or_several),
    Field(description="token ids of a sequence, or of several"),
]


def listed(ids: list[int] | list[list[int]]) -> list[list[int]]:
    """The sequences, of which there may be one."""
    several = [each for each in ids if isinstance(each, list)]
    return several or [[each for each in ids if isinstance(each, int)]]
