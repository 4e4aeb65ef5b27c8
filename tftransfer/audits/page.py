"""An audit as one HTML page with pictures, and as a part of a run's report."""

from __future__ import annotations

from collections import Counter
from pathlib import PurePath

import numpy as np

from tftransfer import report_html
from tftransfer.audits.examination import CHECKS, Audit
from tftransfer.audits.subject import Finding
from tftransfer.checks import drawing, gallery
from tftransfer.data.examples import Seen
from tftransfer.data.splits import NAMES
from tftransfer.report import DATA, Check, Findings, Picture, Table

_LISTED, _LISTED_IN_RUN, _PRINTED, _DRAWN = 200, 50, 3, 12
_IN_REPORT_ANYHOW = ("unusable",)
_COLUMNS = ("where", "what", "counts")


def render(audit: Audit) -> str:
    """Return the page."""
    sections = {"What was looked for": report_html.table(summary(audit))}
    for name, (title, _) in CHECKS.items():
        if audit.findings[name]:
            picture = _drawn(audit, title, audit.findings[name])
            shown = report_html.picture(picture) if picture else ""
            sections[title] = shown + report_html.table(_table(title, audit.findings[name]))
    if audit.subject.by_class:
        sections["Class by class"] = report_html.table(_classes(audit))
    subject = audit.subject
    facts = {
        "Found": f"{len(subject.seen):,} examples",
        "Usable": f"{len(subject.usable):,} examples",
        "Classes": f"{len(subject.by_class):,}" if subject.by_class else "–",
    }
    return report_html.page("Data audit", subject.name, facts, (in_words(audit),), sections, "Written by tftransfer.")


def in_words(audit: Audit) -> str:
    """Say in a sentence how much was found."""
    if not audit.counted and not audit.mentioned:
        return "Nothing was found."
    return f"{audit.counted} findings fail a strict audit, {audit.mentioned} more are mentioned."


def summary(audit: Audit) -> Table:
    """Return how much each check found."""
    rows = []
    for name, (title, _) in CHECKS.items():
        counted = sum(finding.counts for finding in audit.findings[name])
        first = audit.findings[name][0].where if audit.findings[name] else ""
        rows.append((title, counted, len(audit.findings[name]) - counted, first))
    note = "What fails, or counts, should be put right; what is mentioned may well be meant."
    return Table(in_words(audit), ("check", "fail", "mentioned", "first"), tuple(rows), note)


def findings(audit: Audit) -> Findings:
    """Return what the report of a run says: a check and, if anything was found, a table."""
    counts = {name: len(found) for name, found in audit.findings.items() if found}
    check = Check("data_audit", not audit.counted, counts or {"findings": 0})
    rows = [
        (CHECKS[name][0], finding.where, finding.problem, finding.counts)
        for name, found in audit.findings.items()
        for finding in found
        if name not in _IN_REPORT_ANYHOW
    ]
    rows.sort(key=lambda row: not row[-1])
    if not rows:
        return Findings(checks=(check,))
    more = f" And {len(rows) - _LISTED_IN_RUN:,} more." if len(rows) > _LISTED_IN_RUN else ""
    note = f"`tftransfer audit` shows them with pictures, and looks for near copies.{more}"
    columns = ("check", *_COLUMNS)
    table = Table("What an audit of the data found", columns, tuple(rows[:_LISTED_IN_RUN]), note, DATA)
    return Findings(tables=(table,), checks=(check,))


def lines(audit: Audit) -> list[str]:
    """Return what a run says before it begins: nothing, or a sentence and the first findings that count."""
    counted = [
        finding
        for name, found in audit.findings.items()
        for finding in found
        if finding.counts and name not in _IN_REPORT_ANYHOW
    ]
    if not counted:
        return []
    more = len(counted) - _PRINTED
    return [
        f"Audit: {len(counted)} findings, more about them by `tftransfer audit`",
        *(f"  {finding.where}: {finding.problem}" for finding in counted[:_PRINTED]),
        *[f"  and {more} more, in the report"] * (more > 0),
    ]


def _table(title: str, found: tuple[Finding, ...]) -> Table:
    ordered = sorted(found, key=lambda finding: not finding.counts)
    rows = tuple((finding.where, finding.problem, finding.counts) for finding in ordered[:_LISTED])
    note = f"{len(found) - _LISTED:,} more stand in audit.json." if len(found) > _LISTED else ""
    return Table(title, _COLUMNS, rows, note)


def _classes(audit: Audit) -> Table:
    seen = audit.subject.seen
    counts = {name: Counter(seen[place].split for place in own) for name, own in audit.subject.by_class.items()}
    rows = tuple((name, *(count[split] for split in NAMES)) for name, count in counts.items())
    return Table("Usable examples of each class", ("class", *NAMES), rows)


def _drawn(audit: Audit, title: str, found: tuple[Finding, ...]) -> Picture | None:
    """Draw the first examples of a check's findings, those that are compared side by side."""
    subject = audit.subject
    if subject.pictures is None or subject.places is None:
        return None
    numbers = {int(place): number for number, place in enumerate(subject.places)}
    ordered = sorted(found, key=lambda finding: not finding.counts)
    shown = [own for finding in ordered if (own := [place for place in finding.examples if place in numbers])]
    width = max(map(len, shown), default=1)
    places = [place for own in shown if len(own) == width for place in own][: _DRAWN // width * width]
    if not places:
        return None
    entries = [(numbers[place], _said(subject.seen[place])) for place in places]
    shapes = [np.divide(*(subject.seen[place].size or (1, 1))) for place in places]
    told = "; ".join(subject.seen[place].name for place in places)
    caption = "The first of them, with file, label and split."
    return gallery.gallery(subject.pictures, entries, title, caption, DATA, told, columns=4, shapes=shapes)


def _said(one: Seen) -> tuple[str, ...]:
    return tuple(drawing.text(line, 16) for line in (PurePath(one.name).name, f"{one.label}, {one.split}"))
