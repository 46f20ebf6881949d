"""What the recipe of docs/large_scale.md costs, computed and not measured: `python -m bench.evaluation.large_scale`.

Memory is the estimate of the job sft, plus what DPR needs beside it. Hours are FLOPs at a stated utilisation, plus the
steps of sampling at a stated pace. The configuration is that of the recipe; only the assumptions below are made here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from pathlib import Path

from dense_reward_trainer.configs.base import load_config
from dense_reward_trainer.configs.dpr import DprConfig
from dense_reward_trainer.recipe_files import config_path
from dense_reward_trainer.sft.memory import BFLOAT16, FLOAT32, ModelSizes, StepShape, estimate, in_words
from dense_reward_trainer.studies.regimes.cell import arguments
from dense_reward_trainer.studies.regimes.config import SweepConfig
from dense_reward_trainer.studies.regimes.flops import FORWARD, TRAINING
from dense_reward_trainer.studies.regimes.policies import DprPolicy, Overrides, SampledPolicy, SftPolicy

from bench.tables import replace_block, table

PAGE = Path(__file__).resolve().parents[2] / "docs" / "large_scale.md"
RECIPE = "large_scale_sweep"

PEAK_FLOPS = 989e12  # H100, bfloat16, dense
UTILISATION = 0.4  # of training and of scoring
RECOMPUTED = 4 / 3  # gradient checkpointing computes the forward pass twice
DECODING_S = 0.03  # one token for every response of a batch, by transformers
START_S = 90.0  # of a job: imports, weights from the disk, checkpoints to it
DEMONSTRATIONS, TEST, EPOCHS = 7473, 1319, 2  # GSM8K; MATH has 7,500 and 500
PROMPT_TOKENS, RESPONSE_TOKENS = 150, 300
LABELLED_BATCHES = 2
BATCH = 256  # of evaluate
CONVERSATIONS, CONVERSATION_TOKENS = 207_865, 1100  # UltraChat200k, one epoch
WIN_RATE_STEPS = 200
TOTALS = ("study_h", "win_rates_h")


@dataclass(frozen=True, slots=True)
class Model:
    """`shared`: GPUs that share one copy of weights, gradients and moments; 1 under DDP."""

    sizes: ModelSizes
    shared: int

    @property
    def parameters(self) -> int:
        return self.sizes.trained


def qwen(layers: int, hidden: int, keys: int, intermediate: int, vocabulary: int, *, tied: bool) -> ModelSizes:
    """Sizes of a Qwen2.5 model by its published configuration."""
    attention = 2 * hidden * hidden + 2 * hidden * keys + hidden + 2 * keys
    layer = attention + 3 * hidden * intermediate + 2 * hidden
    parameters = layers * layer + hidden + vocabulary * hidden * (1 if tied else 2)
    return ModelSizes(
        trained=parameters,
        frozen=0,
        layers=layers,
        hidden=hidden,
        query=hidden,
        keys=keys,
        intermediate=intermediate,
        vocabulary=vocabulary,
    )


MODELS: Mapping[str, Model] = {
    "0.5B": Model(qwen(24, 896, 128, 4864, 151936, tied=True), 1),
    "1.5B": Model(qwen(28, 1536, 256, 8960, 151936, tied=True), 1),
    "7B": Model(qwen(28, 3584, 512, 18944, 152064, tied=False), 8),
}


@dataclass(frozen=True, slots=True)
class Costs:
    """Bytes on each GPU, and hours on one node of 8 GPUs."""

    sft_bytes: int
    dpr_bytes: int
    references_bytes: int
    sft_h: float
    dpr_h: float
    study_h: float
    win_rates_h: float


def recipe() -> SweepConfig:
    return load_config(SweepConfig, config_path(RECIPE))


def dpr_of(config: SweepConfig, name: str) -> DprConfig:
    policy = config.policies[name]
    assert isinstance(policy, DprPolicy)
    always: Overrides = {"output_dir": "unused", "prompts": {"source": "unused"}}
    return load_config(DprConfig, config_path(policy.recipe), arguments(always | config.dpr | policy.dpr))


def costs(model: Model) -> Costs:
    """The costs of the study for one size of model, and of the win rates on UltraChat200k."""
    config = recipe()
    dpr, gpus = dpr_of(config, config.primary), config.launch or 1
    sft_h, run_h = _sft_s(model, gpus) / 3600, _dpr_s(model, dpr, gpus) / 3600
    chat_s = _training_s(model, CONVERSATIONS * CONVERSATION_TOKENS, gpus) + WIN_RATE_STEPS * _step_s(model, dpr, gpus)
    chat_s += 2 * START_S
    return Costs(
        estimate(
            model.sizes, _shape(model, int(str(config.sft["batch_size"])) * int(str(config.sft["max_length_tokens"])))
        ).peak,
        _dpr_bytes(model, dpr, gpus),
        3 * BFLOAT16 * model.parameters,
        sft_h,
        run_h,
        sum(_cells_h(config, regime, sft_h, run_h, _continued_s(model, dpr, gpus) / 3600) for regime in config.regimes),
        chat_s / 3600,
    )


def _shape(model: Model, tokens: int, learnt: int | None = None) -> StepShape:
    return StepShape(
        tokens=tokens,
        learnt=tokens if learnt is None else learnt,
        accumulation=2,
        bfloat16=True,
        checkpointing=True,
        sharing=model.shared,
        replicas=model.shared == 1,
        cuda=True,
    )


def _dpr_bytes(model: Model, dpr: DprConfig, gpus: int) -> int:
    """The larger of a training step, whose loss holds three arrays of logits, and of sampling with whole weights."""
    rows, sizes = dpr.trl.batch_size or 1, model.sizes
    learnt = rows * dpr.max_new_tokens
    step = estimate(sizes, _shape(model, learnt + rows * PROMPT_TOKENS, learnt))
    training = step.peak - step.logits + 3 * FLOAT32 * learnt * sizes.vocabulary
    whole = 0 if model.shared == 1 else BFLOAT16 * model.parameters
    responses = dpr.prompts_per_step * dpr.group_size // gpus
    cache = responses * (PROMPT_TOKENS + dpr.max_new_tokens) * sizes.layers * 2 * sizes.keys * BFLOAT16
    return max(training, step.weights + step.gradients + step.moments + whole + cache)


def _training_s(model: Model, tokens: float, gpus: int) -> float:
    return tokens * TRAINING * RECOMPUTED * model.parameters / (gpus * PEAK_FLOPS * UTILISATION)


def _sft_s(model: Model, gpus: int) -> float:
    return START_S + _training_s(model, EPOCHS * DEMONSTRATIONS * (PROMPT_TOKENS + RESPONSE_TOKENS), gpus)


def _step_s(model: Model, dpr: DprConfig, gpus: int) -> float:
    """One step of DPR: sample, score with two models on one GPU, compute log-probs and train on all."""
    tokens = dpr.prompts_per_step * dpr.group_size * (PROMPT_TOKENS + RESPONSE_TOKENS)
    scoring_s = tokens * 2 * FORWARD * model.parameters / (PEAK_FLOPS * UTILISATION)
    logprobs_s = tokens * FORWARD * model.parameters / (gpus * PEAK_FLOPS * UTILISATION)
    return dpr.max_new_tokens * DECODING_S + scoring_s + logprobs_s + _training_s(model, tokens, gpus)


def _dpr_s(model: Model, dpr: DprConfig, gpus: int) -> float:
    return START_S + dpr.steps * _step_s(model, dpr, gpus)


def _continued_s(model: Model, dpr: DprConfig, gpus: int) -> float:
    """SFT with the FLOPs of the run of DPR: 14 of each weight and token, where SFT's own are 6."""
    tokens = dpr.steps * dpr.prompts_per_step * dpr.group_size * (PROMPT_TOKENS + RESPONSE_TOKENS)
    return START_S + _training_s(model, tokens * (4 * FORWARD + TRAINING) / TRAINING, gpus)


def _cells_h(config: SweepConfig, regime: str, sft_h: float, dpr_h: float, continued_h: float) -> float:
    """All cells of a regime; with the tuning seeds, a run for each value of each grid."""
    here = config.policies_of(regime, config.policies)
    tuned = config.tuning is not None and config.tuned_in(regime) == regime
    reported, tried = len(config.seeds_of(regime)), len(config.tuning.seeds) if config.tuning and tuned else 0
    hours = (reported + tried) * sft_h
    for policy in here.values():
        runs = reported + tried * sum(len(values) for values in policy.grid.values())
        match policy:
            case DprPolicy():
                hours += runs * (dpr_h + _answers_h(config, 2))
            case SftPolicy():
                hours += runs * (continued_h + _answers_h(config, 2))
            case SampledPolicy(options=options):
                choose = options.get("choose")
                samples = int(str(choose["samples"])) if isinstance(choose, dict) else 2
                hours += runs * _answers_h(config, samples)
    # the service, the evaluation with the start and the SFT model, and the preview
    cell_h = 2 * START_S / 3600 + 2 * _answers_h(config, 2)
    preview_h = (START_S + LABELLED_BATCHES * RESPONSE_TOKENS * DECODING_S) / 3600
    return hours + reported * (cell_h + preview_h) + tried * cell_h


def _answers_h(config: SweepConfig, answers: int) -> float:
    """Answers to every test problem on one GPU; 2: a greedy and a sampled one."""
    tokens = int(str(config.evaluate["held_out_options.max_new_tokens"]))
    return answers * ceil(TEST / BATCH) * tokens * DECODING_S / 3600


def blocks() -> dict[str, str]:
    """The tables of the page."""
    found = {name: costs(model) for name, model in MODELS.items()}
    memory = [
        [
            f"{name} ({MODELS[name].parameters:,} parameters)",
            "ddp" if MODELS[name].shared == 1 else "zero3",
            in_words(one.sft_bytes),
            in_words(one.dpr_bytes),
            in_words(one.references_bytes),
            in_words(one.references_bytes / 3),
        ]
        for name, one in found.items()
    ]
    hours = [
        [name, *(f"{value:.2f}" for value in (one.sft_h, one.dpr_h)), f"{one.study_h:.0f}", f"{one.win_rates_h:.1f}"]
        for name, one in found.items()
    ]
    head = ["model", "strategy", "SFT", "DPR", "three references in the service", "its SFT model"]
    total = ["all", "", "", *(f"{sum(getattr(one, key) for one in found.values()):.0f}" for key in TOTALS)]
    return {
        "memory": table(head, memory),
        "hours": table(["model", "one SFT", "one DPR run", "the study", "UltraChat: SFT and DPR"], [*hours, total]),
    }


def main() -> None:
    for name, body in blocks().items():
        replace_block(PAGE, name, body)


if __name__ == "__main__":
    main()
