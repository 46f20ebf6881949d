"""dense-reward: the reward of every token, from two checkpoints of one supervised fine-tuning run.

Importing this package imports the client only. The service is `dense_reward.http.app`; models run in `engines`.
"""

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
from dense_reward.client.results import (
    Alternative,
    Scored,
    ScoredItem,
    ScoredResponse,
    ServedModel,
    Timing,
    Usage,
    padded,
)
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
