import keras
import numpy as np
import pytest

from tftransfer import training
from tftransfer.checks import forgetting
from tftransfer.data import Data
from tftransfer.errors import InputError
from tftransfer.strategies import Phase


@pytest.fixture(scope="module")
def probed(small_network, small_data):
    keras.utils.set_random_seed(0)
    model = small_network()
    return model, forgetting.source_probe(model, small_data), model.get_weights()


@pytest.fixture
def source(probed):
    """The small network with its own old task: the colours themselves."""
    model, probe, weights = probed
    model.set_weights(weights)
    return model, probe


def test_the_head_is_scikit_learns_logistic_regression(source, small_data):
    from sklearn.linear_model import LogisticRegression

    model, probe = source
    features = forgetting._features(model, small_data.train)
    scale = np.sqrt(np.square(features - features.mean(0)).sum(1).mean())
    theirs = LogisticRegression(C=10.0, max_iter=2000).fit(
        (features - features.mean(0)) / scale, small_data.train.targets
    )
    logits = forgetting._features(model, small_data.test) @ probe.kernel + probe.bias
    expected = theirs.decision_function((forgetting._features(model, small_data.test) - features.mean(0)) / scale)
    np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-3)


def test_an_untouched_network_forgets_nothing(source):
    model, probe = source
    found = forgetting.forgetting(model, probe)
    metrics = found.checks[0].metrics
    assert metrics["before"] == metrics["after"] == metrics["after_fitted_again"] == probe.before
    assert found.tables[0].rows[0][1].value == probe.before


def test_ruined_features_are_seen(source, small_task, small_data):
    model, probe = source
    assert probe.before > 0.8
    for layer in model.layers:
        if isinstance(layer, keras.layers.Conv2D):
            layer.kernel.assign(-layer.kernel)
    after = forgetting.forgetting(model, probe).checks[0].metrics["after"]
    assert after < probe.before - 0.2


@pytest.mark.slow
def test_training_the_head_alone_forgets_nothing(source, small_task, small_data):
    model, probe = source
    training.fine_tune(model, small_task, small_data, (Phase("probe", "head", 2, 0.1),), batch_size=8)
    assert forgetting.source_accuracy(model, probe) == probe.before


def test_two_classes_are_probed(small_network, make_examples):
    pictures = np.zeros((20, 32, 32, 3), np.uint8)
    targets = np.arange(20, dtype=np.int32) % 2
    pictures[targets == 1, :, :, 0] = 200
    part = make_examples(pictures, targets)
    model = small_network(num_classes=2)
    probe = forgetting.source_probe(model, Data("two", ("off", "on"), part, part, part, found=20))
    assert forgetting.source_accuracy(model, probe) == 1.0


@pytest.mark.slow
def test_the_built_in_task_is_known_to_the_embedded_backbone():
    from tftransfer import builders

    data = forgetting.demo_source((64, 64), seed=1)
    assert (len(data.train) + len(data.validation), len(data.test)) == forgetting.PICTURES
    keras.utils.set_random_seed(0)
    known, random = (
        builders.image_classifier("MobileNet-0.25", 10, image_size=64, weights=weights) for weights in ("demo", None)
    )
    accuracies = [forgetting.source_probe(model, data).before for model in (known, random)]
    assert accuracies[0] > accuracies[1] + 0.3


def test_another_image_size_is_refused(small_network, make_examples):
    part = make_examples(np.zeros((4, 48, 48, 3), np.uint8), np.arange(4, dtype=np.int32) % 2)
    with pytest.raises(InputError, match="image size"):
        forgetting.source_probe(small_network(), Data("two", ("off", "on"), part, part, part, found=4))
