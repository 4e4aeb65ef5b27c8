"""Write `tftransfer/assets/keras_weights.json`: what Keras publishes for each row.

    python -m tests.golden.keras_weights

`networks` holds for each row its number of parameters without the top and the file without the top that Keras
would download at its natural size; `md5` the MD5 sum of each file, with and without the top, where Keras has
one; `sha256` is of files at hand and kept as it is. Slow: it builds all 40 networks three times.
"""

from __future__ import annotations

import gc
import json
from pathlib import Path
from unittest import mock

import keras

from tftransfer import backbones

ASSET = Path(backbones.__file__).parent / "assets" / "keras_weights.json"


class Asked(Exception):
    """Raised in place of a download, with the file's name and MD5 sum."""


def _refuse(name: str, origin: str, file_hash: str | None = None, **_: object) -> str:
    raise Asked(name, file_hash)


def asked(row: backbones.Backbone, include_top: bool) -> tuple[str, str | None]:
    """Return the name and MD5 sum of the file that Keras asks for."""
    function = getattr(keras.applications, row.function)
    width = {"alpha": row.width} if row.width != 1.0 else {}
    side = row.natural_size
    with mock.patch("keras.src.utils.file_utils.get_file", _refuse):
        try:
            function(include_top=include_top, weights="imagenet", input_shape=(side, side, 3), **width)
        except Asked as question:
            return question.args
        finally:
            keras.backend.clear_session()
            gc.collect()
    raise RuntimeError(f"{row.name} asked for no file")


def main() -> None:
    """Ask for every row and write the file."""
    networks, digests = {}, {}
    for name in backbones.names():
        row = backbones.backbone(name)
        side = row.smallest_size
        model = backbones.build(name, (side, side))
        networks[name] = {"parameters": model.count_params(), "file": asked(row, False)[0]}
        digests.update(asked(row, top) for top in (False, True))
        print(name, networks[name], flush=True)
    kept = json.loads(ASSET.read_text())["sha256"] if ASSET.exists() else {}
    md5 = {name: digest for name, digest in sorted(digests.items()) if digest}
    ASSET.write_text(json.dumps({"networks": networks, "md5": md5, "sha256": kept}, indent=1) + "\n")


if __name__ == "__main__":
    main()
