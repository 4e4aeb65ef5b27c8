"""Crafted `.keras` files, after the public advisories and beyond: each is refused without being loaded."""

from __future__ import annotations

import base64
import io
import json
import marshal
import shutil
import stat
import struct
import zipfile
import zlib
from types import SimpleNamespace

import h5py
import keras
import numpy as np
import pytest

from tftransfer.scanning import archives, configs, scan
from tftransfer.tasks.single_label import SmoothedCrossentropy


def test_what_keras_writes_has_no_findings(network, write_keras, tmp_path):
    network.save(tmp_path / "saved.keras")
    assert scan(tmp_path / "saved.keras") == ()
    assert scan(write_keras()) == (), "written again"
    network.save_weights(tmp_path / "w.weights.json", max_shard_size=1e-6)
    assert scan(tmp_path / "w.weights.json") == ()
    with zipfile.ZipFile(tmp_path / "saved.keras") as archive:
        archive.extractall(tmp_path / "unpacked")
    assert scan(tmp_path / "unpacked") == ()


def test_this_toolkits_classes_are_known(tmp_path):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    model.compile("adam", SmoothedCrossentropy(2, 0.1))
    model.save(tmp_path / "own.keras")
    assert scan(tmp_path / "own.keras") == ()


def test_assets_of_layers_are_known(tmp_path):
    words = keras.layers.TextVectorization(output_mode="multi_hot", name="words")
    words.adapt(np.array(["red green", "blue"]))
    keras.Sequential([keras.Input((1,), dtype="string"), words, keras.layers.Dense(2)]).save(tmp_path / "text.keras")
    with zipfile.ZipFile(tmp_path / "text.keras") as archive:
        assert any(name.startswith("assets/") for name in archive.namelist())
    assert scan(tmp_path / "text.keras") == ()


# Names: one more layer, or another one.

CODE = base64.b64encode(marshal.dumps(compile("open('evil', 'w')", "evil", "exec"))).decode()
PICKLE = base64.b64encode(b"\x80\x04cos\nsystem\n.").decode()


def named(module, class_name, registered_name=None, /, **config):
    return {"module": module, "class_name": class_name, "config": config, "registered_name": registered_name}


def function(module, name, registered_name="function"):
    return {"module": module, "class_name": "function", "config": name, "registered_name": registered_name}


LAYERS = {
    # CVE-2024-3660, CVE-2026-12481: a layer with Python's byte code.
    "Lambda: holds Python code": named(
        "keras.layers", "Lambda", function={"class_name": "__lambda__", "config": {"value": CODE}}
    ),
    # CVE-2025-1550: any function of any module.
    "function 'system' of os": named("keras.layers", "Activation", activation=function("os", "system")),
    "class Popen of subprocess": named("subprocess", "Popen", args="id"),
    # CVE-2025-8747, and CVE-2024-55459, CVE-2025-12060, CVE-2025-12638, whose crafted archives it would fetch.
    "function 'get_file' of keras.utils": named(
        "keras.layers", "Activation", activation=function("keras.utils", "get_file")
    ),
    "class get_file of keras.utils": named("keras.utils", "get_file", origin="http://localhost/x.tar", extract=True),
    # CVE-2025-9906: safe mode is switched off first.
    "function 'enable_unsafe_deserialization'": named(
        "keras.layers", "Activation", activation=function("keras.config", "enable_unsafe_deserialization")
    ),
    # CVE-2025-9906, second step: a model in another file.
    "function 'load_model' of keras.models": named(
        "keras.layers", "Activation", activation=function("keras.models", "load_model")
    ),
    # CVE-2025-12058: a vocabulary that is a file or an address.
    "'/etc/passwd'": named("keras.layers", "StringLookup", vocabulary="/etc/passwd"),
    "'http://169.254.169.254/token'": named(
        "keras.layers", "TextVectorization", vocabulary="http://169.254.169.254/token"
    ),
    "vocabulary: is neither a list nor an array": named(
        "keras.layers", "IntegerLookup", vocabulary={"class_name": "__bytes__", "config": {"value": "/etc/passwd"}}
    ),
    # CVE-2026-1462: a SavedModel beside it.
    "class TFSMLayer of keras.layers": named("keras.layers", "TFSMLayer", filepath="/tmp/evil"),
    # CVE-2026-12479: a name that leads elsewhere.
    "leads to another folder": named("keras.layers", "Dense", name="../../../evil", units=1),
    # A network of PyTorch is a pickle.
    "class TorchModuleWrapper": named("keras.layers", "TorchModuleWrapper", module=PICKLE),
    "__tuple__ of evil is no class": named("evil", "__tuple__"),
    "TensorShape of evil is no class": named("evil", "TensorShape"),
    "class JaxLayer": named("keras.layers", "JaxLayer", call_fn=function("os", "system")),
    # An operation that calls a function, on a node that leads nowhere.
    "class Switch of keras.src.ops.core": named("keras.src.ops.core", "Switch"),
    "class FeatureSpace of keras.utils": named("keras.utils", "FeatureSpace"),
    "class Layer of tensorflow.python.keras": named("tensorflow.python.keras", "Layer"),
    "class Dense of evil.layers": named("evil.layers", "Dense", units=1),
    "somebody else>Dense of keras.layers is somebody's own": named(
        "keras.layers", "Dense", "somebody else>Dense", units=1
    ),
    "is registered as get_file": named("keras.layers", "Dense", "get_file", units=1),
    "class tftransfer>Evil": named("tftransfer.evil", "Evil", "tftransfer>Evil"),
    "class evil>OneCycle": named("tftransfer.schedules", "OneCycle", "evil>OneCycle"),
    "class functions>relu": named("functions", "relu", "functions>relu"),
    "class relu of functions": named("functions", "relu"),
    "class Dense names no module": {"class_name": "Dense", "config": {"units": 1}},
    "class __typespec__": {"class_name": "__typespec__", "module": "os", "spec_name": "x", "config": []},
    "is no text": named("keras.layers", ["Dense"], units=1),
    "too large a number": named("keras.layers", "Dense", units=10**15),
    "too large a tensor": named("keras.layers", "Reshape", target_shape=[2**20, 2**20]),
    "class deserialize of keras.layers": named("keras.layers", "deserialize"),
    "function 'deserialize' of keras.losses": named(
        "keras.layers", "Activation", activation=function("keras.losses", "deserialize")
    ),
    "function 'relu' of os": named("keras.layers", "Activation", activation=function("os", "relu")),
    "function 'evil>relu'": named("keras.layers", "Activation", activation=function("builtins", "evil>relu")),
    "of builtins": named("keras.layers", "Activation", activation=function("builtins", "eval")),
}


@pytest.mark.parametrize("said", LAYERS)
def test_layers_that_run_or_read_are_refused(said, config, write_keras, problems_of):
    config["config"]["layers"].append({**LAYERS[said], "name": "evil", "inbound_nodes": []})
    found = problems_of(write_keras(config=config))
    assert any(said in line and "layers[" in line for line in found), found


PARTS = {
    "an argument": lambda layer, evil: layer["config"].update(kernel_initializer=evil),
    "deep in an argument": lambda layer, evil: layer["config"].update(x=[{"y": [evil]}]),
    "a build": lambda layer, evil: layer.update(build_config={"input_shape": evil}),
    "an input": lambda layer, evil: layer["inbound_nodes"][0]["kwargs"].update(training=evil),
}


@pytest.mark.parametrize("part", PARTS)
def test_names_are_looked_for_everywhere(part, config, layer_of, write_keras, problems_of):
    PARTS[part](layer_of(config, "conv"), named("os", "system"))
    found = problems_of(write_keras(config=config))
    assert len(found) == 1
    assert "class system of os" in found[0]


@pytest.mark.parametrize("key", ["optimizer", "loss", "metrics"])
def test_how_it_was_compiled_is_judged_too(key, config, write_keras, problems_of):
    config["compile_config"][key] = named("somewhere", "Evil", "somebody>Evil")
    assert "compile_config" in problems_of(write_keras(config=config))[0]


def test_a_layer_that_is_called_while_it_is_loaded_is_refused(config, layer_of, write_keras, problems_of):
    layer_of(config, "conv")["inbound_nodes"].append({"args": [[[1]]], "kwargs": {"repeats": 25_000_000}})
    assert "called without a tensor of the network" in problems_of(write_keras(config=config))[0]


def test_dense_names_of_old_keras_are_no_paths(config, layer_of, write_keras):
    layer_of(config, "conv")["config"]["name"] = "conv1/bn"
    layer_of(config, "lookup")["config"]["vocabulary"] = ["/etc/passwd", "../x", "http://x"]
    layer_of(config, "conv")["config"]["kernel_initializer"]["config"]["seed"] = 2**63
    assert scan(write_keras(config=config)) == ()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"{", "no JSON"),
        (b"[1]", "no JSON object"),
        (b'{"a": ' * 100_000, "no JSON"),
        (b'{"a": ' * 300 + b"1" + b"}" * 300, "deep"),
        (b'{"a": ' + b"9" * 5000 + b"}", "no JSON"),
        (b"\xff\xfe", "no JSON"),
    ],
    ids=["open", "list", "recursive", "deep", "digits", "encoding"],
)
def test_descriptions_are_bounded(text, said, write_keras, problems_of):
    assert any(said in line for line in problems_of(write_keras({"config.json": text})))


def test_descriptions_have_a_largest_size(write_keras, problems_of, monkeypatch):
    monkeypatch.setattr(configs, "LARGEST_CONFIG", 100)
    assert any("more than 100" in line for line in problems_of(write_keras()))
    monkeypatch.setattr(configs, "LARGEST_CONFIG", 10**6)
    monkeypatch.setattr(configs, "MOST_VALUES", 100)
    assert any("more than 100 values" in line for line in problems_of(write_keras()))


# The archive.


@pytest.mark.parametrize("name", ["../evil.txt", "/etc/evil", "assets/../../evil", "..\\evil", "C:/evil"])
def test_members_stay_in_the_archive(name, write_keras, problems_of):
    """After CVE-2025-12060 and CVE-2025-12638."""
    assert any("leads out" in line for line in problems_of(write_keras({name: b"evil"})))


@pytest.mark.parametrize("name", ["evil.py", "assets/evil.so", "notes.txt", "model.weights.h5.bak"])
def test_members_are_what_keras_writes(name, write_keras, problems_of):
    assert any(name in line for line in problems_of(write_keras({name: b"evil"})))


def test_pickles_among_the_assets_are_refused(write_keras, problems_of):
    assert "a pickle" in problems_of(write_keras({"assets/vocabulary.txt": b"\x80\x04cos\nsystem\n."}))[0]


def _named_twice(archive, kept):
    """Python from 3.12 on takes the second one, of the Info-ZIP extra field for names in Unicode."""
    member = zipfile.ZipInfo("assets/x")
    other = b"assets/../../evil"
    member.extra = struct.pack("<HHBI", 0x7075, 5 + len(other), 1, zlib.crc32(b"assets/x")) + other
    archive.writestr(member, b"")


def _twice(archive, kept):
    for content in (b"{}", kept["config.json"]):
        archive.writestr("config.json", content)
    archive.writestr("model.weights.h5", kept["model.weights.h5"])


def _link(archive, kept):
    _whole(archive, kept)
    link = zipfile.ZipInfo("assets/link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    archive.writestr(link, "/etc/passwd")


def _bomb(archive, kept):
    _whole(archive, kept)
    archive.writestr("assets/zeros.txt", bytes(archives.BOMB_BYTES + 1), zipfile.ZIP_DEFLATED)


def _packed_otherwise(archive, kept):
    _whole(archive, kept)
    archive.writestr("assets/x.txt", b"x", zipfile.ZIP_LZMA)


def _without_weights(archive, kept):
    archive.writestr("config.json", kept["config.json"])


def _whole(archive, kept):
    for name, content in kept.items():
        archive.writestr(name, content)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("fill", "said"),
    [
        (_twice, "config.json: is there twice"),
        (_named_twice, "has two names"),
        (_link, "is a link"),
        (_bomb, "assets/zeros.txt: claims"),
        (_packed_otherwise, "packed in a way"),
        (_without_weights, "lacks config.json or weights"),
    ],
)
def test_archives_of_another_make_are_refused(fill, said, kept, tmp_path, problems_of):
    with zipfile.ZipFile(tmp_path / "crafted.keras", "w") as archive:
        fill(archive, kept)
    assert any(said in line for line in problems_of(tmp_path / "crafted.keras"))


EDITS = {
    "has another name": lambda content: content.replace(b"metadata.json", b"metadata.jsom", 1),
    "has other sizes": lambda content: content[:22] + b"\x01\x00\x00\x00" + content[26:],
    "packed otherwise": lambda content: content[:8] + b"\x08\x00" + content[10:],
    "bytes lie before": lambda content: b"PK\x03\x04 and more" + content,
    "does not begin like": lambda content: b"MZ\x90\x00" + content,
    "is encrypted": lambda content: _in_the_table(content, 8, b"\x01\x00"),
    "no .keras archive": lambda content: content[: len(content) // 2],
}


def _in_the_table(content, offset, new, last=False):
    """Change an entry of the table of contents at the archive's end."""
    begin = (content.rfind if last else content.find)(b"PK\x01\x02") + offset
    return content[:begin] + new + content[begin + len(new) :]


@pytest.mark.parametrize("said", EDITS)
def test_the_two_tables_of_an_archive_must_agree(said, write_keras, problems_of):
    path = write_keras({"metadata.json": b"{}"})
    path.write_bytes(EDITS[said](path.read_bytes()))
    found = problems_of(path)
    assert any(said in line for line in found), found


def test_members_do_not_share_their_data(tmp_path, problems_of):
    """An archive that unpacks to more than its size without packing much: one member's data hold another member."""
    inner, path = tmp_path / "inner.zip", tmp_path / "crafted.keras"
    member = zipfile.ZipInfo("assets/b.txt")
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr(member, "words")
    record = inner.read_bytes()[: 30 + len(member.filename) + len("words")]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(zipfile.ZipInfo("assets/a.txt"), record)
        archive.writestr(member, "words")
    begin = 30 + len("assets/a.txt")
    path.write_bytes(_in_the_table(path.read_bytes(), 42, begin.to_bytes(4, "little"), last=True))
    assert any("assets/b.txt: shares its data" in line for line in problems_of(path))


# The weights in the archive.


def _h5(write):
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        write(file)
    return content.getvalue()


def _shape_bomb(file):
    """CVE-2026-0897."""
    file.create_dataset("layers/dense/vars/0", (50_000_000, 50_000_000), "f4", compression="gzip", chunks=(1000, 1000))


def _external(file):
    """CVE-2026-1669."""
    file.create_dataset("layers/dense/vars/0", (10,), "u1", external=[("/etc/passwd", 0, 10)])


@pytest.mark.parametrize(("write", "said"), [(_shape_bomb, "claims 10000000000000000 bytes"), (_external, "passwd")])
@pytest.mark.parametrize("packing", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_weights_in_the_archive_are_judged(write, said, packing, kept, tmp_path, problems_of):
    with zipfile.ZipFile(tmp_path / "crafted.keras", "w", packing) as archive:
        _whole(archive, kept | {"model.weights.h5": _h5(write)})
    found = problems_of(tmp_path / "crafted.keras")
    assert any(said in line and "model.weights.h5" in line for line in found), found


def test_weights_of_python_objects_are_refused(kept, tmp_path, problems_of):
    content = io.BytesIO()
    np.savez(content, dense=np.array({"0": 1}, dtype=object))
    with zipfile.ZipFile(tmp_path / "crafted.keras", "w") as archive:
        archive.writestr("config.json", kept["config.json"])
        archive.writestr("model.weights.npz", content.getvalue())
    assert any("Python objects" in line for line in problems_of(tmp_path / "crafted.keras"))


def test_only_structure_is_read(tmp_path, monkeypatch):
    """A large file costs no more than a small one: its tensors are not read."""
    with h5py.File(tmp_path / "large.weights.h5", "w") as file:
        file.create_dataset("layers/dense/vars/0", data=np.ones((1000, 5000), np.float32))
    read = SimpleNamespace(bytes=0)
    window = archives._Window.readinto

    def counted(self, buffer):
        read.bytes += len(buffer)
        return window(self, buffer)

    monkeypatch.setattr(archives._Window, "readinto", counted)
    with zipfile.ZipFile(tmp_path / "large.keras", "w") as archive:
        config = named("keras", "Sequential", name="x", layers=[])
        archive.writestr("config.json", json.dumps(config))
        archive.write(tmp_path / "large.weights.h5", "model.weights.h5")
    assert scan(tmp_path / "large.keras") == ()
    assert 0 < read.bytes < 200_000


# An unpacked archive, and weights in several files.


def test_unpacked_archives_are_judged(config, write_keras, tmp_path, problems_of):
    config["config"]["layers"].append(named("os", "system"))
    with zipfile.ZipFile(write_keras(config=config)) as archive:
        archive.extractall(tmp_path / "unpacked")
    (tmp_path / "unpacked" / "evil.py").write_text("")
    (tmp_path / "unpacked" / "assets").symlink_to("/etc")
    found = problems_of(tmp_path / "unpacked")
    assert len(found) == 3
    assert any("class system of os" in line for line in found)


def test_a_description_without_weights_is_judged(config, tmp_path, problems_of):
    """Keras builds the network of a folder before it misses the weights."""
    config["config"]["layers"].append(named("os", "system"))
    folder = tmp_path / "folder"
    folder.mkdir()
    np.savez(folder / "honest.npz", x=np.ones(3))
    (folder / "config.json").write_text(json.dumps(config))
    found = problems_of(folder)
    assert len(found) == 1
    assert "config.json" in found[0]
    assert "class system of os" in found[0]


def test_descriptions_of_other_programs_have_no_findings(tmp_path):
    content = {"architectures": ["BertModel"], "hidden_size": 768, "vocab_size": 30522, "_name_or_path": "/x"}
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert scan(tmp_path) == ()


def test_a_savedmodel_is_no_folder_of_keras(everything, config, kept, tmp_path, problems_of):
    """TensorFlow would load the one, Keras the other."""
    shutil.copytree(everything, tmp_path / "both")
    config["config"]["layers"].append(named("os", "system"))
    (tmp_path / "both" / "config.json").write_text(json.dumps(config))
    (tmp_path / "both" / "model.weights.h5").write_bytes(kept["model.weights.h5"])
    assert "config.json: lies in a SavedModel" in problems_of(tmp_path / "both")[0]


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"weight_map": {"/a/vars": "../evil.weights.h5"}}, "beside it"),
        ({"weight_map": {"/a/vars": ["missing.weights.h5"]}}, "not there"),
        ({"weight_map": 1}, "no table"),
        ({"weight_map": {}}, "names no file"),
    ],
)
def test_sharded_weights_name_files_beside_them(table, said, tmp_path, problems_of):
    (tmp_path / "x.weights.json").write_text(json.dumps(table))
    assert said in problems_of(tmp_path / "x.weights.json")[0]


def test_nothing_is_run(config, write_keras, tmp_path, monkeypatch):
    """The same file does run its code where Keras loads it without safe mode."""
    monkeypatch.chdir(tmp_path)
    config["config"]["layers"].append({**LAYERS["Lambda: holds Python code"], "name": "evil", "inbound_nodes": []})
    assert scan(write_keras(config=config))
    assert not (tmp_path / "evil").exists()
