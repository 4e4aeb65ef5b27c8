import numpy as np
import pytest

from tftransfer.averages import Ema, WiseFt
from tftransfer.errors import InputError


class _Point:
    """A model with one weight."""

    def __init__(self, value: float) -> None:
        self.weights = [np.array([value], np.float32), np.array([7], np.uint32)]

    def get_weights(self):
        return self.weights

    def set_weights(self, weights):
        self.weights = weights


def _finish(loss, error: float = 0.0, steps: int = 10) -> tuple[float, float]:
    model = _Point(1.0)
    start = [np.array([0.0], np.float32), np.array([3], np.uint32)]
    share = WiseFt(steps).finish(model, start, lambda: (loss(float(model.weights[0][0])), error))
    return share, float(model.weights[0][0])


def test_the_lowest_validation_loss_on_the_line_is_found():
    share, value = _finish(lambda x: (x - 0.3) ** 2)
    assert share == pytest.approx(0.3)
    assert value == pytest.approx(0.3)


def test_within_one_standard_error_the_point_closest_to_the_start_is_taken():
    share, _ = _finish(lambda x: (x - 0.5) ** 2, error=0.05)  # 0.3 is within 0.04 of the lowest, 0.2 is not
    assert share == pytest.approx(0.3)


@pytest.mark.parametrize(("best", "end"), [(0.0, 0.0), (1.0, 1.0)])
def test_both_ends_come_out_bit_for_bit(best, end):
    assert _finish(lambda x: (x - best) ** 2)[1] == end


def test_a_loss_that_is_not_finite_is_never_chosen():
    assert _finish(lambda x: float("nan") if x > 0.55 else 1 - x)[0] == pytest.approx(0.5)


def test_states_of_random_layers_are_not_interpolated():
    model = _Point(1.0)
    WiseFt(2).finish(
        model, [np.zeros(1, np.float32), np.array([3], np.uint32)], lambda: (abs(model.weights[0][0] - 0.5), 0)
    )
    assert model.weights[1].dtype == np.uint32
    assert model.weights[1][0] == 7


def test_the_average_forgets_at_its_pace():
    assert Ema(1.0).momentum(10) ** 10 == pytest.approx(np.exp(-1))


@pytest.mark.parametrize(
    "bad", [lambda: Ema(0), lambda: Ema("a"), lambda: Ema(float("nan")), lambda: WiseFt(0), lambda: WiseFt(1.5)]
)
def test_bad_numbers_are_refused(bad):
    with pytest.raises(InputError):
        bad()
