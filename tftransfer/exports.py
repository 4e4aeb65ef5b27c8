"""Export a finished run for other runtimes: read its data again, judge the files on them, add to its report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tftransfer import bundles, runs
from tftransfer.bundles import Bundle
from tftransfer.data import Data, load
from tftransfer.errors import InputError
from tftransfer.report import Table
from tftransfer.serving import Verification
from tftransfer.serving.files import Evidence, Runtime, calibration_pictures, publish_files

_SMOKE = 64  # examples of a recipe's --smoke


def export_files(
    bundle: Bundle, runtime: Runtime, kinds: Sequence[str], source: str | None = None
) -> tuple[Path | None, Verification, Table]:
    """Publish files in a run's folder, with a table in its report and its manifest brought up to date.

    Nothing else in the report changes, and a table of an earlier export is replaced: it is about files that are gone.

    Args:
        bundle: The finished run.
        runtime: What the files are for.
        kinds: Which of its files.
        source: Data to calibrate int8 and to measure with, as `data.load` takes them. Defaults to the run's own.

    Returns:
        As `publish_files`.

    Raises:
        InputError: As `publish_files`, if int8 is among the kinds and the data cannot be read, or the report cannot.
    """
    runtime.require()
    bundles.read_report(bundle.folder)
    evidence = evidence_of(bundle, kinds, source)
    folder, verification, table = publish_files(runtime, bundle.model, bundle.task, bundle.folder, kinds, evidence)
    if folder:
        bundles.put_in_report(bundle.folder, table)
        bundles.refresh(bundle.folder, folder.relative_to(bundle.folder).as_posix(), bundles.REPORT, bundles.HTML)
    return folder, verification, table


def evidence_of(bundle: Bundle, kinds: Sequence[str], source: str | None = None) -> Evidence:
    """Return what files of a run are judged on: its test split, or the pictures that it kept where there is none.

    Args:
        bundle, kinds, source: As for `export_files`.

    Raises:
        InputError: If the data cannot be read and were named, or are needed for int8.
    """
    try:
        data, note = data_again(bundle, source)
    except InputError as error:
        if source:
            raise
        if "int8" in kinds:
            raise InputError(
                f"int8 is calibrated on the run's training pictures, and {error}: give `--data`, or "
                "`--quantize none,float16`, which needs none"
            ) from None
        samples = bundles.read_samples(bundle.folder)
        return Evidence(samples=samples, note=f"Accuracy was not measured: {error}.")
    return Evidence(data.test, calibration=calibration_pictures(data.train) if "int8" in kinds else (), note=note)


def data_again(bundle: Bundle, source: str | None = None) -> tuple[Data, str]:
    """Read the data of a finished run again, divided as they were.

    Args:
        bundle: The finished run.
        source: Other data of the same labels, as `data.load` takes them. Defaults to the run's own.

    Returns:
        The data, and a sentence for readers of numbers measured on them: "" if they are the run's, by fingerprint.

    Raises:
        InputError: If the run does not say what its data are, they cannot be read, or they have other labels.
    """
    configuration = bundle.manifest["configuration"]
    name = source or configuration.get("data")
    if not name:
        raise InputError(f"{bundle.folder / bundles.MANIFEST} does not name the run's data")
    if not source and runs.is_hidden_path(name):
        raise InputError(f"the run keeps no absolute paths, of its data the name alone, {name}: give them by `--data`")
    data, task = load(
        name,
        image_size=bundle.image_size,
        task_kind=bundle.task.kind,
        seed=configuration.get("seed", 0),
        limit=_SMOKE if configuration.get("smoke") else None,
    )
    if task.labels != bundle.task.labels:
        raise InputError(
            f"{name} has other labels than the run: {_listed(task.labels)}, not {_listed(bundle.task.labels)}"
        )
    if configuration.get("remove_duplicates"):
        data, _ = runs.without_duplicates(data)
    same = data.fingerprint == bundle.manifest.get("data", {}).get("fingerprint")
    return data, "" if same else f"{data.name} is not what the run was trained on, or has changed since."


def _listed(labels: Sequence[str]) -> str:
    return ", ".join(map(repr, labels[:5])) + (", ..." if len(labels) > 5 else "")
