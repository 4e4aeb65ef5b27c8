"""Long runs and many runs in one process hold no more and more memory."""

from __future__ import annotations

import gc
import weakref

import pytest
from tensorflow.python.framework.func_graph import FuncGraph

from tftransfer import trainee, training
from tftransfer.strategies import Phase

_GROWTH = """
    import ctypes, gc, json, sys
    from tftransfer import cli
    cli.import_tensorflow()
    import keras, numpy as np, psutil, tensorflow as tf
    from tftransfer import inference, tasks, training
    from tftransfer.data import Data, Examples, Pictures
    from tftransfer.strategies import Phase

    def examples(count, seed):
        generator = np.random.default_rng(seed)
        held = tf.constant(generator.integers(0, 256, (count, 32, 32, 3), np.uint8))
        source = Pictures(tuple(map(str, range(count))), lambda index: tf.gather(held, index), (32, 32))
        return Examples(source, np.arange(count, dtype=np.int32) % 3, np.ones(count, np.float32))

    def network():
        keras.utils.set_random_seed(0)
        image = keras.Input((32, 32, 3))
        x = keras.layers.Conv2D(8, 3, strides=2, activation="relu", name="conv")(image)
        x = keras.layers.GlobalAveragePooling2D(name="head_pool")(x)
        return keras.Model(image, keras.layers.Dense(3, name="logits")(x))

    data = Data("noise", ("a", "b", "c"), examples(64, 0), examples(16, 1), examples(16, 2))
    task, process = tasks.SingleLabel(data.labels), psutil.Process()

    def resident():
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what the allocator has free is not held
        return process.memory_info().rss

    class Watch(keras.callbacks.Callback):
        sizes = []
        def on_epoch_end(self, epoch, logs=None):
            if epoch % 100 == 99:
                self.sizes.append(resident())

    def epochs():
        training.fine_tune(network(), task, data, (Phase("probe", "head", 1000, 1e-3),), callbacks=[Watch()])
        return Watch.sizes[2:]

    def rounds():
        model, sizes = network(), []
        predict = inference.predictor(model, task)
        for number in range(50):
            training.fine_tune(model, task, data, (Phase("all", "all", 1, 1e-4),), seed=number)
            predict(data.test)
            if number % 5 == 4:
                sizes.append(resident())
        return sizes[2:]

    print(json.dumps({"epochs": epochs, "rounds": rounds}[sys.argv[1]]()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["epochs", "rounds"])
def test_memory_is_flat_after_a_warm_up(run_python, kind):
    sizes = run_python(_GROWTH, kind)
    assert max(sizes) < 1.02 * sizes[0], sizes


def test_calls_let_go_of_all_their_graphs(small_network, small_task, small_data):
    """Keras' optimizers register a gradient for each step that is traced, which holds its graph for good."""

    def graphs() -> int:
        training.fine_tune(model, small_task, small_data, (Phase("all", "all", 1, 1e-3),), max_steps=1)
        gc.collect()
        return sum(isinstance(one, FuncGraph) for one in gc.get_objects())

    model = small_network()
    graphs()
    assert graphs() == graphs()


def test_twenty_phases_let_go_of_the_functions_of_those_before(small_network, small_task, small_data, monkeypatch):
    made, alive = trainee.Trainee.make_train_function, []

    def make(self, force=False):
        function = made(self, force)
        if not any(known() is function for known in alive):
            alive.append(weakref.ref(function))
        return function

    monkeypatch.setattr(trainee.Trainee, "make_train_function", make)
    strategy = tuple(Phase(f"phase {number}", "head", 1, 1e-3) for number in range(20))
    training.fine_tune(small_network(), small_task, small_data, strategy, batch_size=24)
    gc.collect()
    assert len(alive) == 20
    assert sum(known() is not None for known in alive) <= 1
