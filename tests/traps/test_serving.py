"""Traps of stock Keras and TensorFlow around exports and devices: each test steps into one."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tftransfer import serving


def test_a_module_that_holds_a_keras_model_fails_in_a_graph_session(small_network, tmp_path):
    """It loads in Python, but not on the path that the C++ server takes; ours does."""
    module = tf.Module()
    module.model = small_network()
    signature = tf.TensorSpec((None, 32, 32, 3), tf.float32, name="image")
    serve = tf.function(lambda image: {"logits": module.model(image, training=False)}, input_signature=[signature])
    tf.saved_model.save(module, tmp_path / "stock", signatures={"serving_default": serve})
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        loaded = tf.compat.v1.saved_model.load(session, ["serve"], str(tmp_path / "stock"))
        signature_def = loaded.signature_def["serving_default"]
        answer, given = signature_def.outputs["logits"].name, signature_def.inputs["image"].name
        with pytest.raises(tf.errors.OpError, match="Could not find variable"):
            session.run(answer, {given: np.zeros((1, 32, 32, 3), np.float32)})


@pytest.mark.slow
def test_ours_answers_in_a_graph_session(small_network, small_task, tmp_path):
    model = small_network()
    serving.export_savedmodel(model, small_task, tmp_path / "1")
    verification = serving.verify(tmp_path / "1", model=model, task=small_task, repeats=2)
    outcome = {check.name: check.passed for check in verification.checks}
    assert outcome["graph session equals Keras"] is True
    assert outcome["repeated requests"] is True


def test_stock_export_keeps_augmentation_on(small_network, tmp_path):
    """`model.export` serves random layers as they were called; two identical requests differ."""
    inputs = keras.Input((32, 32, 3))
    noisy = keras.layers.RandomBrightness(0.5)(inputs, training=True)
    model = keras.Model(inputs, small_network()(noisy))
    model.export(tmp_path / "stock", verbose=False)
    serve = tf.saved_model.load(tmp_path / "stock").signatures["serving_default"]
    picture = tf.fill((1, 32, 32, 3), 100.0)
    name = next(iter(serve.structured_input_signature[1]))
    first, second = (next(iter(serve(**{name: picture}).values())) for _ in range(2))
    assert name != "image"  # names depend on the session
    assert not np.array_equal(first, second)
