"""Bad labels, weights, pixels and variables are refused by name."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from tftransfer import bundles, serving, soundness, tasks, training
from tftransfer.data.examples import Pictures
from tftransfer.errors import InputError
from tftransfer.strategies import Phase


def _with(examples, place, values, **others):
    changed = {name: np.array(getattr(examples, name)) for name in ("targets", "weights")}
    changed[place][[1, 3, 5, 7]] = values
    return dataclasses.replace(examples, **changed, **others)


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        ("targets", 3, r"label must be a class number from 0 to 2.*training.*4 of 24.*picture 1 has 3.*and 1 more"),
        ("targets", -1, "picture 1 has -1"),
        ("weights", -0.5, "weight must be a finite number from 0"),
        ("weights", np.nan, "picture 3 has nan"),
    ],
)
def test_bad_labels_and_weights_are_named_before_the_first_step(
    small_network, small_task, small_data, place, value, said
):
    data = dataclasses.replace(small_data, train=_with(small_data.train, place, value))
    with pytest.raises(InputError, match=said):
        training.fine_tune(small_network(), small_task, data, (Phase("probe"),))


def test_validation_is_looked_at_too(small_network, small_task, small_data):
    data = dataclasses.replace(small_data, validation=_with(small_data.validation, "targets", 7))
    with pytest.raises(InputError, match="validation split 4 of 12"):
        training.fine_tune(small_network(), small_task, data, (Phase("probe"),))


def test_numbers_and_several_classes_are_looked_at(make_examples):
    pictures = np.zeros((2, 8, 8, 3), np.uint8)
    good = np.array([[0.5], [-3.0]], np.float32)
    soundness.check_examples(tasks.Regression(), make_examples(pictures, good), "training")
    for bad in (np.inf, np.nan):
        with pytest.raises(InputError, match="target must be a finite number.*picture 1"):
            soundness.check_examples(
                tasks.Regression(), make_examples(pictures, np.array([[0.5], [bad]], np.float32)), "training"
            )
    several = tasks.MultiLabel(("a", "b"))
    soundness.check_examples(several, make_examples(pictures, np.array([[0, 1], [1, 1]], np.float32)), "training")
    with pytest.raises(InputError, match=r"numbers from 0 to 1.*picture 0 has \[0.0, 2.0\]"):
        soundness.check_examples(several, make_examples(pictures, np.array([[0, 2], [1, 1]], np.float32)), "training")


def test_each_example_needs_a_target(make_examples, small_task):
    examples = make_examples(np.zeros((2, 8, 8, 3), np.uint8), np.zeros(1, np.int32), np.ones(2, np.float32))
    with pytest.raises(InputError, match="2 examples, but 1 targets"):
        soundness.check_examples(small_task, examples, "training")


@pytest.mark.parametrize("at_once", [False, True])
def test_pixels_that_are_not_finite_are_named(small_task, make_examples, at_once):
    pictures = np.ones((70, 4, 4, 3), np.float32)
    plain = make_examples(pictures, np.zeros(70, np.int32))
    soundness.check_examples(small_task, plain, "training")
    pictures[66, 1, 2, 0] = np.nan
    held = tf.constant(pictures)
    source = Pictures(plain.names, lambda index: tf.gather(held, index), (4, 4), at_once=at_once)
    with pytest.raises(InputError, match="1 of 70 pictures of the training split.*picture 66"):
        soundness.check_examples(small_task, dataclasses.replace(plain, pictures=source), "training")


def test_weights_that_are_not_finite_are_neither_trained_nor_saved_nor_published(
    small_network, small_task, small_data, tmp_path
):
    model = small_network()
    kernel = model.get_layer("conv_2").kernel.numpy()
    kernel[0, 0, 0, 0] = np.inf
    model.get_layer("conv_2").set_weights([kernel])
    said = "1 of 576 numbers of 'conv_2/kernel'"
    with pytest.raises(InputError, match=said):
        training.fine_tune(model, small_task, small_data, (Phase("probe"),))
    with pytest.raises(InputError, match=said):
        bundles.save(tmp_path / "run", model, small_task, None, configuration={}, provenance={})
    with pytest.raises(InputError, match=said):
        serving.publish(model, small_task, tmp_path / "serving")
    assert not list(tmp_path.iterdir())


def test_validation_pictures_that_give_no_finite_outputs_are_named(small_network, small_task, small_data):
    """Weights and pixels are finite, but their product is not."""
    model = small_network()
    kernel, bias = model.get_layer("logits").get_weights()
    model.get_layer("logits").set_weights([kernel * 0 + 3e38, bias])
    with pytest.raises(InputError, match="not finite for .* of 12 validation examples: picture 0, picture 1"):
        training.fine_tune(model, small_task, small_data, (Phase("probe"),), batch_size=8)
