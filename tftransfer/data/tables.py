"""Tables of examples: CSV, TSV and JSONL with a header, paths relative to the table."""

from __future__ import annotations

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tftransfer.data import splits
from tftransfer.data.listing import Files, Listing
from tftransfer.errors import InputError

DELIMITERS = {".csv": ",", ".tsv": "\t"}
JSON_LINES = (".jsonl", ".ndjson")
_REQUIRED = ("image", "label")

Row = tuple[int, dict[str, Any]]
"""A line's number in the file and its cells by column."""


def listed(path: Path) -> Listing:
    """List the examples of a table with the columns `image`, `label` and optionally `split`.

    Rows of a split that is neither train, validation nor test are left out, and a note counts them.

    Args:
        path: A `.csv`, `.tsv` or `.jsonl` file in UTF-8.

    Raises:
        InputError: If the table is not as described, or a picture is not there; with the line.
    """
    rows = list(_rows(path))
    if not rows:
        raise InputError(f"table {path} has no rows below its header")
    rows, notes = _in_known_splits(path, rows)
    files = [_file(path, line, row) for line, row in rows]
    texts = [_label(path, line, row) for line, row in rows]
    lines = [line for line, _ in rows]
    return Listing(
        name=path.name,
        names=tuple(str(row["image"]).strip() for _, row in rows),
        labels=tuple(texts),
        given=tuple(_split(row) or "train" for _, row in rows),
        reader=Files(tuple(map(str, files))),
        classes=read_classes(path.parent) or _in_order_of_value([row["label"] for _, row in rows]),
        several=any(isinstance(row["label"], list) for _, row in rows) or any("|" in text for text in texts),
        notes=notes,
        what=str(path),
        where=lambda number: f"{path}, line {lines[number]}",
    )


def read_classes(folder: Path) -> tuple[str, ...]:
    """Read the order of the classes from `classes.txt`, one name per line; empty if there is no such file.

    Raises:
        InputError: If a name occurs twice.
    """
    file = folder / "classes.txt"
    if not file.is_file():
        return ()
    names = [line.strip() for line in _text(file).splitlines() if line.strip()]
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise InputError(f"{file} names classes twice: {', '.join(map(repr, twice))}. Expected each class once")
    return tuple(names)


def _rows(path: Path) -> Iterator[Row]:
    suffix = path.suffix.lower()
    if suffix in JSON_LINES:
        return _json_rows(path)
    if suffix in DELIMITERS:
        return _delimited_rows(path, DELIMITERS[suffix])
    raise InputError(
        f"{path} is no table: expected a file that ends in .csv, .tsv or .jsonl, or a folder DIR/[SPLIT/]CLASS/file"
    )


def _text(path: Path) -> str:
    """Read UTF-8, with or without a byte order mark; name the line of the first byte that is not."""
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InputError(
            f"{path}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8. Save the table as UTF-8"
        ) from None


def _delimited_rows(path: Path, delimiter: str) -> Iterator[Row]:
    reader = csv.reader(io.StringIO(_text(path), newline=""), delimiter=delimiter, strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        _check_columns(path, header)
        for cells in reader:
            if not cells:
                continue  # a blank line
            if len(cells) != len(header):
                raise InputError(
                    f"{path}, line {reader.line_num}: {len(cells)} cells where the header has {len(header)} "
                    f"columns. "
                    'Put cells that hold the separator into "quotes"'
                )
            yield reader.line_num, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: {error}") from None


def _json_rows(path: Path) -> Iterator[Row]:
    for line, text in enumerate(_text(path).split("\n"), start=1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, and deep nesting
            reason = str(getattr(error, "msg", error)).split(";")[0]
            raise InputError(f"{path}, line {line}: not JSON: {reason}. Expected one object per line") from None
        if not isinstance(row, dict):
            raise InputError(f'{path}, line {line}: expected an object such as {{"image": ..., "label": ...}}')
        _check_columns(path, list(row), line)
        yield line, row


def _check_columns(path: Path, columns: list[str], line: int = 1) -> None:
    missing = [name for name in _REQUIRED if name not in columns]
    if missing:
        found = ", ".join(map(repr, columns)) or "none"
        raise InputError(
            f"{path}, line {line}: column {missing[0]!r} is missing. Expected a header with image, label and "
            f"optionally split. Received: columns {found}"
        )
    twice = [name for name, count in Counter(columns).items() if count > 1]
    if twice:
        raise InputError(f"{path}, line {line}: column {twice[0]!r} occurs twice")


def _split(row: dict[str, Any]) -> str | None:
    return splits.canonical(str(row.get("split", "train")))


def _in_known_splits(path: Path, rows: list[Row]) -> tuple[list[Row], tuple[str, ...]]:
    """Drop rows of other splits; a column without a single name is as if it were not there."""
    named = [(line, row) for line, row in rows if str(row.get("split") or "").strip()]
    if not named:
        return [(line, {**row, "split": "train"}) for line, row in rows], ()
    empty = [line for line, row in rows if not str(row.get("split") or "").strip()]
    if empty:
        raise InputError(f"{path}, line {empty[0]}: `split` is empty. Expected train, validation or test in every row")
    others = Counter(str(row["split"]).strip() for _, row in rows if _split(row) is None)
    kept = [(line, row) for line, row in rows if _split(row)]
    if not kept:
        raise InputError(
            f"{path}: no row is in a split called train, validation or test. Received: splits {sorted(others)}"
        )
    return kept, tuple(f"{count} rows of split {name!r} were left out" for name, count in others.items())


def _file(path: Path, line: int, row: dict[str, Any]) -> Path:
    text = str(row["image"] or "").strip()
    file = path.parent / text
    if not text or not os.path.isfile(file):  # Path's own is_file fails on names that are too long
        what = f"file {text} does not exist" if text else "the `image` cell is empty"
        raise InputError(f"{path}, line {line}: {what}. Paths are relative to the table, so expected {file}")
    return file


def _label(path: Path, line: int, row: dict[str, Any]) -> str:
    """Return a label as text; the parts of a list are joined by `|`."""
    label = row["label"]
    if isinstance(label, dict) or (isinstance(label, list) and any(isinstance(p, (list, dict)) for p in label)):
        raise InputError(f"{path}, line {line}: a label must be a text, a number or a list of such")
    if not isinstance(label, list):
        return _text_of(label)
    parts = [_text_of(part) for part in label]
    holding = [part for part in parts if "|" in part]
    if holding:
        raise InputError(f"{path}, line {line}: a label in a list must not hold `|`. Received: {holding[0]!r}")
    return "|".join(parts)


def _text_of(value: Any) -> str:
    """Return a cell as text; 1.0 is the same class as 1."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        value = int(value)
    return "" if value is None else str(value).strip()


def _in_order_of_value(labels: list[Any]) -> tuple[str, ...]:
    """Return the classes in the order of their numbers if all labels are numbers, which only JSON tells from text."""
    if not all(isinstance(label, (int, float)) and not isinstance(label, bool) for label in labels):
        return ()
    return tuple(dict.fromkeys(map(_text_of, sorted(labels))))
