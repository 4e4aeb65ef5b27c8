"""Judge model files before TensorFlow or Keras read them: neither is imported here.

What is not on a list of what models need is refused: operations of a SavedModel's graphs, classes of a Keras network,
names in an archive, links and claims of sizes. Loops that never end, and networks that are merely large, are not found.
"""

from __future__ import annotations

from tftransfer.scanning.examination import SCANNED_FOR, check, examine, scan
from tftransfer.scanning.finding import Finding

__all__ = ["SCANNED_FOR", "Finding", "check", "examine", "scan"]
