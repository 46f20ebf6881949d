"""Does the reward point at the error? Plants some in right answers, ranks right against wrong samples.

Every figure stands beside that of the SFT model's plain log-prob: a comparison without it proves nothing.
"""

import json
from dataclasses import asdict, dataclass

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
from dense_reward_trainer.rl.policy import PolicyCheckpoint, chosen_device, load_policy
from dense_reward_trainer.rl.reward_service import ServiceAddress, pinned_pair
from dense_reward_trainer.rl.sampling import Sampling
from dense_reward_trainer.runs.run_folder import check_run, open_run


@dataclass(frozen=True, slots=True)
class CreditResult:
    """By signal, with 95 % bootstrap intervals. `localisation` by kind of planted error.

    `ranking` is null where no policy was sampled, `steps` where no labelled solutions were given.
    """

    localisation: dict[str, dict[str, Localisation]]
    answers: int
    ranking: dict[str, Ranking] | None
    right: int
    wrong: int
    steps: dict[str, Localisation] | None
    solutions: int


def run(config: CreditConfig, report: Report) -> CreditResult:
    """Measure, print a table, and leave credit.json and credit.png in the run folder.

    Raises ConfigError where the data hold too few answers or the samples too few kinds, DataError, CheckpointError or
    JobError, naming the cure.
    """
    check_run("credit", config)
    demonstrations = load(config.data).demonstrations
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
    report(table(result, config))
    folder = open_run("credit", config).folder
    record = {"result": asdict(result), "config": config.model_dump(mode="json"), "model": pair.card.model_dump()}
    (folder / "credit.json").write_text(json.dumps(record, indent=2) + "\n")
    plot_credit(result.localisation, result.ranking, result.steps, folder / "credit.png")
    return result


def _policy(config: CreditConfig) -> PolicyCheckpoint | None:
    if config.policy is None:
        return None
    return load_policy(config.policy, precision="float32", device=chosen_device(config.device))


def table(result: CreditResult, config: CreditConfig) -> str:
    """The result for people."""
    lines: list[str] = []
    others = config.against.replace("_", " ")
    for kind, found in result.localisation.items():
        lines.append(
            f"corrupted {kind} against the other {others} of its answer, {result.answers} answers: AUROC, hit@1"
        )
        lines += [_row(name, one.auroc, one.hit) for name, one in found.items()]
    if result.ranking is not None:
        lines.append(f"{result.right} right against {result.wrong} wrong samples, summed: AUROC, calibration error")
        for name, ranked in result.ranking.items():
            error = "-" if ranked.calibration is None else f"{ranked.calibration.expected_error:.3f}"
            lines.append(f"{_row(name, ranked.auroc)}  {error}")
    if result.steps is not None:
        lines.append(f"first wrong step against those before it, {result.solutions} solutions: AUROC, hit@1")
        lines += [_row(name, one.auroc, one.hit) for name, one in result.steps.items()]
    return "\n".join(lines)


def _row(name: str, *intervals: Interval) -> str:
    return "  ".join([f"  {name:12}", *(f"{x.value:.3f} [{x.low:.3f}, {x.high:.3f}]" for x in intervals)])


def _with_an_error(solutions: list[Solution]) -> tuple[Solution, ...]:
    """Those whose first wrong step has steps before it to stand out from. Raises ConfigError where there is none."""
    found = tuple(solution for solution in solutions if solution.first_wrong)
    if not found:
        raise ConfigError(f"solutions: none of {len(solutions)} has right steps before a wrong one")
    return found
