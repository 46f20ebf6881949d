"""What can be typed after `dense-reward-train`: jobs, flags and examples. Nothing slow is imported here."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

from dense_reward.command_line.parser import CommandParser, PrintCompletion, ShowVersion, words_or_files

from dense_reward_trainer.launch import STRATEGIES
from dense_reward_trainer.recipe_files import recipes_of

PROGRAM = "dense-reward-train"


@dataclass(frozen=True, slots=True)
class JobSpec:
    """Where to find a job: `module` has run(config, report); `config` is module:Class, without slow imports.

    `data`: the key of the job's data source, if it has one. `launches`: whether it runs in several processes.
    """

    module: str
    config: str
    help: str
    data: str | None = None
    launches: bool = False


JOBS = {
    "sft": JobSpec(
        "dense_reward_trainer.jobs.sft",
        "dense_reward_trainer.configs.sft:SftConfig",
        "train on demonstrations: an SFT checkpoint and its reference",
        data="data",
        launches=True,
    ),
    "preview": JobSpec(
        "dense_reward_trainer.jobs.preview",
        "dense_reward_trainer.configs.preview:PreviewConfig",
        "before training on the reward: would it help? A verdict from labelled answers, in minutes, without a service",
    ),
    "credit": JobSpec(
        "dense_reward_trainer.jobs.credit",
        "dense_reward_trainer.configs.credit:CreditConfig",
        "measure the reward: does it locate planted errors, and rank right above wrong answers?",
        data="data",
    ),
    "benchmark": JobSpec(
        "dense_reward_trainer.jobs.benchmark",
        "dense_reward_trainer.configs.benchmark:BenchmarkConfig",
        "measure the reward on ProcessBench, PRM800K, PRMBench and RewardBench 2, by their own metrics",
    ),
    "dpr": JobSpec(
        "dense_reward_trainer.jobs.dpr",
        "dense_reward_trainer.configs.dpr:DprConfig",
        "improve a policy on the token rewards of a service (Dense-Path REINFORCE)",
        data="prompts",
        launches=True,
    ),
    "irft": JobSpec(
        "dense_reward_trainer.jobs.irft",
        "dense_reward_trainer.configs.irft:IrftConfig",
        "self-play on demonstrations, in rounds: learn to prefer them to own answers (IRFT, SPIN, GSIL)",
        data="data",
    ),
    "rft": JobSpec(
        "dense_reward_trainer.jobs.rft",
        "dense_reward_trainer.configs.rft:RftConfig",
        "learn a reward model (a scalar head on every token) from demonstrations, improve a policy on it, in rounds",
        data="data",
    ),
    "gradient": JobSpec(
        "dense_reward_trainer.jobs.gradient",
        "dense_reward_trainer.configs.dpr:GradientConfig",
        "before a dpr run: would its gradient make held-out answers likelier?",
        data="prompts",
    ),
    "estimators": JobSpec(
        "dense_reward_trainer.studies.options.compare",
        "dense_reward_trainer.studies.options.config:EstimatorsConfig",
        "compare options of dpr on a task whose optimum is known exactly",
    ),
    "sweep": JobSpec(
        "dense_reward_trainer.studies.regimes.study",
        "dense_reward_trainer.studies.regimes.config:SweepConfig",
        "run SFT in several regimes, then DPR and its alternatives at matched KL and FLOPs",
    ),
    "evaluate": JobSpec(
        "dense_reward_trainer.jobs.evaluate",
        "dense_reward_trainer.configs.evaluate:EvaluateConfig",
        "compare policies on held-out prompts: accuracy, likelihood, length and KL",
    ),
    "leaderboard": JobSpec(
        "dense_reward_trainer.jobs.leaderboard",
        "dense_reward_trainer.configs.benchmark:LeaderboardConfig",
        "run lm-evaluation-harness on checkpoints: the Open LLM Leaderboard, or tasks of your own",
    ),
    "judge": JobSpec(
        "dense_reward_trainer.jobs.judge",
        "dense_reward_trainer.configs.judge:JudgeConfig",
        "win rates against a baseline by a judge behind a URL: AlpacaEval 2, Arena-Hard, MT-Bench, LIMA",
    ),
    "sample": JobSpec(
        "dense_reward_trainer.jobs.sample",
        "dense_reward_trainer.configs.sample:SampleConfig",
        "write responses of any policy to a file, also of a tilted one, which needs no training",
    ),
}
REPORT, REPORT_HELP = "report", "collect finished runs into one HTML page: tables, plots, heatmaps and commands"

# Job -> command lines that its help shows. Tests parse them, and resolve their recipes and overrides.
EXAMPLES: dict[str, tuple[str, ...]] = {
    "sft": (
        "dense-reward-train sft arithmetic_sft   # from scratch, minutes on a CPU",
        "dense-reward-train sft sft_full base_model=Qwen/Qwen2.5-1.5B data.source=mine.jsonl output_dir=runs/mine",
        "dense-reward-train sft sft_full --launch 8 --strategy fsdp2   # prints the command for 8 GPUs",
    ),
    "preview": (
        "dense-reward-train preview demo_preview   # after `make demo`",
        "dense-reward-train preview preview_full run=runs/mine labelled=judged.jsonl output_dir=runs/mine_preview",
    ),
    "credit": (
        "dense-reward-train credit demo_credit   # after `make demo`: dense-reward serve --run runs/demo",
        "dense-reward-train credit gsm8k_credit data.source=runs/mine/held_out.jsonl data.last=null corruptions=[word] "
        "against=tokens policy=runs/mine/checkpoints/sft checker=exact output_dir=runs/mine_credit",
    ),
    "benchmark": ("dense-reward-train benchmark benchmark_full limit=200   # the first rows of each file",),
    "dpr": (
        "dense-reward-train dpr demo_dpr   # after `make demo`: dense-reward serve --run runs/demo",
        "dense-reward-train dpr dpr_full policy=runs/mine/checkpoints/sft held_out=runs/mine/held_out.jsonl "
        "prompts.source=mine.jsonl service_pair=base output_dir=runs/mine_dpr",
    ),
    "irft": (
        "dense-reward-train irft arithmetic_irft",
        "dense-reward-train irft irft_full policy=runs/mine/checkpoints/sft data.source=mine.jsonl "
        "output_dir=runs/irft",
    ),
    "rft": (
        "dense-reward-train rft arithmetic_rft",
        "dense-reward-train rft rft_full policy=runs/mine/checkpoints/sft held_out=runs/mine/held_out.jsonl "
        "data.source=mine.jsonl output_dir=runs/rft",
    ),
    "gradient": (
        "dense-reward-train gradient demo_dpr output_dir=runs/demo_gradient   # the configuration of the dpr run",
        "dense-reward-train gradient dpr_full batches=16 service_pair=null service_pairs=[base,early] "
        "output_dir=runs/gradient",
    ),
    "estimators": ("dense-reward-train estimators estimators processes=8",),
    "sweep": ("dense-reward-train sweep evidence_sweep", "dense-reward-train sweep evidence_sweep finished_only=true"),
    "evaluate": (
        "dense-reward-train evaluate arithmetic_evaluate",
        "dense-reward-train evaluate evaluate_full "
        "'policies={sft: runs/mine/checkpoints/sft, dpr: runs/mine_dpr/checkpoints/policy}' "
        "held_out=runs/mine/held_out.jsonl output_dir=runs/mine_evaluation",
    ),
    "leaderboard": ("dense-reward-train leaderboard leaderboard_full 'policies={sft: runs/mine/checkpoints/sft}'",),
    "judge": (
        "dense-reward-train judge judge_lima   # writes the prompts to answer first",
        "dense-reward-train judge judge_lima 'answers={sft: a/samples.jsonl, dpr: b/samples.jsonl}' estimate_only=true",
    ),
    "sample": (
        "dense-reward-train sample sample_full policy=runs/demo/checkpoints/sft prompts=runs/demo/held_out.jsonl "
        "max_new_tokens=64",
        "dense-reward-train sample sample_full "
        "'policy={checkpoint: runs/mine/checkpoints/sft, tilt: {reference: runs/mine/checkpoints/base}}'",
    ),
    REPORT: (
        "dense-reward-train report runs --output report.html",
        "dense-reward-train report runs/demo_credit runs/demo_preview",
    ),
}


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The parsed command line. Overrides can come before and after --skip-bad; argparse alone would refuse that."""
    top = parser()
    options: argparse.Namespace
    options, rest = top.parse_known_args(arguments)
    unknown = [argument for argument in rest if argument.startswith("-")]
    if unknown:
        top.refuse(unknown, options, _as_override(unknown[0]))
    options.overrides = [*options.overrides, *rest]
    return options


def _as_override(word: str) -> str:
    """The cure for a key of the configuration that is typed like a flag."""
    key, _, value = word.lstrip("-").partition("=")
    return f"; keys of the configuration are typed without dashes: {key}={value or 'VALUE'}" if key else ""


def parser() -> CommandParser:
    """The parser of the command line. Each job's arguments are added only if it is named."""
    top = _Parser(
        prog=PROGRAM,
        description="Trains and measures models: demonstrations -> checkpoints -> policy.",
        examples=(
            "dense-reward-train sft arithmetic_sft",
            "dense-reward-train preview arithmetic_preview",
            "dense-reward-train dpr --help",
        ),
    )
    top.add_argument("--version", action=ShowVersion)
    top.add_argument("--print-completion", action=PrintCompletion)
    commands = top.add_subparsers(dest="job", required=True, metavar="JOB")
    for name, job in JOBS.items():
        fill = partial(_add_job, name, job)
        commands.add_parser(name, help=job.help, description=job.help, fill=fill, examples=EXAMPLES[name])
    commands.add_parser(REPORT, help=REPORT_HELP, description=REPORT_HELP, fill=_add_report, examples=EXAMPLES[REPORT])
    return top


def _add_job(name: str, job: JobSpec, command: CommandParser) -> None:
    recipes = recipes_of(name)
    config = command.add_argument(
        "config", help=f"YAML file, or a shipped recipe: {', '.join(recipes)}" if recipes else "YAML file"
    )
    config.complete = words_or_files(name, recipes)  # type: ignore[attr-defined] # shtab reads it
    command.add_argument(
        "overrides",
        nargs="*",
        default=[],  # without a default, argparse calls them required
        metavar="key.sub=value",
        help="overrides of keys of the configuration; values are YAML",
    )
    command.set_defaults(skip_bad=False, launch=None)
    if job.data is not None:
        skip_bad = f"skip lines that are not demonstrations, and report how many ({job.data}.skip_bad=true)"
        command.add_argument("--skip-bad", action="store_true", help=skip_bad)
    if job.launches:
        command.add_argument(
            "--launch", metavar="[MACHINESx]GPUS", help="print the command for so many GPUs, such as 8 or 2x8"
        )
        command.add_argument(
            "--strategy",
            choices=STRATEGIES,
            default="ddp",
            help="with --launch. ddp: each GPU holds the whole model; fsdp2, zero3: the GPUs share it",
        )


def _add_report(command: CommandParser) -> None:
    command.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output_dir of a job, or a folder of such")
    command.add_argument(
        "--output", type=Path, metavar="FILE", default=Path("report.html"), help="the page (default: report.html)"
    )
    command.set_defaults(overrides=[])


class _Parser(CommandParser):
    """Several processes with the same command line report its error once."""

    def error(self, message: str) -> NoReturn:
        from dense_reward_trainer.runs.processes import is_first_to_say

        if is_first_to_say(message):
            super().error(message)
        self.exit(2)
