import time

import keras
import pytest
import tensorflow as tf

from tftransfer import feeding, training
from tftransfer.strategies import Phase


def _batches(count, seconds):
    def batch(number):
        tf.py_function(lambda: time.sleep(seconds), [], [])
        return number, number + 1, number + 2

    return tf.data.Dataset.range(count).map(batch).prefetch(2)


@pytest.mark.parametrize(("giving", "taking", "least", "most"), [(0.04, 0.0, 0.3, 1.5), (0.0, 0.04, 0.0, 0.1)])
def test_the_time_that_is_spent_waiting_is_measured(giving, taking, least, most):
    batches, waited = feeding._clocked(_batches(10, giving))
    given = []
    for batch in batches:
        given.append(tuple(int(part) for part in batch))
        time.sleep(taking)
    assert given == [(number, number + 1, number + 2) for number in range(10)]
    assert least <= waited() <= most


@pytest.mark.parametrize(
    ("phase", "cache", "said"),
    [
        (Phase("head", "head", 5), "auto", "kept in memory"),
        (Phase("head", "head", 5), "off", "switched off"),
        (Phase("head", "head", 5, augmentation="light"), "auto", "new views"),
        (Phase("head", "head", 6, augmentation="light", views=2), "auto", "kept in memory"),
        pytest.param(
            Phase("head", "head", 2, augmentation="light", views=2), "auto", "would not pay", marks=pytest.mark.slow
        ),
        (Phase("head", "head", 2, augmentation="light", views=2, average_views=True), "auto", "kept in memory"),
        (Phase("head", "head", 1), "auto", "would not pay"),
        (Phase("all", "all", 5), "auto", "nothing is frozen"),
    ],
)
def test_a_phase_says_what_was_kept(small_network, small_task, small_data, phase, cache, said):
    history = training.fine_tune(small_network(), small_task, small_data, (phase,), batch_size=12, cache=cache)
    (record,) = history.phases
    assert said in record.store
    assert 0 <= record.waited_share < 1
    assert 0 <= record.extract_seconds < record.seconds
    assert {"store", "waited_share", "extract_seconds"} <= set(record.to_json())


def test_where_a_callback_looks_at_every_batch_nothing_is_kept(small_network, small_task, small_data):
    phase = (Phase("head", "head", 5),)
    looks = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: None)
    history = training.fine_tune(small_network(), small_task, small_data, phase, batch_size=12, callbacks=[looks])
    assert history.phases[0].store == "computed in every epoch: a callback looks at every batch"
