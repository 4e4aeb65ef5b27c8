import argparse
import json
import os
import signal
import subprocess
import sys
import threading
from importlib import metadata

import keras
import pytest

from tftransfer import cli
from tftransfer.errors import InputError


def _exit(parser_call) -> int:
    with pytest.raises(SystemExit) as stopped:
        parser_call()
    return stopped.value.code


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["predict"],
        ["verify"],
        ["evaluate", "run"],
        ["--nonsense"],
        ["verify", "run", "--repeats", "many"],
    ],
)
def test_wrong_arguments_are_one_line_and_exit_2(arguments, capsys):
    assert _exit(lambda: cli.main(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.strip().splitlines()) == 1


@pytest.mark.parametrize("command", ["predict", "evaluate", "export", "verify"])
def test_a_missing_run_is_one_line_and_exit_2(command, capsys, tmp_path):
    arguments = [command, str(tmp_path / "nothing")]
    arguments += {"predict": ["picture.png"], "evaluate": ["--data", "demo"]}.get(command, [])
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    assert "nothing" in error


def test_no_command_prints_help(capsys):
    assert cli.main([]) == 0
    assert "doctor" in capsys.readouterr().out


def test_version(capsys):
    assert _exit(lambda: cli.main(["--version"])) == 0
    assert capsys.readouterr().out.startswith("tftransfer 0.")


@pytest.mark.parametrize(("text", "size"), [("224", (224, 224)), ("96x128", (96, 128)), ("96X128", (96, 128))])
def test_image_size(text, size):
    assert cli.image_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "a", "1x2x3", "-5", "12x", "1.5", "²"])
def test_bad_image_sizes_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="N or HxW"):
        cli.image_size(text)


@pytest.mark.parametrize("text", ["-1", "4294967296", "²", "1.5", ""])
def test_bad_seeds_are_refused(text, capsys):
    parser = cli.recipe_parser("image_classification", "A recipe.")
    assert _exit(lambda: parser.parse_args([f"--seed={text}"])) == 2
    assert "from 0 to 4294967295" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "a", "0,0", "1,01", "-1", "0,,1", "²", "4294967296"])
def test_bad_lists_of_seeds_are_refused(text):
    with pytest.raises(InputError, match="`seeds` must be a comma list of different whole numbers from 0 to"):
        cli.seeds(text)


def test_the_largest_seed_seeds_everything():
    parser = cli.recipe_parser("image_classification", "A recipe.")
    keras.utils.set_random_seed(parser.parse_args(["--seed", "4294967295"]).seed)


def test_bad_input_becomes_one_line(capsys):
    def fail() -> int:
        raise InputError("first\n   second")

    assert cli.guarded(fail) == 2
    assert capsys.readouterr().err.endswith(": first second\n")


def test_an_interruption_is_75(capsys):
    def interrupt() -> int:
        raise KeyboardInterrupt

    assert cli.guarded(interrupt) == 75
    assert capsys.readouterr().err == "stopped\n"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_signal_ends_a_process_with_75(name):
    code = (
        "import signal, time; from tftransfer import cli\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs ignore it
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"  # and under nohup this
        "cli.run_recipe(lambda: print('ready', flush=True) or time.sleep(60))"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(getattr(signal, name))
        _, error = process.communicate(timeout=30)
    assert process.returncode == 75
    assert error.decode().splitlines() == [
        "stopped; the same command with --resume, or with the same --out, goes on with this run"
    ]


def test_handlers_are_put_back_and_ignored_signals_stay_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    during = []
    try:
        cli.guarded(lambda: during.extend(map(signal.getsignal, (signal.SIGTERM, signal.SIGHUP))))
        assert during == [signal.default_int_handler, signal.SIG_IGN]
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_other_threads_set_no_handlers():
    codes = []
    thread = threading.Thread(target=lambda: codes.append(cli.guarded(lambda: 0)))
    thread.start()
    thread.join()
    assert codes == [0]


def test_programming_errors_are_not_hidden():
    def fail() -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cli.guarded(fail)


def test_importing_tensorflow_writes_nothing():
    code = "from tftransfer import cli; cli.import_tensorflow(); import tensorflow as tf; tf.constant(1) + 1"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout == done.stderr == ""


def test_recipe_options_take_no_abbreviations(capsys):
    parser = cli.recipe_parser("image_classification", "A recipe.")
    assert _exit(lambda: parser.parse_args(["--epoch", "3"])) == 2
    assert "--epoch" in capsys.readouterr().err


def test_recipes_share_the_options_of_the_contract():
    parser = cli.recipe_parser("image_classification", "A recipe.")
    options = {option for action in parser._actions for option in action.option_strings}
    assert {
        "--data",
        "--backbone",
        "--weights",
        "--image-size",
        "--strategy",
        "--epochs",
        "--batch-size",
        "--learning-rate",
        "--seed",
        "--devices",
        "--precision",
        "--out",
        "--smoke",
        "--dry-run",
        "--quiet",
    } <= options


def test_doctor_says_what_is_there(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["tensorflow"] == tensorflow_version()
    assert found["devices"]["processors"] == os.cpu_count()
    assert found["embedded_weights"] == "intact"
    assert found["memory_gib"]["total"] > 0
    assert isinstance(found["missing"], dict)


def tensorflow_version() -> str:
    return metadata.version("tensorflow")


def test_doctor_fails_where_the_embedded_weights_are_damaged(capsys, monkeypatch):
    from tftransfer import weights

    def damaged(name):
        raise InputError("damaged")

    monkeypatch.setattr(weights, "check_demo", damaged)
    assert cli.main(["doctor"]) == 1
    assert "damaged" in capsys.readouterr().out


def test_backbones_lists_every_row(capsys):
    from tftransfer import backbones

    assert cli.main(["backbones", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["backbone"] for row in rows] == list(backbones.names())
    assert all(row["natural size"] >= row["smallest size"] > 0 for row in rows)
