import dataclasses
import errno
import gc
import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
import types

import keras
import numpy as np
import pytest
import tensorflow as tf

from tftransfer import constants, features, feeding, prefix, strategies, trainable, training
from tftransfer.data import order
from tftransfer.data.augment import named
from tftransfer.errors import InputError
from tftransfer.features import Room
from tftransfer.shelf import Shelf
from tftransfer.strategies import Phase

PHASES = {
    "head": Phase("head", "head", 3, 0.01),
    "top": Phase("top", "last:1", 3, 0.01),
    "views": Phase("views", "last:1", 4, 0.01, augmentation="light", views=2),
    "averaged": Phase("averaged", "last:1", 3, 0.01, augmentation="light", views=2, average_views=True, mixup=0.4),
    "endless": Phase("endless", "head", 3, 0.01, augmentation="light"),
    "dropout": Phase("dropout", "head", 3, 0.01, mixup=0.4),
}


@pytest.fixture
def data(small_data):
    """Pictures whose content is known by digests."""
    splits = {}
    for name in ("train", "validation", "test"):
        examples = getattr(small_data, name)
        digests = tuple(f"{number:064x}" for number in range(len(examples)))
        pictures = dataclasses.replace(examples.pictures, digests=tuple(f"{len(name)}{d[1:]}" for d in digests))
        splits[name] = dataclasses.replace(examples, pictures=pictures)
    return dataclasses.replace(small_data, **splits)


BY_DEFAULT = {("views", "files"), ("averaged", "memory")}
CASES = [
    pytest.param(*case, marks=() if case in BY_DEFAULT else pytest.mark.slow)
    for case in itertools.product(PHASES, ("memory", "files"))
]


@pytest.mark.parametrize(("name", "place"), CASES)
def test_kept_or_computed_trains_to_the_same_bits(small_network, small_task, data, name, place, tmp_path, monkeypatch):
    if place == "files":
        monkeypatch.setattr(features, "MEMORY_SHARE", 0.0)
    start, ended, logs = small_network(dropout=0.3).get_weights(), [], []
    for cache in ("auto", "off", "auto"):
        model = small_network(dropout=0.3)
        model.set_weights(start)
        history = training.fine_tune(
            model, small_task, data, (PHASES[name],), batch_size=7, cache=cache, cache_dir=tmp_path
        )
        ended.append([w.numpy() for w in model.weights])
        logs.append(dict(history))
        kept = "kept" in history.phases[0].store
        assert kept == (cache == "auto" and name != "endless"), history.phases[0].store
    assert "0 computed" in history.phases[0].store or name == "endless"
    assert logs[0] == logs[1] == logs[2]
    for one, two, three in zip(*ended, strict=True):
        np.testing.assert_array_equal(one, two)
        np.testing.assert_array_equal(one, three)


def _tuned(small_network, small_task, data, cache_dir):
    """Return the weights that a run with a cache folder ends with, and what it says of its store."""
    keras.utils.set_random_seed(0)
    model = small_network()
    history = training.fine_tune(model, small_task, data, (PHASES["top"],), batch_size=7, cache_dir=cache_dir)
    return model.get_weights(), history.phases[0].store


def _damage(folder, kind):
    for number, file in enumerate(sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)):
        contents = bytearray(file.read_bytes())
        if kind == "cut short":
            file.write_bytes(contents[: len(contents) // 2])
        elif kind == "a flipped bit":
            contents[(7 * number) % len(contents)] ^= 4
            file.write_bytes(contents)
        else:
            file.unlink()


@pytest.mark.slow  # by default `test_damaged_files_are_computed_again` below, and `test_shelf.py`
@pytest.mark.parametrize("place", ["memory", "files"])
@pytest.mark.parametrize("kind", ["cut short", "a flipped bit", "removed"])
def test_a_run_goes_on_with_damaged_files(small_network, small_task, data, tmp_path, monkeypatch, kind, place):
    if place == "files":
        monkeypatch.setattr(features, "MEMORY_SHARE", 0.0)
    expected, _ = _tuned(small_network, small_task, data, tmp_path)
    _damage(tmp_path, kind)
    found, said = _tuned(small_network, small_task, data, tmp_path)
    for one, two in zip(expected, found, strict=True):
        np.testing.assert_array_equal(one, two)
    assert "24 computed" in said
    assert ("damaged" in said) == (kind != "removed")
    assert "0 computed" in _tuned(small_network, small_task, data, tmp_path)[1]


@pytest.mark.parametrize("place", [pytest.param("memory", marks=pytest.mark.slow), "files"])
def test_a_run_goes_on_when_the_disk_is_full(small_network, small_task, data, tmp_path, monkeypatch, place):
    expected, _ = _tuned(small_network, small_task, data, None)
    if place == "files":
        monkeypatch.setattr(features, "MEMORY_SHARE", 0.0)
    replace, count = os.replace, itertools.count()

    def full(*given):
        if next(count) >= 10:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(*given)

    monkeypatch.setattr(os, "replace", full)
    found, said = _tuned(small_network, small_task, data, tmp_path)
    for one, two in zip(expected, found, strict=True):
        np.testing.assert_array_equal(one, two)
    assert "No space left" in said
    assert said.startswith(f"kept in {place}")


def test_a_disk_without_room_for_what_training_reads_is_gone_without(
    small_network, small_task, data, tmp_path, monkeypatch
):
    expected, _ = _tuned(small_network, small_task, data, None)
    monkeypatch.setattr(features, "MEMORY_SHARE", 0.0)

    def full(*given):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    found, said = _tuned(small_network, small_task, data, tmp_path)
    for one, two in zip(expected, found, strict=True):
        np.testing.assert_array_equal(one, two)
    assert said.startswith("computed in every epoch")
    assert "has no room for what training reads: No space left" in said


class _Damages(keras.callbacks.Callback):
    """Damages files while training reads them."""

    def __init__(self, folder, kind):
        super().__init__()
        self.folder, self.kind = folder, kind

    def on_epoch_end(self, epoch, logs=None):
        _damage(self.folder, self.kind)


@pytest.mark.parametrize("kind", [pytest.param("a flipped bit", marks=pytest.mark.slow), "removed"])
def test_files_that_are_damaged_while_training_runs_are_nothing_to_it(
    small_network, small_task, data, tmp_path, monkeypatch, kind
):
    expected, _ = _tuned(small_network, small_task, data, None)
    monkeypatch.setattr(features, "MEMORY_SHARE", 0.0)
    keras.utils.set_random_seed(0)
    model, damages = small_network(), _Damages(tmp_path, kind)
    training.fine_tune(model, small_task, data, (PHASES["top"],), batch_size=7, cache_dir=tmp_path, callbacks=[damages])
    for one, two in zip(expected, model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, two)


def test_a_cache_folder_that_cannot_be_written_is_gone_without(small_network, small_task, data, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    expected, _ = _tuned(small_network, small_task, data, None)
    found, said = _tuned(small_network, small_task, data, tmp_path / "file" / "cache")
    for one, two in zip(expected, found, strict=True):
        np.testing.assert_array_equal(one, two)
    assert said.startswith("kept in memory")
    assert "cannot be written" in said


_KEEPS = """
    import json, os, signal, sys
    from pathlib import Path
    import numpy as np
    import keras
    from tftransfer import constants, features
    from tftransfer.data import Examples
    from tftransfer.data.augment import named
    from tftransfer.data.examples import Pictures
    from tftransfer.shelf import Shelf
    import tensorflow as tf
    folder, dies_after = Path(sys.argv[1]), int(sys.argv[2])
    pictures = tf.constant(np.random.default_rng(0).integers(0, 256, (200, 8, 8, 3)).astype(np.uint8))
    digests = tuple(f"{number:064x}" for number in range(200))
    found = Pictures(digests, lambda index: tf.gather(pictures, index), (8, 8), digests, at_once=True)
    examples = Examples(found, np.zeros(200, np.int64), np.ones(200, np.float32))
    inputs = keras.Input((8, 8, 3))
    outputs = keras.layers.Conv2D(4, 3, kernel_initializer=keras.initializers.GlorotUniform(0))(inputs)
    put = Shelf.put
    def dying(*given):
        if dies_after == dying.count:
            os.kill(os.getpid(), signal.SIGKILL)
        dying.count += 1
        return put(*given)
    dying.count = 0
    Shelf.put = dying
    below = constants.Constants(keras.Model(inputs, outputs), 32)
    room = features.Room(0 if sys.argv[3] == "files" else 10**9, Shelf(folder))
    kept = features.keep(below, examples, named("none"), views=1, seed=0, room=room, key=below.digest)
    (values,) = kept.read(tf.range(200, dtype=tf.int64), tf.constant(0, tf.int64))
    print(json.dumps([kept.computed, room.shelf.notes, values.numpy().astype(float).sum(axis=(1, 2, 3)).tolist()]))
"""


def _keeping(folder, dies_after, place):
    command = [sys.executable, "-c", textwrap.dedent(_KEEPS), str(folder), str(dies_after), place]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_two_processes_share_a_store_and_one_that_is_killed_leaves_whole_items(tmp_path):
    killed = _keeping(tmp_path, 70, "memory")
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    both = [_keeping(tmp_path, -1, place) for place in ("memory", "files")]
    answers = [json.loads(one.communicate()[0].splitlines()[-1]) for one in both]
    after = json.loads(_keeping(tmp_path, -1, "files").communicate()[0].splitlines()[-1])
    assert all(one[0] <= 130 and not one[1] for one in answers)
    assert after[0] == 0
    assert answers[0][2] == answers[1][2] == after[2]
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 200


def _of_any_size(small_network):
    """Return the small network for pictures of any size."""
    one = small_network()
    inputs = keras.Input((None, None, 3), name="image")
    return keras.Model(inputs, one._run_through_graph([inputs], operation_fn=lambda operation: operation))


@pytest.mark.parametrize("selector", ["head", pytest.param("last:1", marks=pytest.mark.slow)])
def test_pictures_of_another_size_are_others(small_network, small_task, small_data, data, tmp_path, selector):
    """A network that takes any size gives pooled features of one size for all of them."""
    small = {}
    for name in ("train", "validation", "test"):
        examples = getattr(data, name)
        load = examples.pictures.load
        halved = dataclasses.replace(
            examples.pictures, load=lambda index, load=load: load(index)[..., ::2, ::2, :], image_size=(16, 16)
        )
        small[name] = dataclasses.replace(examples, pictures=halved)
    phase = (Phase("one", selector, 3, 0.01),)
    for given in (data, dataclasses.replace(data, **small)):
        model = _of_any_size(small_network)
        start = model.get_weights()
        said = training.fine_tune(model, small_task, given, phase, batch_size=7, cache_dir=tmp_path).phases[0].store
        assert "24 computed" in said
        ended = model.get_weights()
        model.set_weights(start)
        training.fine_tune(model, small_task, given, phase, batch_size=7, cache="off")
        for one, two in zip(ended, model.get_weights(), strict=True):
            np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("place", ["memory", "files"])
def test_tensors_of_several_types_come_back(data, tmp_path, place):
    """A mask crosses a cut beside what it masks, and numbers of half precision cross it in mixed precision."""
    inputs = keras.Input((32, 32, 3))
    pooled = keras.layers.GlobalAveragePooling2D()(inputs)
    outputs = [pooled, keras.ops.greater(pooled, 128.0), keras.ops.cast(pooled, "bfloat16")]
    below = constants.Constants(keras.Model(inputs, outputs), 32)
    room = Room(10**9 if place == "memory" else 0, Shelf(tmp_path))
    for expected in (24, 0):
        kept = features.keep(below, data.train, named("none"), views=1, seed=0, room=room, key="key")
        numbers, mask, halves = kept.read(tf.range(24, dtype=tf.int64), tf.constant(0, tf.int64))
        assert (kept.computed, kept.in_memory) == (expected, place == "memory")
        np.testing.assert_array_equal(mask.numpy(), numbers.numpy() > 128.0)
        np.testing.assert_array_equal(halves.numpy(), tf.cast(numbers, tf.bfloat16).numpy())
        assert 0 < mask.numpy().mean() < 1
        first = next(iter(order.in_order(data.train, 24, feeding._read(kept))))[0]
        for one, two in zip(first, (numbers, mask, halves), strict=True):
            np.testing.assert_array_equal(one.numpy(), two.numpy())


def test_a_file_of_features_is_gone_with_what_reads_it(data, tmp_path, small_network):
    below, room = constants.Constants(_frozen(small_network), 32), Room(0, Shelf(tmp_path))
    gc.collect()
    opened = len(os.listdir("/proc/self/fd"))
    kept = features.keep(below, data.train, named("none"), views=1, seed=0, room=room, key="key")
    batches = order.in_order(data.train, 8, feeding._read(kept))
    assert len(list(batches)) == 3
    assert len(os.listdir("/proc/self/fd")) == opened + 1
    del kept, batches
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == opened


def test_a_run_that_was_stopped_while_it_computed_goes_on(small_network, small_task, data, tmp_path, monkeypatch):
    put, count = Shelf.put, itertools.count()

    def stopped(*given):
        if next(count) == 15:
            raise KeyboardInterrupt
        return put(*given)

    monkeypatch.setattr(Shelf, "put", stopped)
    with pytest.raises(KeyboardInterrupt):
        _tuned(small_network, small_task, data, tmp_path)
    monkeypatch.undo()
    found, said = _tuned(small_network, small_task, data, tmp_path)
    assert "9 computed" in said
    for one, two in zip(_tuned(small_network, small_task, data, None)[0], found, strict=True):
        np.testing.assert_array_equal(one, two)


GRADUAL = tuple(
    Phase(selector, selector, 4, 0.01, augmentation="light", views=2) for selector in ("head", "last:1", "from:conv_2")
)


def _stage_calls(monkeypatch) -> list[tuple[str, int]]:
    """Note how many examples go through each graph of constants, by the name of its last layer."""
    calls, plain = [], constants.Constants.after

    def after(self, inputs):
        calls.append((self._network.layers[-1].name, int(inputs[0].shape[0] or 0)))
        return plain(self, inputs)

    monkeypatch.setattr(constants.Constants, "after", after)
    return calls


@pytest.mark.parametrize("place", [pytest.param("memory", marks=pytest.mark.slow), "files"])
def test_the_lowest_cut_that_a_later_phase_needs_is_computed_once(
    small_network, small_task, data, tmp_path, monkeypatch, place
):
    monkeypatch.setattr(feeding, "_PAYS", 0.0)
    monkeypatch.setattr(feeding, "_SHARED", 0.0)
    if place == "files":
        monkeypatch.setattr(features, "MEMORY_SHARE", 0.0)
    start, ended = small_network().get_weights(), []
    for cache in ("auto", "off"):
        model = small_network()
        model.set_weights(start)
        calls = _stage_calls(monkeypatch)
        history = training.fine_tune(
            model, small_task, data, GRADUAL, batch_size=8, cache=cache, cache_dir=tmp_path / "kept"
        )
        ended.append(model.get_weights())
        if cache == "auto":
            lowest = next(name for name, _ in calls)
            once = 2 * len(data.train) + len(data.validation)
            assert sum(count for name, count in calls if name == lowest) == once
            assert [phase.store.endswith("0 computed") for phase in history.phases] == [False, False, True]
            assert all(phase.store.startswith("kept") for phase in history.phases)
    for kept, computed in zip(*ended, strict=True):
        np.testing.assert_array_equal(kept, computed)


def _epochs(phase):
    return phase.epochs


def test_nothing_is_shared_beyond_a_phase_that_trains_all(small_network, monkeypatch):
    monkeypatch.setattr(feeding, "_PAYS", 0.0)
    monkeypatch.setattr(feeding, "_SHARED", 0.0)
    model = small_network()
    every = Phase("all", "all", 1, 0.01)
    phases, variables = feeding.still_frozen(model, (GRADUAL[0], every, GRADUAL[2]), _epochs)
    assert (phases, variables) == ((), [])
    phases, variables = feeding.still_frozen(model, GRADUAL, _epochs)
    assert phases == GRADUAL[1:]
    assert {variable.path.split("/")[0] for variable in variables} >= {"conv_2", "conv_3"}


def test_half_precision_is_the_same_kept_or_not(small_network, small_task, data):
    start, ended = small_network().get_weights(), []
    for cache, dtype in (("auto", "float16"), ("off", "float16"), ("auto", "float32")):
        model = small_network()
        model.set_weights(start)
        training.fine_tune(model, small_task, data, (PHASES["top"],), batch_size=7, cache=cache, cache_dtype=dtype)
        ended.append(model.get_weights())
    differs = []
    for half, recomputed, single in zip(*ended, strict=True):
        np.testing.assert_array_equal(half, recomputed)
        np.testing.assert_allclose(half, single, rtol=0.05, atol=0.01)
        differs.append(not np.array_equal(half, single))
    assert any(differs)


@pytest.mark.slow
@pytest.mark.skipif(not constants.has_bfloat16(), reason="needs a processor with AVX512-BF16 or AMX")
def test_bfloat16_is_the_same_kept_or_not_and_its_error_is_said(small_network, small_task, data):
    model = small_network()
    start, ended, said = model.get_weights(), [], []
    for cache, kind in (("auto", "bfloat16"), ("off", "bfloat16"), ("auto", "float32")):
        model.set_weights(start)
        history = training.fine_tune(
            model, small_task, data, (PHASES["top"],), batch_size=7, cache=cache, frozen_dtype=kind
        )
        ended.append(model.get_weights())
        said.append(history.phases[0].store)
    for kept, computed in zip(*ended[:2], strict=True):
        np.testing.assert_array_equal(kept, computed)
    assert any(not np.array_equal(narrow, exact) for narrow, exact in zip(ended[0], ended[2], strict=True))
    error = float(said[0].split("differs from float32 by ")[1].split("%")[0])
    assert 0 < error < 5
    assert "bfloat16" not in said[2]


def test_bfloat16_is_refused_where_the_processor_has_none(small_network, small_task, data, monkeypatch):
    monkeypatch.setattr(constants, "has_bfloat16", lambda: False)
    with pytest.raises(InputError, match="AVX512-BF16"):
        training.fine_tune(small_network(), small_task, data, (PHASES["head"],), frozen_dtype="bfloat16")


def test_half_precision_takes_half_the_room(small_network, data):
    frozen, room = _frozen(small_network), Room(2**30)
    both = (constants.Constants(frozen), constants.Constants(frozen, narrow=True))
    single, half = (features.keep(b, data.train, named("none"), views=1, seed=0, room=room).size for b in both)
    assert single == 2 * half


@pytest.mark.parametrize(
    ("argument", "value"),
    [("cache", "on"), ("cache_dtype", "float64"), ("frozen_dtype", "int8"), ("cache_dir", __file__)],
)
def test_bad_options_are_refused(small_network, small_task, data, argument, value):
    with pytest.raises(InputError, match=f"`{argument}`"):
        training.fine_tune(small_network(), small_task, data, (PHASES["head"],), **{argument: value})


def _frozen(small_network, selector="last:1"):
    model = small_network()
    trainable.set_trainable(model, selector)
    return prefix.cut(model).frozen


@pytest.mark.parametrize("memory", [2**30, 0], ids=["memory", "files"])
def test_features_are_those_of_the_network(small_network, data, tmp_path, memory):
    frozen = _frozen(small_network)
    below = constants.Constants(frozen)
    room = Room(memory, Shelf(tmp_path))
    kept = features.keep(below, data.train, named("none"), views=1, seed=0, room=room, key="key")
    assert kept.in_memory == bool(memory)
    chosen = np.array([5, 0, 23, 5])
    pictures = np.stack([data.train.pictures.load(index) for index in chosen]).astype(np.float32)
    found = kept.read(keras.ops.convert_to_tensor(chosen, "int64"), keras.ops.zeros((), "int64"))
    np.testing.assert_allclose(found[0], below(pictures)[0], rtol=1e-3, atol=1e-5)
    again = features.keep(below, data.train, named("none"), views=1, seed=0, room=room, key="key")
    assert (kept.computed, again.computed) == (24, 0)


def test_without_room_nothing_is_kept(small_network, data):
    below = constants.Constants(_frozen(small_network))
    assert features.keep(below, data.train, named("none"), views=1, seed=0, room=Room(10)) is None
    assert features.keep(below, data.train, named("none"), views=1, seed=0, room=Room(2**20)) is not None


def test_another_weight_picture_view_or_seed_is_computed_anew(small_network, data, tmp_path):
    room = Room(2**30, Shelf(tmp_path))
    frozen = _frozen(small_network)

    def computed(examples=data.train, policy="light", views=2, seed=0):
        below, key = constants.Constants(frozen), features.digest_of(frozen)
        return features.keep(below, examples, named(policy), views=views, seed=seed, room=room, key=key).computed

    assert computed() == 48
    assert computed() == 0
    assert computed(views=3) == 24
    assert computed(seed=1) == 48
    assert computed(policy="none", views=1) == 24
    pictures = data.train.pictures
    changed = dataclasses.replace(pictures, digests=("f" * 64, *pictures.digests[1:]))
    assert computed(dataclasses.replace(data.train, pictures=changed)) == 2
    kernel = frozen.get_layer("conv_1").kernel
    kernel.assign(kernel * 1.001)
    assert computed() == 48


def test_what_lies_there_needs_no_more_room(small_network, data, tmp_path):
    below = constants.Constants(_frozen(small_network))

    def keep(limit):
        room = Room(2**30, Shelf(tmp_path, limit))
        return features.keep(below, data.train, named("none"), views=1, seed=0, room=room, key="key"), room.shelf.notes

    size = keep(2**20)[0].size
    again, notes = keep(int(1.5 * size) + 24 * 64)
    assert (again.computed, notes) == (0, [])


def test_a_network_has_one_digest_however_it_was_cut_out(small_network):
    model = small_network()
    body = prefix.body(model)
    trainable.set_trainable(body, "all")
    before = features.digest_of(body)
    trainable.set_trainable(model, "head")
    frozen, body = prefix.cut(model).frozen, prefix.body(model)
    assert before == features.digest_of(frozen) == features.digest_of(body)
    layer = next(layer for layer in body.layers if layer.weights)
    layer.set_weights([1.5 * weight for weight in layer.get_weights()])
    assert before != features.digest_of(frozen) == features.digest_of(body)


def _activated(kind="relu", policy="float32", layer=keras.layers.Activation):
    """Return a network of one kernel of ones, with an activation whose name is its kind."""
    inputs = keras.Input((4,), name="given")
    dense = keras.layers.Dense(3, kernel_initializer="ones", dtype=policy, name=f"dense_{kind}")
    half = keras.layers.Activation("linear", dtype="float32", name="single")(dense(inputs))
    return keras.Model(inputs, layer(kind, name=kind)(half))


class _Silent(keras.layers.Activation):
    def get_config(self):
        raise NotImplementedError("nothing to be said of it")


def test_networks_that_differ_have_different_digests():
    assert features.digest_of(_activated()) == features.digest_of(_activated())
    assert len({features.digest_of(_activated(kind)) for kind in ("relu", "tanh", "gelu")}) == 3
    assert features.digest_of(_activated(policy="mixed_bfloat16")) != features.digest_of(_activated())


def _own_layer(factor):
    """Return a class whose parent's code has a constant in it."""
    space = {"keras": keras, "__name__": "somebodys"}
    text = f"""
class Parent(keras.layers.Activation):
    def call(self, inputs):
        return {factor} * super().call(inputs)

class Child(Parent):
    pass
"""
    exec(textwrap.dedent(text), space)
    return space["Child"]


def _own_function(factor):
    space = {"__name__": "somebodys"}
    exec(f"def given(inputs):\n    return {factor} * inputs", space)
    return space["given"]


def test_the_code_of_somebodys_own_layers_and_functions_counts():
    layers = [features.digest_of(_activated(layer=_own_layer(factor))) for factor in (2, 2, 3)]
    assert layers[0] == layers[1] != layers[2]
    functions = []
    for factor in (2, 2, 3):
        inputs = keras.Input((4,))
        network = keras.Model(inputs, keras.layers.Activation(_own_function(factor))(inputs))
        functions.append(features.digest_of(network))
    assert functions[0] == functions[1] != functions[2]


def test_a_network_that_cannot_be_described_is_kept_for_the_run_alone(small_task, data, tmp_path):
    inputs = keras.Input((32, 32, 3), name="image")
    x = keras.layers.Conv2D(4, 3, strides=4, name="conv_1")(inputs)
    x = keras.layers.GlobalAveragePooling2D(name="head_pool")(_Silent("relu")(x))
    model = keras.Model(inputs, keras.layers.Dense(3, name="logits")(x))
    assert features.digest_of(model) == ""
    for _ in range(2):
        history = training.fine_tune(model, small_task, data, (PHASES["head"],), cache_dir=tmp_path)
        assert history.phases[0].store.startswith("kept in memory")
        assert "24 computed" in history.phases[0].store


def test_what_a_run_keeps_takes_a_share_of_the_memory_altogether(monkeypatch):
    memory = types.SimpleNamespace(available=900)
    monkeypatch.setattr(features.psutil, "virtual_memory", lambda: memory)
    held = features.Kept(lambda chosen, view: [], 0, 100, in_memory=True)
    again = dataclasses.replace(held, computed=1)
    files = features.Kept(lambda chosen, view: [], 0, 10**6, in_memory=False)
    assert features.room().memory == 225
    assert features.room(held=(held, again, files)).memory == 150  # of 1,000 before, a hundred are taken


def test_views_that_are_all_in_files_need_no_picture(small_network, data, tmp_path):
    below, room = constants.Constants(_frozen(small_network), 32), Room(2**30, Shelf(tmp_path))

    def computed(examples):
        return features.keep(below, examples, named("light"), views=2, seed=0, room=room, key="key").computed

    def unreadable(index):
        raise AssertionError("a picture was read")

    assert computed(data.train) == 48
    pictures = dataclasses.replace(data.train.pictures, load=unreadable)
    assert computed(dataclasses.replace(data.train, pictures=pictures)) == 0


def test_what_is_frozen_in_several_phases_is_kept_apart_where_that_saves_something():
    often = Phase("often", "last:1", 20, 0.01)
    uses = [feeding.Use(often, often.epochs, 0.9)] * 3
    assert feeding.pays_to_share(uses, 0.4)
    assert feeding.pays_to_share(uses[:2], 0.4)  # so that all phases but the last come to the same
    assert not feeding.pays_to_share(uses, 0.2)
    assert not feeding.pays_to_share(uses[:1], 0.4)
    assert not feeding.pays_to_share([uses[0], *(dataclasses.replace(use, share=0.05) for use in uses[1:])], 0.4)
    other = dataclasses.replace(often, augmentation="light", views=2)
    assert not feeding.pays_to_share([uses[0], *[dataclasses.replace(uses[0], phase=other)] * 2], 0.4)
    endless = dataclasses.replace(often, augmentation="light")
    assert not feeding.pays_to_share([dataclasses.replace(use, phase=endless) for use in uses], 0.4)


@pytest.mark.parametrize("strategy", [pytest.param("norm_only", marks=pytest.mark.slow), "bias_only"])
def test_a_probe_before_little_that_is_frozen_finds_what_another_probe_kept(
    small_network, small_task, data, tmp_path, strategy
):
    model = small_network()
    start, (first, second) = model.get_weights(), strategies.parse(strategy, epochs=6)
    both = (first, dataclasses.replace(second, epochs=2))
    probe = training.fine_tune(model, small_task, data, both[:1], cache_dir=tmp_path).phases[0]
    model.set_weights(start)
    again = training.fine_tune(model, small_task, data, both, cache_dir=tmp_path).phases[0]
    assert "24 computed" in probe.store
    assert " 0 computed" in again.store


def test_damaged_files_are_computed_again(small_network, data, tmp_path):
    shelf = Shelf(tmp_path)
    below = constants.Constants(_frozen(small_network))

    def keep(memory):
        return features.keep(below, data.train, named("none"), views=1, seed=0, room=Room(memory, shelf), key="key")

    whole = keep(2**30)
    files = sorted(path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size)
    assert len(files) == 24
    files[0].write_bytes(files[0].read_bytes()[:-4])
    files[1].write_bytes(b"")
    files[2].unlink()
    for memory in (2**30, 0):
        mended = keep(memory)
        assert mended.computed == (3 if memory else 0)
        every = keras.ops.arange(24, dtype="int64")
        one, two = (kept.read(every, keras.ops.zeros((), "int64"))[0] for kept in (whole, mended))
        np.testing.assert_array_equal(one, two)
    assert sum("damaged" in note for note in shelf.notes) == 2
