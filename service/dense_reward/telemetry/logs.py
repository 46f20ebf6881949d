"""Logging to stderr: lines for people or JSON for machines. A caller's text cannot forge a line of either.

A line about a request carries its id. What callers send is not logged unless a setting requests it,
and credentials in URLs never are.
"""

import json
import logging
from contextvars import ContextVar
from datetime import UTC, datetime

from dense_reward.credentials import without_credentials
from dense_reward.heatmap.visible import visible
from dense_reward.telemetry.log_format import LogFormat

REQUEST_ID: ContextVar[str | None] = ContextVar("request_id", default=None)
"""The id of the request that is being answered."""
FIELDS = ("method", "path", "route", "status", "seconds", "caller", "body")
"""Attributes of a record that a JSON line includes in addition to its message."""


def configure(level: str, kind: LogFormat) -> None:
    """Send all records of this process, including those of libraries, to stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if kind == "json" else TextLines())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    if level != "debug":
        logging.getLogger("httpx2").setLevel(logging.WARNING)  # it logs a line for each query to a remote engine


class TextLines(logging.Formatter):
    """One line per record, with control and direction-changing characters made visible.

    Lines of a traceback are indented, so that no text in an exception looks like a record.
    """

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        record.message = visible(without_credentials(record.message))
        request_id = REQUEST_ID.get()
        return super().formatMessage(record) + ("" if request_id is None else f" [{request_id}]")

    def formatException(self, ei: "logging._SysExcInfoType") -> str:  # noqa: N802 - logging's name
        return "\n".join(f"  {visible(without_credentials(line))}" for line in super().formatException(ei).split("\n"))


class JsonLines(logging.Formatter):
    """One JSON object per line: time, level, logger, message, request_id, the record's FIELDS, and its traceback."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": without_credentials(record.getMessage()),
        }
        if (request_id := REQUEST_ID.get()) is not None:
            line["request_id"] = request_id
        line |= {name: value for name in FIELDS if (value := getattr(record, name, None)) is not None}
        if record.exc_info:
            line["traceback"] = without_credentials(self.formatException(record.exc_info))
        return json.dumps(line)
