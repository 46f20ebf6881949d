"""Engines for the tests of the queue: they count, fail, block, run out of memory, and never compute."""

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from dense_reward.errors import OutOfMemoryError
from dense_reward.records import Branch, Cost, EngineInfo, Scores, TokenScores, Trunk, Wants, Work

INFO = EngineInfo(
    sft="sft",
    reference="reference",
    revision="r",
    dtype="float32",
    device="cpu",
    vocab_size=1 << 20,
    max_length_tokens=1 << 20,
    quantities=frozenset({"kl", "centred", "entropy", "candidate_reward", "alternatives"}),
    related=True,
)
PATIENCE_S = 30.0
"""After which a test that waits for another thread gives up."""


def trunk(name: int, *lengths: int, prompt_tokens: int = 2, first: int = 0) -> Trunk:
    """A prompt named by its ids, with branches of these lengths, each named by its place after `first`."""
    branches = tuple(Branch(np.full(n, g, np.int32), np.ones(n, dtype=bool)) for g, n in enumerate(lengths, first))
    return Trunk(np.full(prompt_tokens, name, np.int32), branches)


def unlike(count: int, name: int, length: int, prompt_tokens: int = 2) -> list[Trunk]:
    """Trunks of one prompt with one branch each, no two of which are equal."""
    return [trunk(name, length, prompt_tokens=prompt_tokens, first=place) for place in range(count)]


def scores_of(prompt: Trunk, branch: Branch, wants: Wants) -> TokenScores:
    """Log-probs that tell whose they are: the prompt's name and the branch's; with all that the batch wants."""
    n, k = int(branch.scored_T.sum()), wants.top_k
    place = float(branch.ids_T[0]) if len(branch.ids_T) else -1.0
    ids_NK = np.tile(np.arange(k, dtype=np.int32), (n, 1))
    return TokenScores(
        sft_logprob_S=np.full(n, prompt.prompt_P[0], np.float32),
        reference_logprob_S=np.full(n, place, np.float32),
        kl_S=np.full(n, 0.5, np.float32) if wants.kl else None,
        entropy_S=np.full(n, 0.25, np.float32) if wants.entropy else None,
        top_ids_SK=ids_NK if k else None,
        top_sft_logprob_SK=-ids_NK.astype(np.float32) if k else None,
        top_reference_logprob_SK=-ids_NK.astype(np.float32) if k else None,
    )


def packed(trunk: Trunk) -> Cost:
    """Of an engine that computes a prompt once for all of its branches."""
    return Cost(len(trunk.prompt_P), tuple(len(branch.ids_T) for branch in trunk.branches))


def padded(trunk: Trunk) -> Cost:
    """Of an engine that computes a prompt anew for each branch."""
    return Cost(0, tuple(len(trunk.prompt_P) + len(branch.ids_T) for branch in trunk.branches))


def tokens_computed(batch: Sequence[Trunk]) -> int:
    """By an engine that computes equal prompts of a batch once."""
    prompts = {trunk.prompt_P.tobytes(): len(trunk.prompt_P) for trunk in batch}
    return sum(prompts.values()) + sum(len(branch.ids_T) for trunk in batch for branch in trunk.branches)


def named_scores(trunks: Sequence[Trunk], wants: Wants) -> Scores:
    return [[scores_of(prompt, branch, wants) for branch in prompt.branches] for prompt in trunks]


@dataclass(slots=True, eq=False)
class Recorder:
    """Answers with names, and remembers its batches: those prepared, and those computed with what they were asked for.

    `before` is called with a batch that is to be computed, `preparing` with one to be prepared; they may raise or wait.
    """

    before: Callable[[Sequence[Trunk]], None] = lambda trunks: None
    preparing: Callable[[Sequence[Trunk]], None] = lambda trunks: None
    batches: list[list[Trunk]] = field(default_factory=list)
    prepared: list[list[Trunk]] = field(default_factory=list)
    wants: list[Wants] = field(default_factory=list)
    info: EngineInfo = INFO
    cost: Callable[[Trunk], Cost] = packed

    def prepare(self, trunks: Sequence[Trunk], wants: Wants) -> Work:
        self.prepared.append(list(trunks))
        self.preparing(trunks)

        def work() -> Scores:
            self.batches.append(list(trunks))
            self.wants.append(wants)
            self.before(trunks)
            return named_scores(trunks, wants)

        return work

    @property
    def batch_tokens(self) -> list[int]:
        return [tokens_computed(batch) for batch in self.batches]

    @property
    def names(self) -> list[list[int]]:
        """Of the prompts of each batch."""
        return [[int(trunk.prompt_P[0]) for trunk in batch] for batch in self.batches]


@dataclass(slots=True)
class Gate:
    """Holds an engine's batches until it is opened; `entered` tells that one is being held."""

    entered: threading.Event = field(default_factory=threading.Event)
    opened: threading.Event = field(default_factory=threading.Event)

    def __call__(self, trunks: Sequence[Trunk]) -> None:
        self.entered.set()
        if not self.opened.wait(PATIENCE_S):
            raise TimeoutError("nobody opened the gate")


@dataclass(slots=True, eq=False)
class Memory:
    """Has room for so many tokens at once, and remembers whether the failed batch's tensors were let go in time."""

    room_tokens: int
    lost: list["weakref.ref[_Tensor]"] = field(default_factory=list)
    still_held: bool = False

    def __call__(self, trunks: Sequence[Trunk]) -> None:
        self.still_held = self.still_held or any(lost() is not None for lost in self.lost)
        tensor = _Tensor()
        if sum(trunk.tokens for trunk in trunks) > self.room_tokens:
            self.lost.append(weakref.ref(tensor))
            raise OutOfMemoryError("no room")


@dataclass(slots=True, eq=False)
class SmallDevice:
    """Has room to compute so many tokens; a batch lies in its memory from when it is prepared until it is let go.

    `still_held` tells whether one that failed lay there yet while another was prepared.
    """

    room_tokens: int
    info: EngineInfo = INFO
    lost: list["weakref.ref[_Tensor]"] = field(default_factory=list)
    still_held: bool = False

    def cost(self, trunk: Trunk) -> Cost:
        return packed(trunk)

    def prepare(self, trunks: Sequence[Trunk], wants: Wants) -> Work:
        self.still_held = self.still_held or any(lost() is not None for lost in self.lost)
        tensor = _Tensor()

        def work() -> Scores:
            if tokens_computed(trunks) > self.room_tokens:
                self.lost.append(weakref.ref(tensor))
                raise OutOfMemoryError("no room")
            return named_scores(trunks, wants)

        return work


class _Tensor:
    """Stands for what a failed batch leaves on the device."""
