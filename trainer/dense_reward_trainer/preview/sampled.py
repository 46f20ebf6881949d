"""Answers of policies to labelled prompts, judged: the SFT model, what it gives for free, and tilted policies.

Must not know jobs.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from dense_reward.records import Report

from dense_reward_trainer.configs.dpr import HeldOutOptions
from dense_reward_trainer.configs.preview import PreviewConfig
from dense_reward_trainer.data.records import DataError
from dense_reward_trainer.data.sources import NO_SKIP
from dense_reward_trainer.data.tokenised import TokenisedRow, encode_demonstrations
from dense_reward_trainer.preview.labelled import Labelled, wanted
from dense_reward_trainer.rl.held_out_metrics import SampledResponse, sampled_responses
from dense_reward_trainer.rl.policy import PolicyCheckpoint
from dense_reward_trainer.rl.prompts import check_room
from dense_reward_trainer.rl.records import Rollout
from dense_reward_trainer.rl.sampling import Sampling, counted, sample
from dense_reward_trainer.runs.kept_parts import KeptParts
from dense_reward_trainer.runs.progress import Progress

Kept = list[tuple[list[int], bool]]
"""Responses as they are kept: ids, and whether the end of turn is the last of them."""


@dataclass(frozen=True, slots=True)
class Change:
    """What a control changes in how the SFT model is sampled."""

    greedy: bool = False
    temperature: float = 1.0
    top_p: float = 1.0


# What the SFT model gives without a reference and without training. Temperature 1/2 is what training on sft_logprob
# with returns immediate and kl_coefficient 1 converges to.
CONTROLS: Mapping[str, Change] = {
    "greedy": Change(greedy=True),
    "temperature 0.5": Change(temperature=0.5),
    "top-p 0.95": Change(top_p=0.95),
}


@dataclass(frozen=True, slots=True, eq=False)
class DrawnAnswers:
    """`size` answers to each prompt, in the order of the prompts."""

    rollouts: list[Rollout]
    records: list[SampledResponse]
    size: int

    @property
    def right(self) -> list[bool]:
        return [bool(record.right) for record in self.records]

    @property
    def share(self) -> list[float]:
        """The share of right answers to each prompt, [P]."""
        return [float(share) for share in np.reshape(self.right, (-1, self.size)).mean(axis=1)]


@dataclass(frozen=True, slots=True, eq=False)
class Sampler:
    """The prompts, tokenised, and how they are answered and judged. `parts`: keeps the answers of each policy."""

    rows: Sequence[TokenisedRow]
    sampling: Sampling
    judging: HeldOutOptions
    parts: KeptParts

    @classmethod
    def of(
        cls, config: PreviewConfig, sft: PolicyCheckpoint, labelled: Labelled, parts: KeptParts, report: Report
    ) -> Self:
        """`config.prompts` different prompts of the labelled data, drawn with its seed; fewer if it has fewer.

        Raises DataError if a prompt is refused by the template, has two different answers, or leaves no room.
        """
        rows = _different(labelled, sft, config)
        chosen = sorted(np.random.default_rng(config.seed).permutation(len(rows))[: config.prompts].tolist())
        report(f"{len(rows)} different prompts with a known answer, {len(chosen)} of them are used")
        rows = [rows[i] for i in chosen]
        check_room(rows, sft.policy.limit_tokens, config.max_new_tokens, "max_new_tokens", "or remove such prompts")
        sampling = Sampling(config.max_new_tokens, config.samples_per_prompt, batch_size=config.batch_size)
        return cls(rows, sampling, HeldOutOptions(checker=config.checker, seed=config.seed), parts)

    def draw(self, checkpoint: PolicyCheckpoint, name: str, change: Change | None = None) -> DrawnAnswers:
        """Answers of a policy to every prompt, with a progress bar called `name`; one to each if they are greedy."""
        change = Change() if change is None else change
        size = 1 if change.greedy else self.sampling.group_size
        sampling = replace(
            self.sampling,
            group_size=size,
            greedy=change.greedy,
            temperature=change.temperature,
            top_p=change.top_p,
        )
        kept = self.parts.get(
            f"answers of {name}".replace(" ", "-"), Kept, lambda: self._sampled(checkpoint, name, sampling)
        )
        prompts = [row.encoded.prompt_P for row in self.rows for _ in range(size)]
        rollouts = [
            Rollout(prompt_P, np.array(ids, dtype=np.int32), finished)
            for prompt_P, (ids, finished) in zip(prompts, kept, strict=True)
        ]
        judged = sampled_responses(checkpoint.encoder, self.rows, rollouts, self.judging, greedy=change.greedy)
        return DrawnAnswers(rollouts, judged, size)

    def _sampled(self, checkpoint: PolicyCheckpoint, name: str, sampling: Sampling) -> Kept:
        together = max(1, self.sampling.batch_size // sampling.group_size)
        found: Kept = []
        with Progress(len(self.rows) * sampling.group_size, f"answers of {name}") as progress:
            for start in range(0, len(self.rows), together):
                prompts = [row.encoded.prompt_P for row in self.rows[start : start + together]]
                seed = self.judging.seed + start
                rollouts = sample(checkpoint.policy, prompts, sampling, seed, counted(progress))
                found += [(rollout.response_T.tolist(), rollout.finished) for rollout in rollouts]
        return found

    def notes(self, drawn: DrawnAnswers) -> Iterator[str]:
        """What may make answers wrong that the user did not mean: a low limit of length, or another checker."""
        cut_off = sum(not record.finished for record in drawn.records)
        unread = sum(record.finished and record.answer is None for record in drawn.records)
        count = len(drawn.records)
        if cut_off:
            limit = self.sampling.max_new_tokens
            yield f"{cut_off} of {count} answers were cut off at max_new_tokens {limit}, and count as wrong"
        if unread:
            checker = self.judging.checker
            yield f"the checker {checker} found no answer in {unread} of {count} answers, which count as wrong"


def _different(labelled: Labelled, sft: PolicyCheckpoint, config: PreviewConfig) -> list[TokenisedRow]:
    """Each prompt once. Raises DataError if its rows name different answers."""
    encoded = encode_demonstrations(
        labelled.demonstrations,
        sft.encoder,
        every_turn=False,
        limit_tokens=sft.policy.limit_tokens,
        skip_bad=False,
        cure=NO_SKIP,
    )
    found: dict[bytes, TokenisedRow] = {}
    for row in encoded.rows:
        first = found.setdefault(row.encoded.prompt_P.tobytes(), row)
        answers = [wanted(one.demonstration, config.checker) for one in (first, row)]
        if answers[0] != answers[1] and config.checker != "exact":
            raise DataError(
                f"{row.demonstration.source} has the prompt of {first.demonstration.source}, but another answer "
                f"({answers[1]} instead of {answers[0]}): correct or remove one of them"
            )
    return list(found.values())
