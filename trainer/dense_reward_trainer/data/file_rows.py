"""Opens a file of demonstrations: its rows, or an error that says what the file is instead.

JSON Lines, a JSON array, {"data": [...]} and objects that are written over several lines are read, plain or gzipped;
and Parquet, whose rows are objects already.
"""

import codecs
import gzip
import json
import re
import shlex
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from dense_reward_trainer.data.conversions import is_layout
from dense_reward_trainer.data.data_sets import OUT, WRITE
from dense_reward_trainer.data.records import DataError, RawRow
from dense_reward_trainer.data.row_values import without_nulls

_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
_PARQUET = ".parquet"
_FROM_PARQUET = "list(datasets.Dataset.from_parquet(sys.argv[1]))"
_HEAD_BYTES = 4096
_JSON_LINES = "write it as JSON Lines, one object per line"
_TO_JSON = f".to_json(sys.argv[2])' {{file}} {OUT}"
# The first bytes of a file, what it is, and the cure; {file} is quoted for a shell.
_MAGIC: tuple[tuple[bytes, str, str], ...] = (
    (b"version https://git-lfs", "a git-lfs pointer, not the data", "run `git lfs pull` where it was cloned"),
    (b"/annex/objects/", "a git-annex pointer, not the data", "run `git annex get` where it was cloned"),
    (
        b"PAR1",
        "a Parquet file",
        f"python -c 'import datasets, sys; datasets.Dataset.from_parquet(sys.argv[1]){_TO_JSON}",
    ),
    (
        b"ARROW1",
        "an Arrow file",
        "python -c 'import datasets, pyarrow.feather, sys; "
        f"datasets.Dataset(pyarrow.feather.read_table(sys.argv[1])){_TO_JSON}",
    ),
    (
        b"\xff\xff\xff\xff",
        "an Arrow stream",
        f"python -c 'import datasets, sys; datasets.Dataset.from_file(sys.argv[1]){_TO_JSON}",
    ),
    (b"PK\x03\x04", "a zip archive", "run `unzip {file}`, and name the file that was in it"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", f"zstd -dc {{file}} > {OUT}"),
    (b"BZh", "compressed with bzip2", f"bzip2 -dc {{file}} > {OUT}"),
    (b"\xfd7zXZ\x00", "compressed with xz", f"xz -dc {{file}} > {OUT}"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it, and name the file that was in it"),
    (b"Rar!", "a RAR archive", "unpack it, and name the file that was in it"),
    (b"%PDF", "a PDF document", _JSON_LINES),
    (b"SQLite format 3", "an SQLite data base", _JSON_LINES),
    (b"\x89HDF", "an HDF5 file", _JSON_LINES),
    (b"\x93NUMPY", "a NumPy array", _JSON_LINES),
    (b"\x80\x04", "a Python pickle", _JSON_LINES),
    (b"\x80\x05", "a Python pickle", _JSON_LINES),
    (b"Obj\x01", "an Avro file", _JSON_LINES),
    (b"ORC", "an ORC file", _JSON_LINES),
)
# The longer mark of UTF-32 begins with that of UTF-16.
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
# Objects over several lines, one after another; json.load alone reads one value.
_ONE_AFTER_ANOTHER = (
    "(d := json.JSONDecoder().raw_decode) and (t := [open(0).read().strip()]) and "
    '[v for v, end in iter(lambda: t[0] and d(t[0]), "") if [t.__setitem__(0, t[0][end:].strip())]]'
)
# A delimiter: the name of the table, and the argument of csv.DictReader.
_TABLES = {b",": ("CSV", ""), b"\t": ("TSV", ', delimiter="\\t"'), b";": ("CSV", ', delimiter=";"')}
_CSV = (
    "python -c 'import csv, json; [print(json.dumps(r)) for r in "
    'csv.DictReader(open(0, encoding="utf-8-sig"){argument})]\' < {file}'
)
_INNER = (
    "python -c 'import json, sys; [print(json.dumps(r)) for r in json.load(sys.stdin)[sys.argv[1]]]' {key} < {file}"
)


@dataclass(frozen=True, slots=True)
class FileRows:
    """Rows with their numbers: that of the line, or for JSON over several lines and Parquet that of the row.

    `note`: what a user must know if some of them are bad. `python`: the expression that reads the rows from stdin.
    """

    path: Path
    rows: Sequence[tuple[int, bytes | RawRow]]
    note: str = ""
    python: str = '[json.loads(t) for t in open(0, encoding="utf-8-sig") if t.strip()]'

    def conversion(self, python: str) -> str:
        """A shell command that writes OUT from the rows; `python` is a Python expression over `rows`."""
        file = shlex.quote(str(self.path))
        if self.path.suffix == _PARQUET:
            read = f"import datasets, json, sys; rows = {_FROM_PARQUET}; new = {python}; {WRITE}"
            return f"python -c {shlex.quote(read)} {file} > {OUT}"
        program = f"import json; rows = {self.python}; new = {python}; [print(json.dumps(r)) for r in new]"
        if self.path.suffix == ".gz":
            return f"gzip -dc {file} | python -c {shlex.quote(program)} > {OUT}"
        return f"python -c {shlex.quote(program)} < {file} > {OUT}"


def file_rows(path: Path) -> FileRows:
    """All rows that are not blank. Raises DataError, which says what the file is and how to convert it."""
    if path.is_dir():
        raise DataError(
            f"{path} is a folder: name a .jsonl file in it, or write {path}@train to load it with `datasets`"
        )
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    if content.startswith(b"PAR1"):
        return _parquet_rows(path)
    refuse_other_kinds(path, content)
    content = _decompressed(path, content)
    content = content.removeprefix(codecs.BOM_UTF8)
    lines = [(number, line) for number, line in enumerate(content.split(b"\n"), 1) if line.strip()]
    if not lines:
        raise DataError(f"{path} is empty: it holds {len(content)} bytes, and nothing visible")
    _refuse_text(path, lines)
    if not path.name.endswith(_SUFFIXES):
        kinds = "only .jsonl and .json files, plain or .gz, and .parquet are read"
        raise DataError(f"{path}: {kinds}: rename it, or convert it")
    whole = _over_several_lines(path, content, lines)
    if whole is None:
        return FileRows(path, lines, _encoding_note(path, lines))
    if not whole.rows:
        raise DataError(f"{path} is an empty JSON array: it has no rows")
    return FileRows(path, [*enumerate(whole.rows, 1)], python=whole.python)


def _parquet_rows(path: Path) -> FileRows:
    """The rows of a Parquet file, without the nulls of their objects. Raises DataError if it is damaged or empty."""
    if path.suffix != _PARQUET:
        raise DataError(f"{path} is a Parquet file: rename it to {path.name}{_PARQUET}")
    import pyarrow  # noqa: PLC0415 - slow, and only needed for this kind of file
    from pyarrow import parquet  # noqa: PLC0415

    try:
        values = parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise DataError(f"{path} is a Parquet file that is damaged or incomplete ({reason}): copy it again") from None
    if not values:
        raise DataError(f"{path} is an empty Parquet file: it has no rows")
    return FileRows(path, [(number, cast(RawRow, without_nulls(row))) for number, row in enumerate(values, 1)])


def refuse_other_kinds(path: Path, content: bytes) -> None:
    """Raises DataError if the first bytes are those of another kind of file."""
    head, file = content[:_HEAD_BYTES], shlex.quote(str(path))
    for magic, kind, cure in _MAGIC:
        if head.startswith(magic):
            raise DataError(f"{path} is {kind}: {cure.format(file=file)}")
    if head[257:262] == b"ustar":
        raise DataError(f"{path} is a tar archive: unpack it, and name the file that was in it")
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS if head.startswith(mark)), None) or _wide(head)
    if encoding:
        raise DataError(
            f"{path} is {encoding} text, but only UTF-8 is read: iconv -f {encoding} -t UTF-8 {file} > {OUT}"
        )
    if b"\0" in head and not head.startswith(b"\x1f\x8b"):
        raise DataError(f"{path} is a binary file: {_JSON_LINES}")
    if head.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"<"):
        raise DataError(
            f"{path} is a page (HTML or XML), not data: probably a download that failed, for example without a login"
        )


def _wide(head: bytes) -> str | None:
    """UTF-16 without a byte order mark, by its zeros: JSON begins with ASCII characters."""
    start = head[:16]
    if len(start) < 4 or not any(start):
        return None
    if not any(start[1::2]) and all(start[0::2]):
        return "UTF-16LE"
    return "UTF-16BE" if not any(start[0::2]) and all(start[1::2]) else None


def _decompressed(path: Path, content: bytes) -> bytes:
    if path.suffix != ".gz":
        if content.startswith(b"\x1f\x8b"):
            raise DataError(f"{path} is compressed with gzip: rename it to {path.name}.gz")
        return content
    try:
        inner = gzip.decompress(content)
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path}: not a complete gzip file ({error}): copy or compress it again") from error
    refuse_other_kinds(path, inner)
    return inner


def _refuse_text(path: Path, lines: Sequence[tuple[int, bytes]]) -> None:
    """Raises DataError if no line can be the beginning of JSON that is read."""
    if any(line.lstrip().startswith((b"{", b"[")) for _, line in lines) or _parses(lines[0][1]):
        return
    first, file = lines[0][1].rstrip(), shlex.quote(str(path))
    mark = max(_TABLES, key=first.count)
    if mark in first and len(lines) > 1:
        name, argument = _TABLES[mark]
        cure = _CSV.format(argument=argument, file=file)
        raise DataError(f"{path} is {name}, a table of texts, not JSON: {cure} > {OUT}")
    raise DataError(f"{path} is text, not JSON: no line begins with {{ or [: {_JSON_LINES}")


def _parses(line: bytes) -> bool:
    try:
        json.loads(line.decode())
    except (ValueError, RecursionError):
        return False
    return True


@dataclass(frozen=True, slots=True)
class _Whole:
    """Rows of a text that is not JSON Lines, and the Python expression that reads them from stdin."""

    rows: Sequence[bytes]
    python: str


def _over_several_lines(path: Path, content: bytes, lines: Sequence[tuple[int, bytes]]) -> _Whole | None:
    """The rows of an array, of {"data": [...]}, or of objects over several lines; None for JSON Lines."""
    first = lines[0][1]
    is_array = first.lstrip().startswith(b"[") and not (len(lines) > 1 and _parses(first))
    if not is_array and _parses(first):
        return _of_one_object(path, first) if len(lines) == 1 else None
    kind = "a JSON array" if is_array else "JSON over several lines"
    try:
        text = content.decode()
        values = _elements(text) if is_array else _values(text)
    except (ValueError, RecursionError) as error:
        if not is_array and (len(lines) == 1 or any(line.startswith(b"{") and _parses(line) for _, line in lines)):
            return None
        if isinstance(error, UnicodeDecodeError):
            raise DataError(_encoding_note(path, lines) or f"{path} is {kind}, but not UTF-8: convert it") from None
        raise DataError(
            f"{path} is {kind} that is damaged or incomplete ({error}): correct it, or copy it again"
        ) from None
    if is_array:
        return _Whole(values, "json.load(open(0))")
    inner = _of_one_object(path, values[0]) if len(values) == 1 else None
    return inner or _Whole(values, _ONE_AFTER_ANOTHER)


def _values(text: str) -> list[bytes]:
    """The JSON values of a text, one after another."""
    decoder, values, at = json.JSONDecoder(), [], _next(text, 0)
    while at < len(text):
        _, end = decoder.raw_decode(text, at)
        values.append(text[at:end].encode())
        at = _next(text, end)
    return values


def _elements(text: str) -> list[bytes]:
    """The elements of the array that is the text. Raises ValueError if the text is anything else."""
    decoder, values, at = json.JSONDecoder(), [], _next(text, _next(text, 0) + 1)
    while at < len(text) and text[at] != "]":
        _, end = decoder.raw_decode(text, at)
        values.append(text[at:end].encode())
        at = _next(text, end)
        if at < len(text) and text[at] == ",":
            at = _next(text, at + 1)
            if text[at : at + 1] == "]":
                raise ValueError(f"a comma follows the last element, {len(values)}")
        elif at < len(text) and text[at] != "]":
            raise ValueError(f"a comma is missing after element {len(values)}")
    if _next(text, at + 1) < len(text) or at >= len(text):
        raise ValueError(f"the array {'breaks off' if at >= len(text) else 'ends early'} after element {len(values)}")
    return values


_BLANK = re.compile(r"[ \t\n\r]*")


def _next(text: str, at: int) -> int:
    """The place of the next character that is not blank."""
    found = _BLANK.match(text, at)
    return at if found is None else found.end()


def _of_one_object(path: Path, content: bytes) -> _Whole | None:
    """The rows in {"data": [...]}; None if the object is a row. Raises DataError if rows are in it somewhere else."""
    value = json.loads(content.decode())
    lists = [key for key, part in value.items() if _holds_rows(key, part)] if isinstance(value, dict) else []
    if not lists or is_layout(value):
        return None
    if list(value) == ["data"]:
        array = content.decode().strip().removeprefix("{").partition(":")[2].removesuffix("}")
        return _Whole(_elements(array), 'json.load(open(0))["data"]')
    cure = _INNER.format(key=shlex.quote(lists[0]), file=shlex.quote(str(path)))
    raise DataError(
        f'{path} is one JSON object with rows in {", ".join(map(ascii, lists))}, but only {{"data": [...]}} is read. '
        f"Write the rows that you mean: {cure} > {OUT}"
    )


def _holds_rows(key: str, value: object) -> bool:
    """Whether a value is a list of rows, and not a chat or another part of one row."""
    if not isinstance(value, list) or not value or not all(isinstance(row, dict) for row in value):
        return False
    return key == "data" or is_layout(value[0])


def _encoding_note(path: Path, lines: Sequence[tuple[int, bytes]]) -> str:
    """Says that a file has a one-byte encoding, if no line beyond ASCII is UTF-8; else ""."""
    beyond = [line for _, line in lines if not line.isascii()]
    if not beyond or any(_is_utf8(line) for line in beyond):
        return ""
    cure = f"iconv -f WINDOWS-1252 -t UTF-8 {shlex.quote(str(path))} > {OUT}"
    return f"{path} is not UTF-8; Latin-1 or Windows-1252 is likely: {cure}"


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True
