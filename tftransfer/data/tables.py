"""Tables of examples: CSV, TSV and JSONL with a header, paths relative to the table."""

from __future__ import annotations

import csv
import io
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tftransfer.data import splits
from tftransfer.data.listing import Files, Listing, Refuse, at_once, some
from tftransfer.errors import InputError

DELIMITERS = {".csv": ",", ".tsv": "\t"}
JSON_LINES = (".jsonl", ".ndjson")
_REQUIRED = ("image", "label")
_FEW = 0.1  # share of the rows below which several labels may be a slip

Row = tuple[int, dict[str, Any]]
"""A line's number in the file and its cells by column."""


def listed(path: Path, refuse: Refuse = at_once) -> Listing:
    """List the examples of a table with the columns `image`, `label` and optionally `split`.

    Rows of a split that is neither train, validation nor test are left out, and a note counts them.

    Args:
        path: A `.csv`, `.tsv` or `.jsonl` file in UTF-8.
        refuse: Takes the fault of a line, which is then left out. Defaults to raising it.

    Raises:
        InputError: If the table is not as described, or a picture is not there; with the line.
    """
    faults: list[InputError] = []

    def told(error: InputError) -> None:
        faults.append(error)
        refuse(error)

    rows = list(_rows(path, told))
    if not rows:
        raise InputError(f"table {path} has no rows below its header that can be read")
    rows, notes = _in_known_splits(path, rows, told)
    sound = list(_with_file_and_label(path, rows, told))
    if not sound:
        raise InputError(f"table {path} has no row that can be used. {faults[0]}")
    rows, files, texts = [row for row, _, _ in sound], [file for _, file, _ in sound], [text for _, _, text in sound]
    lines = [line for line, _ in rows]
    return Listing(
        name=path.name,
        names=tuple(str(row["image"]).strip() for _, row in rows),
        labels=tuple(texts),
        given=tuple(_split(row) or "train" for _, row in rows),
        reader=Files(tuple(map(str, files))),
        classes=read_classes(path.parent) or _in_order_of_value([row["label"] for _, row in rows]),
        several=any(isinstance(row["label"], list) for _, row in rows) or any("|" in text for text in texts),
        notes=(*notes, *_listed_again(files, lines), *_seldom_several(texts, lines)),
        what=str(path),
        where=lambda number: f"{path}, line {lines[number]}",
        columns=_further_columns([row for _, row in rows]),
    )


def _with_file_and_label(path: Path, rows: list[Row], refuse: Refuse) -> Iterator[tuple[Row, Path, str]]:
    for line, row in rows:
        try:
            yield (line, row), _file(path, line, row), _label(path, line, row)
        except InputError as error:
            refuse(error)


def _listed_again(files: list[Path], lines: list[int]) -> Iterator[str]:
    """Say in a note which lines name a file that an earlier one has; such rows are used."""
    first: dict[Path, int] = {}
    again = [
        f"line {line} (as line {first[file]})"
        for file, line in zip(files, lines, strict=True)
        if first.setdefault(file, line) != line
    ]
    if again:
        yield f"{len(again)} rows name a picture again: {some(again)}"


def _seldom_several(texts: list[str], lines: list[int]) -> Iterator[str]:
    """Say in a note which few lines make all labels several ones."""
    several = [f"line {line}" for text, line in zip(texts, lines, strict=True) if "|" in text]
    if 0 < len(several) <= _FEW * len(texts):
        yield f"{len(several)} of {len(texts)} rows hold several labels or numbers, separated by `|`: {some(several)}"


def _further_columns(rows: list[dict[str, Any]]) -> dict[str, tuple[str, ...]]:
    names = dict.fromkeys(name for row in rows for name in row if name not in (*_REQUIRED, "split"))
    return {name: tuple(_text_of(row.get(name)) for row in rows) for name in names}


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


def _rows(path: Path, refuse: Refuse) -> Iterator[Row]:
    suffix = path.suffix.lower()
    if suffix in JSON_LINES:
        return _json_rows(path, refuse)
    if suffix in DELIMITERS:
        return _delimited_rows(path, DELIMITERS[suffix], refuse)
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


def _delimited_rows(path: Path, delimiter: str, refuse: Refuse) -> Iterator[Row]:
    reader = csv.reader(io.StringIO(_text(path), newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1  # where a row begins: quotes may hold line breaks
        try:
            cells = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            refuse(InputError(f"{path}, line {line}: {error}"))
            continue
        if header is None:
            header = [name.strip() for name in cells]
            _check_columns(path, header)
        elif len(cells) == len(header):
            yield line, dict(zip(header, cells, strict=True))
        elif cells:  # else a blank line
            refuse(
                InputError(
                    f"{path}, line {line}: {len(cells)} cells where the header has {len(header)} columns. "
                    'Put cells that hold the separator into "quotes"'
                )
            )
    if header is None:
        _check_columns(path, [])


def _json_rows(path: Path, refuse: Refuse) -> Iterator[Row]:
    for line, text in enumerate(_text(path).split("\n"), start=1):
        try:
            if text.strip():
                yield line, _json_row(path, line, text)
        except InputError as error:
            refuse(error)


def _json_row(path: Path, line: int, text: str) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, and deep nesting
        reason = str(getattr(error, "msg", error)).split(";")[0]
        raise InputError(f"{path}, line {line}: not JSON: {reason}. Expected one object per line") from None
    if not isinstance(row, dict):
        raise InputError(f'{path}, line {line}: expected an object such as {{"image": ..., "label": ...}}')
    _check_columns(path, list(row), line)
    return row


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


def _in_known_splits(path: Path, rows: list[Row], refuse: Refuse) -> tuple[list[Row], tuple[str, ...]]:
    """Drop rows of other splits; a column without a single name is as if it were not there."""
    named = [(line, row) for line, row in rows if str(row.get("split") or "").strip()]
    if not named:
        return [(line, {**row, "split": "train"}) for line, row in rows], ()
    for line in sorted({line for line, _ in rows} - {line for line, _ in named}):
        refuse(InputError(f"{path}, line {line}: `split` is empty. Expected train, validation or test in every row"))
    others: dict[str, list[int]] = defaultdict(list)
    for line, row in named:
        if _split(row) is None:
            others[str(row["split"]).strip()].append(line)
    kept = [(line, row) for line, row in named if _split(row)]
    if not kept:
        raise InputError(
            f"{path}: no row is in a split called train, validation or test. Received: splits {sorted(others)}"
        )
    return kept, tuple(
        f"{len(own)} rows of split {name!r} were left out: {some([f'line {line}' for line in own])}"
        for name, own in others.items()
    )


def _file(path: Path, line: int, row: dict[str, Any]) -> Path:
    text = str(row["image"] or "").strip()
    file = path.parent / text
    if not text or not os.path.isfile(file):  # Path's own is_file fails on names that are too long
        if not text:
            raise InputError(f"{path}, line {line}: the `image` cell is empty. Expected a path, relative to the table")
        shown, expected = (name if name.isprintable() else repr(name) for name in (text, str(file)))
        what = f"{shown} is no file" if os.path.isdir(file) else f"file {shown} does not exist"
        raise InputError(f"{path}, line {line}: {what}. Paths are relative to the table, so expected {expected}")
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
