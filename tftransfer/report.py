"""What a run has to say: numbers with their uncertainty, tables, pictures and checks, as JSON and as HTML.

Nothing here needs TensorFlow, so that a report can be read, compared and rendered anywhere.
"""

from __future__ import annotations

import base64
import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Headings of the sections that tables and pictures can name, in the order of the page.
RESULT = "Result"
TRAINING = "What was trained"
CURVES = "Learning curves"
CLASSES = "Class by class"
LABELS = "Label by label"
NUMBERS = "Number by number"
CONFUSION = "What is taken for what"
MISTAKES = "Mistakes"
CALIBRATION = "Calibration"
OTHER = "Further results"
DATA = "Data"

_MAIN_METRICS = ("accuracy", "map", "mean_iou", "entity_f1", "mean_absolute_error")
_EMPTY_DATA = {"name": "", "train": 0, "validation": 0, "test": 0, "quarantined": []}


@dataclass(frozen=True)
class Number:
    """A measured number with its 95 % interval.

    Args:
        value: The number; None, NaN and infinity mean that it is undefined.
        low, high: The interval. Default to None: not known.
        method: How the interval was found, such as `"wilson"`, or why there is none. Defaults to None.

    Example:
        >>> Number(float("nan")).value is None
        True
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    method: str | None = None

    def __post_init__(self) -> None:
        _make_plain(self, "value", "low", "high", "method")


@dataclass(frozen=True)
class Table:
    """Rows under named columns.

    Args:
        title: What the table shows.
        columns: The names of the columns; the first column holds the rows' names.
        rows: One tuple per row: strings, whole numbers, floats, booleans, None or a `Number`.
        note: A sentence below the table. Defaults to none.
        section: The heading under which it stands, such as `CLASSES`. Defaults to `OTHER`.
        percent: Columns whose numbers are shown as percentages. Defaults to none.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    note: str = ""
    section: str = OTHER
    percent: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        rows = tuple(tuple(map(_cell, row)) for row in self.rows)
        for row in rows:
            if len(row) != len(self.columns):
                raise ValueError(
                    f"rows of table {self.title!r} must have {len(self.columns)} cells. Received: row={row!r}"
                )
        object.__setattr__(self, "rows", rows)
        object.__setattr__(self, "columns", tuple(map(str, self.columns)))
        object.__setattr__(self, "percent", tuple(map(str, self.percent)))


@dataclass(frozen=True)
class Picture:
    """A picture in PNG.

    Args:
        title: What the picture shows.
        png: The file's bytes.
        caption: A sentence below the picture, how to read it. Defaults to none.
        section: The heading under which it stands, such as `CURVES`. Defaults to `OTHER`.
        alt: What someone who cannot see the picture should know. Defaults to title and caption.
    """

    title: str
    png: bytes = field(repr=False)
    caption: str = ""
    section: str = OTHER
    alt: str = ""


@dataclass(frozen=True)
class Check:
    """The outcome of one check.

    Args:
        name: What was checked.
        passed: Whether it holds; None if it could not be decided.
        metrics: Named numbers (or short texts) behind the answer. Defaults to none.
    """

    name: str
    passed: bool | None
    metrics: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _make_plain(self, "passed", "metrics")


@dataclass(frozen=True)
class Findings:
    """What one check contributes to a report."""

    metrics: dict[str, Number] = field(default_factory=dict)
    tables: tuple[Table, ...] = ()
    pictures: tuple[Picture, ...] = ()
    checks: tuple[Check, ...] = ()

    def __add__(self, other: Findings) -> Findings:
        """Put two findings together, in order."""
        return Findings(
            {**self.metrics, **other.metrics},
            self.tables + other.tables,
            self.pictures + other.pictures,
            self.checks + other.checks,
        )


@dataclass(frozen=True)
class Report:
    """Everything a run has to say.

    Args:
        task: The task's name, such as `"image_classification"`.
        backbone: The backbone's name.
        strategy: One dict per phase: `name`, `epochs` and whatever else describes it.
        complete: Whether training ran to its end; false after a time limit.
        data: `name`, the counts `train`, `validation`, `test`, and `quarantined`, a list of dicts with `file`
            and `reason`; also `found` and `splits` (how each split came to be) where known.
        metrics: Measured on the test split.
        seconds: How long each part took: `decode` reading the data in the process that ended the run, `extract`
            computing or finding what the frozen part gives and `train` all else in the phases, over all processes that
            trained it; `total` is the whole of the last process and the phases of those before it. Of a process that
            was interrupted, what was lost after its last checkpoint is in none of them.
        checks: Their outcomes.
        versions: Of Python and the libraries.
        seed: The run's seed.
        tables, pictures: In the order in which they stand within their sections.
        notes: Sentences that a reader must not miss. Defaults to none.

    Example:
        >>> report = Report("image_classification", "VGG16", [], True, {"test": 9}, {"accuracy": Number(0.5)})
        >>> report.to_json()["metrics"]
        {'accuracy': 0.5}
        >>> Report.from_json(report.to_json()) == report
        True
    """

    task: str
    backbone: str
    strategy: list[dict[str, Any]]
    complete: bool
    data: dict[str, Any]
    metrics: dict[str, Number]
    seconds: dict[str, float | None] = field(default_factory=dict)
    checks: tuple[Check, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    seed: int = 0
    tables: tuple[Table, ...] = ()
    pictures: tuple[Picture, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", {**_EMPTY_DATA, **self.data})
        _make_plain(self, "strategy", "complete", "data", "seconds", "versions", "seed")
        for name in ("checks", "tables", "pictures", "notes"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    @property
    def main_metric(self) -> str | None:
        """The name of the metric that stands for the run, or None if nothing was measured."""
        known = [name for name in _MAIN_METRICS if name in self.metrics]
        return next(iter([*known, *self.metrics]), None)

    def to_json(self) -> dict[str, Any]:
        """Return the contents of `report.json`; an undefined number is None."""
        own = {name: getattr(self, name) for name in _JSON_AS_IT_IS}
        return {
            **own,
            "metrics": {name: number.value for name, number in self.metrics.items()},
            "intervals": {name: _interval(number) for name, number in self.metrics.items() if _interval(number)},
            "checks": [dataclasses.asdict(check) for check in self.checks],
            "tables": [_table_to_json(table) for table in self.tables],
            "pictures": [_picture_to_json(picture) for picture in self.pictures],
            "notes": list(self.notes),
        }

    @classmethod
    def from_json(cls, contents: Mapping[str, Any]) -> Report:
        """Read what `to_json` returned; parts that an older version did not write are empty.

        Raises:
            ValueError: If a part that every report has is missing.
        """
        missing = [name for name in (*_JSON_AS_IT_IS, "metrics") if name not in contents]
        if missing:
            raise ValueError(f"a report must have {', '.join(missing)}. Received: keys={sorted(contents)}")
        intervals = contents.get("intervals", {})
        numbers = {name: Number(value, **intervals.get(name, {})) for name, value in contents["metrics"].items()}
        return cls(
            **{name: contents[name] for name in _JSON_AS_IT_IS},
            metrics=numbers,
            checks=tuple(Check(**check) for check in contents.get("checks", ())),
            tables=tuple(map(_table_from_json, contents.get("tables", ()))),
            pictures=tuple(map(_picture_from_json, contents.get("pictures", ()))),
            notes=tuple(contents.get("notes", ())),
        )

    def to_html(self) -> str:
        """Return the report as one HTML page that loads nothing and runs no script."""
        from tftransfer import report_html

        return report_html.render(self)


_JSON_AS_IT_IS = ("task", "backbone", "strategy", "complete", "data", "seconds", "versions", "seed")


def _make_plain(record: Any, *names: str) -> None:
    for name in names:
        object.__setattr__(record, name, plain(getattr(record, name)))


def plain(value: Any) -> Any:
    """Turn a value into what JSON can hold: NumPy's numbers become Python's, undefined floats become None.

    Example:
        >>> plain({"a": (1, float("inf"))})
        {'a': [1, None]}
    """
    if hasattr(value, "tolist"):  # NumPy's scalars and arrays, without importing NumPy
        return plain(value.tolist())
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    raise TypeError(f"a report holds numbers, strings, lists and dicts. Received: {value!r}")


def _cell(value: Any) -> Any:
    cell = value if isinstance(value, Number) else plain(value)
    if isinstance(cell, (list, dict)):
        raise TypeError(f"a table's cell must be one number or string. Received: {value!r}")
    return cell


def _interval(number: Number) -> dict[str, Any]:
    parts = dataclasses.asdict(number)
    del parts["value"]
    return parts if any(part is not None for part in parts.values()) else {}


def _table_to_json(table: Table) -> dict[str, Any]:
    rows = [[dataclasses.asdict(cell) if isinstance(cell, Number) else cell for cell in row] for row in table.rows]
    named = {item.name: getattr(table, item.name) for item in dataclasses.fields(table)}
    return {**named, "columns": list(table.columns), "rows": rows, "percent": list(table.percent)}


def _table_from_json(contents: Mapping[str, Any]) -> Table:
    rows = tuple(
        tuple(Number(**cell) if isinstance(cell, Mapping) else cell for cell in row) for row in contents["rows"]
    )
    return Table(**{**contents, "columns": tuple(contents["columns"]), "rows": rows})


def _picture_to_json(picture: Picture) -> dict[str, Any]:
    return {**dataclasses.asdict(picture), "png": base64.b64encode(picture.png).decode("ascii")}


def _picture_from_json(contents: Mapping[str, Any]) -> Picture:
    return Picture(**{**contents, "png": base64.b64decode(contents["png"])})
