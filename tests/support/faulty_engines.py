"""Engines for tests of the queue: they record their batches, fail, block or run out of memory, and compute nothing."""

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from dense_reward.errors import OutOfMemoryError
from dense_reward.records import Branch, Cost, EngineInfo, Scores, StagedWork, TokenScores, Trunk, Wants, Work

INFO = EngineInfo(
    sft="sft",
    reference="reference",
    revision="r",
    dtype="float32",
    device="cpu",
    vocab_size=1 << 20,
    max_length_tokens=1 << 20,
    quantities=frozenset({"kl", "centred", "entropy", "varentropy", "candidate_reward", "alternatives"}),
    related=True,
)
PATIENCE_S = 30.0
"""The longest time that a test waits for another thread."""


def trunk(name: int, *lengths: int, prompt_tokens: int = 2, first: int = 0) -> Trunk:
    """A prompt whose ids are all `name`, with branches of these lengths. The ids of branch g are all `first` + g."""
    branches = tuple(Branch(np.full(n, g, np.int32), np.ones(n, dtype=bool)) for g, n in enumerate(lengths, first))
    return Trunk(np.full(prompt_tokens, name, np.int32), branches)


def unlike(count: int, name: int, length: int, prompt_tokens: int = 2) -> list[Trunk]:
    """Trunks with the same prompt and one branch each; all branches differ."""
    return [trunk(name, length, prompt_tokens=prompt_tokens, first=place) for place in range(count)]


def scores_of(prompt: Trunk, branch: Branch, wants: Wants) -> TokenScores:
    """Log-probs that identify what was scored: sft gives the prompt's name, reference the branch's."""
    n, k = int(branch.scored_T.sum()), wants.top_k
    place = float(branch.ids_T[0]) if len(branch.ids_T) else -1.0
    ids_NK = np.tile(np.arange(k, dtype=np.int32), (n, 1))
    return TokenScores(
        sft_logprob_S=np.full(n, prompt.prompt_P[0], np.float32),
        reference_logprob_S=np.full(n, place, np.float32),
        kl_S=np.full(n, 0.5, np.float32) if wants.kl else None,
        entropy_S=np.full(n, 0.25, np.float32) if wants.entropy else None,
        varentropy_S=np.full(n, 0.125, np.float32) if wants.varentropy else None,
        top_ids_SK=ids_NK if k else None,
        top_sft_logprob_SK=-ids_NK.astype(np.float32) if k else None,
        top_reference_logprob_SK=-ids_NK.astype(np.float32) if k else None,
    )


def packed(trunk: Trunk) -> Cost:
    """The cost to an engine that computes a prompt once for all of its branches."""
    return Cost(len(trunk.prompt_P), tuple(len(branch.ids_T) for branch in trunk.branches))


def padded(trunk: Trunk) -> Cost:
    """The cost to an engine that computes the prompt again for each branch."""
    return Cost(0, tuple(len(trunk.prompt_P) + len(branch.ids_T) for branch in trunk.branches))


def tokens_computed(batch: Sequence[Trunk]) -> int:
    """Tokens of a batch for an engine that computes equal prompts once."""
    prompts = {trunk.prompt_P.tobytes(): len(trunk.prompt_P) for trunk in batch}
    return sum(prompts.values()) + sum(len(branch.ids_T) for trunk in batch for branch in trunk.branches)


def named_scores(trunks: Sequence[Trunk], wants: Wants) -> Scores:
    return [[scores_of(prompt, branch, wants) for branch in prompt.branches] for prompt in trunks]


@dataclass(slots=True, eq=False)
class Recorder:
    """Answers with `named_scores`, and records the batches that it prepared and those that it computed.

    `preparing` is called before a batch is prepared, `before` before one is computed. With `collecting`, work has two
    stages, as on a GPU: `before` is called when it is launched, `collecting` before its scores arrive. All can raise
    or wait.
    """

    before: Callable[[Sequence[Trunk]], None] = lambda trunks: None
    preparing: Callable[[Sequence[Trunk]], None] = lambda trunks: None
    batches: list[list[Trunk]] = field(default_factory=list)
    prepared: list[list[Trunk]] = field(default_factory=list)
    collecting: Callable[[Sequence[Trunk]], None] | None = None
    wants: list[Wants] = field(default_factory=list)
    info: EngineInfo = INFO
    cost: Callable[[Trunk], Cost] = packed

    def prepare(self, trunks: Sequence[Trunk], wants: Wants) -> Work:
        self.prepared.append(list(trunks))
        self.preparing(trunks)

        def collect() -> Scores:
            if self.collecting is not None:
                self.collecting(trunks)
            return named_scores(trunks, wants)

        def launch() -> Callable[[], Scores]:
            self.batches.append(list(trunks))
            self.wants.append(wants)
            self.before(trunks)
            return collect

        work = StagedWork(launch, tokens_computed(trunks))
        return work if self.collecting is not None else work.__call__

    @property
    def batch_tokens(self) -> list[int]:
        return [tokens_computed(batch) for batch in self.batches]

    @property
    def names(self) -> list[list[int]]:
        """The names of the prompts of each batch."""
        return [[int(trunk.prompt_P[0]) for trunk in batch] for batch in self.batches]


@dataclass(slots=True)
class Gate:
    """Holds an engine's batches until it is opened. `entered` is set once it holds one."""

    entered: threading.Event = field(default_factory=threading.Event)
    opened: threading.Event = field(default_factory=threading.Event)

    def __call__(self, trunks: Sequence[Trunk]) -> None:
        self.entered.set()
        if not self.opened.wait(PATIENCE_S):
            raise TimeoutError("the gate was not opened in time")


@dataclass(slots=True, eq=False)
class Memory:
    """Has room for `room_tokens` tokens. `still_held`: a failed batch's tensor was alive when the next batch began."""

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
    """Has room to compute `room_tokens` tokens. A batch holds a tensor from when it is prepared until it is released.

    `still_held`: the tensor of a failed batch was alive while another batch was prepared.
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
    """A substitute for the tensors of a batch on the device."""
