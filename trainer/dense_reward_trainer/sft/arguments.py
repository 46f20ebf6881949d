"""Arguments of transformers' trainers whose names depend on the version."""

from transformers import TrainingArguments


def checkpointing(wanted: bool) -> dict[str, bool]:
    """Whether activations are recomputed: newer versions renamed the argument, and warn about the older name."""
    names = ("activation_checkpointing", "gradient_checkpointing")
    return {next(name for name in names if hasattr(TrainingArguments, name)): wanted}
