"""The embedded data: real handwritten digits, which scikit-learn brings along."""

from __future__ import annotations

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

TEST_SHARE = 0.2


def digits() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return scikit-learn's handwritten digits as pictures, white on black.

    The test split is the same for every seed, so that results can be compared.

    Returns:
        Pictures uint8 `(1797, 8, 8, 3)`, their digits `(1797,)`, and whether each belongs to the test split.

    Example:
        >>> pictures, numbers, is_test = digits()
        >>> pictures.shape, int(is_test.sum())
        ((1797, 8, 8, 3), 360)
    """
    bunch = load_digits()
    gray = np.round(bunch.images * 255 / 16).astype(np.uint8)
    numbers = np.arange(len(gray))
    _, test = train_test_split(numbers, test_size=TEST_SHARE, stratify=bunch.target, random_state=0)
    return np.repeat(gray[..., None], 3, axis=-1), bunch.target, np.isin(numbers, test)
