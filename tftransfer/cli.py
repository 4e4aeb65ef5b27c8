"""The command line: `tftransfer COMMAND`, and the options that the recipes share."""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import math
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from tftransfer import __version__
from tftransfer.errors import DivergedError, InputError, ScanError, check

LARGEST_SEED = 2**32 - 1
"""NumPy's."""

CACHES = ("auto", "off")
FORMATS = ("savedmodel", "litert", "onnx")
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EMFILE, errno.ENFILE, errno.EFBIG)
_GOES_ON = "stopped; the same command with --resume, or with the same --out, goes on with this run"
_UNITS = {"s": 1, "m": 60, "h": 3600}
DONE, FAILED, BAD_INPUT, STOPPED = 0, 1, 2, 75

_VERIFY_HELP = """\
Every file that the run wrote must be there with the SHA-256 that the manifest has for it, and the manifest must have
the one in manifest.sha256. Nothing may lie among the versions in serving/ that the manifest does not know, since a
model server would load it; files that you add elsewhere are let be. Whole versions before the current one may be gone.
What was changed is named, and no model or SavedModel that was changed is loaded."""

_AUDIT_HELP = """\
Writes DIR/audit.html, a page with pictures, audit.json, and contents.json with the SHA-256 and the label of every
example. The next audit of the same data compares them with that; as long as something has changed or is missing,
contents.json stays as it is, unless you --accept.

These findings count, and fail with --strict: faults of a table's lines, of records and class folders; data that a run
would refuse, such as classes too small for the splits; files that cannot be used; what has changed or is missing; blank
pictures; classes named alike but for case, spaces or dashes, or, with hardly any examples, but for a letter; copies in
two splits or with two labels, if they are sure; groups (columns such as subject or patient_id) in several splits.
The others are mentioned, since they may well be meant: extensions of another format, sizes, nearly blank pictures, rare
classes, copies within a split, plurals, what looks like groups in names of files and other columns, new files, notes.

--quarantine moves what a run would set aside to the same path below DIR, which must lie outside the data. Links, what
cannot be read and what has changed meanwhile stay; nothing is overwritten; audit.json lists what was moved."""

_SIGN_HELP = """\
Writes RUN/model.sig over every file in the folder, once these are found to be those of the manifest. Make a key:

  openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -aes256 -out private.pem
  openssl pkey -in private.pem -pubout -out public.pem

Without -aes256 the key has no password. The password of one that has is taken from the environment variable
TFTRANSFER_KEY_PASSWORD, or asked for. Keep the private key out of the run's folder and give the public one to those
who check:

  tftransfer verify RUN --public-key public.pem

A signature holds for the folder as it was. Whatever is written into it later, such as the next version by
`tftransfer export`, makes the signature stale: sign again. Needs the extra: pip install 'tftransfer[sign]'."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line without a usage block, and that takes no abbreviations."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("allow_abbrev", False)
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**options)

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"{self.prog}: {message}\n")


def recipe_parser(
    name: str,
    description: str,
    *,
    strategy_help: str = "NAME[:OPTION=VALUE,...] (default: freeze_then_unfreeze; for the demo's digits without flips)",
    epochs_help: str = "the strategy's own",
) -> Parser:
    """Return a parser with the options that recipes share; a recipe adds its own to it.

    Args:
        name: The recipe's name.
        description: What `--help` says first.
        strategy_help: How to write `--strategy`, and what happens without it.
        epochs_help: What happens without `--epochs`.
    """
    parser = Parser(prog=f"recipes/{name}.py", description=description)
    add = parser.add_argument
    add("--data", default="demo", help="demo, tfds:NAME, a folder or a table (default: demo)")
    add(
        "--backbone",
        help="a row of `tftransfer backbones` (default: the demo's for demo data, else MobileNetV2)",
    )
    add(
        "--weights",
        help="imagenet, demo, none or a file (default: demo for the demo's backbone, else imagenet)",
    )
    add("--image-size", type=image_size, metavar="N|HxW", help="pixels (default: the backbone's natural size)")
    add("--strategy", help=f"{strategy_help}; `tftransfer strategies` lists them")
    add("--epochs", type=int, help=f"total over all phases (default: {epochs_help})")
    add("--batch-size", type=at_least(1), default=32, help="examples per step over all devices (default: %(default)s)")
    add("--learning-rate", type=float, help="peak of the last phase (default: the strategy's own)")
    add("--seed", type=at_least(0, LARGEST_SEED), default=0, help="decides every random choice (default: %(default)s)")
    add(
        "--cache",
        choices=CACHES,
        default="auto",
        help="keep what is frozen where that pays, or off (default: %(default)s)",
    )
    add(
        "--cache-dir",
        type=Path,
        help="keep it here for later runs too, 20 GiB at most, the oldest goes first (default: in memory only)",
    )
    add("--devices", default="auto", help="auto, cpu, gpu or a number of devices (default: %(default)s)")
    add(
        "--precision",
        default="auto",
        help="auto, float32, mixed_float16, mixed_bfloat16 (default: %(default)s)",
    )
    add("--out", type=Path, help=f"the run's folder (default: saved_models/{name}-NNN, next free number)")
    add("--resume", action="store_true", help="go on with an unfinished run, in --out or the newest of these options")
    add(
        "--smoke",
        action="store_true",
        help="at most 64 examples and two steps a phase; every file is written",
    )
    add(
        "--dry-run",
        action="store_true",
        help="read the data, build the model, say what would be done, write nothing",
    )
    _trust(parser)
    add("--quiet", action="store_true", help="print errors only")
    return parser


def _trust(parser: Parser) -> None:
    parser.add_argument("--trust", action="store_true", help="load model files without scanning them; says so")


def at_least(smallest: int, largest: int | None = None) -> Callable[[str], int]:
    """Return a function that reads a whole number from `smallest` up, to `largest` if that is given.

    Example:
        >>> at_least(1)("32")
        32
    """
    span = f"from {smallest}" + (f" to {largest}" if largest is not None else "")

    def whole_number(text: str) -> int:
        # Not `isdigit`, which is true of "²" too.
        if not text.isdecimal() or int(text) < smallest or (largest is not None and int(text) > largest):
            raise argparse.ArgumentTypeError(f"expected a whole number {span}. Received: {text!r}")
        return int(text)

    return whole_number


def duration(text: str) -> float:
    """Read a time: seconds, or a number with s, m or h.

    Example:
        >>> duration("90"), duration("1.5h")
        (90.0, 5400.0)
    """
    number, unit = (text[:-1], text[-1]) if text[-1:] in _UNITS else (text, "s")
    try:
        seconds = float(number) * _UNITS[unit]
    except ValueError:
        seconds = -1
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"expected seconds above 0, or such as 90m or 2h. Received: {text!r}")
    return seconds


def batch_sizes(text: str) -> tuple[int, ...]:
    """Read a comma list of batch sizes; `none` for none.

    Example:
        >>> batch_sizes("1,8"), batch_sizes("none")
        ((1, 8), ())
    """
    return () if text == "none" else tuple(map(at_least(1), text.split(",")))


def seeds(text: str) -> tuple[int, ...]:
    """Read a comma list of seeds.

    Raises:
        InputError: If one is no whole number from 0 to `LARGEST_SEED`, or comes twice.

    Example:
        >>> seeds("0,1,2")
        (0, 1, 2)
    """
    parts = text.split(",")
    found = tuple(int(part) for part in parts if part.isdecimal())
    fits = len(parts) == len(set(found)) and max(found) <= LARGEST_SEED
    check(fits, "seeds", f"a comma list of different whole numbers from 0 to {LARGEST_SEED}", text)
    return found


def image_size(text: str) -> tuple[int, int]:
    """Read `N` or `HxW`, in pixels.

    Example:
        >>> image_size("224"), image_size("96x128")
        ((224, 224), (96, 128))
    """
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise argparse.ArgumentTypeError(f"expected N or HxW in pixels, such as 224 or 96x128. Received: {text!r}")
    return int(sides[0]), int(sides[-1])


def parse(parser: Parser, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse arguments and only then load TensorFlow, so that `--help` and wrong options answer at once."""
    options = parser.parse_args(arguments)
    import_tensorflow()
    return options


def run_recipe(main: Callable[[], int | None], *, goes_on: bool = True) -> NoReturn:
    """Run a recipe's main function and end the process with the exit code of the contract.

    Args:
        main: Returns its exit code, or None for 0.
        goes_on: Whether the same command goes on with a run that was stopped. Defaults to True.
    """
    sys.exit(guarded(main, _GOES_ON if goes_on else "stopped"))


def guarded(main: Callable[[], int | None], stopped: str = "stopped") -> int:
    """Call a function, and turn bad input into one line and exit code 2, an interruption into 75.

    Args:
        main: Returns its exit code, or None for 0.
        stopped: What is said of an interruption. Defaults to `"stopped"`.

    A disk that is full or cannot be written is one line and exit code 1.
    What a scan found in a file that was to be loaded, and training that diverged, is one line and exit code 1. SIGTERM
    and SIGHUP, as batch systems and closed terminals send them, end it as Ctrl-C does. What the terminal cannot show,
    such as names of files that are not UTF-8, is printed as `\\udcXX`.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with _signals_interrupt():
            return main() or DONE
    except InputError as error:
        print(f"{Path(sys.argv[0]).name}: {' '.join(str(error).split())}", file=sys.stderr)
        return FAILED if isinstance(error, ScanError) else BAD_INPUT
    except DivergedError as error:
        print(f"{Path(sys.argv[0]).name}: {' '.join(str(error).split())}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        return STOPPED
    except OSError as error:
        if error.errno not in _OF_THE_DISK:
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"{Path(sys.argv[0]).name}: {where}{error.strerror}", file=sys.stderr)
        return FAILED


@contextlib.contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise KeyboardInterrupt; one that is ignored, as under `nohup`, stays ignored."""
    kept = {number: signal.getsignal(number) for number in _stop_signals()}
    try:
        for number in kept:
            signal.signal(number, signal.default_int_handler)
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def _stop_signals() -> list[int]:
    if threading.current_thread() is not threading.main_thread():
        return []  # Python lets only the main thread set handlers
    known = (getattr(signal, name, None) for name in ("SIGTERM", "SIGHUP"))
    return [number for number in known if number and signal.getsignal(number) not in (signal.SIG_IGN, None)]


def import_tensorflow() -> None:
    """Import TensorFlow without the notices that its libraries write to standard error while they load.

    They come before any log level is heeded, so the file descriptor itself is turned away; if the import fails, what
    was written is shown.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # what matters arrives as an exception
    sys.stderr.flush()
    with tempfile.TemporaryFile() as caught, _stderr_to(caught.fileno()):
        try:
            import tensorflow as tf

            tf.config.list_physical_devices()  # looks for GPUs, with notices of its own, without using one
        except BaseException:
            caught.seek(0)
            sys.stdout.write(caught.read().decode(errors="replace"))
            raise


@contextlib.contextmanager
def _stderr_to(descriptor: int) -> Iterator[None]:
    kept = os.dup(2)
    os.dup2(descriptor, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `tftransfer COMMAND`; returns the exit code of the contract."""
    options = _parser().parse_args(arguments)
    if options.command is None:
        _parser().print_help()
        return DONE
    return guarded(lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    if options.command == "scan":
        from tftransfer.scanning import command

        return command.scan(options)
    import_tensorflow()
    from tftransfer import commands

    return getattr(commands, options.command)(options)


def _parser() -> Parser:
    parser = Parser(prog="tftransfer", description="Transfer learning for Keras 3 and TensorFlow.")
    parser.add_argument("--version", action="version", version=f"tftransfer {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    _command(commands, "doctor", "versions, devices, memory, and what is missing")
    _command(commands, "backbones", "the pretrained networks, their sizes and preprocessing")
    _command(commands, "strategies", "the ways to fine-tune, with their options")
    for name, summary in (
        ("rank", "which pretrained networks suit a data set, before any is tuned"),
        ("suggest", "network, size of pictures, strategy, epochs and batch size for a data set, and why"),
    ):
        command = _command(commands, name, summary)
        add = command.add_argument
        add("--data", required=True, help="demo, tfds:NAME, a folder or a table")
        add("--backbones", required=True, help="comma list of NAME[=WEIGHTS]; WEIGHTS as for the recipes")
        usual = "each one's natural size" + (", and half of it" if name == "suggest" else "")
        add("--image-size", type=image_size, metavar="N|HxW", help=f"pixels (default: {usual})")
        add("--task", default="auto", help="auto, single_label, multi_label, regression (default: auto)")
        add("--seed", type=at_least(0, LARGEST_SEED), default=0, help="of the split (default: %(default)s)")
        add(
            "--cache-dir",
            type=Path,
            help="keep what is computed here, for training too: 20 GiB at most, the oldest goes first",
        )
        _trust(command)
    audit = _command(commands, "audit", "what is wrong with data: broken files, copies, labels, splits, with pictures")
    audit.epilog = _AUDIT_HELP
    add = audit.add_argument
    add("--data", required=True, help="demo, tfds:NAME, a folder or a table")
    add("--task", default="auto", help="auto, single_label, multi_label, regression (default: auto)")
    add("--seed", type=at_least(0, LARGEST_SEED), default=0, help="of the split (default: %(default)s)")
    add(
        "--out",
        type=Path,
        metavar="DIR",
        help="where to write (default: saved_models/audit-NAME, one for each data set)",
    )
    add("--against", type=Path, metavar="FILE", help="contents.json of an earlier audit (default: the one in --out)")
    add("--accept", action="store_true", help="take what has changed since then as right from here on")
    add("--strict", action="store_true", help="end with 1 if a finding counts")
    add("--quarantine", type=Path, metavar="DIR", help="move files that cannot be used there, and no others")
    predict = _command(commands, "predict", "labels for pictures, by a finished run")
    predict.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    predict.add_argument("files", type=Path, nargs="+", metavar="FILE", help="pictures")
    predict.add_argument("--csv", action="store_true", help="print comma-separated values instead of a table")
    evaluate = _command(commands, "evaluate", "metrics of a finished run on other data")
    evaluate.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    evaluate.add_argument("--data", required=True, help="demo, tfds:NAME, a folder or a table")
    export = _command(
        commands,
        "export",
        "write, verify and publish the next SavedModel of a finished run, or files for other runtimes",
    )
    export.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    export.add_argument("--format", choices=FORMATS, default=FORMATS[0], help="what to write (default: %(default)s)")
    export.add_argument(
        "--optimise",
        action=argparse.BooleanOptionalAction,
        help="savedmodel: variables become constants, BatchNorm goes into the convolutions (default: yes)",
    )
    export.add_argument("--keep", type=at_least(1), help="savedmodel: versions that stay (default: 5)")
    export.add_argument("--quantize", help="litert: comma list of none, float16, int8 (default: all three)")
    export.add_argument(
        "--data",
        help="litert, onnx: demo, tfds:NAME, a folder or a table; training pictures calibrate int8, test pictures "
        "measure the files (default: the run's own)",
    )
    export.add_argument(
        "--top-k",
        type=at_least(1),
        metavar="K",
        help="savedmodel: also answer with the K most probable labels, by `classify`",
    )
    export.add_argument(
        "--warm-up",
        type=batch_sizes,
        metavar="N,N|none",
        help="savedmodel: batch sizes that a model server answers before it serves (default: 1,8)",
    )
    verify = _command(commands, "verify", "compare what serves with what was trained")
    verify.add_argument("path", type=Path, metavar="RUN|VERSION_DIR", help="a run's folder or one serving/N")
    verify.add_argument("--repeats", type=at_least(2), default=50, help="identical requests (default: %(default)s)")
    verify.add_argument("--public-key", type=Path, metavar="PEM", help="check the run's signature with this key too")
    verify.epilog = _VERIFY_HELP
    for command in (predict, evaluate, export, verify):
        _trust(command)
    scan = _command(commands, "scan", "look for what a model file should not hold, without loading it")
    scan.add_argument(
        "paths",
        type=Path,
        nargs="+",
        metavar="PATH",
        help="a SavedModel, .keras, .h5, .npz or .safetensors file, or a folder with such files, as a run's",
    )
    sign = _command(commands, "sign", "sign a finished run's folder with a key of your own, offline")
    sign.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    sign.add_argument("--key", type=Path, required=True, metavar="PEM", help="a private elliptic key")
    sign.epilog = _SIGN_HELP
    return parser


def _command(commands: Any, name: str, summary: str) -> Parser:
    parser = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
    parser.add_argument("--json", action="store_true", help="print JSON for machines")
    parser.add_argument("--quiet", action="store_true", help="print errors only")
    return parser


if __name__ == "__main__":
    sys.exit(main())
