"""Values of rows as JSON. What JSON has no value for becomes text or null, in the same way everywhere. Pure."""

import base64
import json
import math
from collections.abc import Mapping

import numpy as np

from dense_reward.bulk.records import Cells


def json_line(row: Cells) -> bytes:
    """One line. Bytes become base64 text, dates ISO 8601 text, NaN and infinities null: JSON has none of them.

    float32 values have the shortest digits that give the same float32.
    """
    import orjson  # noqa: PLC0415 - only where something is written

    try:
        return orjson.dumps(row, default=_plain, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE)
    except TypeError:  # integers of more than 64 bits and lone surrogates, which JSON can hold and orjson cannot
        return (json_text(row) + "\n").encode()


def json_text(value: object) -> str:
    """The same for any value, in ASCII."""
    return json.dumps(_plain(value), allow_nan=False)


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(entry) for entry in value]
    return value if value is None or isinstance(value, str | int) else _plain_scalar(value)


def _plain_scalar(value: object) -> object:
    if isinstance(value, float | np.floating):
        # Through the shortest digits: float(np.float32) would write digits that no float32 has.
        return float(str(value)) if math.isfinite(value) else None
    if isinstance(value, np.integer):
        return int(value)
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return value.isoformat() if hasattr(value, "isoformat") else str(value)
