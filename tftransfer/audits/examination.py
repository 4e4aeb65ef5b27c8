"""All checks of an audit, and what they found."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from tftransfer.audits import balance, blank, contents, copies, files, groups, label_names, sizes
from tftransfer.audits.subject import Check, Finding, Known, Subject
from tftransfer.data.examples import Data
from tftransfer.data.loading import Inspection

CHECKS: dict[str, tuple[str, Check]] = {
    "source": ("Faults of the source", files.source),
    "changes": ("Changed since the last audit", contents.changes),
    "unusable": ("Files that cannot be used", files.unusable),
    "misnamed": ("Extensions of another format", files.misnamed),
    "blank": ("Blank pictures", blank.blank),
    "sizes": ("Unusual sizes", sizes.sizes),
    "balance": ("Rare and missing classes", balance.balance),
    "label_names": ("Names of classes that are alike", label_names.label_names),
    "exact_copies": ("The same picture twice", copies.exact),
    "near_copies": ("Pictures that look the same", copies.near),
    "groups": ("Groups in several splits", groups.groups),
}
"""By name, each check's heading and function, in the order of the page."""


@dataclass(frozen=True)
class Audit:
    """What was found in some data.

    Args:
        subject: The data.
        findings: By check, what it found.
    """

    subject: Subject
    findings: dict[str, tuple[Finding, ...]]

    @property
    def counted(self) -> int:
        """How many findings fail an audit that is strict."""
        return sum(finding.counts for found in self.findings.values() for finding in found)

    @property
    def mentioned(self) -> int:
        """How many findings may well be meant."""
        return sum(map(len, self.findings.values())) - self.counted

    def to_json(self) -> dict[str, Any]:
        """Return everything but the pictures; `examples` are names."""
        seen = self.subject.seen
        return {
            "data": self.subject.name,
            "found": len(seen),
            "usable": len(self.subject.usable),
            "passed": not self.counted,
            "findings": [
                {"check": check, **asdict(finding), "examples": [seen[place].name for place in finding.examples]}
                for check, found in self.findings.items()
                for finding in found
            ],
        }


def examine(subject: Subject) -> Audit:
    """Let every check look at some data.

    Example:
        >>> from tftransfer.data.examples import Seen
        >>> seen = tuple(Seen(f"{n}.png", "ab"[n % 2], "train", digest=str(n // 2)) for n in range(40))
        >>> audit = examine(Subject("forty", "single_label", seen))
        >>> audit.counted, audit.findings["exact_copies"][0].problem
        (20, "the same content, as 1.png, with labels 'a', 'b'")
    """
    return Audit(subject, {name: tuple(find(subject)) for name, (_, find) in CHECKS.items()})


def of_inspection(inspection: Inspection, known: Known | None = None) -> Audit:
    """Audit a source that was read for it.

    Args:
        inspection: From `data.inspect`.
        known: What an earlier audit wrote down. Defaults to None.
    """
    own = {name: getattr(inspection, name) for name in _SHARED}
    return examine(Subject(**own, known=known))


def of_data(data: Data) -> Audit:
    """Audit data that were read for training, without looking at a picture again.

    What needs pixels, such as near copies, is not looked for; `unusable` and faults of the source are in the report
    anyhow.
    """
    return examine(Subject(data.name, data.kind, data.seen))


_SHARED = ("name", "kind", "seen", "pictures", "places", "faults", "refused", "notes")
