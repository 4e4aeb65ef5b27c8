"""Audits: what is wrong with data, told before anything is trained on them; each check is a file of its own."""

from tftransfer.audits import contents, folder, moving, page
from tftransfer.audits.examination import CHECKS, Audit, examine, of_data, of_inspection
from tftransfer.audits.subject import Finding, Known, Subject

__all__ = [
    "CHECKS",
    "Audit",
    "Finding",
    "Known",
    "Subject",
    "contents",
    "examine",
    "folder",
    "moving",
    "of_data",
    "of_inspection",
    "page",
]
