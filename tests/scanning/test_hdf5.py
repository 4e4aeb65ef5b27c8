"""Crafted HDF5 files: links, data elsewhere, filters, claims, and the networks that old files describe."""

from __future__ import annotations

import json

import h5py
import keras
import numpy as np
import pytest

from tftransfer.scanning import hdf5, scan
from tftransfer.weights import demo_weights_path


@pytest.fixture
def write(tmp_path):
    """Return a function that writes an HDF5 file with one honest tensor and what else is asked for."""

    def written(change, name="crafted.weights.h5"):
        with h5py.File(tmp_path / name, "w") as file:
            file["layers/dense/vars/0"] = np.ones((3, 4), np.float32)
            change(file)
        return tmp_path / name

    return written


def test_what_keras_writes_has_no_findings(tmp_path):
    simple = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, "relu"), keras.layers.Dropout(0.1)])
    simple.compile("adam", "mse", metrics=["mae"])
    simple.fit(np.ones((2, 4)), np.ones((2, 2)), verbose=0)
    simple.save(tmp_path / "whole.h5")
    functional = keras.applications.MobileNet(weights=None, input_shape=(32, 32, 3), alpha=0.25)
    functional.save(tmp_path / "functional.h5")
    functional.save_weights(tmp_path / "only.weights.h5")
    for name in ("whole.h5", "functional.h5", "only.weights.h5"):
        assert scan(tmp_path / name) == ()
    assert scan(demo_weights_path()) == ()


def test_packed_tensors_have_no_findings(write):
    def change(file):
        for packing in ("gzip", "lzf"):
            file.create_dataset(packing, data=np.zeros((100, 100)), compression=packing, shuffle=True, fletcher32=True)

    assert scan(write(change)) == ()


def _external_link(file):
    """keras#22900, the class of CVE-2026-1669: the weights are another file's."""
    file["model_weights"] = h5py.ExternalLink("/etc/passwd", "/")


def _soft_link(file):
    file["layers/other"] = h5py.SoftLink("/layers/dense")


def _hard_link(file):
    file["layers/other"] = file["layers"]


def _external(file):
    """CVE-2026-1669."""
    file.create_dataset("secret", (10,), "u1", external=[("/etc/passwd", 0, 10)])


def _virtual(file):
    """keras#22976."""
    layout = h5py.VirtualLayout((4,), "f4")
    layout[:] = h5py.VirtualSource("/srv/other.h5", "weights", (4,))
    file.create_virtual_dataset("secret", layout)


def _references(file):
    file.create_dataset("references", data=np.array([file["layers"].ref], dtype=h5py.ref_dtype))


def _reference(file):
    file.attrs["reference"] = file["layers"].ref


def _shape_bomb(file):
    """CVE-2026-0897."""
    file.create_dataset("bomb", (1 << 20, 1 << 20), "f4", chunks=(1024, 1024), compression="gzip")


def _chunk_bomb(file):
    """A tensor of four numbers in a chunk of 128 MB, packed twice into a few thousand bytes."""
    plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plan.set_chunk((1 << 25,))
    plan.set_deflate(1)
    plan.set_deflate(1)
    space = h5py.h5s.create_simple((4,), (h5py.h5s.UNLIMITED,))
    h5py.h5d.create(file.id, b"bomb", h5py.h5t.NATIVE_FLOAT, space, plan)
    file["bomb"][:] = 1


def _many_bombs(file):
    for number in range(60):
        file.create_dataset(f"bomb{number}", (1 << 20,), "f4", chunks=(1024,), compression="gzip")


def _filter(file):
    plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plan.set_chunk((10,))
    plan.set_filter(305, h5py.h5z.FLAG_OPTIONAL)
    space = h5py.h5s.create_simple((10,))
    h5py.h5d.create(file.id, b"filtered", h5py.h5t.NATIVE_FLOAT, space, plan)


def _type(file):
    file["type"] = np.dtype("f4")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_external_link, "/model_weights: is a link (ExternalLink)"),
        (_soft_link, "/layers/other: is a link (SoftLink)"),
        (_hard_link, "/layers/other: is there under a second name"),
        (_external, "/secret: keeps its data in another file"),
        (_virtual, "/secret: is a virtual tensor"),
        (_references, "/references: holds references"),
        (_reference, "attribute 'reference' refers"),
        (_shape_bomb, "/bomb: claims 4398046511104 bytes"),
        (_chunk_bomb, "/bomb: claims 134217728 bytes"),
        (_many_bombs, "bytes of tensors in a file of"),
        (_filter, "/filtered: needs the filter 305"),
        (_type, "/type: is neither a group nor a tensor"),
    ],
)
def test_structures_that_no_weights_need_are_refused(change, said, write, problems_of):
    found = problems_of(write(change))
    assert len(found) == 1
    assert said in found[0]


def test_attributes_have_a_largest_size(write, problems_of, monkeypatch):
    def change(file):
        file.attrs["names"] = np.zeros(1000)

    path = write(change)
    monkeypatch.setattr(hdf5, "LARGEST_ATTRIBUTE", 7999)
    assert "attribute 'names' claims 8000 bytes" in problems_of(path)[0]
    monkeypatch.setattr(hdf5, "MOST_ATTRIBUTES", 0)
    assert "more than 0" in problems_of(path)[0]


def test_objects_are_counted(write, problems_of, monkeypatch):
    path = write(lambda file: file.create_group("/".join("abcdefgh")))
    monkeypatch.setattr(hdf5, "DEEPEST", 5)
    assert "deep" in problems_of(path)[0]


LAMBDA = {
    "class_name": "Lambda",
    "config": {"name": "evil", "function": ["4wEA", None, None], "function_type": "lambda"},
}


def _network(*layers):
    dense = {"class_name": "Dense", "config": {"name": "dense", "units": 1, "activation": "relu"}}
    return {"class_name": "Sequential", "config": {"name": "old", "layers": [dense, *layers]}}


@pytest.mark.parametrize(
    ("attribute", "content", "said"),
    [
        ("model_config", _network(LAMBDA), "Lambda: holds Python code"),  # CVE-2025-9905, and CVE-2024-3660 in HDF5
        ("model_config", _network({"class_name": "TFOpLambda", "config": {"function": "io.write_file"}}), "TFOpLambda"),
        ("model_config", _network({"class_name": "TFSMLayer", "config": {"filepath": "/tmp/evil"}}), "TFSMLayer"),
        (
            "model_config",
            _network({"class_name": "Popen", "module": "subprocess", "config": {}}),
            "Popen of subprocess",
        ),
        ("model_config", _network({"class_name": "Mine", "config": {}}), "class Mine is not on the list"),
        ("model_config", _network({"class_name": "StringLookup", "config": {"vocabulary": "/x"}}), "path of a file"),
        ("training_config", {"loss": {"class_name": "Evil", "config": {}}}, "class Evil is not on the list"),
    ],
)
@pytest.mark.parametrize("encode", [str, str.encode], ids=["text", "bytes"])
def test_networks_in_old_files_are_judged(attribute, content, said, encode, write, problems_of):
    def change(file):
        file.attrs[attribute] = encode(json.dumps(content))

    found = problems_of(write(change, "old.h5"))
    assert any(said in line and attribute in line for line in found), found


def test_old_networks_have_no_findings(write):
    policy = {"class_name": "Policy", "config": {"name": "float32"}}
    layer = {"class_name": "Conv2D", "config": {"name": "conv1/conv", "dtype": policy, "filters": 3}}
    layer["config"]["kernel_initializer"] = {"class_name": "VarianceScaling", "config": {"seed": None}}

    def change(file):
        file.attrs["model_config"] = json.dumps(_network(layer))
        file.attrs["training_config"] = json.dumps({"optimizer_config": {"class_name": "Adam", "config": {}}})

    assert scan(write(change, "old.h5")) == ()


@pytest.mark.parametrize("value", [3, "no JSON", "[]"])
def test_a_description_is_json(value, write, problems_of):
    def change(file):
        file.attrs["model_config"] = value

    assert "model_config: is no" in problems_of(write(change))[0]
