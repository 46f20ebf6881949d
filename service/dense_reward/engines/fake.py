"""A weightless, deterministic engine and a byte tokenizer, for tests and to try out a deployment. Imports numpy only.

Each state's logits come from a hash of the ids before it, so that every quantity obeys its definition exactly.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dense_reward.errors import refuse
from dense_reward.records import (
    Cost,
    EngineInfo,
    FloatArray,
    IdArray,
    Scores,
    Teacher,
    TeacherScores,
    TokenScores,
    Trunk,
    Wants,
    Work,
    teacher_scores,
)
from dense_reward.text.offsets import Span, decoded_spans
from dense_reward.text.special_tokens import JsonValue, Message
from dense_reward.text.tokenizer import Pieces

BOS_ID, EOS_ID, VOCABULARY = 256, 257, 258
_SPECIAL = {"<bos>": BOS_ID, "<eos>": EOS_ID}
QUANTITIES = frozenset({"kl", "centred", "entropy", "varentropy", "candidate_reward", "alternatives"})


class FakeTokenizer:
    """One id for each byte of UTF-8."""

    vocab_size = VOCABULARY
    bos_id: int | None = BOS_ID
    eos_id: int | None = EOS_ID
    special_ids = frozenset(_SPECIAL.values())
    special_strings = tuple(_SPECIAL)
    longest_token_bytes = max(map(len, _SPECIAL))
    has_dummy_prefix = False
    template_variables: frozenset[str] = frozenset()

    def encode(self, text: str, *, special: bool, continues: bool = False, at_most: int | None = None) -> Pieces:
        ids: list[int] = []
        offsets: list[Span] = []
        at = 0
        while at < len(text):
            name = next((s for s in self.special_strings if special and text.startswith(s, at)), None)
            end = at + (1 if name is None else len(name))
            new = text[at:end].encode() if name is None else [_SPECIAL[name]]
            ids.extend(new)
            offsets.extend([(at, end)] * len(new))
            at = end
        return Pieces(tuple(ids), tuple(offsets))

    def render_chat(
        self,
        messages: Sequence[Message],
        *,
        generation_prompt: bool,
        tools: Sequence[JsonValue] | None = None,
        template_kwargs: object = None,
        date: str | None = None,
    ) -> str:
        if tools or template_kwargs:
            raise refuse(
                "bad_template",
                "the fake tokenizer's template takes neither tools nor template_kwargs: remove them",
                param="tools",
            )
        turns = "".join(f"<bos>{message['role']}\n{message['content']}<eos>\n" for message in messages)
        return turns + ("<bos>assistant\n" if generation_prompt else "")

    def text_and_spans(self, ids: Sequence[int]) -> tuple[str, tuple[Span, ...]]:
        return decoded_spans(ids, _decoded)

    def text(self, ids: Sequence[int]) -> str:
        return _decoded(ids)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        return [_decoded([token]) for token in ids]


class FakeEngine:
    """Scores by definition, one state at a time."""

    def __init__(self, max_length_tokens: int = 4096) -> None:
        self._info = EngineInfo(
            "fake-sft", "fake-reference", "fake", "float64", "cpu", VOCABULARY, max_length_tokens, QUANTITIES, True
        )

    @property
    def info(self) -> EngineInfo:
        return self._info

    def cost(self, trunk: Trunk) -> Cost:
        return Cost(len(trunk.prompt_P), tuple(len(branch.ids_T) for branch in trunk.branches))

    def prepare(self, trunks: Sequence[Trunk], wants: Wants) -> Work:
        return lambda: [[_score(trunk, g, wants) for g in range(len(trunk.branches))] for trunk in trunks]

    def score(self, trunks: Sequence[Trunk], wants: Wants) -> Scores:
        return self.prepare(trunks, wants)()


@dataclass(frozen=True, slots=True)
class FakeTeacher:
    """The same models as a teacher, by definition too."""

    engine: FakeEngine
    teacher: Teacher

    @property
    def info(self) -> EngineInfo:
        return self.engine.info

    def cost(self, trunk: Trunk) -> Cost:
        return self.engine.cost(trunk)

    def prepare(self, trunks: Sequence[Trunk], wants: Wants) -> Work:
        del wants
        return lambda: [[_taught(trunk, g, self.teacher) for g in range(len(trunk.branches))] for trunk in trunks]


def _decoded(ids: Sequence[int]) -> str:
    names = {token: name.encode() for name, token in _SPECIAL.items()}
    return b"".join(names.get(token) or bytes([token]) for token in ids).decode(errors="replace")


def state_logprobs(role: str, ids: Sequence[int]) -> NDArray[np.float64]:
    """log pi_role(. | ids), [VOCABULARY]."""
    digest = hashlib.sha256(role.encode() + np.array(ids, dtype="<i4").tobytes()).digest()
    logits_V = np.random.default_rng(int.from_bytes(digest[:8], "little")).normal(size=VOCABULARY)
    return np.asarray(logits_V - np.log(np.exp(logits_V).sum()))


def _score(trunk: Trunk, g: int, wants: Wants) -> TokenScores:
    branch = trunk.branches[g]
    ids = [*trunk.prompt_P.tolist(), *branch.ids_T.tolist()]
    ends = [len(trunk.prompt_P) + int(t) for t in np.flatnonzero(branch.scored_T)]
    sft_SV = np.array([state_logprobs("sft", ids[:end]) for end in ends]).reshape(len(ends), VOCABULARY)
    reference_SV = np.array([state_logprobs("reference", ids[:end]) for end in ends]).reshape(len(ends), VOCABULARY)
    probability_SV = np.exp(sft_SV)
    targets_S1 = np.array([ids[end] for end in ends], dtype=np.int64)[:, None]
    top_SK = np.argsort(-sft_SV, axis=1)[:, : wants.top_k]
    candidates_SK = branch.candidates_SK
    return TokenScores(
        sft_logprob_S=_taken(sft_SV, targets_S1)[:, 0],
        reference_logprob_S=_taken(reference_SV, targets_S1)[:, 0],
        kl_S=(probability_SV * (sft_SV - reference_SV)).sum(1).astype(np.float32) if wants.kl else None,
        entropy_S=-(probability_SV * sft_SV).sum(1).astype(np.float32) if wants.entropy else None,
        varentropy_S=_varentropy(sft_SV).astype(np.float32) if wants.varentropy else None,
        candidate_sft_logprob_SK=None if candidates_SK is None else _taken(sft_SV, candidates_SK),
        candidate_reference_logprob_SK=None if candidates_SK is None else _taken(reference_SV, candidates_SK),
        top_ids_SK=top_SK.astype(np.int32) if wants.top_k else None,
        top_sft_logprob_SK=_taken(sft_SV, top_SK) if wants.top_k else None,
        top_reference_logprob_SK=_taken(reference_SV, top_SK) if wants.top_k else None,
    )


def teacher_logprobs(teacher: Teacher, ids: Sequence[int]) -> NDArray[np.float64]:
    """log pi_teacher(. | ids), [VOCABULARY]."""
    both = (1 + teacher.tilt) * state_logprobs("sft", ids) - teacher.tilt * state_logprobs("reference", ids)
    logits_V = both / teacher.temperature
    return np.asarray(logits_V - np.logaddexp.reduce(logits_V))


def _taught(trunk: Trunk, g: int, teacher: Teacher) -> TokenScores:
    branch = trunk.branches[g]
    ids = [*trunk.prompt_P.tolist(), *branch.ids_T.tolist()]
    ends = [len(trunk.prompt_P) + int(t) for t in np.flatnonzero(branch.scored_T)]
    logprob_SV = np.array([teacher_logprobs(teacher, ids[:end]) for end in ends]).reshape(len(ends), VOCABULARY)
    own_S = logprob_SV[np.arange(len(ends)), [ids[end] for end in ends]]
    top_SK = np.argsort(-logprob_SV, axis=1)[:, : teacher.top_k]
    next_V = teacher_logprobs(teacher, ids)
    return teacher_scores(
        TeacherScores(
            own_S.astype(np.float32),
            ((logprob_SV > own_S[:, None]).sum(axis=1) + 1).astype(np.int32),
            top_SK.astype(np.int32),
            _taken(logprob_SV, top_SK),
            None if branch.candidates_SK is None else _taken(logprob_SV, branch.candidates_SK),
            int(next_V.argmax()),
            float(next_V.max()),
        )
    )


def _varentropy(logprob_SV: NDArray[np.float64]) -> NDArray[np.float64]:
    """The variance of the log-prob of a token that the distribution draws, [S]."""
    probability_SV = np.exp(logprob_SV)
    mean_S1 = (probability_SV * logprob_SV).sum(1, keepdims=True)
    found: NDArray[np.float64] = (probability_SV * (logprob_SV - mean_S1) ** 2).sum(1)
    return found


def _taken(values_SV: NDArray[np.float64], ids_SK: NDArray[np.int64] | IdArray) -> FloatArray:
    return np.take_along_axis(values_SV, ids_SK.astype(np.int64), axis=1).astype(np.float32)
