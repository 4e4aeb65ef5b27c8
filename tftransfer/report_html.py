"""The report as one HTML page: no scripts, nothing loaded from elsewhere, readable on a phone."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Iterable, Mapping
from importlib import resources
from typing import Any

from tftransfer.report import (
    CALIBRATION,
    CLASSES,
    CONFUSION,
    CURVES,
    DATA,
    LABELS,
    MISTAKES,
    NUMBERS,
    OTHER,
    RESULT,
    TRAINING,
    Check,
    Number,
    Picture,
    Report,
    Table,
)

CHECKS, TIME = "Checks", "Time, versions and seed"
_RESULTS = (RESULT, TRAINING, CURVES, CLASSES, LABELS, NUMBERS, CONFUSION, MISTAKES, CALIBRATION)
_ORDER = (*_RESULTS, OTHER, CHECKS, DATA, TIME)
_RATE = re.compile(r"(accuracy|precision|recall|f1|iou|calibration_error|by_chance|^map\d*)$")
_WORDS = {"f1": "F1", "iou": "IoU", "map": "mAP", "map50": "mAP 50", "map75": "mAP 75", "r": "R"}
METHODS = {
    "wilson": "Wilson's",
    "wilson_effective_n": "Wilson's at the effective sample size",
    "student_t_log": "Student's t on the logarithm",
}
_MOST_FILES = 200
_MOST_ROWS = 40  # a longer table scrolls inside its box
_SPACE = "\u00a0"  # keeps a number and its unit on one line

# The page may not run or load anything, whatever a label or a file name contains.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def render(report: Report) -> str:
    """Return the page; everything that comes from data is escaped."""
    sections = {name: body for name in _section_names(report) if (body := _section(report, name))}
    footer = "Written by tftransfer. Intervals are 95 % intervals."
    return _page(_title(report), _header(report), sections, footer)


def page(
    kind: str, title: str, facts: Mapping[str, Any], notices: Iterable[str], sections: Mapping[str, str], footer: str
) -> str:
    """Return another page in the report's look.

    Args:
        kind, title: What it is, and of what.
        facts: A few words or numbers by their names.
        notices: Sentences that a reader must not miss.
        sections: HTML by heading, from `table` and `picture`.
        footer: A sentence below it.
    """
    said = "".join(f'<p class="notice">{sentence(notice)}</p>\n' for notice in notices)
    head = f'<p class="kicker">{text(kind)}</p>\n<h1>{text(title)}</h1>\n{_definitions(facts)}{said}'
    return _page(f"{kind}: {title}", head, sections, footer)


def _page(title: str, head: str, sections: Mapping[str, str], footer: str) -> str:
    links = "".join(f'<li><a href="#s{i}">{text(name)}</a></li>' for i, name in enumerate(sections))
    bodies = "".join(
        f'<section id="s{i}" aria-labelledby="h{i}"><h2 id="h{i}">{text(name)}</h2>{body}</section>\n'
        for i, (name, body) in enumerate(sections.items())
    )
    style = resources.files("tftransfer").joinpath("assets/report.css").read_text(encoding="utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        f'<header>\n{head}<nav aria-label="Sections"><ul>{links}</ul></nav>\n</header>\n'
        f"<main>\n{bodies}</main>\n<footer>{text(footer)}</footer>\n</body>\n</html>\n"
    )


def text(value: Any) -> str:
    """Escape a value for HTML, also as an attribute; bytes of a file name that are no text become `?`."""
    return html.escape(str(value).encode("utf-8", "replace").decode("utf-8"))


def sentence(value: str) -> str:
    """Escape a sentence, and keep its percentages on one line."""
    return re.sub(r"(?<=\d) %", f"{_SPACE}%", text(value))


def words(name: str) -> str:
    """Turn the name of a metric or a field into words.

    Example:
        >>> words("macro_f1"), words("sign/val_loss")
        ('Macro F1', 'Sign / val loss')
    """
    parts = [_WORDS.get(part, part) for part in name.replace("/", " / ").replace("_", " ").split()]
    joined = " ".join(parts).replace("R squared", "R²")
    return joined if joined[:3] == "mAP" else joined[:1].upper() + joined[1:]


def is_rate(name: str) -> bool:
    """Tell from a metric's name whether it is a share, shown as a percentage."""
    return bool(_RATE.search(name.rpartition("/")[2].lower()))


def number(value: Any, percent: bool = False) -> str:
    """Write a number for a person: one decimal for percentages, else three digits that count.

    Example:
        >>> number(0.9304, percent=True), number(0.25), number(1234567), number(None)
        ('93.0\\xa0%', '0.25', '1,234,567', '–')
    """
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if percent:
        return f"{100 * value:.1f}{_SPACE}%"
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}" if abs(value) < 1e15 else f"{value:.3g}"
    return f"{value:.3g}"


def interval(measured: Number, percent: bool = False) -> str:
    """Write an interval as `90.1–95.2 %`, or nothing if there is none.

    Example:
        >>> interval(Number(0.93, 0.901, 0.952), percent=True)
        '90.1–95.2\\xa0%'
    """
    if measured.low is None or measured.high is None:
        return ""
    low, high = _measured(measured.low, percent), _measured(measured.high, percent)
    return f"{low.removesuffix(_SPACE + '%')}–{high}" if measured.low >= 0 else f"{low} to {high}"


def _measured(value: float | None, percent: bool) -> str:
    """Write a measured number so that it lines up with its interval: `0.870`, not `0.87`."""
    if value is None or percent or not 0 < abs(value) < 1000:
        return number(value, percent)
    return f"{value:#.3g}".rstrip(".")


def _title(report: Report) -> str:
    return f"{report.backbone} on {report.data['name']}" if report.data["name"] else report.backbone


def _header(report: Report) -> str:
    facts = {
        "Task": words(report.task),
        "Backbone": report.backbone,
        "Data": report.data["name"] or "–",
        "Trained on": f"{number(report.data['train'])} examples",
        "Tested on": f"{number(report.data['test'])} examples",
        "Checks": _checks_in_words(report.checks),
    }
    return (
        f'<p class="kicker">{text(words(report.task))} · report</p>\n'
        f"<h1>{text(_title(report))}</h1>\n"
        f"{_headline(report)}{_definitions(facts)}{_notices(report)}"
    )


def _headline(report: Report) -> str:
    name = report.main_metric
    if name is None:
        return ""
    measured, percent = report.metrics[name], is_rate(name)
    value = _measured(measured.value, percent) if measured.value is not None else "undefined"
    around = interval(measured, percent)
    counted = f"on {number(report.data['test'])} test examples"
    told = f"(95{_SPACE}% interval {around}), {counted}" if around else counted
    return (
        f'<p class="headline"><span class="name">{text(words(name))}</span> '
        f'<span class="value">{text(value)}</span> <span>{text(told)}</span></p>\n{_bar(measured, percent)}'
    )


def _bar(measured: Number, percent: bool) -> str:
    """Draw a share and its interval between 0 and 100 %; the same numbers stand beside it in words."""
    if not percent or measured.value is None or measured.low is None or measured.high is None:
        return ""
    low, width, value = (100 * part for part in (measured.low, measured.high - measured.low, measured.value))
    return (
        f'<div aria-hidden="true"><div class="bar"><i style="left:{low:.2f}%;width:{width:.2f}%"></i>'
        f'<b style="left:{value:.2f}%"></b></div>'
        '<div class="ends"><span>0</span><span>100 %</span></div></div>\n'
    )


def _definitions(facts: Mapping[str, Any]) -> str:
    items = "".join(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in facts.items())
    return f'<dl class="facts">{items}</dl>\n'


def _notices(report: Report) -> str:
    stopped = "Training did not run to its end; these are the results so far."
    warning = "" if report.complete else f'<p class="notice bad"><strong>Incomplete.</strong> {stopped}</p>\n'
    return warning + "".join(f'<p class="notice">{sentence(note)}</p>\n' for note in report.notes)


def _checks_in_words(checks: tuple[Check, ...]) -> str:
    failed = sum(check.passed is False for check in checks)
    passed = sum(check.passed is True for check in checks)
    return f"{passed} passed, {failed} failed" if checks else "none"


def _section_names(report: Report) -> list[str]:
    """Return the sections in their order, those that only a table or picture names before the checks."""
    of_tables, of_pictures = ([item.section for item in items] for items in (report.tables, report.pictures))
    named = dict.fromkeys([*of_tables, *of_pictures])
    unknown = [name for name in named if name not in _ORDER]
    return [*_RESULTS, *unknown, *_ORDER[len(_RESULTS) :]]


def _section(report: Report, name: str) -> str:
    own = {RESULT: _result, TRAINING: _training, CHECKS: _checks, DATA: _data, TIME: _time}.get(name)
    tables = "".join(table(one) for one in report.tables if one.section == name)
    pictures = "".join(picture(one) for one in report.pictures if one.section == name)
    return (own(report) if own else "") + pictures + tables


def _result(report: Report) -> str:
    if not report.metrics:
        return "<p>Nothing was measured.</p>"
    body = "".join(_metric_row(name, measured) for name, measured in report.metrics.items())
    note = f"Measured on the test split, {number(report.data['test'])} examples. {_methods(report.metrics)}"
    return _table_of("Metrics", ("metric", "value", "95 % interval"), body, note, numeric=(1, 2))


def _metric_row(name: str, measured: Number) -> str:
    percent = is_rate(name)
    value = "undefined" if measured.value is None else _measured(measured.value, percent)
    cells = "".join(f'<td class="number">{text(cell)}</td>' for cell in (value, interval(measured, percent) or "–"))
    return f'<tr><th scope="row">{text(words(name))}</th>{cells}</tr>'


def _methods(metrics: Mapping[str, Number]) -> str:
    """Say in a sentence how which interval was found, or why there is none."""
    by_method: dict[str, list[str]] = {}
    for name, measured in metrics.items():
        if measured.method:
            by_method.setdefault(METHODS.get(measured.method, measured.method), []).append(_within(words(name)))
    told = "; ".join(f"{method} ({', '.join(names)})" for method, names in by_method.items())
    return f"How the intervals were found: {told}." if told else ""


def _within(phrase: str) -> str:
    return phrase[:1].lower() + phrase[1:] if phrase[1:2].islower() else phrase


def _training(report: Report) -> str:
    """Describe the phases side by side: a row per field, a column per phase, as it suits a phone."""
    phases = [phase for phase in report.strategy if isinstance(phase, Mapping)]
    if not phases:
        return ""
    fields = [name for name in dict.fromkeys(key for phase in phases for key in phase) if name != "name"]
    names = tuple(str(phase.get("name", f"phase {i}")) for i, phase in enumerate(phases, start=1))
    rows = tuple((words(name), *(_scalar(phase.get(name)) for phase in phases)) for name in fields)
    return table(Table("The strategy, phase by phase", ("", *names), rows))


def _scalar(value: Any) -> Any:
    return value if value is None or isinstance(value, (str, int, float)) else _in_words(value)


def _in_words(value: Any) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{key}: {_in_words(part)}" for key, part in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_in_words(part) for part in value)
    return value if isinstance(value, str) else number(value)


def _checks(report: Report) -> str:
    if not report.checks:
        return ""
    body = "".join(
        f'<tr><th scope="row">{text(words(check.name))}</th><td>{_badge(check.passed)}</td>'
        f'<td class="words">{_check_numbers(check)}</td></tr>'
        for check in report.checks
    )
    return _table_of("What was checked", ("check", "outcome", "numbers"), body)


def _badge(passed: bool | None) -> str:
    kind, word = {True: ("good", "passed"), False: ("bad", "failed"), None: ("", "not decided")}[passed]
    return f'<span class="badge {kind}">{word}</span>'


def _check_numbers(check: Check) -> str:
    return "<br>".join(f"{text(words(name))}: {text(_in_words(value))}" for name, value in check.metrics.items())


def _data(report: Report) -> str:
    names = [name for name in ("found", "train", "validation", "test") if name in report.data]
    files = report.data["quarantined"]
    rows = (*((words(name), report.data[name]) for name in names), ("Quarantined", len(files)))
    splits = tuple((words(name), _in_words(value)) for name, value in report.data.get("splits", {}).items())
    parts = [Table("How many examples", ("split", "examples"), rows)]
    parts += [Table("How the splits came to be", ("split", "how"), splits)] * bool(splits)
    parts += [_quarantine(files)] * bool(files)
    return "".join(map(table, parts))


def _quarantine(files: list[dict[str, str]]) -> Table:
    rows = tuple((entry.get("file", ""), entry.get("reason", "")) for entry in files[:_MOST_FILES])
    more = len(files) - len(rows)
    note = (
        f"And {more:,} more: see report.json." if more else "These files were set aside; the run went on without them."
    )
    return Table("Files that could not be used", ("file", "why"), rows, note)


def _time(report: Report) -> str:
    seconds = tuple((words(name), value) for name, value in report.seconds.items())
    versions = (*report.versions.items(), ("seed", str(report.seed)))
    parts = [Table("Seconds", ("part", "seconds"), seconds)] * bool(seconds)
    return "".join(map(table, [*parts, Table("Versions and seed", ("", "version"), versions)]))


def table(table: Table) -> str:
    """Return a table as HTML."""
    numeric = [i for i in range(1, len(table.columns)) if _is_numeric(row[i] for row in table.rows)]
    percent = [name in table.percent for name in table.columns]
    body = "".join(_row(row, percent, numeric) for row in table.rows)
    return _table_of(table.title, table.columns, body, table.note, numeric, tall=len(table.rows) > _MOST_ROWS)


def _is_numeric(cells: Iterable[Any]) -> bool:
    return all(cell is None or isinstance(cell, (int, float, Number)) for cell in cells)


def _row(row: tuple[Any, ...], percent: list[bool], numeric: Iterable[int]) -> str:
    first, *rest = (_cell(cell, rate) for cell, rate in zip(row, percent, strict=True))
    kinds = ["number" if i in numeric else "words" if _is_long(row[i]) else "" for i in range(1, len(row))]
    cells = "".join(f'<td class="{kind}">{cell}</td>' for cell, kind in zip(rest, kinds, strict=True))
    return f'<tr><th scope="row">{first}</th>{cells}</tr>'.replace(' class=""', "")


def _is_long(cell: Any) -> bool:
    return isinstance(cell, str) and len(cell) > 20


def _cell(cell: Any, percent: bool) -> str:
    if isinstance(cell, Number):
        around = interval(cell, percent)
        return text(_measured(cell.value, percent)) + (f" <small>({text(around)})</small>" if around else "")
    return text(cell if isinstance(cell, str) else number(cell, percent))


def _table_of(
    title: str,
    columns: Iterable[str],
    body: str,
    note: str = "",
    numeric: Iterable[int] = (),
    tall: bool = False,
) -> str:
    heads = "".join(
        f'<th scope="col" class="number">{text(name)}</th>' if i in numeric else f'<th scope="col">{text(name)}</th>'
        for i, name in enumerate(columns)
    )
    below = f'<p class="note">{sentence(note)}</p>' if note else ""
    return (
        f'<div class="table"><p class="title">{text(title)}</p>'
        f'<div class="scroll{" tall" * tall}" tabindex="0" role="region" aria-label="{text(title)}">'
        f'<table aria-label="{text(title)}"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
        f"{below}</div>\n"
    )


def picture(picture: Picture) -> str:
    """Return a picture as HTML, with the file inside."""
    source = f"data:image/png;base64,{base64.b64encode(picture.png).decode('ascii')}"
    alt = picture.alt or f"{picture.title}. {picture.caption}".strip()
    caption = f" {sentence(picture.caption)}" if picture.caption else ""
    return (
        f'<figure><img src="{source}" alt="{text(alt)}">'
        f"<figcaption><strong>{text(picture.title)}.</strong>{caption}</figcaption></figure>\n"
    )
