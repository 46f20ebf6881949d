"""The formats of log lines. Imports nothing of this package, because help texts name them."""

from typing import Literal

LogFormat = Literal["text", "json"]
