"""The model card in Markdown: what a model is for, what it was made of, how good it is, and how to use it.

It is written from the report and the manifest alone, so that every number in it is one of theirs. It has no YAML
header: model hubs act on the licence and the library there; the licence is for the owner of the data to say, and their
Keras loader does not read a run's folder.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from tftransfer.report import CLASSES, LABELS, NUMBERS, Check, Number, Report, Table
from tftransfer.report_html import METHODS, number, words

_MOST_LABELS = 50  # that are listed; the rest stands in manifest.json
_MOST_FILES = 10
_KINDS = {
    "single_label": "one label for each picture",
    "multi_label": "any number of labels for each picture",
    "regression": "numbers for each picture",
}
_ANSWERS = {
    "single_label": "`label`, `probability` and `probabilities` (one per label, in the order above)",
    "multi_label": "`labels` and `scores` of what was found, and `probabilities` (one per label, in the order above)",
    "regression": "`values`, in the order above",
}
_ACTIVATIONS = {"single_label": "keras.ops.softmax(outputs)", "multi_label": "keras.ops.sigmoid(outputs)"}
_WEIGHTS = {
    "demo": "embedded in tftransfer",
    "imagenet": "ImageNet's, as Keras publishes them",
    "file": "from a file",
    "random": "random, not pretrained",
}
_VERDICTS = {True: "passed", False: "**failed**", None: "not judged"}
# What a run can look into, by the check's name; what no check looked into is said in the limits.
_LOOKED_INTO = {
    "duplicates": "whether pictures lie in two splits",
    "labels": "whether labels are wrong",
    "forgetting": "what the backbone forgot of its old task",
    "robustness": "pictures that are noisy, blurred or attacked",
    "fairness": "whether some groups are served worse than others",
    "privacy": "whether the model gives away which pictures it was trained on",
}
_USUAL = {"layer_decay": 1.0, "weight_decay": 0.0, "views": 0}
_FURTHER = (
    "layer_decay", "weight_decay", "views", "mixup", "cutmix", "stochastic_depth", "adapter", "penalty", "average",
    "train_batch_norm",
)  # fmt: skip


def render(report: Report, manifest: Mapping[str, Any]) -> str:
    """Return the card; the same report and manifest give the same text.

    Args:
        report: The run's report.
        manifest: The run's manifest; what it does not hold yet, such as the card's own SHA-256, is left out.
    """
    sections = {
        "Task": _task(manifest),
        "Intended use and limits": _limits(report, manifest),
        "Data": _data(report, manifest),
        "Training": _training(report, manifest),
        "Metrics on the test split": _metrics(report),
        "Number by number" if manifest["task"]["kind"] == "regression" else "Label by label": _by_label(report),
        "Checks": _checks(report.checks),
        "How to use it": _use(manifest),
        "Provenance": _provenance(manifest),
    }
    body = "".join(f"\n## {title}\n\n{text}\n" for title, text in sections.items() if text)
    title = f"{report.backbone} on {report.data['name']}" if report.data["name"] else report.backbone
    return f"# {escape(title)}\n\n{_summary(report, manifest)}\n{body}"


def escape(text: Any) -> str:
    r"""Return what Markdown shows as the text itself, on one line, also in a cell of a table.

    Example:
        >>> print(escape("a_b <c> | *d*"))
        a_b \<c> \| \*d\*
    """
    line = " ".join(str(text).split())
    # An underscore inside a word is one; anywhere else it may begin emphasis.
    return re.sub(r"([\\`*\[\]<|~$&#]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))", r"\\\1", line)


def exact(value: float | None) -> str:
    """Write a number of the report to four decimals, a very small or large one to four digits that count.

    Example:
        >>> exact(0.99722), exact(0.00001234), exact(360), exact(None)
        ('0.9972', '1.234e-05', '360', 'undefined')
    """
    if value is None or isinstance(value, (bool, int)):
        return "undefined" if value is None else str(value)
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e6 else f"{value:.4g}"


def _summary(report: Report, manifest: Mapping[str, Any]) -> str:
    gives = _KINDS.get(manifest["task"]["kind"], words(report.task))
    said = f"Gives {gives}: {escape(report.backbone)}, fine-tuned with tftransfer."
    name = report.main_metric
    if name is None:
        return said
    measured = report.metrics[name]
    around = f" (95 % interval {_interval(measured)})" if measured.low is not None else ""
    return f"{said} **{words(name)} {exact(measured.value)}**{around} on {report.data['test']} test examples."


def _task(manifest: Mapping[str, Any]) -> str:
    task, labels = manifest["task"], manifest["labels"]
    height, width = manifest["image_size"]
    shown = ", ".join(map(escape, labels[:_MOST_LABELS]))
    more = f" and {len(labels) - _MOST_LABELS} more, in `manifest.json`" if len(labels) > _MOST_LABELS else ""
    named = "Numbers" if task["kind"] == "regression" else "Labels"
    pixels = f"RGB, {height} x {width} pixels (height x width), values from 0 to 255"
    return _list(
        f"Task: {escape(task['name'])}, {_KINDS.get(task['kind'], task['kind'])}",
        f"{named} ({len(labels)}): {shown}{more}",
        f"Input: pictures. `model.keras` takes them as {pixels}; the SavedModel also takes JPEG, PNG, WebP, GIF or BMP "
        "files of any size and decodes, turns and resizes them as in training",
        f"Output of the SavedModel: {_ANSWERS.get(task['kind'], 'see its signatures')}",
    )


def _limits(report: Report, manifest: Mapping[str, Any]) -> str:
    said = [f"Made for pictures like those of its data ({escape(report.data['name'])}); others were not tried."]
    if manifest["task"]["kind"] == "single_label":
        said.append("A picture that shows none of the labels is still given one of them.")
    if manifest.get("configuration", {}).get("smoke"):
        said.append("Trained for a few steps only, to try the recipe out (`--smoke`): not for use.")
    if not report.complete:
        said.append("Training was stopped before its end; everything here describes the model as it was then.")
    said += [*_precision(report), *_rarest(report)]
    failed = [check.name for check in report.checks if check.passed is False]
    if failed:
        said.append(f"These checks failed: {', '.join(map(escape, failed))}.")
    missing = [what for name, what in _LOOKED_INTO.items() if name not in {one.name for one in report.checks}]
    if missing:
        said.append(f"Not looked into: {'; '.join(missing)}.")
    return _list(*said, *map(escape, report.notes))


def _precision(report: Report) -> Iterator[str]:
    """Say how far the main number can be trusted, from the width of its interval."""
    name = report.main_metric
    measured = report.metrics[name] if name else Number(None)
    if name and measured.low is not None and measured.high is not None:
        yield (
            f"Measured on one test split of {report.data['test']} examples: on new pictures of the same kind "
            f"{words(name).lower()} may be anywhere from {_interval(measured)}, so that smaller differences between "
            "models say little."
        )


def _rarest(report: Report) -> Iterator[str]:
    counts = report.data.get("per_label", {}).get("test", [])
    if counts:
        fewest = min(counts)
        label = report.data["labels"][counts.index(fewest)]
        yield f"Label {escape(label)} has the fewest test examples: {fewest}."


def _data(report: Report, manifest: Mapping[str, Any]) -> str:
    data, splits = report.data, report.data.get("splits", {})
    rows = [(name, data[name], splits.get(name, {}).get("from", "")) for name in ("train", "validation", "test")]
    aside = [f"{escape(one['file'])}: {escape(one['reason'])}" for one in data["quarantined"]]
    more = [f"and {len(aside) - _MOST_FILES} more, in `report.json`"] if len(aside) > _MOST_FILES else []
    facts = _list(
        f"Name: {escape(data['name'])}",
        *_digest(
            "Fingerprint (SHA-256 of names, contents, labels and splits)", manifest.get("data", {}).get("fingerprint")
        ),
        f"Set aside because they cannot be used or are copies: {len(aside)}",
        *(f"  {line}" for line in (*aside[:_MOST_FILES], *more)),
        f"Pictures in two splits: {_duplicates(report.checks)}",
        *map(escape, splits.get("notes", ())),
    )
    return "\n\n".join([facts, _table(("split", "examples", "from"), rows), *_per_label(data)])


def _duplicates(checks: Iterable[Check]) -> str:
    found = next((check.metrics for check in checks if check.name == "duplicates"), None)
    if found is None:
        return "not looked for"
    removed = ", removed from training" if found.get("removed") else ""
    return f"{found.get('exact', 0)} exact copies, {found.get('alike', 0)} that look alike{removed}"


def _per_label(data: Mapping[str, Any]) -> Iterator[str]:
    """Return the table of counts, of the rarest labels if there are many."""
    counts = data.get("per_label", {})
    if not counts:
        return
    rows = list(zip(data["labels"], *counts.values(), strict=True))
    shown = rows if len(rows) <= _MOST_LABELS else sorted(rows, key=lambda row: row[1])[:_MOST_LABELS]
    yield _table(("label", *counts), shown)
    if len(shown) < len(rows):
        yield f"The {len(shown)} rarest of {len(rows)} labels; all are in `report.json`."


def _training(report: Report, manifest: Mapping[str, Any]) -> str:
    columns = ("phase", "trains", "epochs", "kept epoch", "learning rate", "schedule", "optimizer", "augmentation")
    keys = ("name", "selector", "epochs", "best_epoch", "learning_rate", "schedule", "optimizer", "augmentation")
    rows = [(*(_setting(phase.get(key)) for key in keys), _further(phase)) for phase in report.strategy]
    decided = manifest.get("decisions", {})
    devices = [f"Devices: {escape(decided['devices'])}"] if decided.get("devices") else []
    seconds = ", ".join(f"{name} {number(value)}" for name, value in report.seconds.items())
    facts = _list(
        f"Backbone: {escape(report.backbone)}",
        *_weights(manifest.get("weights")),
        f"Seed: {report.seed}",
        *devices,
        *([f"Seconds: {seconds}"] * bool(seconds)),
    )
    return "\n\n".join([facts, *([_table((*columns, "further"), rows)] * bool(rows))])


def _weights(held: Mapping[str, Any] | None) -> Iterator[str]:
    if not held:
        return
    file = f", `{held['file']}`" if held.get("file") else ""
    yield f"Weights that training began with: {_WEIGHTS.get(held['kind'], held['kind'])}{file}"
    known = "a file that was published" if held.get("known") else "no file that is known"
    yield from _digest(f"SHA-256 of these weights, {known}", held.get("sha256"))


def _further(phase: Mapping[str, Any]) -> str:
    """Return a phase's other settings, those that are not as usual."""
    settings = {name: phase.get(name) for name in _FURTHER}
    told = {name: value for name, value in settings.items() if value and value != _USUAL.get(name)}
    return "; ".join(f"{name.replace('_', ' ')} {_setting(value)}" for name, value in told.items())


def _setting(value: Any) -> str:
    return _in_words(value, "{:g}".format)


def _metrics(report: Report) -> str:
    if not report.metrics:
        return "Nothing was measured."
    rows = [
        (words(name), exact(measured.value), _interval(measured), _method(measured))
        for name, measured in report.metrics.items()
    ]
    return _table(("metric", "value", "95 % interval", "how the interval was found"), rows)


def _method(measured: Number) -> str:
    return METHODS.get(measured.method, measured.method) if measured.method else "–"


def _interval(measured: Number) -> str:
    if measured.low is None or measured.high is None:
        return "–"
    return f"{exact(measured.low)} to {exact(measured.high)}"


def _by_label(report: Report) -> str:
    return "\n\n".join(
        map(_table_of, (table for table in report.tables if table.section in (CLASSES, LABELS, NUMBERS)))
    )


def _table_of(table: Table) -> str:
    rows = table.rows[:_MOST_LABELS]
    more = f" {len(rows)} of {len(table.rows)} rows; all are in `report.json`." if len(rows) < len(table.rows) else ""
    note = f"\n\n{escape(table.note)}{more}" if table.note or more else ""
    return _table(table.columns, rows) + note


def _checks(checks: Sequence[Check]) -> str:
    rows = [(words(one.name), _VERDICTS[one.passed], _facts(one.metrics)) for one in checks]
    return _table(("check", "outcome", "found"), rows, escaped=(1,)) if rows else ""


def _facts(metrics: Mapping[str, Any]) -> str:
    return "; ".join(
        f"{name.replace('_', ' ')}: {_in_words(value, '{:.4g}'.format)}" for name, value in metrics.items()
    )


def _use(manifest: Mapping[str, Any]) -> str:
    height, width = manifest["image_size"]
    ends = _ACTIVATIONS.get(manifest["task"]["kind"], "outputs")
    comment = "in the order above" if ends == "outputs" else "probabilities, in the order of the labels"
    in_keras = f"""With Keras alone, from this folder; the picture is one of the test split:

```python
import keras

model = keras.saving.load_model("model.keras", compile=False)
picture = keras.utils.img_to_array(keras.utils.load_img("samples/0.png", target_size=({height}, {width})))
outputs = model(picture[None])  # from (batch, {height}, {width}, 3)
print({ends})  # {comment}
```

"""
    return in_keras + (_SERVING if manifest.get("current", True) else _UNPUBLISHED)


_SERVING = """The SavedModel takes encoded pictures and answers with names; the manifest says which version is newest:

```python
import json
from pathlib import Path

import tensorflow as tf

current = json.loads(Path("manifest.json").read_text())["current"]
serve = tf.saved_model.load(f"serving/{current}").signatures["serving_default"]
print(serve(image_bytes=tf.constant([Path("samples/0.png").read_bytes()])))
```

TF Serving takes the folder `serving`:

```sh
docker run -p 8501:8501 -v "$PWD/serving:/models/model" tensorflow/serving
```"""

_UNPUBLISHED = (
    "When this card was written no SavedModel had passed verification, see the checks; `tftransfer export FOLDER` "
    "tries again."
)


def _provenance(manifest: Mapping[str, Any]) -> str:
    facts = _list(
        *_digest("SHA-256 of `model.keras`", manifest.get("files", {}).get("model.keras")),
        "`manifest.json` holds the SHA-256 of every other file; `tftransfer verify FOLDER` compares them, and the "
        "SavedModel with `model.keras`",
        "Where the run was signed, `model.sig` holds the signature: `tftransfer verify FOLDER --public-key PUBLIC.pem`",
    )
    return f"{facts}\n\n{_table(('package', 'version'), manifest.get('versions', {}).items())}"


def _digest(what: str, sha256: str | None) -> list[str]:
    return [f"{what}: `{sha256}`"] if sha256 else []


def _list(*lines: str) -> str:
    """Return a list; a line that begins with blanks stands below the one before it."""
    return "\n".join(re.sub(r"^( *)", r"\1- ", line) for line in lines)


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]], escaped: Sequence[int] = ()) -> str:
    """Return a table; cells in the columns `escaped` are Markdown already."""
    lines = [map(escape, columns), ["---"] * len(columns)]
    lines += [[str(v) if place in escaped else escape(_cell(v)) for place, v in enumerate(row)] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, Number):
        return exact(value.value) if value.low is None else f"{exact(value.value)} ({_interval(value)})"
    return _in_words(value, exact)


def _in_words(value: Any, write: Callable[[float], str]) -> str:
    """Return a value of the report as text; `write` is for floats."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_in_words(part, write)}" for name, part in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_in_words(part, write) for part in value)
    if value is None or isinstance(value, bool):
        return "–" if value is None else "yes" if value else "no"
    return write(value) if isinstance(value, float) else str(value)
