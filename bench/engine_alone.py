"""The engine alone, fed with full batches of prepared rows: what everything around it is compared with."""

import json
import time
from collections.abc import Sequence

from dense_reward.bulk.columns import Columns
from dense_reward.bulk.records import Faulty
from dense_reward.records import Engine, Trunk, Wants
from dense_reward.schemas import Options
from dense_reward.scoring.items import Limits, prepare
from dense_reward.serving.loaders import LoadedPair

GSM8K = {"prompt": "question", "response": "answer"}
Seconds = tuple[float, float]
"""CPU seconds of this process, and seconds."""


def trunks_of(lines: Sequence[str], columns: Columns, loaded: LoadedPair) -> list[Trunk]:
    limits = Limits(loaded.engine.info.vocab_size, loaded.engine.info.max_length_tokens, 1, 64)
    trunks: list[Trunk] = []
    for line in lines:
        items = columns.items(json.loads(line))
        assert not isinstance(items, Faulty), items
        trunks += [prepare(item, Options.model_validate({}), loaded.encoder, limits).trunk for item in items]
    return trunks


def now() -> Seconds:
    return time.process_time(), time.perf_counter()


def since(started: Seconds) -> Seconds:
    return time.process_time() - started[0], time.perf_counter() - started[1]


def engine_seconds(engine: Engine, trunks: Sequence[Trunk], max_batch_tokens: int) -> Seconds:
    """CPU seconds and seconds of the engine for full batches in the order of the rows, one after another."""
    started = now()
    batch: list[Trunk] = []
    for trunk in [*trunks, None]:
        if batch and (trunk is None or sum(each.tokens for each in [*batch, trunk]) > max_batch_tokens):
            engine.prepare(batch, Wants())()
            batch = []
        if trunk is not None:
            batch.append(trunk)
    return since(started)
