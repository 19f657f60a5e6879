"""Data files: read rows from JSONL, JSON, CSV, Parquet and text."""

import csv
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lora_align.data.rows import Row
from lora_align.errors import UserError

Rows = Iterator[tuple[str, Row | UserError]]  # (place, row or the fault that makes it unreadable)
EVERYDAY = Path(__file__).with_name("everyday_prompts.txt")  # prompts for those who bring none
JSON_SPACE = re.compile(r"[ \t\n\r]*")
JSON_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*+"|[\[\]{}]', re.S)  # strings hide the brackets inside them


def _jsonl(path: Path) -> Rows:
    with path.open("rb") as stream:  # bytes, because text mode also splits at U+2028 and similar characters
        begun = False
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            if not begun and line.lstrip(b"\xef\xbb\xbf \t")[:1] == b"[":  # a row is an object, which begins with {
                raise UserError(f"{path}:{number}: not valid JSON Lines; a list of rows is a .json file: rename it")
            begun = True
            yield _object(line, f"{path}:{number}")


def _json(path: Path) -> Rows:
    """Read a list of objects one by one, so that a fault has a line number."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as fault:
        raise UserError(f"{path}: {_not_utf8(fault)}") from fault
    if not text.lstrip().startswith("["):
        lines = "; a file with one object on each line must be named .jsonl" if text.lstrip().startswith("{") else ""
        raise UserError(f"{path}: expected a list of objects{lines}")
    decoder, at, index = json.JSONDecoder(), _next(text, text.index("[") + 1), 0
    while text[at : at + 1] != "]":
        try:
            row, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as fault:
            where, found_end = f"{path}:{_line(text, at)}", _end_of_value(text, at)
            refused = UserError(f"{where}: row {index + 1}: {_invalid(fault)}")
            if found_end is None:
                raise refused from fault
            yield where, refused
            end = found_end
        else:
            yield _checked(row, f"{path} row {index + 1}")
        at = end
        index, at = index + 1, _next(text, at)
        if text[at : at + 1] == ",":
            at = _next(text, at + 1)
        elif text[at : at + 1] != "]":
            raise UserError(f"{path}:{_line(text, at)}: not valid JSON: expected a comma, or ] at the end of the list")
    if _next(text, at + 1) < len(text):
        raise UserError(f"{path}:{_line(text, at)}: not valid JSON: text after the list")


def _end_of_value(text: str, at: int) -> int | None:
    """Return the end of an object or list that cannot be decoded, by its brackets; None if they do not balance."""
    open_ = []
    for token in JSON_BRACKETS.finditer(text, at):
        if token[0] in "{[":
            open_.append("}" if token[0] == "{" else "]")
        elif token[0] in "}]" and (not open_ or open_.pop() != token[0]):
            return None
        if not open_:
            return token.end() if token[0] in "}]" else None
    return None


def _line(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1


def _next(text: str, at: int) -> int:
    """Return the index of the next character that is not white space."""
    match = JSON_SPACE.match(text, at)
    return match.end() if match else at


def _parquet(path: Path) -> Rows:
    from pyarrow import ArrowInvalid
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path} row {number}", row
    except (ArrowInvalid, OSError) as fault:
        raise UserError(f"{path}: not a complete Parquet file: {fault}; write or download it again") from fault


def _csv(path: Path) -> Rows:
    with path.open(encoding="utf-8-sig", newline="") as stream:
        csv.field_size_limit(1 << 30)
        reader = csv.DictReader(stream)
        try:
            _check_commas(path, reader.fieldnames or [])
            for row in reader:
                where = f"{path}:{reader.line_num}"
                if None in row or None in row.values():
                    yield (
                        where,
                        UserError(f"{where}: more or fewer fields than the header; put text that has commas in quotes"),
                    )
                else:
                    yield where, row
        except csv.Error as fault:
            raise UserError(f"{path}:{reader.line_num + 1}: {fault}") from fault
        except UnicodeDecodeError as fault:
            raise UserError(f"{path}:{reader.line_num + 1}: {_not_utf8(fault)}") from fault


def _check_commas(path: Path, header: Sequence[str]) -> None:
    """Refuse a table whose fields are separated by something other than commas."""
    separators = {";": "semicolons", "\t": "tabs", "|": "bars"}
    if len(header) == 1 and (present := [name for sign, name in separators.items() if sign in header[0]]):
        raise UserError(f"{path}:1: fields are separated by {present[0]}; save the table with commas between them")


def _lines(path: Path) -> Rows:
    """Read plain text with one prompt per line."""
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if line.strip():
            try:
                yield f"{path}:{number}", {"prompt": line.decode("utf-8-sig").strip()}
            except UnicodeDecodeError as fault:
                raise UserError(f"{path}:{number}: {_not_utf8(fault)}") from fault


def _object(line: bytes, where: str) -> tuple[str, Row | UserError]:
    try:
        row = json.loads(line.decode("utf-8-sig").rstrip("\r\n"))
    except (ValueError, RecursionError) as fault:
        array = "; a list of rows is a .json file" if line.lstrip()[:1] == b"[" else ""
        return where, UserError(f"{where}: {_invalid(fault)}{array}")
    return _checked(row, where)


def _checked(row: Any, where: str) -> tuple[str, Row | UserError]:
    if isinstance(row, dict):
        return where, row
    actual = "a list; write each row as an object" if isinstance(row, list) else "a single value"
    return where, UserError(f"{where}: expected an object, found {actual}")


def _invalid(fault: Exception) -> str:
    """Describe why JSON could not be parsed."""
    if isinstance(fault, RecursionError):
        return "nested too deeply to be read"
    if isinstance(fault, json.JSONDecodeError):
        return f"not valid JSON: {fault.msg}, at column {fault.colno}"
    if isinstance(fault, UnicodeDecodeError):
        return _not_utf8(fault)
    return "not valid JSON: a number has too many digits"  # json's only other ValueError


def _not_utf8(fault: UnicodeDecodeError) -> str:
    return f"not UTF-8 ({fault.reason} at byte {fault.start}); save the file as UTF-8"


FILES: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".parquet": _parquet,
    ".csv": _csv,
    ".txt": _lines,
}
