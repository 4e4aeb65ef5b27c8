"""Heads: what stands on top of a backbone, made of built-in layers only."""

from __future__ import annotations

from dataclasses import dataclass

import keras


@dataclass(frozen=True)
class Dense:
    """Global average pooling, optional hidden layers, dropout and one Dense layer, all in float32.

    Args:
        num_outputs: Width of the last layer.
        hidden: Widths of the hidden layers (ReLU). Defaults to none.
        dropout: Share of features dropped after each hidden layer and before the last layer. Defaults to 0.2.
        activation: Activation of the last layer; None gives logits.
        l1: L1 penalty on every kernel of the head.
        l2: L2 penalty on every kernel of the head.
    """

    num_outputs: int
    hidden: tuple[int, ...] = ()
    dropout: float = 0.2
    activation: str | None = None
    l1: float = 0.0
    l2: float = 0.0

    def __call__(self, features: keras.KerasTensor) -> keras.KerasTensor:
        """Put the head on features `(batch, height, width, channels)`; returns `(batch, num_outputs)`."""
        x = keras.layers.GlobalAveragePooling2D(dtype="float32", name="head_pool")(features)
        for number, units in enumerate(self.hidden, start=1):
            if number > 1:
                x = self._dropped(x, f"head_dropout_{number - 1}")
            x = self._dense(units, "relu", f"head_hidden_{number}")(x)
        x = self._dropped(x, "head_dropout")
        return self._dense(self.num_outputs, self.activation, "logits")(x)

    def _dropped(self, x: keras.KerasTensor, name: str) -> keras.KerasTensor:
        if not self.dropout:
            return x
        return keras.layers.Dropout(self.dropout, dtype="float32", name=name)(x)

    def _dense(self, units: int, activation: str | None, name: str) -> keras.layers.Dense:
        penalty = keras.regularizers.L1L2(self.l1, self.l2) if self.l1 or self.l2 else None
        return keras.layers.Dense(units, activation=activation, kernel_regularizer=penalty, dtype="float32", name=name)
