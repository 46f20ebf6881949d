"""Engines for the tests of the queue: they count, fail, block, run out of memory, and never compute."""

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from dense_reward.engine.base import Branch, EngineInfo, TokenScores, Trunk, Wants
from dense_reward.errors import OutOfMemoryError

INFO = EngineInfo(
    sft="sft",
    reference="reference",
    revision="r",
    dtype="float32",
    device="cpu",
    vocabulary=1 << 20,
    max_length_tokens=1 << 20,
    quantities=frozenset({"kl", "centred", "entropy", "candidate_reward", "alternatives"}),
    related=True,
)
PATIENCE_S = 30.0
"""After which a test that waits for another thread gives up."""


def trunk(name: int, *lengths: int, prompt_tokens: int = 2) -> Trunk:
    """A prompt named by its ids, with branches of these lengths, each named by its place."""
    branches = tuple(Branch(np.full(n, g, np.int32), np.ones(n, dtype=bool)) for g, n in enumerate(lengths))
    return Trunk(np.full(prompt_tokens, name, np.int32), branches)


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


def named_scores(trunks: Sequence[Trunk], wants: Wants) -> list[list[TokenScores]]:
    return [[scores_of(prompt, branch, wants) for branch in prompt.branches] for prompt in trunks]


@dataclass(slots=True)
class Recorder:
    """Answers with names, and remembers its batches. `before` may raise or wait."""

    before: Callable[[Sequence[Trunk]], None] = lambda trunks: None
    batches: list[list[Trunk]] = field(default_factory=list)
    wants: list[Wants] = field(default_factory=list)
    info: EngineInfo = INFO
    cost: Callable[[Trunk], int] = lambda trunk: trunk.tokens

    def cost_tokens(self, trunk: Trunk) -> int:
        return self.cost(trunk)

    def score(self, trunks: Sequence[Trunk], wants: Wants) -> list[list[TokenScores]]:
        self.batches.append(list(trunks))
        self.wants.append(wants)
        self.before(trunks)
        return named_scores(trunks, wants)

    @property
    def batch_tokens(self) -> list[int]:
        return [sum(trunk.tokens for trunk in batch) for batch in self.batches]


@dataclass(slots=True)
class Gate:
    """Holds an engine's batches until it is opened; `entered` tells that one is being held."""

    entered: threading.Event = field(default_factory=threading.Event)
    opened: threading.Event = field(default_factory=threading.Event)

    def __call__(self, trunks: Sequence[Trunk]) -> None:
        self.entered.set()
        if not self.opened.wait(PATIENCE_S):
            raise TimeoutError("nobody opened the gate")


@dataclass(slots=True)
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


class _Tensor:
    """Stands for what a failed batch leaves on the device."""
