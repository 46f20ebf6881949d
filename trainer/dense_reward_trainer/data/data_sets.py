"""Data sets of the `datasets` library: their names, short names of known ones, and how one is opened.

Must not import tokenizers, chat templates or models.
"""

import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

from dense_reward_trainer.data.records import DataError, RawRow

OUT = "converted.jsonl"
# Arrow has dates and other values that JSON has not.
WRITE = "[print(json.dumps(r, default=str)) for r in new]"


class DatasetRows(Protocol):
    """A data set: its length, and one mapping of columns to values for each row."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[RawRow]: ...


OpenDataset = Callable[[str, str | None, str], DatasetRows]


@dataclass(frozen=True, slots=True)
class KnownDataSet:
    """A data set at the hub that has a short name, and the configuration and split that are meant without others.

    `columns`: those that are read; docs/data.md describes their layouts.
    """

    hub_id: str
    columns: tuple[str, ...]
    config: str | None = None
    split: str = "train"

    @property
    def source(self) -> str:
        """name[:config]@split"""
        return f"{self.hub_id}{f':{self.config}' if self.config else ''}@{self.split}"


# Short name, in lower case without punctuation -> data set.
KNOWN: Mapping[str, KnownDataSet] = {
    "alpaca": KnownDataSet("tatsu-lab/alpaca", ("instruction", "input", "output")),
    "alpacacleaned": KnownDataSet("yahma/alpaca-cleaned", ("instruction", "input", "output")),
    "dolly": KnownDataSet("databricks/databricks-dolly-15k", ("instruction", "context", "response")),
    "gsm8k": KnownDataSet("openai/gsm8k", ("question", "answer"), config="main"),
    "hhrlhf": KnownDataSet("Anthropic/hh-rlhf", ("chosen",)),
    "lima": KnownDataSet("GAIR/lima", ("conversations",)),
    "math": KnownDataSet("DigitalLearningGmbH/MATH-lighteval", ("problem", "solution"), config="default"),
    "metamathqa": KnownDataSet("meta-math/MetaMathQA", ("query", "response")),
    "norobots": KnownDataSet("HuggingFaceH4/no_robots", ("messages",)),
    "oasst1": KnownDataSet("OpenAssistant/oasst1", ("message_id", "parent_id", "role", "text", "rank")),
    "oasst2": KnownDataSet("OpenAssistant/oasst2", ("message_id", "parent_id", "role", "text", "rank")),
    "openhermes": KnownDataSet("teknium/OpenHermes-2.5", ("conversations",)),
    "tulu3": KnownDataSet("allenai/tulu-3-sft-mixture", ("messages",)),
    "ultrachat200k": KnownDataSet("HuggingFaceH4/ultrachat_200k", ("messages",), split="train_sft"),
    "ultrafeedback": KnownDataSet(
        "HuggingFaceH4/ultrafeedback_binarized", ("prompt", "chosen", "messages"), split="train_sft"
    ),
}
_OTHER_NAMES: Mapping[str, str] = {
    "anthropichh": "hhrlhf",
    "databricksdolly15k": "dolly",
    "dolly15k": "dolly",
    "hendrycksmath": "math",
    "hh": "hhrlhf",
    "metamath": "metamathqa",
    "openhermes25": "openhermes",
    "stanfordalpaca": "alpaca",
    "tulu3sftmixture": "tulu3",
    "ultrachat": "ultrachat200k",
    "ultrafeedbackbinarized": "ultrafeedback",
}
SOURCES = (
    "a .jsonl, .json (or .gz of one) or .parquet file, a data set such as openai/gsm8k:main@train, a short name of one "
    f"({', '.join(KNOWN)}), or the generator `arithmetic`"
)
_BY_HUB_ID = {known.hub_id: known for known in KNOWN.values()}


def known_data_set(name: str) -> KnownDataSet | None:
    """The data set with this hub id or short name; None if it is not known, or a folder of this name is here."""
    if Path(name).exists():
        return None
    short = re.sub(r"[^a-z0-9]", "", name.lower()) if "/" not in name else ""
    return _BY_HUB_ID.get(name) or KNOWN.get(_OTHER_NAMES.get(short, short))


def dataset_name(source: str) -> tuple[str, str | None, str]:
    """Hub id or folder, configuration and split of name[:config][@split]; those of a known data set are completed.

    Raises DataError if the source has another form.
    """
    name_and_config, at, part = source.rpartition("@") if "@" in source else (source, "", "")
    name, colon, config = name_and_config.partition(":")
    if not name or (at and not part) or (colon and not config):
        raise DataError(f"{source!r} does not name a data set: write name[:config][@split]. A source is {SOURCES}")
    known = known_data_set(name) or KnownDataSet(name, ())
    return known.hub_id, config or known.config, part or known.split


def open_dataset(name: str, config: str | None, split: str) -> DatasetRows:
    """`datasets.load_dataset` for one split. Raises DataError with the library's message if that fails."""
    import datasets  # noqa: PLC0415  (slow, and only needed for this source)

    try:
        return cast(DatasetRows, datasets.load_dataset(name, config, split=split))
    except RuntimeError as error:
        # datasets 4 and later: "Dataset scripts are no longer supported, but found NAME.py"
        if "script" not in str(error):
            raise
        command = f"hf download {shlex.quote(name)} --repo-type dataset --revision refs/convert/parquet --local-dir DIR"
        raise DataError(
            f"{name!r} is a data set with a loading script, which the library runs no more ({error}): download its "
            f"files as Parquet (`{command}`) or as it is published, and name one file as the source"
        ) from error
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{name!r} is not a file, and as a data set (configuration {config or 'default'}, split {split}) it "
            f"could not be loaded: {error}. A source is {SOURCES}"
        ) from error


def dataset_conversion(name: str, config: str | None, part: str, python: str) -> str:
    """A shell command that writes OUT from a data set; `python` is a Python expression over `rows`."""
    program = (
        f"import datasets, json; rows = list(datasets.load_dataset({name!r}, {config!r}, split={part!r})); "
        f"new = {python}; {WRITE}"
    )
    return f"python -c {shlex.quote(program)} > {OUT}"
