"""Write a SavedModel that takes the bytes of pictures and answers with labels."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import keras
import tensorflow as tf

from tftransfer import builders, constants
from tftransfer.data.images import decode_picture
from tftransfer.errors import InputError, check
from tftransfer.tasks import Task

# How many pictures of one request are decoded at the same time.
_PARALLEL_PICTURES = 8
Network = Callable[[tf.Tensor], tf.Tensor]


def export_savedmodel(
    model: keras.Model,
    task: Task,
    directory: str | os.PathLike[str],
    *,
    from_logits: bool | None = None,
    optimise: bool = True,
    top_k: int = 0,
) -> str:
    """Write a network and its task as a SavedModel for TF Serving.

    Decoding, orientation, resizing, preprocessing, softmax and label names are inside the graph, augmentation
    and dropout are off. What is written is not verified; `publish` does both.

    Args:
        model: The trained network, from pixels in [0, 255], `(batch, height, width, 3)`, to numbers.
        task: What its outputs mean; it names the outputs of the SavedModel.
        directory: Where `saved_model.pb` and `variables/` go. It is made if need be.
        from_logits: Whether the network gives logits. Defaults to what its last layer says.
        optimise: Whether variables become constants and BatchNorm is folded into the convolutions, for answers that
            are the same within 1e-5 and come sooner. Defaults to True.
        top_k: With how many labels a further signature, `classify`, answers. Defaults to 0: there is none.

    Returns:
        Why variables were kept; "" if they were not, or were to be.

    Raises:
        InputError: If the network takes pictures of no fixed size, or its outputs do not fit the task, or the task
            has fewer labels than `top_k`, or a layer uses a lookup table that it does not hold.

    Signatures of the result, the first two with the outputs of `task.answers`:

    - `serving_default`: `image_bytes`, `(batch,)` string, encoded pictures of any size;
    - `tensor`: `image`, `(batch, height, width, 3)` float32 in [0, 255], at the network's size;
    - `classify`, if asked for: as `serving_default`, with the most probable labels first, as `classes` and `scores`,
      `(batch, top_k)` string and float32.
    """
    check_outputs(model, task)
    _check_top_k(task, top_k)
    network, kept = _constant(model) if optimise else (None, "")
    answer = answers_of(model, task, from_logits, network)
    height, width = image_size(model)

    def tensor(image: tf.Tensor) -> dict[str, tf.Tensor]:
        # A session does not compare what it is fed with the declared shape: other sizes would be answered.
        image = tf.ensure_shape(image, (None, height, width, 3))
        # TensorFlow's fused convolutions fail on an empty batch ("Incompatible shapes: [0,64,64,3] vs. [8]"):
        # one black picture stands in, and its answer is cut off again.
        batch = tf.shape(image)[0]
        filled = tf.pad(image, [[0, tf.maximum(1 - batch, 0)], [0, 0], [0, 0], [0, 0]])
        return {name: values[:batch] for name, values in answer(filled).items()}

    def serving_default(image_bytes: tf.Tensor) -> dict[str, tf.Tensor]:
        return tensor(tf.cast(batch_decoder((height, width))(image_bytes), tf.float32))

    def classify(image_bytes: tf.Tensor) -> dict[str, tf.Tensor]:
        scores, places = tf.math.top_k(serving_default(image_bytes)["probabilities"], top_k)
        return {"classes": tf.gather(tf.constant(task.labels), places), "scores": scores}

    pictures = tf.TensorSpec((None, height, width, 3), tf.float32, name="image")
    encoded = tf.TensorSpec((None,), tf.string, name="image_bytes")
    archive = keras.export.ExportArchive()
    if network is None:
        archive.track(model)  # for lookup tables and other resources of a user's own layers
    archive.add_endpoint("serving_default", serving_default, input_signature=[encoded])
    archive.add_endpoint("tensor", tensor, input_signature=[pictures])
    if top_k:
        archive.add_endpoint("classify", classify, input_signature=[encoded])
    with quiet():
        try:
            archive.write_out(os.fspath(Path(directory)), verbose=False)
        except AssertionError as error:  # how TensorFlow says that a resource belongs to nobody
            raise InputError(
                "`model` uses a lookup table or another resource that none of its layers holds, so that it would be "
                f"missing from the SavedModel: make it an attribute of the layer. TensorFlow says: {_first_line(error)}"
            ) from None
    return kept


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200]


def _constant(model: keras.Model) -> tuple[Network | None, str]:
    """Return the network as a graph of constants, or why it cannot be one."""
    try:
        infer = constants.as_portable_function(model)
    except constants.NotConstant as why:
        return None, str(why)
    except (ValueError, TypeError, tf.errors.OpError) as error:  # of the optimiser: the network serves without it
        return None, f"TensorFlow's optimiser failed ({type(error).__name__})"
    return lambda image: tf.nest.pack_sequence_as(model.output, infer(image)), ""


def answers_of(
    model: keras.Model, task: Task, from_logits: bool | None = None, network: Network | None = None
) -> Callable[[tf.Tensor], dict[str, tf.Tensor]]:
    """Return the graph function from float32 `(batch, height, width, 3)` to the task's named answers.

    Args:
        model, task, from_logits: As for `export_savedmodel`.
        network: What stands for the model. Defaults to itself, in inference mode.
    """
    run = network or (lambda image: model(image, training=False))
    logits = builders.outputs_are_logits(model) if from_logits is None else from_logits
    shape = (None, *image_size(model), 3)

    def answer(image: tf.Tensor) -> dict[str, tf.Tensor]:
        # A session does not trust the shape of what it is fed, and would rewrite the network otherwise than Keras does.
        return task.answers(run(tf.ensure_shape(image, shape)), logits)

    # One function for both signatures: the network is traced, and stored in the file, once.
    return tf.function(answer, input_signature=[tf.TensorSpec(shape, tf.float32)], autograph=False)


@functools.lru_cache(maxsize=8)
def batch_decoder(image_size: tuple[int, int]) -> Callable[[tf.Tensor], tf.Tensor]:
    """Return the graph function that decodes a batch of encoded pictures as training does; it is traced once.

    Args:
        image_size: `(height, width)` in pixels.

    Returns:
        From `(batch,)` string, which may be empty, to `(batch, height, width, 3)` uint8.
    """

    def decode(image_bytes: tf.Tensor) -> tf.Tensor:
        # Without a fixed signature `map_fn` cannot know the shape of an empty batch.
        return tf.map_fn(
            lambda contents: decode_picture(contents, image_size),
            image_bytes,
            fn_output_signature=tf.TensorSpec((*image_size, 3), tf.uint8),
            parallel_iterations=_PARALLEL_PICTURES,
        )

    return tf.function(decode, input_signature=[tf.TensorSpec((None,), tf.string)], autograph=False)


def image_size(model: keras.Model) -> tuple[int, int]:
    """Return `(height, width)` of the pictures a network takes.

    Raises:
        InputError: If the network has another kind of input, or one of no fixed size.
    """
    shape = model.input_shape
    if not isinstance(shape, tuple) or len(shape) != 4 or shape[3] != 3 or None in shape[1:]:
        raise InputError(
            "`model` must take pictures of one size, (batch, height, width, 3): build it with `image_size`. "
            f"Received: model.input_shape={shape!r}"
        )
    return shape[1], shape[2]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence TensorFlow's notes on assets written and on graph sessions, which the C++ server still uses."""
    logger = tf.get_logger()
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def check_outputs(model: keras.Model, task: Task) -> None:
    """Refuse a network whose outputs are not one number for each of the task's.

    Raises:
        InputError: If they are not.
    """
    shape = model.output_shape
    if not isinstance(shape, tuple) or shape[-1] != task.num_outputs:
        raise InputError(
            f"`model` must give {task.num_outputs} numbers, one for each of {task.labels!r}. "
            f"Received: model.output_shape={shape!r}"
        )


def _check_top_k(task: Task, top_k: int) -> None:
    answers = task.answers(tf.zeros((1, task.num_outputs)), True)
    most = len(task.labels) if "probabilities" in answers else 0
    wanted = f"a whole number from 0 to {most}, the number of labels" if most else "0 for a task without probabilities"
    check(isinstance(top_k, int) and 0 <= top_k <= most, "top_k", wanted, top_k)
