"""A scalar head on a language model's backbone: how it starts, and its values with gradient.

The model is transformers' for sequence classification with one label, the format of reward models. Must not know jobs.
"""

from collections.abc import Sequence

import torch
from dense_reward.errors import CheckpointError
from dense_reward.records import IdArray
from torch import Tensor
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dense_reward_trainer.reward_model.losses import HeadValues


def new_head(language_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A reward model with the layers of a language model, and a bias-free last layer of zeros.

    With zeros every value is 0 at first, and the first loss is log 2, whatever the seed. Raises CheckpointError if
    transformers has no such model of this architecture.
    """
    config = language_model.config
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise CheckpointError(
            f"transformers has no reward model (sequence classification) of {type(language_model).__name__}: choose "
            "another architecture"
        )
    without = {"id2label", "label2id", "num_labels", "architectures"}
    values = {name: value for name, value in config.to_dict().items() if name not in without}
    config = type(config).from_dict({**values, "num_labels": 1})
    config.pad_token_id = _padding(tokenizer)
    attention = language_model.config._attn_implementation
    model: PreTrainedModel = AutoModelForSequenceClassification.from_config(
        config, dtype=language_model.dtype, attn_implementation=attention
    )
    score = getattr(model, "score", None)
    if not isinstance(score, torch.nn.Linear):
        raise CheckpointError(
            f"{type(model).__name__} has no linear last layer `score`, so a service could not compute it: choose "
            "another architecture"
        )
    model.base_model.load_state_dict(language_model.base_model.state_dict())
    with torch.no_grad():
        for parameter in score.parameters():
            parameter.zero_()
    return model.to(language_model.device)


def _padding(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The padding that other programs must skip to find the last token; None if it would be the end of turn too."""
    padding = tokenizer.pad_token_id
    return None if padding == tokenizer.eos_token_id else padding


def head_values(model: PreTrainedModel, prompts: Sequence[IdArray], responses: Sequence[IdArray]) -> HeadValues:
    """The values after each token of the responses, with gradient, by one forward of sequences padded on the right.

    A causal model never attends to padding on the right. The last layer is computed in float32.
    """
    device = model.device
    sequences = [torch.from_numpy(ids) for prompt, ids in zip(prompts, responses, strict=True) for ids in (prompt, ids)]
    rows = [torch.cat(pair).long() for pair in zip(sequences[::2], sequences[1::2], strict=True)]
    ids_BL = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
    length_B = torch.tensor([len(ids) for ids in responses], device=device)
    start_B = torch.tensor([len(prompt) for prompt in prompts], device=device)
    values_BL = _values(model, ids_BL)
    position_BT = start_B[:, None] + torch.arange(int(length_B.max()), device=device)
    return HeadValues(values_BL.gather(1, position_BT.clamp(max=ids_BL.shape[1] - 1)), length_B)


def _values(model: PreTrainedModel, ids_BL: Tensor) -> Tensor:
    states_BLD: Tensor = model.base_model(
        input_ids=ids_BL, attention_mask=torch.ones_like(ids_BL), use_cache=False
    ).last_hidden_state
    score: torch.nn.Linear = model.score
    with torch.autocast(states_BLD.device.type, enabled=False):
        wide = torch.promote_types(states_BLD.dtype, torch.float32)
        bias = None if score.bias is None else score.bias.to(wide)
        return torch.nn.functional.linear(states_BLD.to(wide), score.weight.to(wide), bias)[..., 0]
