"""What `tftransfer COMMAND` does; one function per command, named like it, returning the exit code."""

from __future__ import annotations

import argparse
import csv
import functools
import getpass
import importlib.util
import json
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
import psutil
import tensorflow as tf

from tftransfer import (
    audits,
    bundles,
    choices,
    constants,
    distribution,
    exports,
    inference,
    integrity,
    ranking,
    run_verification,
    serving,
    signing,
    suggestion,
    weights,
)
from tftransfer.advice import asking
from tftransfer.backbones import backbone, build, names
from tftransfer.builders import outputs_are_logits
from tftransfer.checks import performance
from tftransfer.console import literal_console, print_table
from tftransfer.data import Data, images, inspect, load, load_for, sources
from tftransfer.data import audit as pictures
from tftransfer.errors import InputError, check
from tftransfer.report import Number, Table
from tftransfer.serving.publication import KEPT_VERSIONS
from tftransfer.serving.warm_up import BATCH_SIZES
from tftransfer.shelf import shelf_at
from tftransfer.strategies import describe
from tftransfer.strategies import names as strategy_names
from tftransfer.tasks import Task
from tftransfer.versions import versions

_BATCH_SIZE = 32  # pictures that `predict` holds at a time
_OPTIONAL = {
    "ai_edge_litert": "to export for LiteRT (extra litert)",
    "model_signing": "to sign runs (extra sign)",
    "pytest": "to run the tests (extra dev)",
    "tensorboard": "to look at a run's logs/",
    "tf2onnx": "to export to ONNX (extra onnx)",
}


def doctor(options: argparse.Namespace) -> int:
    """Report versions, devices, memory and what is missing; 1 if the embedded weights are damaged."""
    memory = psutil.virtual_memory()
    damage = _embedded_damage()
    found = {
        "versions": versions(),
        "devices": distribution.describe_hardware(),
        "memory_gib": {
            "total": round(memory.total / 2**30, 1),
            "available": round(memory.available / 2**30, 1),
        },
        "embedded_weights": damage or "intact",
        "missing": {name: purpose for name, purpose in _OPTIONAL.items() if importlib.util.find_spec(name) is None},
    }
    rows = [(section, _line(content)) for section, content in found.items()]
    _show(options, found, Table("tftransfer doctor", ("what", "found"), tuple(rows)))
    return 1 if damage else 0


def _embedded_damage() -> str | None:
    try:
        weights.check_demo(weights.demo_card()["backbone"])
    except InputError as error:
        return str(error)
    return None


def backbones(options: argparse.Namespace) -> int:
    """List the rows of the backbone table."""
    records = [backbone(name) for name in names()]
    columns = ("backbone", "family", "natural size", "smallest size", "preprocessing")
    rows = tuple((r.name, r.family, r.natural_size, r.smallest_size, r.preprocessing) for r in records)
    content = [dict(zip(columns, row, strict=True)) for row in rows]
    _show(options, content, Table(f"{len(rows)} backbones", columns, rows))
    return 0


def rank(options: argparse.Namespace) -> int:
    """Score pretrained networks on the training split of a data set, the most promising first."""
    networks = choices.listed_networks(options.backbones, options.image_size)
    shelf = shelf_at(options.cache_dir)
    keras.utils.set_random_seed(options.seed)  # of weights that are none
    loaded, scores = _loader(options), []
    for name, network in networks.items():
        data, task = loaded(network.image_size)
        built = build(network.backbone, network.image_size, network.weights, trust=options.trust)
        scores.append(ranking.score(built, name, task, data, seed=options.seed, shelf=shelf))
    compared = ranking.table(scores, task)
    notes = shelf.notes if shelf else ()
    _show(options, [asdict(one) for one in sorted(scores, key=lambda one: -one.logme)], compared, *notes)
    return 0


def _loader(options: argparse.Namespace) -> Callable[[tuple[int, int]], tuple[Data, Task]]:
    """Return the function from a size of pictures to data and task, which loads each size once."""

    @functools.cache
    def loaded(image_size: tuple[int, int]) -> tuple[Data, Task]:
        return load(
            options.data,
            image_size=image_size,
            task_kind=options.task,
            seed=options.seed,
            cache_dir=options.cache_dir,
        )

    return loaded


def suggest(options: argparse.Namespace) -> int:
    """Propose network, size of the pictures, strategy, epochs and batch size, and say why."""
    tried = [
        (name, replace(network, image_size=size))
        for name, network in choices.listed_networks(options.backbones, options.image_size).items()
        for size in choices.sizes_to_try(network, given=options.image_size is not None)
    ]
    shelf = shelf_at(options.cache_dir)
    keras.utils.set_random_seed(options.seed)  # of weights that are none
    loaded, facts = _loader(options), []
    for _, network in tried:
        data, task = loaded(network.image_size)
        built = build(network.backbone, network.image_size, network.weights, trust=options.trust)
        facts.append(suggestion.measure(built, task, data.train, seed=options.seed, shelf=shelf))
    best, why = suggestion.choose(facts)
    network, found = tried[best][1], suggestion.suggest(facts[best])
    size = "x".join(map(str, network.image_size))
    command = _recipe_call(options, network, found)
    columns = (
        "backbone",
        "image size",
        facts[0].metric,
        "mirrored",
        "on random filters",
        "on 8x8 pixels",
        "LogME",
        "ms",
    )
    rows = tuple(
        (
            name,
            "x".join(map(str, one.image_size)),
            own.probe,
            own.mirrored,
            own.random,
            own.pixels,
            own.logme,
            own.milliseconds,
        )
        for (name, one), own in zip(tried, facts, strict=True)
    )
    reasons = [f"Begin with {tried[best][0]} at {size} pixels: {why}", *found.reasons, found.duration]
    reasons += shelf.notes if shelf else ()
    shown = [dict(zip(columns, row, strict=True)) for row in rows]
    content = {"command": command, "reasons": reasons, "suggestion": asdict(found), "tried": shown}
    note = "A linear model on features of the training split, on examples that it has not seen."
    _show(options, content, Table("Tried", columns, rows, note), *reasons, command)
    return 0


def _recipe_call(options: argparse.Namespace, network: choices.Network, found: suggestion.Suggestion) -> str:
    """Return the command that trains what is suggested, on the same split and with the features that are kept."""
    chosen = {
        "--data": options.data,
        "--backbone": network.backbone,
        "--weights": network.weights or "none",
        "--image-size": "x".join(map(str, network.image_size)),
        "--strategy": found.strategy,
        "--epochs": found.epochs,
        "--batch-size": found.batch_size,
    }
    usual = {"--task": "auto", "--seed": 0, "--cache-dir": None}
    given = {"--task": options.task, "--seed": options.seed, "--cache-dir": options.cache_dir}
    chosen |= {name: value for name, value in given.items() if value != usual[name]}
    words = (str(word) for option in chosen.items() for word in option)
    return shlex.join(["python", "recipes/image_classification.py", *words])


def strategies(options: argparse.Namespace) -> int:
    """List the ways to fine-tune that `--strategy` takes."""
    columns = ("strategy", "what it does", "options and defaults", "source")
    rows = (*map(describe, strategy_names()), *map(describe, asking()))
    content = [dict(zip(columns, row, strict=True)) for row in rows]
    title = f"{len(rows)} strategies, --strategy NAME[:OPTION=VALUE,...]"
    note = "Each takes views, average_views, mixup, cutmix, stochastic_depth and train_batch_norm too."
    _show(options, content, Table(title, columns, rows, note))
    return 0


_AUDITED_AT = (128, 128)  # pixels: twice the thumbnails that copies are looked for among


def audit(options: argparse.Namespace) -> int:
    """Look for what is wrong with data; 1 if that is to be strict and something counts."""
    path = sources.path_of(options.data)
    written = audits.folder.prepared(options.data, options.out)
    for name in ("out", "quarantine"):
        if path.is_dir() and getattr(options, name):
            audits.moving.check_outside(getattr(options, name), path, name)
    if path.is_dir():
        audits.moving.check_outside(written.path, path, "out")
    fits = options.quarantine is None or path.is_dir()
    check(fits, "quarantine", "left out where the data are no folder of class folders", str(options.quarantine))
    earlier = written.earlier if options.against is None else audits.contents.read(options.against)
    inspection = inspect(options.data, image_size=_AUDITED_AT, task_kind=options.task, seed=options.seed)
    found = audits.of_inspection(inspection, earlier)
    moved = []
    if options.quarantine:
        moved = audits.moving.move(inspection.seen, inspection.files, path, options.quarantine)
    audits.folder.write(written, found, moved, options.accept)
    lines = [f"{'stays' if one.stays else 'moved'}: {one.file}: {one.stays or one.reason}" for one in moved]
    content = {
        **found.to_json(),
        "moved": [asdict(one) for one in moved],
        "page": str(written.path / audits.folder.PAGE),
    }
    _show(options, content, audits.page.summary(found), *lines, f"Page: {content['page']}")
    return 1 if options.strict and found.counted else 0


def predict(options: argparse.Namespace) -> int:
    """Print an answer for each picture."""
    bundle = bundles.load(options.run, trust=options.trust)
    outputs = _outputs(bundle, options.files)
    answers = bundle.task.answers(outputs, outputs_are_logits(bundle.model))
    rows = _answer_rows(options.files, {name: value.numpy() for name, value in answers.items()})
    if options.csv:
        writer = csv.DictWriter(sys.stdout, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return 0
    _show(options, rows, Table("", tuple(rows[0]), tuple(tuple(row.values()) for row in rows)))
    return 0


def _outputs(bundle: bundles.Bundle, files: Sequence[Path]) -> tf.Tensor:
    """Return the network's outputs for picture files; only one batch of pictures is in memory at a time."""
    infer = constants.as_constant_function(bundle.model)
    batches = [files[begin : begin + _BATCH_SIZE] for begin in range(0, len(files), _BATCH_SIZE)]
    pictures = (np.stack([_read_picture(file, bundle.image_size) for file in batch]) for batch in batches)
    return tf.concat([infer(tf.constant(batch))[0] for batch in pictures], axis=0)


def evaluate(options: argparse.Namespace) -> int:
    """Print the metrics of a run on a data set: on its test split if it has one, else on all of it."""
    bundle = bundles.load(options.run, trust=options.trust)
    unseen = load_for(bundle.task, options.data, image_size=bundle.image_size)
    examples = unseen.examples
    probabilities = inference.predict(bundle.model, bundle.task, examples)
    metrics = performance.performance(bundle.task, examples, probabilities).metrics
    content = {
        "examples": len(examples),
        "split": unseen.split,
        "quarantined": [asdict(item) for item in unseen.quarantined],
        "metrics": {name: asdict(number) for name, number in metrics.items()},
    }
    rows = tuple((name, _number(m.value), _number(m.low), _number(m.high)) for name, m in metrics.items())
    found = "the test split" if unseen.split == "test" else "all of it, for want of a test split"
    title = f"{len(examples)} examples ({found}), {len(unseen.quarantined)} set aside"
    _show(options, content, Table(title, ("metric", "value", "low", "high"), rows))
    return 0


# The options of `export` that apply to each format.
_APPLY = {
    "savedmodel": ("optimise", "keep", "top_k", "warm_up"),
    "litert": ("quantize", "data"),
    "onnx": ("data",),
}


def export(options: argparse.Namespace) -> int:
    """Write the next SavedModel of a run, or its files for another runtime, verified before they are published."""
    for name in {option for options_of in _APPLY.values() for option in options_of}:
        fits = getattr(options, name) is None or name in _APPLY[options.format]
        check(fits, name, f"left out for `--format {options.format}`", getattr(options, name))
    if options.format != "savedmodel":
        return _export_files(options)
    bundle = bundles.load(options.run, trust=options.trust)
    samples = bundles.read_samples(bundle.folder)
    version, verification = serving.publish(
        bundle.model,
        bundle.task,
        bundle.folder / "serving",
        samples,
        optimise=options.optimise is not False,
        top_k=options.top_k or 0,
        keep=options.keep or KEPT_VERSIONS,
        warm_up_sizes=BATCH_SIZES if options.warm_up is None else options.warm_up,
    )
    if version:
        bundles.refresh(bundle.folder, f"{integrity.SERVING}/{version.name}")
    stale = version and (bundle.folder / integrity.SIGNATURE).is_file()
    again = f"{integrity.SIGNATURE} is older than this version: sign again with `tftransfer sign`"
    _show_verification(options, verification, *[again] * bool(stale))
    return 0 if version else 1


def _export_files(options: argparse.Namespace) -> int:
    runtime = importlib.import_module(f"tftransfer.serving.{options.format}").RUNTIME
    given = ",".join(runtime.files) if options.quantize is None else options.quantize
    kinds = list(dict.fromkeys(kind.strip() for kind in given.split(",")))
    known = all(kind in runtime.files for kind in kinds)
    check(known, "quantize", f"a comma list of {', '.join(runtime.files)}", options.quantize)
    bundle = bundles.load(options.run, trust=options.trust)
    folder, verification, table = exports.export_files(bundle, runtime, kinds, options.data)
    if folder is None:
        others = ", and `--quantize` leaves out what failed" if len(kinds) > 1 else ""
        _show_verification(options, verification, f"Nothing was published: every file must pass{others}")
        return 1
    rows = [dict(zip(table.columns, map(_plain, row), strict=True)) for row in table.rows]
    content = {"passed": True, "checks": [asdict(check) for check in verification.checks], "files": rows}
    _show(options, content, table, f"Verified and published: {folder}")
    return 0


def _plain(cell: Any) -> Any:
    return asdict(cell) if isinstance(cell, Number) else cell


def verify(options: argparse.Namespace) -> int:
    """Verify one SavedModel, or a run: its files, its signature, and its newest SavedModel against its Keras model."""
    version = options.path if (options.path / "saved_model.pb").is_file() else None
    folder = options.path.absolute().parent.parent if version else options.path
    if version and not (folder / bundles.MANIFEST).is_file():
        check(options.public_key is None, "public_key", "left out: this is no part of a run", str(options.public_key))
        verification = serving.verify(version, repeats=options.repeats, trust=options.trust)
    else:
        given = {"repeats": options.repeats, "trust": options.trust}
        verification = run_verification.verify_run(folder, version, options.public_key, **given)
    _show_verification(options, verification)
    return 0 if verification.passed else 1


def sign(options: argparse.Namespace) -> int:
    """Sign a run's folder, if its files are those that the run wrote."""
    verification = serving.Verification(run_verification.check_folder(options.run)[1])
    if not verification.passed:
        _show_verification(options, verification)
        return 1
    signature = signing.sign(options.run, options.key, _password(options.key))
    _show(options, {"signature": str(signature)}, Table("", ("signed",), ((str(signature),),)))
    return 0


def _password(key: Path) -> str | None:
    """Take the password of an encrypted key from the environment, or ask for it."""
    if not signing.is_encrypted(key):
        return None
    given = os.environ.get(signing.PASSWORD)
    if given is None and not sys.stdin.isatty():
        raise InputError(f"`key` {key} is encrypted: put its password into the environment variable {signing.PASSWORD}")
    return getpass.getpass(f"Password of {key}: ") if given is None else given


def _read_picture(file: Path, image_size: tuple[int, int]) -> np.ndarray:
    try:
        contents = file.read_bytes()
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from None
    reason = pictures.why_unusable(contents)
    if reason:
        raise InputError(f"{file} cannot be used: {reason}")
    try:
        return images.decode_picture(tf.constant(contents), image_size).numpy()
    except tf.errors.InvalidArgumentError as error:
        raise InputError(f"{file} cannot be used: {pictures.explain(error, contents)}") from None


def _answer_rows(files: Sequence[Path], answers: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Return one dict per file: its label and probability, its labels, or its values."""
    rows = []
    for number, file in enumerate(files):
        row: dict[str, Any] = {"file": str(file)}
        if "labels" in answers:
            given = [text.decode() for text in answers["labels"][number] if text]
            row |= {"labels": "|".join(given)}
        if "label" in answers:
            probability = round(float(answers["probability"][number]), 4)
            row |= {"label": answers["label"][number].decode(), "probability": probability}
        if "values" in answers:
            row |= {"values": "|".join(f"{value:.6g}" for value in answers["values"][number])}
        rows.append(row)
    return rows


def _show_verification(options: argparse.Namespace, verification: serving.Verification, *lines: str) -> None:
    content = {"passed": verification.passed, "checks": [asdict(check) for check in verification.checks]}
    title = "verified" if verification.passed else "NOT verified"
    _show(options, content, Table(title, ("check", "result", "detail"), tuple(verification.rows())), *lines)


def _show(options: argparse.Namespace, content: Any, table: Table, *lines: str) -> None:
    if options.json:
        print(json.dumps(content, indent=1, ensure_ascii=False))
    elif not options.quiet:
        console = literal_console()
        print_table(console, table)
        for line in lines:
            console.print(line, soft_wrap=True)


def _line(content: Any) -> str:
    if isinstance(content, Mapping):
        return ", ".join(f"{name} {value}" for name, value in content.items()) or "nothing"
    return str(content)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
