"""dense-reward: the reward of every token, from two checkpoints of one supervised fine-tuning run.

The names below are those of the client, and are imported when they are first used: a command that prints its help, or a
program that needs one record, does not wait for an HTTP library. The service is `dense_reward.http.app`; models run in
`engines`.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dense_reward.client import AsyncClient, Client, to_pandas, to_torch
    from dense_reward.client.errors import (
        AlignmentError,
        AnswerError,
        ClientError,
        ItemError,
        MismatchError,
        ScoringError,
        ServiceUnavailableError,
        TokenizerMismatchError,
    )
    from dense_reward.client.http import Backoff
    from dense_reward.client.requests import ScoreOptions
    from dense_reward.client.results import Scored, ScoredItem, ServedModel, Timing, Usage, padded
    from dense_reward.client.scored_response import Alternative, ScoredResponse
    from dense_reward.schemas import ModelCard

__all__ = [
    "AlignmentError",
    "Alternative",
    "AnswerError",
    "AsyncClient",
    "Backoff",
    "Client",
    "ClientError",
    "ItemError",
    "MismatchError",
    "ModelCard",
    "ScoreOptions",
    "Scored",
    "ScoredItem",
    "ScoredResponse",
    "ScoringError",
    "ServedModel",
    "ServiceUnavailableError",
    "Timing",
    "TokenizerMismatchError",
    "Usage",
    "padded",
    "to_pandas",
    "to_torch",
]

_MODULES = (
    "client",
    "client.errors",
    "client.http",
    "client.requests",
    "client.results",
    "client.scored_response",
    "schemas",
)


def __getattr__(name: str) -> object:
    if name in __all__:
        for module in _MODULES:
            found: object = getattr(import_module(f"{__name__}.{module}"), name, None)
            if found is not None:
                globals()[name] = found
                return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
