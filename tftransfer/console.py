"""Tables on the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table as ConsoleTable
from rich.text import Text

from tftransfer import report_html
from tftransfer.report import TRAINING, Number, Table
from tftransfer.trainable import AuditRow


def audit_table(title: str, rows: tuple[AuditRow, ...], note: str = "") -> Table:
    """Return what trains as a table for the terminal and the report, with a note below it."""
    columns = ("group", "layers", "parameters", "trainable", "learning rate", "BatchNorm statistics")
    cells = tuple(
        (
            row.group,
            row.layers,
            row.parameters,
            row.trainable,
            f"{row.learning_rate:.3g}" if row.learning_rate else "frozen",
            row.batch_norm or "none",
        )
        for row in rows
    )
    return Table(title, columns, cells, note, section=TRAINING)


def print_table(console: Console, table: Table) -> None:
    """Print a table of the report on the terminal."""
    shown = ConsoleTable(title=table.title, title_justify="left")
    for number, column in enumerate(table.columns):
        shown.add_column(column, justify="right" if number else "left", overflow="fold")
    for row in table.rows:
        shown.add_row(*(_cell(cell, column in table.percent) for cell, column in zip(row, table.columns, strict=True)))
    console.print(shown)
    if table.note:
        console.print(table.note, style="dim")


def literal_console(quiet: bool = False, stderr: bool = False) -> Console:
    """Return a console that prints paths and labels as they are, where rich would read `[bold]` and `:smile:`."""
    return Console(quiet=quiet, stderr=stderr, markup=False, emoji=False)


def _cell(value: Any, percent: bool) -> Text:
    """Return a cell as text that rich takes literally."""
    if isinstance(value, Number):
        span = report_html.interval(value, percent)
        lines = [
            report_html.number(value.value, percent),
            *([span.removesuffix("\N{NO-BREAK SPACE}%")] if span else []),
        ]
        return Text("\n".join(lines))
    return Text(value if isinstance(value, str) else report_html.number(value, percent))
