import dataclasses
import errno

import keras
import numpy as np
import pytest

from tftransfer import builders, checkpoints, sealed_folders, strategies, tasks, training
from tftransfer.adapters import Adapter, Lora
from tftransfer.averages import Ema
from tftransfer.errors import InputError
from tftransfer.history import History
from tftransfer.penalties import Source
from tftransfer.strategies import Phase

STRATEGIES = {
    "moments carried over": (
        Phase("probe", "head", 2, 0.05),
        Phase("top", "last:1", 2, 0.01, augmentation="light", carry_moments=True, average=Ema(1.0)),
        Phase("all", "all", 1, 0.005, optimizer="adamw", carry_moments=True),
    ),
    "LoRA goes on": (
        Phase("probe", "head", 1, 0.05),
        Phase("LoRA", "head", 2, 0.02, adapter=Lora(2)),
        Phase("LoRA again", "head", 2, 0.01, adapter=Lora(2)),
    ),
    "LoRA is merged": (Phase("LoRA", "head", 2, 0.02, adapter=Lora(2)), Phase("all", "all", 1, 0.01)),
}


class _Interrupt(keras.callbacks.Callback):
    """Stop the process's way when a given epoch begins."""

    def __init__(self, epoch: int) -> None:
        super().__init__()
        self.epoch = epoch

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == self.epoch:
            raise KeyboardInterrupt


def _fresh(small_network) -> keras.Model:
    keras.utils.set_random_seed(5)
    return small_network(dropout=0.3)


def _weights(model: keras.Model) -> list[np.ndarray]:
    return [w.numpy() for w in model.weights if "seed_generator" not in w.path]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "LoRA goes on" else pytest.mark.slow) for name in STRATEGIES]
)
def test_going_on_at_a_phase_boundary_equals_never_having_stopped(
    small_network, small_task, small_data, tmp_path, name
):
    strategy = STRATEGIES[name]
    straight = _fresh(small_network)
    expected = training.fine_tune(straight, small_task, small_data, strategy, batch_size=8)
    last = sum(phase.epochs for phase in strategy[:-1])
    with pytest.raises(KeyboardInterrupt):
        training.fine_tune(
            _fresh(small_network),
            small_task,
            small_data,
            strategy,
            batch_size=8,
            output=tmp_path,
            callbacks=[_Interrupt(last)],
        )
    resumed = _fresh(small_network)
    history = training.fine_tune(resumed, small_task, small_data, strategy, batch_size=8, output=tmp_path)
    for one, two in zip(_weights(straight), _weights(resumed), strict=True):
        np.testing.assert_array_equal(one, two)
    assert dict(history) == dict(expected)
    assert [record.epochs for record in history.phases] == [phase.epochs for phase in strategy]
    assert (history.adapter is None) == (expected.adapter is None)


def test_a_finished_strategy_is_not_trained_again(small_network, small_task, small_data, tmp_path):
    strategy = (Phase("probe", "head", 1),)
    first = training.fine_tune(_fresh(small_network), small_task, small_data, strategy, output=tmp_path)
    model = _fresh(small_network)
    again = training.fine_tune(model, small_task, small_data, strategy, output=tmp_path, callbacks=[_Interrupt(0)])
    assert dict(again) == dict(first)


def test_an_adapter_of_a_finished_call_says_the_same_how_far_it_came(small_network, small_task, small_data, tmp_path):
    strategy = (Phase("LoRA", "head", 2, 0.02, adapter=Lora(2)),)
    call = {"batch_size": 8, "max_steps": 2, "output": tmp_path}
    first = training.fine_tune(_fresh(small_network), small_task, small_data, strategy, **call).adapter.reached
    again = training.fine_tune(_fresh(small_network), small_task, small_data, strategy, **call).adapter.reached
    assert (again.phase, again.steps) == (first.phase, first.steps)
    assert len(first.generators) == 1
    np.testing.assert_array_equal(again.generators, first.generators)
    assert again.moments.keys() == first.moments.keys()
    for name, moment in first.moments.items():
        assert again.moments[name].age == moment.age
        np.testing.assert_array_equal(again.moments[name].slots[0], moment.slots[0])


def test_resume_false_begins_again(small_network, small_task, small_data, tmp_path):
    strategy = (Phase("probe", "head", 1),)
    training.fine_tune(_fresh(small_network), small_task, small_data, strategy, output=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        training.fine_tune(
            _fresh(small_network),
            small_task,
            small_data,
            strategy,
            output=tmp_path,
            resume=False,
            callbacks=[_Interrupt(0)],
        )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"strategy": strategies.linear_probe(epochs=2)}, "differs in strategy"),
        pytest.param({"seed": 1}, "differs in seed", marks=pytest.mark.slow),
        pytest.param({"batch_size": 4}, "differs in batch_size", marks=pytest.mark.slow),
    ],
)
def test_another_call_cannot_go_on(small_network, small_task, small_data, tmp_path, changes, said):
    given = {"strategy": (Phase("probe", "head", 1),), "output": tmp_path}
    training.fine_tune(_fresh(small_network), small_task, small_data, **given)
    with pytest.raises(InputError, match=said):
        training.fine_tune(_fresh(small_network), small_task, small_data, **{**given, **changes})


def test_another_network_cannot_go_on(small_network, small_task, small_data, tmp_path):
    strategy = (Phase("probe", "head", 1),)
    training.fine_tune(_fresh(small_network), small_task, small_data, strategy, output=tmp_path)
    other_weights = _fresh(small_network)
    kernel = other_weights.get_layer("conv_2").kernel
    kernel.assign(kernel + 1e-3)
    for other in (other_weights, builders.image_classifier("MobileNet-0.25", 3, image_size=32, weights=None)):
        before = _weights(other)
        with pytest.raises(InputError, match="differs in base(: .*build it anew|, network: )"):
            training.fine_tune(other, small_task, small_data, strategy, output=tmp_path)
        for one, two in zip(before, _weights(other), strict=True):
            np.testing.assert_array_equal(one, two)


class _Scale(keras.layers.Layer):
    """A layer whose variable has no name, as those of ConvNeXt, which Keras numbers anew in each session."""

    def build(self, shape):
        self.factor = self.add_weight(shape=shape[-1:], initializer="ones")

    def call(self, inputs):
        return inputs * self.factor


def _scaled():
    keras.utils.set_random_seed(3)
    inputs = keras.Input((32, 32, 3), name="image")
    x = _Scale()(keras.layers.Conv2D(4, 3, strides=4, name="conv_1")(inputs))
    x = keras.layers.GlobalAveragePooling2D(name="head_pool")(x)
    return keras.Model(inputs, keras.layers.Dense(3, name="logits")(x))


def test_variables_without_a_name_go_on_too(small_task, small_data, tmp_path):
    strategy = (Phase("probe", "head", 1), Phase("all", "all", 1, carry_moments=True))
    whole = _scaled()
    training.fine_tune(whole, small_task, small_data, strategy)
    interrupted = {"output": tmp_path, "callbacks": [_Interrupt(1)]}
    with pytest.raises(KeyboardInterrupt):
        training.fine_tune(_scaled(), small_task, small_data, strategy, **interrupted)
    resumed = _scaled()
    assert [v.name for v in resumed.variables] != [v.name for v in whole.variables]
    training.fine_tune(resumed, small_task, small_data, strategy, output=tmp_path)
    for one, two in zip(_weights(whole), _weights(resumed), strict=True):
        np.testing.assert_array_equal(one, two)


def test_fewer_examples_are_another_call(small_task, small_data):
    data = dataclasses.replace(small_data, fingerprint="of what was read")
    fewer = dataclasses.replace(data, train=data.train.subset(np.arange(20)))
    calls = [checkpoints.call_of((Phase("probe"),), 0, 32, None, one, small_task, None, None) for one in (data, fewer)]
    assert calls[0] != calls[1]


def test_variables_of_other_shapes_are_not_restored(small_network):
    with pytest.raises(InputError, match="another network"):
        checkpoints.Kept({"0.kernel": np.zeros((2, 2))}, (), "", {}, History()).restore(small_network())


def test_what_is_damaged_at_a_boundary_is_set_aside_and_trained_again(
    small_network, small_task, small_data, tmp_path, monkeypatch
):
    strategy = (Phase("probe", "head", 1), Phase("top", "last:1", 1))
    whole = _fresh(small_network)
    monkeypatch.setattr(checkpoints, "finish", lambda folder: None)  # as if the process had ended there
    training.fine_tune(whole, small_task, small_data, strategy, output=tmp_path)
    monkeypatch.undo()
    folder = tmp_path / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["001-000000000", "002-000000000"]
    (folder / "002-000000000" / "manifest.json").write_bytes(b"damaged")
    again = _fresh(small_network)
    history = training.fine_tune(again, small_task, small_data, strategy, output=tmp_path)
    assert "and set aside as damaged-002-000000000." in history.notes[0]
    assert history.notes[1] == "Training goes on from the one before."
    assert [path.name for path in folder.iterdir()] == ["002-000000000"], "nothing is left once all is done"
    for one, two in zip(_weights(whole), _weights(again), strict=True):
        np.testing.assert_array_equal(one, two)


def test_what_cannot_be_read_now_is_not_set_aside(small_network, small_task, small_data, tmp_path, monkeypatch):
    strategy = (Phase("probe", "head", 1),)
    training.fine_tune(_fresh(small_network), small_task, small_data, strategy, output=tmp_path)

    def none_left(path):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(sealed_folders, "digest", none_left)
    with pytest.raises(InputError, match="001-000000000 cannot be read: Too many open files"):
        training.fine_tune(_fresh(small_network), small_task, small_data, strategy, output=tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["001-000000000"]


def test_another_task_source_or_adapter_cannot_go_on(small_task, small_data, make_examples):
    def call(**changes):
        given = {"data": small_data, "task": small_task, "source": None, "adapter": None}
        return checkpoints.call_of((Phase("probe"),), 0, 32, None, **{**given, **changes})

    smoothed = tasks.SingleLabel(small_task.labels, label_smoothing=0.1)
    source = Source("old", small_data.train, small_data.test, np.ones((2, 2)), np.zeros(2), 0.5)
    adapter = Adapter(Lora(2), ((np.ones((2, 2)), np.ones((2, 2))),), (), small_task.labels, "")
    other = dataclasses.replace(small_data, train=small_data.test)
    for changes in ({"task": smoothed}, {"source": source}, {"adapter": adapter}, {"data": other}):
        name = next(iter(changes))
        assert getattr(call(**changes), name) != getattr(call(), name)


def test_a_phase_that_cannot_run_is_refused_before_the_first_one(small_network, small_task, small_data):
    model = small_network()
    before = _weights(model)
    strategy = (Phase("probe", "head", 1), Phase("top", "last:99"))
    with pytest.raises(InputError, match="last:N takes a whole number"):
        training.fine_tune(model, small_task, small_data, strategy)
    for one, two in zip(before, _weights(model), strict=True):
        np.testing.assert_array_equal(one, two)


def test_moments_are_those_of_the_weights_that_were_kept(small_network, small_task, small_data, tmp_path):
    """A ruinous phase is undone; what it left in the optimizer must not go on either."""
    ruin = Phase("ruin", "head", 1, 1e30, warmup=0, schedule="constant")
    strategy = (ruin, Phase("tune", "all", 4, 0.02, carry_moments=True))
    history = training.fine_tune(_fresh(small_network), small_task, small_data, strategy, batch_size=8)
    assert history.phases[0].best_epoch == 0
    assert np.isfinite(history["loss"][1:]).all()
    assert min(history["val_loss"][1:]) < history["val_loss"][1]
