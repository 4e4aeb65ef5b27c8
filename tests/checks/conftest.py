"""What tests of checks share: whether a report keeps what was found."""

import pytest

from tftransfer.report import Findings, Report


def _kept(found: Findings) -> bool:
    report = Report(
        "t", "b", [], True, {}, found.metrics, checks=found.checks, tables=found.tables, pictures=found.pictures
    )
    return Report.from_json(report.to_json()) == report


@pytest.fixture(scope="session")
def kept_by_a_report():
    """Return a function that tells whether findings come back from `report.json` as they went in."""
    return _kept
