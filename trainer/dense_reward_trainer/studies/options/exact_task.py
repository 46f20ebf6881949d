"""A task so small that all responses are enumerated: the value of any policy and the optimum are computed exactly.

P prompts; S states (the response tokens so far), shorter ones first, the same for each prompt; V ids, of which 0 ends
the response; L states of one length. Values are in nats, float64. Must not know estimators.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from dense_reward.records import IdArray
from dense_reward.schemas import SignalName
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from dense_reward_trainer.rl.losses import divisor
from dense_reward_trainer.rl.policy import Policy, policy_logprobs
from dense_reward_trainer.rl.records import ResponseRewards, Rollout
from dense_reward_trainer.rl.returns import mask_of
from dense_reward_trainer.rl.sampling import Sampling, sample
from dense_reward_trainer.studies.options.config import TaskOptions

END = 0
BackUp = Callable[[Tensor, slice], Tensor]


@dataclass(frozen=True, slots=True)
class Tree:
    """All states of a vocabulary and a horizon: a tree whose level t has the states of t tokens."""

    symbols: int
    horizon: int

    @property
    def vocab_size(self) -> int:
        return self.symbols + 1

    def level(self, length: int) -> slice:
        """The states of `length` tokens."""
        first = sum(self.symbols**shorter for shorter in range(length))
        return slice(first, first + self.symbols**length)

    def states(self, length: int) -> list[tuple[int, ...]]:
        """The tokens of each state of a level, in order."""
        return list(product(range(1, self.vocab_size), repeat=length))

    def index(self, state: Sequence[int]) -> int:
        """The index of a state among all states."""
        offset = 0
        for token in state:
            offset = offset * self.symbols + token - 1
        first: int = self.level(len(state)).start
        return first + offset


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """An SFT model and its reference, and their log-probs of every token in every state, [P, S, V]."""

    tree: Tree
    prompts: tuple[IdArray, ...]
    sft: Policy
    reference: Policy
    sft_PSV: Tensor
    reference_PSV: Tensor

    @property
    def reward_PSV(self) -> Tensor:  # noqa: N802 - names carry shapes
        """log pi_sft - log pi_ref."""
        return self.sft_PSV - self.reference_PSV

    def logprobs(self, policy: Policy) -> Tensor:
        """A policy's log-probs of every token in every state, [P, S, V]."""
        return state_logprobs(policy, self.prompts, self.tree)

    def objective(self, policy_PSV: Tensor, coefficient: float) -> float:
        """J(pi) = E[sum r] - b KL(pi || pi_sft), the KL between whole responses; mean over the prompts."""
        shaped_PSV = self.reward_PSV - coefficient * (policy_PSV - self.sft_PSV)
        return self._backwards(shaped_PSV, lambda value_PLV, level: (policy_PSV[:, level].exp() * value_PLV).sum(2))

    def optimum(self, coefficient: float) -> float:
        """The maximum of J, b log E_sft[exp(sum r / b)]; pi* is proportional to pi_sft (pi_sft / pi_ref)^(1/b)."""
        return self.objective(self.optimal_policy(coefficient), coefficient)

    def optimal_policy(self, coefficient: float) -> Tensor:
        """Log-probs of the policy that maximises J, [P, S, V]."""
        best_PSV = torch.empty_like(self.sft_PSV)

        def soft(value_PLV: Tensor, level: slice) -> Tensor:
            tilted_PLV = self.sft_PSV[:, level] + value_PLV / coefficient
            best_PSV[:, level] = torch.log_softmax(tilted_PLV, 2)
            return coefficient * torch.logsumexp(tilted_PLV, 2)

        self._backwards(self.reward_PSV, soft)
        return best_PSV

    def _backwards(self, reward_PSV: Tensor, back_up: BackUp) -> float:
        """Dynamic programming from the last level to the first; returns the mean value of the first states.

        `back_up` reduces the values of the actions of a level, [P, L, V], to the values of its states, [P, L].
        """
        state_PL = reward_PSV.new_zeros(len(self.prompts), self.tree.symbols**self.tree.horizon)
        for length in reversed(range(self.tree.horizon)):
            level = self.tree.level(length)
            action_PLV = reward_PSV[:, level].clone()
            # id 0 ends the response, so it leads to no state
            action_PLV[..., 1:] += state_PL.view(len(self.prompts), -1, self.tree.symbols)
            state_PL = back_up(action_PLV, level)
        return float(state_PL.mean())


def make_task(options: TaskOptions, seed: int) -> Task:
    """The task of a seed, which decides the expert, the demonstrations and SFT."""
    tree = Tree(options.symbols, options.horizon)
    pairs = product(range(1, tree.vocab_size), repeat=2)
    prompts = tuple(np.array(pair, dtype=np.int32) for pair, _ in zip(pairs, range(options.prompts), strict=False))
    expert = _random_policy(options, 2 * seed)
    with torch.no_grad():
        for parameter in expert.model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(options.sharpness)
    each = -(-options.demonstrations // options.prompts)
    demonstrations = sample(expert, prompts, Sampling(options.horizon, each, batch_size=4096), seed)
    order = np.random.default_rng(seed).permutation(len(demonstrations))[: options.demonstrations]
    sft = _random_policy(options, 2 * seed + 1)
    reference = learn(sft, [demonstrations[i] for i in order], options)
    tables = [state_logprobs(policy, prompts, tree) for policy in (sft, reference)]
    return Task(tree, prompts, sft, reference, *tables)


def learn(policy: Policy, demonstrations: Sequence[Rollout], options: TaskOptions) -> Policy:
    """Train the policy in place by SFT, each demonstration once; returns a copy of it at the fraction `reference`."""
    optimiser = torch.optim.AdamW(policy.model.parameters(), lr=options.learning_rate, weight_decay=0.0)
    starts = range(0, len(demonstrations), options.batch_size)
    decay = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, total_iters=len(starts))
    reference: Policy | None = None
    for start in starts:
        batch = demonstrations[start : start + options.batch_size]
        responses = [one.response_T for one in batch]
        logprob_BT = policy_logprobs(policy, [one.prompt_P for one in batch], responses)
        optimiser.zero_grad()
        torch.autograd.backward(-logprob_BT.sum() / divisor(mask_of([len(ids) for ids in responses]), "tokens"))
        optimiser.step()
        decay.step()
        if reference is None and start + len(batch) >= options.reference * len(demonstrations):
            reference = copy.deepcopy(policy)
    return copy.deepcopy(policy) if reference is None else reference


@torch.no_grad()
def state_logprobs(policy: Policy, prompts: Sequence[IdArray], tree: Tree) -> Tensor:
    """log pi of every token in every state, [P, S, V] float64: one forward pass over the longest states."""
    longest = tree.horizon - 1
    ids_NL = torch.tensor([[*prompt, *state] for prompt in prompts for state in tree.states(longest)], dtype=torch.long)
    logits_NLV = policy.model(input_ids=ids_NL).logits[:, -tree.horizon :, : policy.vocab_size]
    logits_PNLV = torch.log_softmax(logits_NLV.double(), -1).reshape(len(prompts), -1, tree.horizon, policy.vocab_size)
    # states with the same first tokens have the same logits there: read them from the first such state
    levels = [logits_PNLV[:, :: tree.symbols ** (longest - length), length] for length in range(tree.horizon)]
    return torch.cat(levels, dim=1)


class TableRewards:
    """TokenRewards from the tables of a task: equal to those that a service of its pair would return."""

    def __init__(self, task: Task, signal: SignalName) -> None:
        self._tree, self._prompt_index = task.tree, {prompt.tobytes(): p for p, prompt in enumerate(task.prompts)}
        kl_PS1 = (task.sft_PSV.exp() * task.reward_PSV).sum(2, keepdim=True)
        signals: dict[SignalName, Tensor] = {
            "reward": task.reward_PSV,
            "centred": task.reward_PSV - kl_PS1,
            "sft_logprob": task.sft_PSV,
        }
        self._signal_PSV, self._sft_PSV = signals[signal].float().numpy(), task.sft_PSV.float().numpy()
        self._kl_PS = kl_PS1[..., 0].float().numpy()

    def score(self, rollouts: Sequence[Rollout], candidates: Sequence[IdArray] | None = None) -> list[ResponseRewards]:
        """The rewards of each rollout, and of its candidates."""
        rows: Sequence[IdArray | None] = [None] * len(rollouts) if candidates is None else candidates
        return [self._one(rollout, ids_TK) for rollout, ids_TK in zip(rollouts, rows, strict=True)]

    def _one(self, rollout: Rollout, ids_TK: IdArray | None) -> ResponseRewards:
        prompt, own_T = self._prompt_index[rollout.prompt_P.tobytes()], rollout.response_T
        own = own_T.tolist()
        states_T = [self._tree.index(own[:t]) for t in range(len(own))]
        signal_TV, sft_TV = self._signal_PSV[prompt, states_T], self._sft_PSV[prompt, states_T]
        rows_T = np.arange(len(own_T))
        sampled = signal_TV[rows_T, own_T], sft_TV[rows_T, own_T], self._kl_PS[prompt, states_T]
        if ids_TK is None:
            return ResponseRewards(*sampled)
        return ResponseRewards(*sampled, signal_TV[rows_T[:, None], ids_TK], sft_TV[rows_T[:, None], ids_TK])


def _random_policy(options: TaskOptions, seed: int) -> Policy:
    vocab_size = options.symbols + 1
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=options.hidden_size,
        intermediate_size=2 * options.hidden_size,
        num_hidden_layers=options.layers,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Policy(LlamaForCausalLM(config).eval(), END, vocab_size)
