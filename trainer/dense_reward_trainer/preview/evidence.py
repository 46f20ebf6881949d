"""From models and labelled data to the figures that a verdict needs. Must not know jobs.

Two kinds of labelled data: prompts, whose answers are sampled and judged here; and judged answers, which are used as
they are. One reference is in memory at a time, beside the SFT model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dense_reward.errors import CheckpointError
from dense_reward.manifest import check_pair, load_manifest
from dense_reward.records import IdArray, Report

from dense_reward_trainer.configs.evaluate import TiltOptions
from dense_reward_trainer.configs.preview import PreviewConfig
from dense_reward_trainer.data.sources import NO_SKIP
from dense_reward_trainer.data.tokenised import TokenisedRow, encode_demonstrations
from dense_reward_trainer.errors import ConfigError
from dense_reward_trainer.policies.load import tilted
from dense_reward_trainer.preview.gains import SFT, Gains, Tilted, compare_policies, likeliest, reweighted, several
from dense_reward_trainer.preview.labelled import Labelled
from dense_reward_trainer.preview.ranking import Ranked, Scored, rank_all, scores_of
from dense_reward_trainer.preview.sampled import CONTROLS, DrawnAnswers, Sampler
from dense_reward_trainer.preview.verdict import Counts
from dense_reward_trainer.rl.held_out_metrics import SampledResponse
from dense_reward_trainer.rl.policy import Policy, PolicyCheckpoint, load_policy
from dense_reward_trainer.rl.records import TokenArrays
from dense_reward_trainer.rl.token_arrays import token_arrays
from dense_reward_trainer.runs.kept_parts import KeptParts
from dense_reward_trainer.runs.progress import Progress

ANSWERS_TOGETHER = 64


@dataclass(frozen=True, slots=True, eq=False)
class Models:
    """An SFT model, loaded, and its references, loaded when they are needed."""

    folder: Path
    sft: PolicyCheckpoint
    references: Mapping[str, Path]
    config: PreviewConfig
    device: str

    def pair(self, name: str) -> tuple[Policy, PolicyCheckpoint]:
        """A reference, and the SFT model tilted away from it. Let go of both before the next one is loaded."""
        folder = self.references[name]
        other = load_policy(folder, precision=self.config.precision, device=self.device)
        options = TiltOptions(reference=folder, strength=self.config.strength)
        return other.policy, tilted(self.sft, other, options, self.folder)


@dataclass(frozen=True, slots=True, eq=False)
class Answers:
    """N judged answers as ids; `prompt` is the index of the prompt of each."""

    prompts: Sequence[IdArray]
    responses: Sequence[IdArray]
    right: Sequence[bool]
    prompt: Sequence[int]

    @property
    def counts(self) -> Counts:
        with_right, with_wrong = (
            {prompt for prompt, right in zip(self.prompt, self.right, strict=True) if right == kind}
            for kind in (True, False)
        )
        right = sum(self.right)
        return Counts(len(set(self.prompt)), right, len(self.right) - right, len(with_right), len(with_wrong))


@dataclass(frozen=True, slots=True, eq=False)
class Evidence:
    """All figures; `samples`: by policy, for people to read."""

    counts: Counts
    ranking: list[Ranked]
    gains: Gains | None
    samples: dict[str, list[SampledResponse]] = field(default_factory=dict)


def check_references(sft: Path, references: Mapping[str, Path], report: Report) -> None:
    """Raises CheckpointError if one cannot be a reference of the SFT model; reports those of another run."""
    own = load_manifest(sft)
    for name, folder in references.items():
        try:
            related = check_pair(own, load_manifest(folder), allow_unrelated=True)
        except CheckpointError as error:
            raise CheckpointError(f"reference {name} ({folder}): {error}") from None
        if not related:
            report(f"reference {name} comes from another run than the SFT model, or from a later step")


def evidence(models: Models, labelled: Labelled, parts: KeptParts, report: Report) -> Evidence:
    """Samples if needed, scores and compares. `parts`: keeps the samples.

    Raises DataError, ConfigError, CheckpointError or JobError.
    """
    if labelled.right is None:
        return _of_prompts(models, labelled, parts, report)
    return _of_judged(models, labelled)


def _of_prompts(models: Models, labelled: Labelled, parts: KeptParts, report: Report) -> Evidence:
    sampler = Sampler.of(models.config, models.sft, labelled, parts, report)
    drawn = sampler.draw(models.sft, SFT)
    for note in sampler.notes(drawn):
        report(note)
    answers = Answers(
        [rollout.prompt_P for rollout in drawn.rollouts],
        [rollout.response_T for rollout in drawn.rollouts],
        drawn.right,
        [i // drawn.size for i in range(len(drawn.rollouts))],
    )
    free = {SFT: drawn} | {name: sampler.draw(models.sft, name, change) for name, change in CONTROLS.items()}
    samples = {name: one.records for name, one in free.items()}
    scores = _scores(models, answers, None, None)
    found: dict[str, Tilted] = {}
    for name in models.references:
        own, greedy = _tilted_answers(models, sampler, answers, name, scores)
        found[name] = Tilted(own.share, greedy=greedy.share)
        samples |= {f"tilted-{name}": own.records, f"greedy-tilted-{name}": greedy.records}
    ranking = rank_all(scores, answers.right, answers.prompt, models.config.seed)
    shares = {name: one.share for name, one in free.items()}
    gains = compare_policies("sampled", shares, found) if answers.counts.prompts > 1 else None
    return Evidence(answers.counts, ranking, gains, samples)


def _tilted_answers(
    models: Models, sampler: Sampler, answers: Answers, name: str, scores: list[Scored]
) -> tuple[DrawnAnswers, DrawnAnswers]:
    """Sampled and greedy answers of the policy tilted away from a reference; adds its scores of `answers`."""
    reference, policy = models.pair(name)
    scores += _scores(models, answers, name, reference)
    own = sampler.draw(policy, f"tilted, {name}")
    return own, sampler.draw(policy, f"tilted, {name}, greedy", CONTROLS["greedy"])


def _of_judged(models: Models, labelled: Labelled) -> Evidence:
    answers = _encoded(models.sft, labelled)
    scores = _scores(models, answers, None, None)
    for name in models.references:
        scores += _scores(models, answers, name, models.pair(name)[0])
    ranking = rank_all(scores, answers.right, answers.prompt, models.config.seed)
    return Evidence(answers.counts, ranking, _reweighted_gains(models, answers, scores))


def _reweighted_gains(models: Models, answers: Answers, scores: Sequence[Scored]) -> Gains | None:
    """Gains from the answers to prompts with several; None for fewer than two such prompts."""
    if len(several(answers.prompt)) < 2:
        return None
    sums = {(one.reference, one.signal): one.values for one in scores if one.aggregate == "sum"}
    own = sums[None, "sft_logprob"]
    free = {
        SFT: reweighted([0.0] * len(own), answers.right, answers.prompt).share,
        "likeliest answer": likeliest(own, answers.right, answers.prompt),
        "power 2": reweighted(own, answers.right, answers.prompt).share,
    }
    a = models.config.strength
    found = {
        name: reweighted([a * nats for nats in sums[name, "reward"]], answers.right, answers.prompt)
        for name in models.references
    }
    return compare_policies("reweighted", free, found)


def _encoded(sft: PolicyCheckpoint, labelled: Labelled) -> Answers:
    """The judged answers as ids, each with its end of turn. Raises DataError, naming file and line."""
    rows: Sequence[TokenisedRow] = encode_demonstrations(
        labelled.demonstrations,
        sft.encoder,
        every_turn=False,
        limit_tokens=sft.policy.limit_tokens,
        skip_bad=False,
        cure=NO_SKIP,
    ).rows
    prompts = [row.encoded.prompt_P for row in rows]
    index: dict[bytes, int] = {}
    return Answers(
        prompts,
        [row.encoded.responses[0].ids_T for row in rows],
        labelled.right or (),
        [index.setdefault(prompt.tobytes(), len(index)) for prompt in prompts],
    )


def _scores(models: Models, answers: Answers, name: str | None, reference: Policy | None) -> list[Scored]:
    """The scores of the answers under a reference; without one, those of the SFT model alone.

    Raises ConfigError if an answer is longer than the reference can read.
    """
    longest = max(len(prompt) + len(ids) for prompt, ids in zip(answers.prompts, answers.responses, strict=True))
    if reference is not None and longest > reference.limit_tokens:
        raise ConfigError(
            f"reference {name} reads at most {reference.limit_tokens} tokens, but a prompt and its answer have "
            f"{longest}: lower max_new_tokens, remove long rows, or leave out this reference"
        )
    arrays: list[TokenArrays] = []
    unit = "scored answers" if name is None else f"scored answers ({name})"
    with Progress(len(answers.responses), unit) as progress:
        for start in range(0, len(answers.responses), ANSWERS_TOGETHER):
            part = slice(start, start + ANSWERS_TOGETHER)
            given = answers.prompts[part], answers.responses[part]
            arrays += token_arrays(models.sft.policy, reference, *given, models.config.microbatch_tokens)
            progress.advance(len(given[0]), tokens=sum(map(len, given[1])))
    return scores_of(name, arrays, models.config.window_tokens)
