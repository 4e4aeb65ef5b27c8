"""Processes that are killed: every run comes back by itself and ends as if nothing had happened."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

_TRAIN = """
    import hashlib, json, os, random, shutil, signal, sys, time
    from pathlib import Path
    from tftransfer import cli
    cli.import_tensorflow()
    import keras, numpy as np
    from tftransfer import adapters, builders, checkpoints, data, feeding, strategies, tasks, trainee, training
    from tftransfer.strategies import Phase

    parent, kills, names = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3].split(",")
    feeding._AT_ONCE = 2
    long = {"augmentation": "light_no_flip", "carry_moments": True}
    STRATEGIES = {
        "freeze_then_unfreeze": (
            Phase("probe", "head", 2, 0.05),
            Phase("tune", "all", 2, 0.01, schedule="cosine", warmup=0.2, train_batch_norm=True, **long),
        ),
        "gradual": (
            Phase("head", "head", 1, 0.05),
            Phase("one", "last:1", 1, 0.02, views=2, **long),
            Phase("two", "last:2", 1, 0.01, views=2, **long),
        ),
        "lora": (
            Phase("head", "head", 1, 0.05),
            Phase("lora", "head", 2, 0.02, adapter=adapters.Lora(2), optimizer="adamw", **long),
        ),
    }

    def digest(arrays):
        known = hashlib.sha256()
        for one in arrays:
            known.update(np.asarray(one).tobytes())
        return known.hexdigest()

    def small():
        image = keras.Input((32, 32, 3))
        x = keras.layers.Rescaling(1 / 127.5, offset=-1.0)(image)
        for number in range(3):
            x = keras.layers.Conv2D(8, 3, strides=2, use_bias=False, name=f"conv_{number}")(x)
            x = keras.layers.BatchNormalization(name=f"norm_{number}")(x)
            x = keras.layers.ReLU()(x)
        x = keras.layers.GlobalAveragePooling2D(name="head_pool")(x)
        x = keras.layers.Dropout(0.3, name="head_dropout")(x)
        return keras.Model(image, keras.layers.Dense(10, name="logits")(x))

    def train(folder, strategy, cache):
        keras.utils.set_random_seed(3)
        model = small() if sys.argv[4] == "small" else builders.image_classifier(
            "MobileNet-0.25", 10, image_size=32, weights="demo", dropout=0.3
        )
        found, task = data.load("demo", image_size=(32, 32), limit=160)
        ends, whole = [], trainee.Trainee.train
        def train_and_look(self, *given, **named):
            logs = whole(self, *given, **named)
            ends.append(digest([*self.variables, *self.optimizer.variables]))
            return logs
        trainee.Trainee.train = train_and_look
        history = training.fine_tune(
            model, task, found, strategy, output=folder, cache=cache, batch_size=16, save_every=0
        )
        told = {"variables": digest(model.variables), "end": ends[-1:], "history": dict(history)}
        (folder / "ended.json").write_text(json.dumps(told, sort_keys=True))

    def started(*given):
        process = os.fork()
        if process:
            return process
        try:
            train(*given)
        finally:
            os._exit(0 if (given[0] / "ended.json").exists() else 1)
"""

_KILL_AT_RANDOM = """
    generator, fallen, ended = random.Random(7), 0, 0
    while fallen < kills:
        for name in names:
            for cache in ("auto", "off"):
                setting = (STRATEGIES[name], cache)
                straight = parent / f"{name}-{cache}"
                if not straight.exists():
                    began = time.monotonic()
                    assert os.waitpid(started(straight, *setting), 0)[1] == 0
                    (straight / "took").write_text(str(time.monotonic() - began))
                took, folder = float((straight / "took").read_text()), parent / f"killed-{name}-{cache}"
                while not (folder / "ended.json").exists():
                    process = started(folder, *setting)
                    if fallen < kills:
                        time.sleep(generator.uniform(0.3, 1.1) * took)
                        os.kill(process, signal.SIGKILL)
                    status = os.waitpid(process, 0)[1]
                    fallen += os.WIFSIGNALED(status)
                    assert os.WIFSIGNALED(status) or status == 0
                expected, found = (json.loads((one / "ended.json").read_text()) for one in (straight, folder))
                if not found["end"]:
                    expected["end"] = []  # killed after the last phase: nothing was left to train
                assert found == expected, (name, cache)
                left = sorted(path.name for path in folder.iterdir())
                assert left == ["checkpoints", "ended.json", "history.csv", "logs"], left
                assert not [path for path in (folder / "checkpoints").iterdir() if path.name.startswith((".", "d"))]
                shutil.rmtree(folder)
                ended += 1
    print(fallen, ended)
"""

_SAVE = """
    import os, signal, sys
    from pathlib import Path
    import numpy as np
    from tftransfer import checkpoints, tensor_files
    from tftransfer.checkpoints import Call, Progress

    parent = Path(sys.argv[1])
    CALL = Call((), 0, 1, None, "", "")

    def progress(steps):
        tensors = {"variable": {"0.0": np.full((100, 100), steps, np.float32)}}
        return Progress(0, 0, steps, steps, tensors, {"steps": steps})

    def save(steps):
        checkpoints.save_progress(parent, CALL, progress(steps))

    def last():
        found = checkpoints.latest(parent, CALL)
        assert not found.notes, found.notes
        steps = found.progress.steps
        assert (found.progress.kinds["variable"]["0.0"] == steps).all()
        assert not [path for path in (parent / "checkpoints").iterdir() if path.name.startswith(".")]
        return steps
"""

_KILL_AT_EVERY_CALL = """
    save(1)
    steps, fallen = 1, 0
    targets = [(os, "mkdir"), (os, "rename"), (os, "replace"), (os, "fsync"), (os, "unlink"), (os, "rmdir")]
    targets += [(tensor_files, "save_file"), (Path, "write_text")]
    for module, name in targets:
        original, place = getattr(module, name), 0
        while True:
            place += 1
            process = os.fork()
            if not process:
                calls = []
                def counted(*given, **named):
                    calls.append(name)
                    if len(calls) == place:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return original(*given, **named)
                setattr(module, name, counted)
                save(steps + 1)
                os._exit(0)
            died = os.WIFSIGNALED(os.waitpid(process, 0)[1])
            found = last()
            assert found in ((steps, steps + 1) if died else (steps + 1,))
            steps = found
            if not died:
                break
            fallen += 1
        assert place > 1, f"{name} is never called"
    print(fallen)
"""

_DAMAGE = """
    import shutil
    from random import Random

    flips, cuts = int(sys.argv[2]), int(sys.argv[3])
    save(1)
    save(2)
    pristine = parent.with_name("pristine")
    shutil.copytree(parent, pristine)
    newest = parent / "checkpoints" / "000-000000002"
    files = sorted(path.relative_to(parent) for path in parent.rglob("*") if path.is_file())
    assert len(files) == 6
    generator = Random(0)

    def flipped(content):
        content = bytearray(content)
        place = generator.randrange(8 * len(content))
        content[place // 8] ^= 1 << place % 8
        return bytes(content)

    def cut(content):
        return content[: generator.randrange(len(content))]

    def check(damaged):
        found = checkpoints.latest(parent, CALL)
        assert len(found.notes) == 2 and damaged in found.notes[0], (damaged, found.notes)
        expected = 1 if damaged == newest.name else 2
        assert found.progress.steps == expected
        assert (found.progress.kinds["variable"]["0.0"] == expected).all()
        shutil.rmtree(parent)
        shutil.copytree(pristine, parent)

    for number in range(flips + cuts):
        file = parent / generator.choice(files)
        file.write_bytes((flipped if number < flips else cut)(file.read_bytes()))
        check(file.parent.name)
    for file in files:
        (parent / file).unlink()
        check(file.parent.name)
    for name in ("extra", ".hidden"):
        (newest / name).touch()
        check(newest.name)
    state, manifest, seal = sorted(newest.iterdir(), reverse=True)
    assert state.name == "state.safetensors"
    state.write_bytes((newest.with_name("000-000000001") / state.name).read_bytes())
    check(newest.name)
    print(flips + cuts)
"""

_FAULTS = """
    import errno, shutil
    import keras
    from tftransfer.history import History, PhaseRecord
    from tftransfer.strategies import Phase

    CALL = Call((Phase("one"), Phase("two")), 0, 1, None, "", "")
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(2, name="logits")])
    pristine = parent.with_name("pristine")

    def step(phase, steps):
        checkpoints.save_progress(parent, CALL, Progress(phase, 0, steps, steps, progress(steps).kinds, {}))

    def end(phases):
        history = History()
        history.phases += [PhaseRecord(phase, (), 0.0, 1, 1, 0.0) for phase in CALL.strategy[:phases]]
        model.get_layer("logits").bias.assign([phases, phases])
        checkpoints.save(parent, CALL, model, history, None, "", {})

    def damage(name):
        file = parent / "checkpoints" / name / "state.safetensors"
        file.write_bytes(file.read_bytes()[:-1])

    def found():
        "Return `(finished phases, steps of the next one)`, of which all that was written is there."
        found = checkpoints.latest(parent, CALL)
        phases = len(found.kept.history.phases) if found.kept else 0
        assert not found.kept or (found.kept.weights["1.bias"] == phases).all()
        steps = found.progress.steps if found.progress else 0
        assert not found.progress or found.progress.phase == phases
        assert not found.progress or (found.progress.kinds["variable"]["0.0"] == steps).all()
        return phases, steps

    # What is there before: whatever fails, it or what the call writes is found afterwards.
    CASES = {
        "a step": ([lambda: step(0, 1)], lambda: step(0, 2), [(0, 1), (0, 2)]),
        "a third step": ([lambda: step(0, 1), lambda: step(0, 2)], lambda: step(0, 3), [(0, 2), (0, 3)]),
        "a step once more": ([lambda: step(0, 1), lambda: step(0, 2)], lambda: step(0, 2), [(0, 2)]),
        "a phase": ([lambda: step(0, 3)], lambda: end(1), [(0, 3), (1, 0)]),
        "a second phase": ([lambda: end(1), lambda: step(1, 3)], lambda: end(2), [(1, 3), (2, 0)]),
        "a phase once more": ([lambda: end(1), lambda: end(2)], lambda: end(2), [(2, 0)]),
        "finish": (
            [lambda: end(1), lambda: step(1, 3), lambda: end(2)], lambda: checkpoints.finish(parent), [(2, 0)]
        ),
        "latest": ([lambda: end(1), lambda: step(1, 3)], found, [(1, 3)]),
        "latest with a damaged step": (
            [lambda: end(1), lambda: step(1, 3), lambda: step(1, 4), lambda: damage("001-000000004")], found, [(1, 3)]
        ),
        "latest with a damaged phase": (
            [lambda: end(1), lambda: end(2), lambda: step(2, 3), lambda: damage("002-000000000")], found, [(1, 0)]
        ),
        "latest with one more that is aside": (
            [lambda: step(0, 1), lambda: step(0, 2), lambda: damage("000-000000002"), found, lambda: step(0, 2),
             lambda: damage("000-000000002")], found, [(0, 1)],
        ),
        "clear": ([lambda: end(1), lambda: step(1, 3)], lambda: checkpoints.clear(parent), [(1, 3), (1, 0), (0, 0)]),
    }
    TARGETS = [(os, name) for name in ("mkdir", "rename", "replace", "fsync", "open", "unlink", "rmdir")]
    TARGETS += [(tensor_files, "save_file"), (Path, "write_text"), (shutil, "disk_usage")]
    faults, hit = 0, set()

    def with_fault(act, number, module, name, place):
        "Whether the call was reached, and whether its fault came out."
        original, calls = getattr(module, name), []
        def faulty(*given, **named):
            calls.append(name)
            if len(calls) != place:
                return original(*given, **named)
            if name == "save_file":
                raise tensor_files.SafetensorError(os.strerror(number))
            raise OSError(number, os.strerror(number))
        setattr(module, name, faulty)
        try:
            act()
        except OSError:
            return True, True
        finally:
            setattr(module, name, original)
        return len(calls) >= place, False

    for case, (before, act, expected) in CASES.items():
        shutil.rmtree(parent, ignore_errors=True)
        for one in before:
            one()
        shutil.rmtree(pristine, ignore_errors=True)
        shutil.copytree(parent, pristine)
        for number in (getattr(errno, name) for name in sys.argv[2].split(",")):
            for module, name in TARGETS:
                place, reached = 0, True
                while reached:
                    place += 1
                    shutil.rmtree(parent)
                    shutil.copytree(pristine, parent)
                    reached, raised = with_fault(act, number, module, name, place)
                    assert not (raised and act is found), (case, name, place)
                    assert found() in expected, (case, name, place, found(), expected)
                    left = [path.name for path in (parent / "checkpoints").glob(".*")]
                    assert not left, (case, name, place, left)
                    faults += reached
                    hit |= {name} if reached else set()
    assert hit == {name for _, name in TARGETS}, hit
    print(faults)
"""


def _run(begin, code, *arguments):
    program = textwrap.dedent(begin) + textwrap.dedent(code)
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [int(number) for number in done.stdout.split()]


def test_a_run_that_is_killed_ten_times_ends_as_if_it_were_not(tmp_path):
    fallen, ended = _run(_TRAIN, _KILL_AT_RANDOM, tmp_path, 10, "freeze_then_unfreeze", "small")
    assert fallen >= 10
    assert ended >= 1


@pytest.mark.slow
def test_runs_that_are_killed_two_hundred_times_end_as_if_they_were_not(tmp_path):
    fallen, ended = _run(_TRAIN, _KILL_AT_RANDOM, tmp_path, 200, "freeze_then_unfreeze,gradual,lora", "demo")
    assert fallen >= 200
    assert ended >= 6


def test_a_save_that_is_killed_at_any_call_leaves_the_old_one_or_the_new_one(tmp_path):
    (fallen,) = _run(_SAVE, _KILL_AT_EVERY_CALL, tmp_path)
    assert fallen >= 15


@pytest.mark.parametrize(("flips", "cuts"), [(40, 10), pytest.param(1000, 100, marks=pytest.mark.slow)])
def test_damage_is_noticed_and_the_one_before_is_used(tmp_path, flips, cuts):
    (damaged,) = _run(_SAVE, _DAMAGE, tmp_path / "run", flips, cuts)
    assert damaged == flips + cuts


@pytest.mark.parametrize("names", ["ENOSPC", pytest.param("EIO,EROFS,EMFILE,EDQUOT", marks=pytest.mark.slow)])
def test_a_fault_at_any_write_leaves_what_was_written_before(tmp_path, names):
    (faults,) = _run(_SAVE, _FAULTS, tmp_path / "run", names)
    assert faults >= 100 * len(names.split(","))
