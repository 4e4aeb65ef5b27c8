import keras
import numpy as np
import pytest

from tftransfer import builders, trainable
from tftransfer.errors import InputError


@pytest.fixture(scope="module")
def built():
    return builders.image_classifier("MobileNetV2-0.35", 3, image_size=32, weights=None, hidden=(8,))


@pytest.fixture
def network(built):
    """One network for all tests; what each sets on it is undone."""
    with trainable.as_it_was(built):
        yield built


def _trains(model: keras.Model) -> set[str]:
    return {variable.path for variable in model.trainable_variables}


HEAD = {"head_hidden_1/kernel", "head_hidden_1/bias", "logits/kernel", "logits/bias"}


def test_none_trains_nothing(network):
    trainable.set_trainable(network, "none")
    assert _trains(network) == set()


def test_head_trains_the_head_alone(network):
    trainable.set_trainable(network, "head")
    assert _trains(network) == HEAD


def test_all_trains_everything(network):
    trainable.set_trainable(network, "all")
    kinds = {path.rsplit("/", 1)[1] for path in _trains(network)}
    assert {"kernel", "gamma", "beta"} <= kinds
    assert not any("moving" in path for path in _trains(network))
    assert len(_trains(network)) == len(network.weights) - sum("moving" in w.path for w in network.weights)


def test_last_n_trains_the_topmost_groups(network):
    groups = trainable.all_groups(network)
    trainable.set_trainable(network, "last:2")
    below = {name for group in groups[:-3] for name in group.layers}
    above = {name for group in groups[-3:] for name in group.layers}
    trained = {path.split("/")[0] for path in _trains(network)}
    assert trained <= above
    assert not trained & below
    assert _trains(network) >= HEAD


def test_from_a_layer_and_a_range(network):
    trainable.set_trainable(network, "from:block_16_project")
    assert {path.split("/")[0] for path in _trains(network)} == {
        "block_16_project",
        "block_16_project_BN",
        "Conv_1",
        "Conv_1_bn",
        "head_hidden_1",
        "logits",
    }
    trainable.set_trainable(network, "block_16_project:block_16_project_BN")
    assert {path.split("/")[0] for path in _trains(network)} == {
        "block_16_project",
        "block_16_project_BN",
        "head_hidden_1",
        "logits",
    }


def test_from_a_group_and_a_range_of_groups(network):
    groups = {group.name: set(group.layers) for group in trainable.all_groups(network)}

    def trained(selector: str) -> set[str]:
        trainable.set_trainable(network, selector)
        return {path.split("/")[0] for path in _trains(network)} - groups["head"]

    assert trained("block_12:block_14") == groups["block_12"] | groups["block_13"] | groups["block_14"]
    assert trained("block_15:block_15") == groups["block_15"]
    assert trained("block_15_project:block_16") == {"block_15_project", "block_15_project_BN"} | groups["block_16"]
    assert trained("from:block_16") == groups["block_16"] | groups["top"]


def test_norm_trains_scale_and_offset_only(network):
    trainable.set_trainable(network, "norm")
    assert {path.rsplit("/", 1)[1] for path in _trains(network) - HEAD} == {"gamma", "beta"}


def test_bias_trains_offsets_only(network):
    trainable.set_trainable(network, "bias")
    assert {path.rsplit("/", 1)[1] for path in _trains(network) - HEAD} == {"beta"}


def test_attention_is_found_in_squeeze_and_excitation():
    model = builders.image_classifier("MobileNetV3Small", 3, image_size=32, weights=None)
    trainable.set_trainable(model, "attention")
    assert all("squeeze_excite" in path or path.startswith("logits") for path in _trains(model))
    assert len(_trains(model)) > 2


def test_regular_expressions_match_paths(network):
    trainable.set_trainable(network, "re:block_1_.*kernel")
    assert _trains(network) - HEAD == {
        "block_1_expand/kernel",
        "block_1_depthwise/kernel",
        "block_1_project/kernel",
    }


def test_selectors_do_not_add_up(network):
    trainable.set_trainable(network, "all")
    trainable.set_trainable(network, "head")
    assert _trains(network) == HEAD


def test_batch_norm_statistics_stay_unless_asked(network):
    norms = [layer for layer in network.layers if isinstance(layer, keras.layers.BatchNormalization)]
    trainable.set_trainable(network, "all")
    assert not any(norm.trainable for norm in norms)
    trainable.set_trainable(network, "all", train_batch_norm=True)
    assert all(norm.trainable for norm in norms)


def test_audit_counts_every_parameter_once(network):
    rows = trainable.set_trainable(network, "last:1")
    assert sum(row.parameters for row in rows) == network.count_params()
    trained = sum(int(np.prod(v.shape)) for v in network.trainable_variables)
    assert sum(row.trainable for row in rows) == trained
    assert [row.group for row in rows][-1] == "head"
    assert rows[0].batch_norm == "frozen"


def test_layer_decay_falls_from_the_head_down(network):
    trainable.set_trainable(network, "all")
    factors = trainable.rate_multipliers(network, 0.5)
    assert factors["logits/kernel"] == 1
    assert factors["Conv_1/kernel"] == 0.5
    assert set(factors) == _trains(network)


def test_a_users_network_has_its_last_layer_as_head():
    inputs = keras.Input((4,))
    x = keras.layers.Dense(4, name="first")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(2, name="second")(x))
    rows = trainable.set_trainable(model, "head")
    assert [row.group for row in rows] == ["first", "head"]
    assert _trains(model) == {"second/kernel", "second/bias"}


@pytest.mark.parametrize(
    ("selector", "said"),
    [
        (3, "`selector` must be text, such as 'head'.*Received: selector=3"),
        ("heads", "Did you mean 'head'"),
        ("last:0", "whole number from 1 to"),
        ("last:99", "whole number from 1 to"),
        ("last:x", "whole number from 1 to"),
        ("from:block_16_projekt", "Did you mean 'block_16_project'"),
        ("Conv_1:block_1_expand", "from stem to top"),
        ("re:nothing_like_this", "matches nothing"),
        ("re:(", "regular expression"),
        ("attention", "matches nothing"),
    ],
)
def test_selectors_that_match_nothing_are_refused(network, selector, said):
    with pytest.raises(InputError, match=said):
        trainable.set_trainable(network, selector)


def test_a_model_gets_back_what_trained_on_it(network):
    for selector in ("none", "head", "last:2", "all", "norm", "bias", "re:block_1_.*kernel"):
        trainable.set_trainable(network, selector)
        layers, variables = ([part.trainable for part in parts] for parts in (network.layers, network.variables))
        trained = _trains(network)
        with trainable.as_it_was(network):
            trainable.set_trainable(network, "head" if selector == "all" else "all")
            assert _trains(network) != trained
        assert [layer.trainable for layer in network.layers] == layers
        assert [variable.trainable for variable in network.variables] == variables
        assert _trains(network) == trained, selector


def test_a_pattern_of_the_head_suggests_no_layer_of_the_head(network):
    with pytest.raises(InputError, match="matches nothing below the head of this network. Groups: "):
        trainable.set_trainable(network, "re:logits")
    with pytest.raises(InputError, match="Did you mean 'block_1_project'"):
        trainable.set_trainable(network, "re:block_1_projekt")
