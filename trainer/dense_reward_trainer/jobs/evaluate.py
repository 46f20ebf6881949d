"""The `evaluate` job: measures policies on held-out prompts; writes a table, the figures as JSON and every response.

Read from `run` downwards. All policies answer the same prompts, with the same seed.
"""

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from dense_reward.checkpoints.atomic_file import write_whole
from dense_reward.engines.torch.device import chosen_device
from dense_reward.records import Report

from dense_reward_trainer.configs.dpr import HeldOutOptions
from dense_reward_trainer.configs.evaluate import ChooseOptions, EvaluateConfig, PolicyOptions
from dense_reward_trainer.configs.signals import TokenSignal
from dense_reward_trainer.policies.chosen import measure_chosen
from dense_reward_trainer.policies.load import check_sampled, load_sampled
from dense_reward_trainer.policies.signals import check_offered, sample_signals
from dense_reward_trainer.rl.held_out_metrics import (
    Estimate,
    HeldOutResult,
    SampledResponse,
    draw_held_out,
    held_out_sampling,
    measure_held_out,
)
from dense_reward_trainer.rl.prompts import held_out_rows
from dense_reward_trainer.rl.records import TokenRewards
from dense_reward_trainer.rl.reward_service import (
    PinnedPair,
    ServiceAddress,
    ServiceRewards,
    pinned_pair,
    pinned_pairs,
)
from dense_reward_trainer.rl.sampling import Sampling
from dense_reward_trainer.runs.run_folder import check_run, open_run
from dense_reward_trainer.text_table import aligned

Measured = tuple[HeldOutResult, list[SampledResponse]]

# title of a column -> its value
COLUMNS: Mapping[str, Callable[[HeldOutResult], Estimate | float | None]] = {
    "greedy accuracy": lambda result: result.greedy_accuracy,
    "sampled accuracy": lambda result: result.sampled_accuracy,
    "NLL per token": lambda result: result.nll_per_token,
    "KL to SFT": lambda result: result.kl_to_sft,
    "length": lambda result: result.length_tokens,
    "cut off": lambda result: result.truncated,
}


@dataclass(frozen=True, slots=True, eq=False)
class PinnedService:
    """The pairs of the service, pinned once, so that all rows of the table have the same models.

    `sft`: one whose SFT model the KL is measured to; null without a service. `choosing`: those whose signals choose
    among samples, by `pair_name`.
    """

    sft: PinnedPair | None
    choosing: Mapping[str | None, PinnedPair]

    @property
    def sft_model_rewards(self) -> TokenRewards | None:
        """Log-probs of the SFT model; None without a service."""
        return None if self.sft is None else ServiceRewards(self.sft, "sft_logprob", with_kl=False)

    def check_tokenizer(self, choosing: Iterable[str | None], tokenizer_sha256: str) -> None:
        """Raises JobError if a pair that a policy needs has a different tokenizer; `choosing`: the names of some."""
        needed = [self.sft, *(self.choosing[name] for name in choosing)]
        for pair in needed:
            if pair is not None:
                pair.check_tokenizer(tokenizer_sha256)


def run(config: EvaluateConfig, report: Report) -> None:
    """Writes `evaluation.json` and `samples-NAME.jsonl` to `config.output_dir`, and reports a table.

    Raises ConfigError, DataError, CheckpointError or JobError; the message states the cure.
    """
    check_run("evaluate", config)
    for options in config.policies.values():
        check_sampled(options)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    measured: dict[str, Measured] = {}
    with pinned_service(config, report) as service:
        for sampled in dict.fromkeys(options.sampled for options in config.policies.values()):
            names = [name for name, options in config.policies.items() if options.sampled == sampled]
            report(f"measuring {', '.join(names)} ({sampled.checkpoint})")
            measured |= measure_policies(config, sampled, names, service, report)
    started = open_run("evaluate", config)
    results = {name: measured[name][0] for name in config.policies}
    for name in config.policies:
        write_samples(started.folder / f"samples-{name}.jsonl", measured[name][1])
    figures = {name: asdict(result) for name, result in results.items()}
    write_whole(started.folder / "evaluation.json", json.dumps(figures, indent=2, allow_nan=False).encode() + b"\n")
    report(evaluation_table(results))
    report(f"figures and samples: {started.folder}")


def measure_policies(
    config: EvaluateConfig, sampled: PolicyOptions, names: Sequence[str], service: PinnedService, report: Report
) -> dict[str, Measured]:
    """Measures the policies that share the samples of `sampled` on the held-out prompts, rendered as in training."""
    options = config.held_out_options
    checkpoint = load_sampled(sampled, report, precision=config.precision, device=chosen_device(config.device))
    limit_tokens = checkpoint.policy.limit_tokens
    rows = held_out_rows(config.held_out, checkpoint.encoder, limit_tokens, options.max_new_tokens, report)
    choices = {name: config.policies[name].choose for name in names}
    wanted = signals_of_choices(config, choices.values())
    service.check_tokenizer(wanted, checkpoint.manifest.tokenizer_sha256)
    drawn = draw_held_out(checkpoint, rows, options, shared_sampling(options, sampled, choices.values()))
    signals = {pair: sample_signals(service.choosing[pair], drawn.rollouts, found) for pair, found in wanted.items()}
    measured: dict[str, Measured] = {}
    for name, choose in choices.items():
        if choose is None:
            own = drawn.first(options.samples_per_prompt)
            measured[name] = measure_held_out(checkpoint, rows, options, service.sft_model_rewards, own)
        else:
            scores = signals.get(pair_name(config, choose))
            measured[name] = measure_chosen(checkpoint, rows, options, drawn, choose, signals=scores)
    return measured


def shared_sampling(
    options: HeldOutOptions, sampled: PolicyOptions, choices: Collection[ChooseOptions | None]
) -> Sampling:
    """How the samples are drawn that several policies share: as many as the policy with the most samples needs."""
    sizes = [options.samples_per_prompt if choose is None else choose.samples for choose in choices]
    own = replace(held_out_sampling(options), temperature=sampled.temperature, top_p=sampled.top_p, min_p=sampled.min_p)
    return replace(own, group_size=max(sizes))


def pair_name(config: EvaluateConfig, choose: ChooseOptions) -> str | None:
    """The pair at the service whose signal chooses; None: its only pair."""
    return choose.pair or config.service_pair


def signals_of_choices(
    config: EvaluateConfig, choices: Iterable[ChooseOptions | None]
) -> dict[str | None, set[TokenSignal]]:
    """The signals that choose among samples, by `pair_name`."""
    wanted: dict[str | None, set[TokenSignal]] = {}
    for choose in choices:
        if choose is not None and choose.signal is not None:
            wanted.setdefault(pair_name(config, choose), set()).add(choose.signal)
    return wanted


@contextmanager
def pinned_service(config: EvaluateConfig, report: Report) -> Iterator[PinnedService]:
    """Pins all pairs that the table needs; of those that the KL could be measured by, the first.

    Raises ConfigError if a pair does not offer a signal, and what `pinned_pair` raises.
    """
    if config.service_url is None:
        yield PinnedService(None, {})
        return
    address = ServiceAddress.of(config.service_url, config)
    wanted = signals_of_choices(config, [options.choose for options in config.policies.values()])
    with ExitStack() as stack:
        names = None if address.pair is None else [address.pair]
        pair, *_ = stack.enter_context(pinned_pairs(address, names, report))
        choosing: dict[str | None, PinnedPair] = {}
        for name, signals in wanted.items():
            choosing[name] = stack.enter_context(pinned_pair(replace(address, pair=name), report))
            check_offered(choosing[name], signals)
        yield PinnedService(pair, choosing)


def write_samples(path: Path, samples: Sequence[SampledResponse]) -> None:
    lines = [json.dumps(asdict(sample), ensure_ascii=False) for sample in samples]
    write_whole(path, "".join(f"{line}\n" for line in lines).encode())


def evaluation_table(results: Mapping[str, HeldOutResult]) -> str:
    """One aligned line for each policy: each mean with its standard error."""
    rows = [["policy", *COLUMNS]]
    rows += [[name, *(_cell(column(result)) for column in COLUMNS.values())] for name, result in results.items()]
    return aligned(rows)


def _cell(value: Estimate | float | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4f}"
    error = "?" if value.standard_error is None else f"{value.standard_error:.3f}"
    return f"{value.value:.3f} ± {error}"
