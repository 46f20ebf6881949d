"""The `credit` job: does the reward locate errors planted in right answers, and rank right above wrong samples?

Every figure is also measured for the plain log-prob of the SFT model, the baseline that the reward must beat.
"""

import json
from dataclasses import asdict, dataclass

from dense_reward.engines.torch.device import chosen_device
from dense_reward.records import Report

from dense_reward_trainer.configs.credit import CreditConfig
from dense_reward_trainer.credit.answer_ranking import Ranking, rank
from dense_reward_trainer.credit.auroc import Interval
from dense_reward_trainer.credit.error_localisation import Localisation, localise
from dense_reward_trainer.credit.first_wrong_step import first_wrong_steps
from dense_reward_trainer.credit.plot import plot_credit
from dense_reward_trainer.data.corruption import Corrupter
from dense_reward_trainer.data.process_labels import Solution, read_solutions
from dense_reward_trainer.data.sources import load
from dense_reward_trainer.errors import ConfigError
from dense_reward_trainer.rl.policy import PolicyCheckpoint, load_policy
from dense_reward_trainer.rl.reward_service import ServiceAddress, pinned_pair
from dense_reward_trainer.rl.sampling import Sampling
from dense_reward_trainer.runs.run_folder import check_run, open_run


@dataclass(frozen=True, slots=True)
class CreditResult:
    """Figures by signal, with 95 % bootstrap intervals; `localisation` also by kind of planted error.

    `ranking` is null without a policy to sample from, `steps` without labelled solutions.
    """

    localisation: dict[str, dict[str, Localisation]]
    answers: int
    ranking: dict[str, Ranking] | None
    right: int
    wrong: int
    steps: dict[str, Localisation] | None
    solutions: int


def run(config: CreditConfig, report: Report) -> CreditResult:
    """Measures, reports a table, and writes credit.json and credit.png to the run folder.

    Raises ConfigError if too few answers can hold an error, or if the samples are all right or all wrong; also
    DataError, CheckpointError or JobError. The message states the cure.
    """
    check_run("credit", config)
    loaded = load(config.data)
    report(loaded.summary)
    demonstrations = loaded.demonstrations
    texts = [demonstration.response for demonstration in demonstrations]
    solutions = () if config.solutions is None else _with_an_error(read_solutions(config.solutions))
    policy = _policy(config)
    localisation: dict[str, dict[str, Localisation]] = {}
    with pinned_pair(ServiceAddress.of(config.service_url, config), report) as pair:
        for kind in config.corruptions:
            corrupter = Corrupter.of(kind, texts)
            localisation[kind] = localise(
                pair, demonstrations, corrupter, count=config.answers, against=config.against, seed=config.seed
            )
        sums = None
        if policy is not None:
            sampling = Sampling(config.max_new_tokens, batch_size=256)
            sums = rank(pair, policy, demonstrations, sampling, samples=config.samples, seed=config.seed, report=report)
        steps = first_wrong_steps(pair, solutions, config.seed) if solutions else None
    right, wrong = (0, 0) if sums is None else sums.counts
    ranking = None if sums is None else sums.ranking(config.seed)
    result = CreditResult(localisation, config.answers, ranking, right, wrong, steps, len(solutions))
    report(credit_table(result, config))
    folder = open_run("credit", config).folder
    record = {"result": asdict(result), "config": config.model_dump(mode="json"), "model": pair.card.model_dump()}
    (folder / "credit.json").write_text(json.dumps(record, indent=2) + "\n")
    plot_credit(result.localisation, result.ranking, result.steps, folder / "credit.png")
    return result


def _policy(config: CreditConfig) -> PolicyCheckpoint | None:
    if config.policy is None:
        return None
    return load_policy(config.policy, precision="float32", device=chosen_device(config.device))


def credit_table(result: CreditResult, config: CreditConfig) -> str:
    """The result as text, one line for each signal."""
    lines: list[str] = []
    others = config.against.replace("_", " ")
    for kind, by_signal in result.localisation.items():
        lines.append(
            f"corrupted {kind} against the other {others} of its answer, {result.answers} answers: AUROC, hit@1"
        )
        lines += [_line(name, one.auroc, one.hit) for name, one in by_signal.items()]
    if result.ranking is not None:
        lines.append(f"{result.right} right against {result.wrong} wrong samples, summed: AUROC, calibration error")
        for name, ranked in result.ranking.items():
            error = "-" if ranked.calibration is None else f"{ranked.calibration.expected_error:.3f}"
            lines.append(f"{_line(name, ranked.auroc)}  {error}")
    if result.steps is not None:
        lines.append(f"first wrong step against those before it, {result.solutions} solutions: AUROC, hit@1")
        lines += [_line(name, one.auroc, one.hit) for name, one in result.steps.items()]
    return "\n".join(lines)


def _line(name: str, *intervals: Interval) -> str:
    return "  ".join([f"  {name:12}", *(f"{x.value:.3f} [{x.low:.3f}, {x.high:.3f}]" for x in intervals)])


def _with_an_error(solutions: list[Solution]) -> tuple[Solution, ...]:
    """The solutions that have right steps before their first wrong one. Raises ConfigError if there are none."""
    comparable = tuple(solution for solution in solutions if solution.first_wrong)
    if not comparable:
        raise ConfigError(
            f"solutions: none of {len(solutions)} has right steps before a wrong one: give another file, or set null"
        )
    return comparable
