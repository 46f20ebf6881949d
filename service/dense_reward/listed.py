"""A setting's file that holds a JSON list -> its entries, each with a name of its own; refused in one way."""

from pathlib import Path
from typing import Protocol, TypeVar

from pydantic import TypeAdapter, ValidationError

from dense_reward.errors import SettingsError


class Named(Protocol):
    @property
    def name(self) -> str: ...


Entry = TypeVar("Entry", bound=Named)


def read_list(setting: str, file: Path, entries: TypeAdapter[list[Entry]]) -> list[Entry]:
    """Raises SettingsError, naming setting, file and place, and repeating nothing of what the file holds."""
    where = f"{setting} {file}"
    try:
        found = entries.validate_json(file.read_bytes())
    except OSError as error:
        raise SettingsError(f"{where}: {error.strerror}") from None
    except ValidationError as error:
        detail = error.errors(include_input=False, include_url=False, include_context=False)[0]
        place = ".".join(map(str, detail["loc"])) or "the file"
        raise SettingsError(f"{where}: {place}: {detail['msg']}") from None
    if len({entry.name for entry in found}) < len(found):
        raise SettingsError(f"{where}: two entries have the same name")
    return found
