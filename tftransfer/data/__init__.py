"""Data: sources, one decoder, splits, a stateless order, augmentation."""

from tftransfer.data.examples import Data, Examples, Pictures, Quarantined
from tftransfer.data.images import decode_picture
from tftransfer.data.loading import inspect, load, load_for

__all__ = ["Data", "Examples", "Pictures", "Quarantined", "decode_picture", "inspect", "load", "load_for"]
