"""What training leaves behind: one list per metric over all phases, and a record of each phase."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tftransfer.adapters import Adapter
from tftransfer.strategies import Phase
from tftransfer.trainable import AuditRow


@dataclass(frozen=True)
class PhaseRecord:
    """What happened in one phase.

    Args:
        phase: The row of the strategy.
        audit: What trained, per depth group.
        frozen_share: Share of the parameters that ran as constants, in [0, 1].
        epochs: Epochs that were run.
        best_epoch: The epoch of the phase whose weights were kept; 0 if those it began with were better.
        seconds: What the phase took, over all processes that trained it: of one that was interrupted, what it took up
            to the checkpoint that the next one went on from.
        tuned_share: Where `WiseFt` stopped between the weights that the phase began with (0) and the tuned ones (1).
        penalty_basis: What a penalty held the network to; empty without one.
        extract_seconds: What computing or finding the frozen part's features took, of `seconds`.
        store: What was kept of them.
        waited_share: Share of the time in training, validation included, that was spent waiting for training batches;
            of the process that ended the phase alone.
        steps: Steps that were taken.
        save_seconds: What checkpoints within the phase took, of `seconds`.
        skipped: How many steps were skipped, because their numbers were not finite.
        rollbacks: How often training went back to the best weights, because several in a row were.
        faults: What was skipped, in plain words; empty if nothing was.
        micro_batches: Into how many parts each batch was divided.
        memory: Why, in plain words; empty for batches that plainly fit.
    """

    phase: Phase
    audit: tuple[AuditRow, ...]
    frozen_share: float
    epochs: int
    best_epoch: int
    seconds: float
    tuned_share: float | None = None
    penalty_basis: str = ""
    extract_seconds: float = 0.0
    store: str = ""
    waited_share: float = 0.0
    steps: int = 0
    save_seconds: float = 0.0
    skipped: int = 0
    rollbacks: int = 0
    faults: str = ""
    micro_batches: int = 1
    memory: str = ""

    def to_json(self) -> dict[str, Any]:
        """Describe the phase for `report.json` and the manifest."""
        return {
            **self.phase.to_json(),
            "epochs": self.epochs,
            "epochs_planned": self.phase.epochs,
            "best_epoch": self.best_epoch,
            "frozen_share": self.frozen_share,
            "seconds": self.seconds,
            "tuned_share": self.tuned_share,
            "penalty_basis": self.penalty_basis or None,
            "extract_seconds": self.extract_seconds,
            "store": self.store,
            "waited_share": self.waited_share,
            "save_seconds": self.save_seconds,
            "skipped": self.skipped,
            "rollbacks": self.rollbacks,
            "faults": self.faults or None,
            "micro_batches": self.micro_batches,
            "memory": self.memory or None,
        }


class History(dict[str, list[float]]):
    """One list per metric over all phases, such as `history["val_loss"]`.

    An epoch for which a metric is not known, such as one that a user's callback logs now and then, holds NaN.
    `phases` holds a record for each phase, `adapter` the LoRA adapter that the last phase left, if it has one;
    `complete` says whether all phases came to their end, `notes` what else happened, `seconds_before` what earlier
    processes took for the phases, up to the checkpoint that the last one went on from.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phases: list[PhaseRecord] = []
        self.adapter: Adapter | None = None
        self.complete = True
        self.notes: list[str] = []
        self.seconds_before = 0.0

    def add(self, logs: dict[str, list[float]], record: PhaseRecord) -> None:
        """Append one phase."""
        before = sum(phase.epochs for phase in self.phases)
        for name, values in logs.items():
            known = self.setdefault(name, [])
            known += [math.nan] * (before - len(known))
            known.extend(float(value) for value in values)
        self.phases.append(record)
        for values in self.values():
            values += [math.nan] * (before + record.epochs - len(values))

    def write_csv(self, path: Path) -> None:
        """Write a row per epoch: the phase's name, the epoch counted over all phases, and every metric."""
        phases = [record.phase.name for record in self.phases for _ in range(record.epochs)]
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["phase", "epoch", *self])
            for epoch, (phase, *values) in enumerate(zip(phases, *self.values(), strict=True), start=1):
                writer.writerow([phase, epoch, *values])
