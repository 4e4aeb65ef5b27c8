"""Traps of stock Keras under MirroredStrategy, in a process of their own with two logical processors."""

import pytest

_BEGIN = """
    from tftransfer import distribution, tasks, training
    from tftransfer.errors import InputError
    from tftransfer.strategies import Phase

    # In each batch of four the first device gets two dark pictures, the second one two bright ones.
    pictures = np.tile(np.array([0, 10, 200, 250], np.uint8)[:, None, None, None], (2, 4, 4, 3))
    targets = np.array([0, 1, 0, 1] * 2, np.int32)

    def network():
        keras.utils.set_random_seed(0)
        inputs = keras.Input((4, 4, 3))
        x = keras.layers.BatchNormalization(momentum=0.5, name="norm")(inputs)
        return keras.Model(inputs, keras.layers.Dense(2, name="logits")(keras.layers.GlobalAveragePooling2D()(x)))

    def statistics(model):
        norm = model.get_layer("norm")
        return [float(norm.moving_mean.numpy()[0]), float(norm.moving_variance.numpy()[0])]
"""

_STOCK = (
    _BEGIN
    + """
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    batch = tf.data.Dataset.from_tensors((pictures[:4].astype(np.float32), targets[:4]))
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    with strategy.scope():
        model = network()
        model.compile("sgd", loss)
    model.fit(batch, verbose=0)

    outside = network()
    try:
        with strategy.scope():
            outside.compile("sgd", loss)
            outside.fit(batch, verbose=0)
        failed = None
    except (AssertionError, ValueError, RuntimeError) as error:
        failed = [type(error).__name__, str(error)]
    print(json.dumps({"statistics": statistics(model), "failed": failed}))
"""
)

_OURS = (
    _BEGIN
    + """
    examples = _examples(pictures, targets)
    data, task = Data("shades", ("a", "b"), examples, examples, examples), tasks.SingleLabel(("a", "b"))

    found = {}
    for devices in ("1", "2"):
        with distribution.devices(devices):
            model = network()
        phase = Phase("all", "all", 2, 1e-3, train_batch_norm=True)
        training.fine_tune(model, task, data, (phase,), batch_size=4)
        found[devices] = statistics(model)
    found["left behind"] = model.get_layer("norm").synchronized
    outside = network()
    try:
        with distribution.devices("2"):
            training.fine_tune(outside, task, data, (Phase("probe", epochs=1),))
    except InputError as error:
        found["refused"] = str(error)
    print(json.dumps(found))
"""
)


@pytest.mark.slow
def test_stock_keras_keeps_the_first_devices_statistics_and_fails_on_a_model_from_outside(run_on_devices):
    found = run_on_devices(_STOCK)
    assert found["statistics"] == pytest.approx([0.5 * 5, 0.5 * 1 + 0.5 * 25])  # of 0 and 10 alone
    assert found["failed"] == ["AssertionError", ""]  # deep in TensorFlow, without a word


def test_ours_takes_statistics_over_the_whole_batch_and_says_what_is_wrong_with_a_model_from_outside(run_on_devices):
    found = run_on_devices(_OURS)
    assert found["2"] == pytest.approx(found["1"], rel=1e-4)
    assert found["1"][0] > 50
    assert found["left behind"] is False
    assert "same `with tft.devices" in found["refused"]
