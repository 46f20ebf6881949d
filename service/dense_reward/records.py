"""What an engine is: the records it takes and gives. Imports numpy alone, so that the service's core stays light.

Shapes: P prompt tokens, T tokens of a branch after the prompt, S of those that are scored (S = T without a mask),
K candidates or alternatives per scored token. Log-probabilities are in nats, at temperature 1, reduced in float32.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray

IdArray = NDArray[np.int32]
FloatArray = NDArray[np.float32]
BoolArray = NDArray[np.bool_]
Result = TypeVar("Result")

Report = Callable[[str], None]
"""Takes one line on the progress of a long step."""
MAX_CANDIDATES = 1024
"""Candidate ids at one token."""


class OnDevice(Protocol):
    """Runs a call where nothing else computes on the device meanwhile."""

    def __call__(self, call: Callable[[], Result]) -> Result: ...


@dataclass(frozen=True, slots=True)
class Wants:
    """What is computed for each scored token beyond the two log-probs; what nobody asked for is not computed."""

    kl: bool = False
    entropy: bool = False
    top_k: int = 0

    def __or__(self, other: "Wants") -> "Wants":
        return Wants(self.kl or other.kl, self.entropy or other.entropy, max(self.top_k, other.top_k))


@dataclass(frozen=True, slots=True)
class Branch:
    """The tokens after a prompt; `scored_T` marks those that get a reward, `candidates_SK` are alternatives to them."""

    ids_T: IdArray
    scored_T: BoolArray
    candidates_SK: IdArray | None = None


@dataclass(frozen=True, slots=True)
class Trunk:
    """A prompt of at least one token and the branches that share it."""

    prompt_P: IdArray
    branches: tuple[Branch, ...]

    @property
    def tokens(self) -> int:
        """Tokens of the prompt, counted once, and of all branches."""
        return len(self.prompt_P) + sum(len(branch.ids_T) for branch in self.branches)


@dataclass(frozen=True, slots=True)
class TokenScores:
    """The two models' view of one branch; arrays that were not asked for are None."""

    sft_logprob_S: FloatArray
    reference_logprob_S: FloatArray
    kl_S: FloatArray | None = None
    entropy_S: FloatArray | None = None
    candidate_sft_logprob_SK: FloatArray | None = None
    candidate_reference_logprob_SK: FloatArray | None = None
    top_ids_SK: IdArray | None = None
    top_sft_logprob_SK: FloatArray | None = None
    top_reference_logprob_SK: FloatArray | None = None


def no_scores(branch: Branch, wants: Wants) -> TokenScores:
    """The scores of a branch without a scored token: S = 0, in the shapes that `wants` and its candidates ask for."""
    row_S = np.empty(0, dtype=np.float32)
    width = 0 if branch.candidates_SK is None else branch.candidates_SK.shape[1]
    candidates_SK = row_S.reshape(0, width) if width else None
    top_SK = row_S.reshape(0, wants.top_k) if wants.top_k else None
    return TokenScores(
        row_S,
        row_S,
        kl_S=row_S if wants.kl else None,
        entropy_S=row_S if wants.entropy else None,
        candidate_sft_logprob_SK=candidates_SK,
        candidate_reference_logprob_SK=candidates_SK,
        top_ids_SK=None if top_SK is None else top_SK.astype(np.int32),
        top_sft_logprob_SK=top_SK,
        top_reference_logprob_SK=top_SK,
    )


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What an engine serves and can do. `quantities` names what it can compute besides the two log-probs."""

    sft: str
    reference: str
    revision: str
    dtype: str
    device: str
    vocab_size: int
    max_length_tokens: int
    quantities: frozenset[str]
    related: bool


Scores = list[list[TokenScores]]
"""One list per trunk, one TokenScores per branch, in order; empty arrays where nothing is scored."""
Work = Callable[[], Scores]
"""A batch that lies ready on the device: called once, on the device thread, it computes the scores."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Tokens that the device computes for a trunk, before padding: what queue and batches count.

    `shared_tokens` once, however many branches of its prompt are computed together, `branch_tokens` for each branch.
    """

    shared_tokens: int
    branch_tokens: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return self.shared_tokens + sum(self.branch_tokens)


class Engine(Hashable, Protocol):
    """One pair: scores trunks under both models. Prepares batches on a thread of the host, computes on the device's."""

    @property
    def info(self) -> EngineInfo: ...

    def cost(self, trunk: Trunk) -> Cost:
        """A branch costs the same whatever branches stand beside it, so that a trunk can be cut anywhere."""
        ...

    def prepare(self, trunks: Sequence[Trunk], wants: Wants) -> Work:
        """Packs a batch and copies it to the device; trunks with equal prompts may share them.

        Called while the device thread may be computing another batch. What it returns may be dropped without a call.
        Both raise OutOfMemoryError where the device cannot hold the batch, EngineLostError where it answers nothing
        more; results do not depend on what else is in the batch.
        """
        ...


@runtime_checkable
class SharingEngine(Engine, Protocol):
    """An engine that can compute a batch together with others that have a model in common with it."""

    def shares_with(self, other: Engine) -> bool:
        """Whether both can be asked at once by `prepare_shared`, and gain by it."""
        ...

    def prepare_shared(
        self, engines: Sequence[Engine], trunks: Sequence[Trunk], wants: Wants
    ) -> Callable[[], list[Scores]]:
        """As `prepare`, for the same trunks under several engines: the scores of each, every model having run once."""
        ...


@runtime_checkable
class RemoteEngine(Engine, Protocol):
    """An engine whose models somebody else computes, who may be away for a while."""

    @property
    def unavailable_reason(self) -> str | None:
        """Why it computes nothing now, though it may again."""
        ...

    def close(self) -> None:
        """Let go of what it holds outside this process."""
        ...
