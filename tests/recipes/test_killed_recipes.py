"""Recipes that are killed: the same command again ends as if nothing had happened, and leaves nothing behind."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

_BEGIN = """
    import hashlib, json, os, random, re, runpy, shutil, signal, sys, time, zipfile
    from functools import partial
    from pathlib import Path
    from tftransfer import cli
    cli.import_tensorflow()
    import keras
    from tftransfer import builders, bundles, integrity, serving, training

    recipe, parent = sys.argv[1], Path(sys.argv[2])
    COMMAND = [recipe, "--backbone", "MobileNet-0.25", "--weights", "none", "--image-size", "32", "--smoke", "--quiet"]
    COMMAND += ["--batch-size", "16"]  # of which a phase takes two
    CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")

    def small(backbone, num_outputs, **given):
        image = keras.Input((32, 32, 3))
        x = keras.layers.Rescaling(1 / 127.5, offset=-1.0)(image)
        x = keras.layers.Conv2D(4, 3, strides=4, name="conv_1")(x)
        x = keras.layers.BatchNormalization(name="norm_1")(x)
        x = keras.layers.GlobalAveragePooling2D(name="head_pool")(x)
        return keras.Model(image, keras.layers.Dense(num_outputs, name="logits")(x))

    builders.image_classifier = small
    serving.publish = partial(serving.publish, repeats=2)

    def watch(folder, kill):
        def heard(event, given):
            writes = event == "open" and isinstance(given[2], int) and given[2] & (os.O_WRONLY | os.O_RDWR)
            if (writes or event in CHANGES) and str(given[0]).startswith(f"{folder}/"):
                kill(event, re.sub("new-.*-[0-9a-f]{16}", "new", str(given[0]).removeprefix(str(folder))))
        sys.addaudithook(heard)

    def run(folder, kill, after_training, *more):
        original = training._conclude
        def conclude(*given):
            watch(folder, kill)
            return original(*given)
        if after_training:
            training._conclude = conclude
        else:
            watch(folder, kill)
        sys.argv = [*COMMAND, "--out", str(folder), *more]
        runpy.run_path(recipe, run_name="__main__")

    def ended(folder, kill=lambda *step: None, after_training=True, *more, seconds=None):
        process = os.fork()
        if not process:
            code = 1
            try:
                run(folder, kill, after_training, *more)
            except SystemExit as end:
                code = end.code
            finally:
                os._exit(code)
        if seconds is not None:
            time.sleep(seconds)
            os.kill(process, signal.SIGKILL)
        status = os.waitpid(process, 0)[1]
        assert os.WIFSIGNALED(status) or status == 0, (status, folder)
        return not os.WIFSIGNALED(status)

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def left(folder):
        report = json.loads((folder / "report.json").read_text())
        files = (path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir())
        assert not list(folder.rglob(".*")), list(folder.rglob(".*"))
        assert integrity.check_seal(folder).passed
        manifest = bundles.read_manifest(folder)
        assert integrity.check_files(folder, manifest).passed
        weights = zipfile.ZipFile(folder / "model.keras").read("model.weights.h5")
        return {
            "files": sorted(path.as_posix() for path in files if path.parts[0] != "logs"),
            "metrics": (report["metrics"], report["intervals"], report["complete"], manifest["metrics"]),
            "checks": [(check["name"], check["passed"]) for check in report["checks"]],
            "history": (folder / "history.csv").read_text(),
            "weights": hashlib.sha256(weights).hexdigest(),
            "version": manifest["current"],
        }
"""

_AT_EVERY_CHANGE_AFTER_TRAINING = """
    straight, trained, folder = parent / "straight", parent / "trained", parent / "run"
    assert ended(straight)
    assert not ended(trained, lambda *step: die())
    fallen = 0
    while True:
        shutil.copytree(trained, folder)
        steps = []
        def kill(*step):
            steps.append(step)
            if len(steps) == fallen + 1:
                die()
        if ended(folder, kill):
            break
        fallen += 1
        assert ended(folder)
        assert left(folder) == left(straight), fallen
        shutil.rmtree(folder)
    print(fallen)
"""

_AT_RANDOM_AFTER_TRAINING = """
    straight, trained, folder = parent / "straight", parent / "trained", parent / "run"
    assert not ended(trained, lambda *step: die())
    shutil.copytree(trained, straight)
    took = -time.monotonic()
    assert ended(straight)
    took += time.monotonic()
    generator, fallen = random.Random(3), 0
    while fallen < int(sys.argv[3]):
        shutil.copytree(trained, folder)
        while not ended(folder, seconds=generator.uniform(0.3, 1.1) * took):
            fallen += 1
        assert left(folder) == left(straight), fallen
        shutil.rmtree(folder)
    print(fallen)
"""

_AT_EVERY_CHANGE_ONCE = """
    straight, folder, known = parent / "straight", parent / "run", parent / "steps"
    assert ended(straight)
    known.touch()
    def kill(*step):
        if repr(step) not in known.read_text().splitlines():
            with known.open("a") as file:
                print(repr(step), file=file)
            die()
    while not ended(folder, kill, after_training=False):
        pass
    assert left(folder) == left(straight)
    print(len(known.read_text().splitlines()))
"""

_OUT_OF_TIME = """
    straight, folder, served = parent / "straight", parent / "run", []
    for more in (*[("--time-limit", "0.001")] * 3, (), ()):
        assert ended(folder, lambda *step: None, True, *more)
        served.append(sorted(os.listdir(folder / "serving")))
        assert bundles.read_manifest(folder)["current"] == served[-1][-1]
    # A step, the phase's last one, nothing as the time is over; all the rest, and nothing as all is done.
    assert served == [["1"], ["1", "2"], ["1", "2"], ["1", "2", "3"], ["1", "2", "3"]], served
    assert ended(straight)
    expected, found = left(straight), left(folder)
    for name in ("files", "version"):
        del expected[name], found[name]
    assert found == expected
    print(len(served))
"""


def _run(code, *given):
    program = textwrap.dedent(_BEGIN) + textwrap.dedent(code)
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", program, *map(str, given)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return int(done.stdout)


@pytest.fixture
def recipe(repository):
    return repository / "recipes" / "image_classification.py"


@pytest.mark.slow
def test_killed_at_every_change_of_its_folder_after_training(recipe, tmp_path):
    assert _run(_AT_EVERY_CHANGE_AFTER_TRAINING, recipe, tmp_path) >= 30


@pytest.mark.slow
def test_killed_at_random_moments_after_training(recipe, tmp_path):
    assert _run(_AT_RANDOM_AFTER_TRAINING, recipe, tmp_path, 10) >= 10


@pytest.mark.slow
def test_killed_once_at_every_change_of_its_folder_one_after_the_other(recipe, tmp_path):
    assert _run(_AT_EVERY_CHANGE_ONCE, recipe, tmp_path) >= 40


@pytest.mark.slow
def test_every_network_is_published_once_however_often_time_runs_out(recipe, tmp_path):
    assert _run(_OUT_OF_TIME, recipe, tmp_path) == 5
