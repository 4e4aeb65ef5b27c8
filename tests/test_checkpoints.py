import keras
import numpy as np
import pytest

from tftransfer import builders, strategies, training
from tftransfer.adapters import Lora
from tftransfer.averages import Ema
from tftransfer.errors import InputError
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


@pytest.mark.parametrize("name", STRATEGIES)
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
        ({"seed": 1}, "differs in seed"),
        ({"batch_size": 4}, "differs in batch_size"),
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
    other = builders.image_classifier("MobileNet-0.25", 3, image_size=32, weights=None)
    with pytest.raises(InputError, match="another network"):
        training.fine_tune(other, small_task, small_data, strategy, output=tmp_path)


def test_a_damaged_file_is_named(small_network, small_task, small_data, tmp_path):
    strategy = (Phase("probe", "head", 1),)
    training.fine_tune(_fresh(small_network), small_task, small_data, strategy, output=tmp_path)
    (tmp_path / "checkpoints" / "phase.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"phase\.safetensors cannot be read"):
        training.fine_tune(_fresh(small_network), small_task, small_data, strategy, output=tmp_path)
