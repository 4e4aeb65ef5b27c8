"""Crafted files of arrays: what their headers claim."""

from __future__ import annotations

import io
import json
import os
import zipfile

import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from tftransfer.scanning import arrays, scan


def test_what_is_written_has_no_findings(tmp_path):
    tensors = {"a": np.ones((3, 4), np.float32), "b": np.zeros(0, np.int64), "c": np.array(1.5, np.float16)}
    save_file(tensors, tmp_path / "x.safetensors", {"format": "np"})
    np.savez(tmp_path / "x.npz", **tensors)
    np.savez_compressed(tmp_path / "y.npz", large=np.zeros((1000, 1000)), text=np.array(["ab"]))
    for name in ("x.safetensors", "x.npz", "y.npz"):
        assert scan(tmp_path / name) == ()


def _npy(header):
    content = io.BytesIO()
    text = repr(header) if isinstance(header, dict) else header
    content.write(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode())
    return content.getvalue()


CLAIM = {"descr": "<f4", "fortran_order": False, "shape": (1 << 30, 1 << 20)}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (_npy(CLAIM), "x.npy: claims"),  # keras#23016
        (_npy({**CLAIM, "shape": (-1,)}), "x.npy: claims"),
        (_npy({**CLAIM, "descr": "|O", "shape": ()}), "x.npy: is an array of Python objects"),
        (_npy({**CLAIM, "descr": "?!"}), "header is damaged"),
        (_npy("__import__('os').system('id')"), "header is damaged"),
        (b"\x93NUMPY\x09\x00", "header is damaged"),
        (b"", "header is damaged"),
    ],
)
def test_headers_of_arrays_are_judged(content, said, tmp_path, problems_of):
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("x.npy", content)
    assert said in problems_of(tmp_path / "x.npz")[0]


def test_arrays_lie_in_the_archive(tmp_path, problems_of):
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("../x.npy", b"")
    assert "leads out" in problems_of(tmp_path / "x.npz")[0]
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("readme.txt", b"")
    assert "no array" in problems_of(tmp_path / "x.npz")[0]


def tensor(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ({"a": tensor([2], 0, 8), "b": tensor([2], 4, 12)}, "b: does not begin"),
        ({"a": tensor([2], 4, 12)}, "a: does not begin"),
        ({"a": tensor([1], 0, 4)}, "tensors of 4 bytes in data of 12"),
        ({"a": tensor([1 << 40], 0, 12)}, "a: has no type, shape and place"),
        ({"a": tensor([-3], 0, 12)}, "a: has no type"),
        ({"a": tensor([3], 12, 0)}, "a: has no type"),
        ({"a": tensor([3], 0, 12, "PICKLE")}, "a: has no type"),
        ({"a": [1]}, "a: has no type"),
        ({"__metadata__": {"x": [1]}, "a": tensor([3], 0, 12)}, "something else than texts"),
        ([1], "no JSON object"),
        ("{", "no JSON"),
    ],
)
def test_headers_of_safetensors_are_judged(header, said, tmp_path, problems_of):
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(12))
    assert any(said in line for line in problems_of(tmp_path / "x.safetensors"))
    with pytest.raises(SafetensorError):  # which is why trust is not offered
        load_file(tmp_path / "x.safetensors")


def test_a_header_fits_into_its_file(tmp_path, problems_of):
    for content in ((1 << 40).to_bytes(8, "little") + b"{}", b"abc", b""):
        (tmp_path / "x.safetensors").write_bytes(content)
        assert "header: claims" in problems_of(tmp_path / "x.safetensors")[0]
    (tmp_path / "x.safetensors").write_bytes((arrays.LARGEST_HEADER + 1).to_bytes(8, "little"))
    os.truncate(tmp_path / "x.safetensors", arrays.LARGEST_HEADER + 100)  # a hole
    assert "header: claims" in problems_of(tmp_path / "x.safetensors")[0]
