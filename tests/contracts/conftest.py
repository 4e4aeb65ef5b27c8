"""What the contracts share: a description of a model by which it can be told that nothing was left on it."""

from __future__ import annotations

from typing import Any

import keras
import pytest

# Keras' own: callbacks set the first on the model that they see, `export` sets the others on every layer.
_KERAS_OWN = {"stop_training", "train_function", "test_function", "predict_function"}


def _state(model: keras.Model) -> dict[str, Any]:
    """Describe all that a model and its layers hold but the values of variables and what trains."""
    layers = list(model._flatten_layers())
    return {
        "compiled": model.compiled,
        "layers": [(layer.name, id(layer)) for layer in layers],
        "attributes": [(layer.name, sorted(vars(layer).keys() - _KERAS_OWN)) for layer in layers],
        "variables": [(variable.path, id(variable)) for variable in model.variables],
        "nodes": [
            (one.name, len(one._inbound_nodes), len(one._outbound_nodes)) for one in (*layers, *model.operations)
        ],
        "config": _without_trainable(keras.saving.serialize_keras_object(model)),
    }


def _without_trainable(config: Any) -> Any:
    if isinstance(config, dict):
        return {key: _without_trainable(value) for key, value in config.items() if key != "trainable"}
    return [_without_trainable(value) for value in config] if isinstance(config, (list, tuple)) else config


@pytest.fixture(scope="session")
def state_of():
    """Return the function that describes a model."""
    return _state
