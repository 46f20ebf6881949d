"""The records that the service and its engines exchange, and the protocols of an engine. Imports numpy only.

Names of arrays end in their shape: P prompt tokens; T tokens of a branch, which follow the prompt; S scored tokens of a
branch, in order (S = T if every token is scored); K candidate ids or alternatives at each scored token.
Log-probs are in nats, at temperature 1, reduced in float32.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray

IdArray = NDArray[np.int32]
FloatArray = NDArray[np.float32]
BoolArray = NDArray[np.bool_]
Result = TypeVar("Result")

Report = Callable[[str], None]
"""Called with one line about the progress of a long step."""
MAX_CANDIDATES = 1024
"""Maximum number of candidate ids (K) at one token."""


class OnDevice(Protocol):
    """Runs a call while nothing else computes on the device, and returns its result."""

    def __call__(self, call: Callable[[], Result]) -> Result: ...


@dataclass(frozen=True, slots=True)
class Wants:
    """What to compute at each scored token in addition to the two log-probs. Everything else is skipped.

    `kl` is KL(pi_sft || pi_ref), `entropy` that of pi_sft, `varentropy` the variance of log pi_sft(a|s) over pi_sft, in
    nats squared; `top_k` is the number of likeliest ids under pi_sft.
    """

    kl: bool = False
    entropy: bool = False
    top_k: int = 0
    varentropy: bool = False

    def __or__(self, other: "Wants") -> "Wants":
        """The smallest Wants that covers both."""
        return Wants(
            self.kl or other.kl,
            self.entropy or other.entropy,
            max(self.top_k, other.top_k),
            self.varentropy or other.varentropy,
        )


@dataclass(frozen=True, slots=True)
class Teacher:
    """A distribution to distil from: softmax(((1 + tilt) l_sft - tilt l_reference) / temperature), l for log-probs.

    That is pi_sft (pi_sft / pi_reference)^tilt, normalised over the whole vocabulary: tilt 0 is sft, and -1 the
    reference. `top_k` is the number of its likeliest ids that are wanted at each scored token.
    """

    tilt: float
    temperature: float = 1.0
    top_k: int = 0


@dataclass(frozen=True, slots=True)
class Branch:
    """Tokens that follow a prompt. `scored_T` marks those that get a reward.

    `candidates_SK` holds ids to score in place of each scored token; None if there are none.
    """

    ids_T: IdArray
    scored_T: BoolArray
    candidates_SK: IdArray | None = None


@dataclass(frozen=True, slots=True)
class Trunk:
    """A prompt of at least one token, and the branches that continue it."""

    prompt_P: IdArray
    branches: tuple[Branch, ...]

    @property
    def tokens(self) -> int:
        """Tokens of the prompt, counted once, plus the tokens of all branches."""
        return len(self.prompt_P) + sum(len(branch.ids_T) for branch in self.branches)


@dataclass(frozen=True, slots=True)
class TeacherScores:
    """The log-probs of one branch under a Teacher, in nats.

    `rank_S` is the place of each scored token among all ids, 1 for the likeliest. The likeliest ids come in order. An
    id that the teacher rules out has -inf. `next_id` is the likeliest id after the whole branch.
    """

    logprob_S: FloatArray
    rank_S: IdArray
    top_ids_SK: IdArray
    top_logprob_SK: FloatArray
    candidate_logprob_SK: FloatArray | None
    next_id: int
    next_logprob: float


@dataclass(frozen=True, slots=True)
class TokenScores:
    """The scores of one branch under both models. Arrays that neither the Wants nor the branch request are None.

    `value_S` is set by a token head and `teacher` by the engine of a teacher: the first two arrays are then empty.
    """

    sft_logprob_S: FloatArray
    reference_logprob_S: FloatArray
    kl_S: FloatArray | None = None
    entropy_S: FloatArray | None = None
    candidate_sft_logprob_SK: FloatArray | None = None
    candidate_reference_logprob_SK: FloatArray | None = None
    top_ids_SK: IdArray | None = None
    top_sft_logprob_SK: FloatArray | None = None
    top_reference_logprob_SK: FloatArray | None = None
    varentropy_S: FloatArray | None = None
    value_S: FloatArray | None = None
    teacher: TeacherScores | None = None

    @property
    def tokens(self) -> int:
        """Number of scored tokens, S."""
        if self.teacher is not None:
            return len(self.teacher.logprob_S)
        return len(self.sft_logprob_S if self.value_S is None else self.value_S)


def head_scores(value_S: FloatArray) -> TokenScores:
    """The scores of one branch under a token head: its value after each scored token."""
    none_0 = np.empty(0, dtype=np.float32)
    return TokenScores(none_0, none_0, value_S=value_S)


def teacher_scores(teacher: TeacherScores) -> TokenScores:
    """The scores of one branch under a Teacher."""
    none_0 = np.empty(0, dtype=np.float32)
    return TokenScores(none_0, none_0, teacher=teacher)


def no_scores(branch: Branch, wants: Wants) -> TokenScores:
    """The scores of a branch without a scored token: S = 0, and an empty array in place of each wanted one."""
    row_S = np.empty(0, dtype=np.float32)
    width = 0 if branch.candidates_SK is None else branch.candidates_SK.shape[1]
    candidates_SK = row_S.reshape(0, width) if width else None
    top_SK = row_S.reshape(0, wants.top_k) if wants.top_k else None
    return TokenScores(
        row_S,
        row_S,
        kl_S=row_S if wants.kl else None,
        entropy_S=row_S if wants.entropy else None,
        varentropy_S=row_S if wants.varentropy else None,
        candidate_sft_logprob_SK=candidates_SK,
        candidate_reference_logprob_SK=candidates_SK,
        top_ids_SK=None if top_SK is None else top_SK.astype(np.int32),
        top_sft_logprob_SK=top_SK,
        top_reference_logprob_SK=top_SK,
    )


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What an engine serves, and its limits: a pair (`sft` and `reference`) or a `token_head`; the other is None.

    `revision` is a hash of the files of all checkpoints and of the options that change their scores. `dtype` is that
    of the sft weights. `quantities` names what it can compute in addition to the two log-probs: kl, centred, entropy,
    varentropy, candidate_reward, alternatives; a token head has no log-probs and none of these. `related` is true if
    both checkpoints come from one run.
    """

    sft: str | None
    reference: str | None
    revision: str
    dtype: str
    device: str
    vocab_size: int
    max_length_tokens: int
    quantities: frozenset[str]
    related: bool
    token_head: str | None = None


Scores = list[list[TokenScores]]
"""One list per trunk, with one TokenScores per branch; trunks and branches are in order."""
Work = Callable[[], Scores]
"""A batch that is prepared on the device. Call it once, on the device thread: it computes and returns the scores."""


@dataclass(frozen=True, slots=True)
class StagedWork(Generic[Result]):
    """Work in two stages, so that a device need not wait for the host between two batches.

    `launch`, on the device thread, starts the computation and returns a call that waits for the results, on any thread.
    Other work can be launched meanwhile. `tokens`: how many go through the models, without padding; None if unknown.
    """

    launch: Callable[[], Callable[[], Result]]
    tokens: int | None

    def __call__(self) -> Result:
        return self.launch()()


def launched(work: Callable[[], Result]) -> Callable[[], Result]:
    """Launch work, and return the call that waits for its results. Other than staged work is finished by then."""
    if isinstance(work, StagedWork):
        return work.launch()
    result = work()
    return lambda: result


@dataclass(frozen=True, slots=True)
class Cost:
    """Tokens that the device computes for a trunk, padding not counted. Queue and batches are measured in them.

    `shared_tokens` are computed once for all branches of the prompt in a batch, `branch_tokens` for each branch.
    """

    shared_tokens: int
    branch_tokens: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return self.shared_tokens + sum(self.branch_tokens)


class Engine(Hashable, Protocol):
    """Scores trunks under both models of one pair. `prepare` runs on a host thread, its Work on the device thread."""

    @property
    def info(self) -> EngineInfo: ...

    def cost(self, trunk: Trunk) -> Cost:
        """The cost of a trunk. A branch's cost must not depend on other branches: the batcher cuts trunks anywhere."""
        ...

    def prepare(self, trunks: Sequence[Trunk], wants: Wants) -> Work:
        """Pack a batch and copy it to the device. Trunks with equal prompts can share the computation of the prompt.

        The device thread can be computing another batch meanwhile. The returned Work can be dropped without a call.
        Scores must not depend on what else is in the batch.

        Both this call and the Work raise OutOfMemoryError if the device cannot hold the batch, SequenceError if the
        engine cannot score one of its sequences, and EngineLostError if the device computes nothing more in this
        process.
        """
        ...


@runtime_checkable
class SharingEngine(Engine, Protocol):
    """An engine that can score a batch together with engines that share a model with it."""

    def shares_with(self, other: Engine) -> bool:
        """Whether `prepare_shared` accepts both engines, and saves work."""
        ...

    def prepare_shared(
        self, engines: Sequence[Engine], trunks: Sequence[Trunk], wants: Wants
    ) -> StagedWork[list[Scores]]:
        """Like `prepare`, for the same trunks under several engines: one Scores per engine, one run per model."""
        ...


@runtime_checkable
class RemoteEngine(Engine, Protocol):
    """An engine that sends queries to another inference engine, which can be temporarily unavailable."""

    @property
    def unavailable_reason(self) -> str | None:
        """Why it cannot compute now, although it may recover; None if it can."""
        ...

    def close(self) -> None:
        """Release what it holds outside this process."""
        ...


TaughtBy = Callable[[Teacher], Engine]
"""Gives the engine of a teacher: it answers with TeacherScores, whatever the Wants. Equal teachers, equal engines."""
