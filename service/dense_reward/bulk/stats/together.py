"""Whether several outputs of bulk scoring belong together, by what was saved beside them."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from dense_reward.bulk.run_state import RunState, state_of
from dense_reward.errors import BulkError


def notes_on(files: Sequence[Path]) -> Iterator[str]:
    """What a reader of the statistics should know. Raises BulkError if two outputs hold the same rows."""
    states = {file: state for file in files if (state := state_of(file)) is not None}
    _refuse_equal(states)
    if len({_text(state.made_from.get("model")) for state in states.values()}) > 1:
        yield "The files are of different models; their rewards are counted together."
    yield from _missing_shards(list(states.values()))


def _refuse_equal(states: dict[Path, RunState]) -> None:
    seen: dict[str, Path] = {}
    for file, state in states.items():
        other = seen.setdefault(_text(state.made_from), file)
        if other != file:
            raise BulkError(f"{file} and {other} hold the same rows, which would count twice: name one of them")


def _missing_shards(states: Sequence[RunState]) -> Iterator[str]:
    found: dict[str, set[str]] = {}
    for state in states:
        options = {**state.made_from.get("options", {})}
        shard = str(options.pop("shard", "1/1"))
        found.setdefault(_text({**state.made_from, "options": options}), set()).add(shard)
    for shards in found.values():
        of = max(int(shard.partition("/")[2]) for shard in shards)
        missing = [f"{index}/{of}" for index in range(1, of + 1) if f"{index}/{of}" not in shards]
        if missing and all(shard.endswith(f"/{of}") for shard in shards):
            yield f"Shards {', '.join(missing)} of the input are not among the files."
        elif missing:
            yield f"The shards {', '.join(sorted(shards))} do not fit together: rows are missing or counted twice."


def _text(value: object) -> str:
    return json.dumps(value, sort_keys=True)
