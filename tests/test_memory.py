"""What fits into memory is estimated, tried where that is not sure, and halved until it does."""

import keras
import numpy as np
import pytest

from tftransfer import feeding, memory, training
from tftransfer.strategies import Phase

MIB = 2**20


@pytest.fixture(scope="module")
def part():
    inputs = keras.Input((32, 32, 3))
    x = keras.layers.Conv2D(64, 3, padding="same")(inputs)
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, keras.layers.Dense(3)(x))


def test_the_estimate_is_made_of_the_layers_outputs(part):
    per_example = 2 * 4 * (32 * 32 * 3 + 32 * 32 * 64 + 64 + 3)
    weights = 4 * (3 * 3 * 3 * 64 + 64 + 64 * 3 + 3)
    assert memory.step_bytes(part, 5, (32, 32)) == 5 * per_example + weights
    nested = keras.Model(part.input, part(part.input))
    assert memory.step_bytes(nested, 5, (32, 32)) >= 5 * per_example + weights
    anything = keras.Input((None, None, 3))
    of_any_size = keras.Model(anything, keras.layers.Conv2D(2, 1)(anything))
    assert memory.step_bytes(of_any_size, 1, (4, 5)) == 2 * 4 * (4 * 5 * 3 + 4 * 5 * 2) + 4 * (3 * 2 + 2)


def test_a_batch_that_plainly_fits_is_not_tried(part):
    def never(*given):
        raise AssertionError(given)

    assert memory.divide(part, 32, (32, 32), memory.Room(1024 * MIB), never) == memory.Division()


@pytest.mark.parametrize(("most", "parts"), [(256, 1), (100, 4), (1, 256)])
def test_a_batch_is_halved_until_a_trial_takes_it(part, most, parts):
    tried = []

    def attempt(part, examples, room, image_size):
        tried.append(examples)
        return examples <= most

    waiting = 3 * 256 * 32 * 32 * 3 * 4
    room = memory.Room(memory.step_bytes(part, 256, (32, 32)) + waiting)
    found = memory.divide(part, 256, (32, 32), room, attempt)
    by_estimate = 256 if parts > 4 else parts  # small ones need no trial
    assert found.micro_batches <= by_estimate
    if parts <= 4:
        assert found.micro_batches == parts
        assert tried == [256 // 2**n for n in range(len(tried))]
        assert ("does not fit" in found.reason) == (parts > 1)


def test_what_cannot_be_tried_or_is_hopeless_is_halved_by_its_estimate(part):
    room = memory.Room(64 * MIB)
    found = memory.divide(part, 4096, (32, 32), room, lambda *given: None)
    assert 64 <= found.micro_batches < 4096
    assert memory.step_bytes(part, 4096 // found.micro_batches, (32, 32)) <= room.least / 8  # beside the pictures
    asked = []
    memory.divide(part, 4096, (32, 32), memory.Room(512 * MIB), lambda *given: asked.append(given[1]))
    assert max(asked) < 4096


def test_the_frozen_part_is_bounded_too(part):
    assert memory.most_frozen(part, 32, (32, 32), memory.Room(1024 * MIB)) == 32
    assert memory.most_frozen(part, 32, (32, 32), memory.Room(8 * MIB)) == 4
    assert memory.most_frozen(part, 32, (32, 32), memory.Room(0)) == 1
    assert memory.most_frozen(None, 32, (32, 32), memory.Room(0)) == 32


@pytest.mark.parametrize(
    ("given", "chunk", "at_a_time"), [({}, 32, 100), ({"micro_batches": 8}, 13, 13), ({"most_frozen": 4}, 4, 100)]
)
def test_validation_and_extraction_take_what_fits(given, chunk, at_a_time):
    steps = feeding.Steps(0, 0, 3, 3, 0, 100, 1, **given)
    assert (steps.chunk, steps.at_a_time) == (chunk, at_a_time)


def test_control_groups_leave_what_they_leave(tmp_path):
    (tmp_path / "own").write_text("0::/a/b\n")
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name, value in {"memory.max": "max", "memory.current": "5"}.items():
        (tmp_path / "a" / "b" / name).write_text(f"{value}\n")
    for name, value in {"memory.max": "1000", "memory.current": "700", "memory.stat": "inactive_file 50"}.items():
        (tmp_path / "a" / name).write_text(f"{value}\n")
    assert memory._left_in_groups(str(tmp_path / "own"), tmp_path) == 350
    assert memory._left_in_groups(str(tmp_path / "none"), tmp_path) == float("inf")
    (tmp_path / "old").write_text("4:memory:/c\n2:cpu:/d\n")
    (tmp_path / "memory" / "c").mkdir(parents=True)
    for name, value in {"memory.limit_in_bytes": "90", "memory.usage_in_bytes": "40"}.items():
        (tmp_path / "memory" / "c" / name).write_text(value)
    assert memory._left_in_groups(str(tmp_path / "old"), tmp_path) == 50


def test_a_decision_is_in_the_record_and_holds_when_the_phase_goes_on(
    small_network, small_task, small_data, monkeypatch, capsys, tmp_path
):
    phase, decided = Phase("all", "all", 1, 0.05), []

    def divide(*given):
        decided.append(given)
        return memory.Division(3, "a batch of 8 does not fit")

    def tuned(**given):
        keras.utils.set_random_seed(0)
        return training.fine_tune(small_network(), small_task, small_data, (phase,), batch_size=8, **given)

    monkeypatch.setattr(memory, "divide", divide)
    history = tuned(quiet=False)
    record = history.phases[0]
    assert (record.micro_batches, record.memory) == (3, "a batch of 8 does not fit")
    assert "all: a batch of 8 does not fit" in capsys.readouterr().out
    assert not tuned(output=tmp_path, time_limit=0).complete
    assert len(decided) == 2
    again = tuned(output=tmp_path)
    assert len(decided) == 2
    assert (again.phases[0].micro_batches, again.phases[0].memory) == (3, record.memory)
    assert dict(again) == dict(history)


@pytest.mark.slow
def test_a_trial_says_whether_a_step_fits(part):
    assert memory.tried(part, 8, memory.Room(2048 * MIB), (32, 32)) is True
    assert memory.tried(part, 100_000, memory.Room(2048 * MIB), (32, 32)) is False

    class Own(keras.layers.Layer):
        def call(self, inputs):
            return inputs

    own = keras.Model(part.input, Own()(part.output))
    assert memory.tried(own, 8, memory.Room(2048 * MIB), (32, 32)) is None


_LIMITED = """
    import json, resource, sys
    import psutil
    from tftransfer import cli
    cli.import_tensorflow()
    import numpy as np, keras, tensorflow as tf
    from tftransfer import memory, tasks, training
    from tftransfer.data import Data, Examples, Pictures
    from tftransfer.strategies import Phase

    def examples(count, seed):
        generator = np.random.default_rng(seed)
        targets = np.arange(count, dtype=np.int32) % 3
        pictures = generator.integers(0, 120, (count, 64, 64, 3), np.uint8)
        pictures[np.arange(count), :, :, targets] += 100
        held = tf.constant(pictures)
        names = tuple(map(str, range(count)))
        source = Pictures(names, lambda index: tf.gather(held, index), (64, 64), at_once=True)
        return Examples(source, targets, np.ones(count, np.float32))

    data = Data("colours", ("a", "b", "c"), examples(2100, 0), examples(30, 1), examples(6, 2))
    layers, inputs = keras.layers, keras.Input((64, 64, 3))
    x = layers.Rescaling(1 / 127.5, offset=-1.0)(inputs)
    for number in range(7):
        x = layers.ReLU()(layers.Conv2D(64, 1, name=f"conv_{number}")(x))
    x = layers.GlobalAveragePooling2D(name="head_pool")(x)
    model = keras.Model(inputs, layers.Dense(3, name="logits")(x))
    task, phase = tasks.SingleLabel(data.labels), Phase("tune", "all", 1, 1e-3, warmup=0)
    room, parts = map(int, sys.argv[1:])
    training.fine_tune(model, task, data, (phase,), batch_size=2, max_steps=1)  # threads, and what is loaded late
    for number, weight in enumerate(model.weights):
        first = keras.initializers.HeNormal(number) if "kernel" in weight.path else keras.initializers.Zeros()
        weight.assign(first(weight.shape))
    if parts:
        memory.divide = lambda *given: memory.Division(parts, "given")
    if room:
        taken = psutil.Process().memory_info().vms
        resource.setrlimit(resource.RLIMIT_AS, (taken + room * 2**20, resource.RLIM_INFINITY))
    history = training.fine_tune(model, task, data, (phase,), batch_size=2048)
    record = history.phases[0]
    print(json.dumps({"loss": history["loss"], "val_loss": history["val_loss"], "parts": record.micro_batches,
                      "said": record.memory}))
"""


@pytest.mark.slow
def test_a_batch_that_is_64_times_too_large_ends_by_itself(run_python, monkeypatch):
    """2,048 examples take 30 GB; where there are 1.4 they are the same step in parts, and nobody has to ask for it."""
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")  # the C library would reserve that much for threads
    limited = run_python(_LIMITED, 1400, 0)
    assert limited["parts"] >= 64
    assert "does not fit" in limited["said"]
    again = run_python(_LIMITED, 0, 2 * limited["parts"])
    assert again["said"] == "given"
    np.testing.assert_allclose(limited["loss"], again["loss"], rtol=1e-5)
    np.testing.assert_allclose(limited["val_loss"], again["val_loss"], rtol=1e-5)
