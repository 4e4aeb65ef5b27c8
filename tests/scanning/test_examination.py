"""The scan as a whole: which files, what is printed, exit codes, no TensorFlow, no crash on damage."""

from __future__ import annotations

import json
import os
import re
import shutil
import time

import hypothesis
import keras
import numpy as np
import pytest
from hypothesis import strategies as st

from tftransfer import InputError, builders, cli, serving, tasks
from tftransfer.errors import ScanError
from tftransfer.scanning import check, examination, examine, scan
from tftransfer.scanning.finding import Finding

OWN_TASKS = (
    tasks.SingleLabel(("red", "green/blue", "größer")),
    tasks.MultiLabel(("red", "green", "blue")),
    tasks.Regression(("width", "height", "depth")),
)


@pytest.fixture
def evil(write_keras, config):
    """A file with one finding."""
    layer = {"module": "os", "class_name": "system", "config": {}, "registered_name": None}
    config["config"]["layers"].append(layer)
    return write_keras(config=config, name="evil.keras")


@pytest.fixture
def run_folder(write_keras, everything, tmp_path):
    """A folder as a run's, with a model, two exports, weights and files that are no models."""
    folder = tmp_path / "run"
    (folder / "logs").mkdir(parents=True)
    (folder / "logs" / "events.out").write_bytes(b"..")
    (folder / "manifest.json").write_text("{}")
    (folder / "checkpoints").mkdir()
    np.savez(folder / "checkpoints" / "x.npz", x=np.ones(3))
    shutil.copy(write_keras(), folder / "model.keras")
    for version in "12":
        shutil.copytree(everything, folder / "serving" / version)
    return folder


def test_a_folder_is_searched_for_models(run_folder):
    models = [model.relative_to(run_folder).as_posix() for model, _ in examine(run_folder)]
    assert models == ["checkpoints/x.npz", "model.keras", "serving/1", "serving/2"]
    assert scan(run_folder) == ()
    assert [model.name for model, _ in examine(run_folder / "serving")] == ["1", "2"]


def test_links_in_a_folder_are_found(run_folder, tmp_path, problems_of):
    (run_folder / "serving" / "3").symlink_to(run_folder / "serving" / "1")
    (run_folder / "other.keras").symlink_to(tmp_path / "elsewhere.keras")
    assert [line.split(": ")[1] for line in problems_of(run_folder)] == ["is a link to elsewhere"] * 2


def test_what_is_named_may_be_a_link(run_folder, tmp_path):
    (tmp_path / "link").symlink_to(run_folder)
    (tmp_path / "link.keras").symlink_to(run_folder / "model.keras")
    assert scan(tmp_path / "link") == scan(tmp_path / "link.keras") == ()


def test_unknown_kinds_are_findings(tmp_path, problems_of):
    (tmp_path / "weights.bin").write_bytes(b"..")
    assert "unknown kind of file" in problems_of(tmp_path / "weights.bin")[0]
    assert "holds no model" in problems_of(tmp_path)[0]
    os.mkfifo(tmp_path / "pipe.h5")
    assert "no ordinary file" in problems_of(tmp_path / "pipe.h5")[0]
    (tmp_path / "dangling.h5").symlink_to(tmp_path / "nothing")
    assert "no ordinary file" in problems_of(tmp_path / "dangling.h5")[0]


@pytest.mark.parametrize(
    ("name", "content"), [("x.h5", b"PK\x03\x04"), ("x.keras", b"\x89HDF\r\n\x1a\n"), ("x.npz", b""), ("x.h5", b"")]
)
def test_a_file_is_what_its_name_says(name, content, tmp_path, problems_of):
    (tmp_path / name).write_bytes(content)
    assert "damaged, cut short or of another kind" in problems_of(tmp_path / name)[0]


def test_a_file_of_two_kinds_is_refused(write_keras, tmp_path, problems_of):
    """One reader takes its beginning, another its end."""
    keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)]).save_weights(tmp_path / "two.weights.h5")
    with (tmp_path / "two.weights.h5").open("ab") as file:
        file.write(write_keras().read_bytes())
    assert "ZIP archive at its end" in problems_of(tmp_path / "two.weights.h5")[0]


def test_missing_files_are_bad_input(tmp_path):
    with pytest.raises(InputError, match="no file or folder"):
        scan(tmp_path / "nothing")


def test_folders_without_end_are_a_finding(run_folder, problems_of, monkeypatch):
    monkeypatch.setattr("tftransfer.scanning.files.MOST_FILES", 3)
    assert "more than 3 files" in problems_of(run_folder)[0]


def test_findings_are_counted(evil, config, write_keras, problems_of, monkeypatch):
    config["config"]["layers"] += [{"module": "os", "class_name": "system", "config": {}}] * 10
    monkeypatch.setattr(examination, "MOST_FINDINGS", 4)
    found = problems_of(write_keras(config=config))
    assert len(found) == 5
    assert found[-1].endswith("and 7 more findings")


def test_what_a_file_says_does_not_steer_the_terminal():
    assert str(Finding("a\nb", "\x1b[31m", "x")) == r"a\nb: \x1b[31m: x"


# Refusal.


def test_check_refuses_with_the_first_finding(evil, run_folder):
    check(run_folder)
    with pytest.raises(ScanError, match="class system of os is not on the list.*--trust"):
        check(evil)


def test_trust_is_loud(evil, capsys):
    check(evil, trust=True)
    assert "is loaded without a scan" in capsys.readouterr().err


def test_a_scans_finding_ends_a_command_with_1(evil, capsys):
    assert cli.guarded(lambda: check(evil)) == 1
    assert "class system of os" in capsys.readouterr().err


# The command.


def test_the_command_says_what_is_found(evil, run_folder, capsys):
    assert cli.main(["scan", str(evil), str(run_folder)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(f"{evil}: config.json: config.layers[")
    assert lines[1].startswith(f"{run_folder}: nothing found in 4 models (scanned for: operations")


def test_the_command_never_says_safe(evil, run_folder, capsys):
    cli.main(["scan", str(evil), str(run_folder)])
    cli.main(["scan", "--json", str(evil), str(run_folder)])
    with pytest.raises(SystemExit):
        cli.main(["scan", "--help"])
    assert not re.search(r"\bsafe\b", capsys.readouterr().out.lower())


def test_the_command_in_json(evil, run_folder, capsys):
    assert cli.main(["scan", "--json", str(evil), str(run_folder)]) == 1
    first, second = json.loads(capsys.readouterr().out)
    assert first["findings"][0]["problem"] == "class system of os is not on the list"
    assert second["findings"] == []
    assert len(second["models"]) == 4
    assert cli.main(["scan", "--json", str(run_folder)]) == 0


def test_the_command_can_be_quiet(evil, capsys):
    assert cli.main(["scan", "--quiet", str(evil)]) == 1
    assert capsys.readouterr().out == ""


def test_a_missing_path_is_one_line_and_exit_2(tmp_path, capsys):
    assert cli.main(["scan", str(tmp_path / "nothing")]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "nothing" in error


def test_neither_tensorflow_nor_keras_is_imported(evil, run_folder, tmp_path, run_python):
    np.savez(tmp_path / "x.npz", x=np.ones(3))
    keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)]).save(tmp_path / "x.h5")
    loaded = run_python(
        """
        import json, sys
        from tftransfer import cli
        codes = [cli.main(["scan", "--quiet", path]) for path in sys.argv[1:]]
        print(json.dumps([codes, sorted({"tensorflow", "keras", "tensorflow_text"} & set(sys.modules))]))
        """,
        *(evil, run_folder, tmp_path / "x.npz", tmp_path / "x.h5"),
    )
    assert loaded == [[1, 0, 0, 0], []]


# Damage.


def damaged(content, draw):
    """Cut a file short, or change a few bytes."""
    if draw(st.booleans()):
        return content[: draw(st.integers(0, len(content)))]
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 8))):
        changed[draw(st.integers(0, len(changed) - 1))] ^= draw(st.integers(1, 255))
    return bytes(changed)


@pytest.mark.parametrize("name", ["saved_model.pb", "model.keras", "model.weights.h5", "x.npz", "x.safetensors"])
@hypothesis.settings(max_examples=80, deadline=None, database=None, derandomize=True)
@hypothesis.given(data=st.data())
def test_damage_is_a_finding_or_nothing(name, originals, data):
    """Whatever the bytes are, a scan ends soon and without an exception."""
    content, folder = originals[name]
    (folder / name).write_bytes(damaged(content, data.draw))
    begin = time.monotonic()
    findings = scan(folder if name == "saved_model.pb" else folder / name)
    assert time.monotonic() - begin < 20
    assert all(isinstance(finding, Finding) for finding in findings)


@pytest.fixture(scope="module")
def originals(everything, network, tmp_path_factory):
    """Good files by name, each with a folder in which it may be damaged."""
    folder = tmp_path_factory.mktemp("damage")
    shutil.copytree(everything, folder / "saved")
    network.save(folder / "model.keras")
    keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)]).save_weights(folder / "model.weights.h5")
    np.savez(folder / "x.npz", x=np.ones(3), y=np.zeros((2, 2)))
    header = json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    (folder / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    places = {path.name: path.parent for path in folder.rglob("*")}
    return {name: ((place / name).read_bytes(), place) for name, place in places.items() if (place / name).is_file()}


# No false alarms.


@pytest.mark.parametrize("task", OWN_TASKS, ids=lambda task: task.kind)
def test_own_exports_have_no_findings(task, tmp_path, small_network):
    model = small_network()
    if task is OWN_TASKS[0]:
        model = builders.image_classifier("MobileNet-0.25", 3, image_size=32, weights=None, hidden=(8,), l2=1e-4)
    serving.export_savedmodel(model, task, tmp_path / "serving" / "1")
    model.save(tmp_path / "model.keras")
    assert scan(tmp_path) == ()
    assert len(list(examine(tmp_path))) == 2


def _savings(model, folder):
    model.export(os.fspath(folder / "exported"), verbose=False)
    model.save(folder / "model.keras")
    model.save_weights(folder / "model.weights.h5")


def test_text_and_recurrent_networks_have_no_findings(tmp_path):
    layers = keras.layers
    text = keras.Sequential(
        [
            keras.Input((), dtype="string"),
            layers.TextVectorization(vocabulary=["a", "/b", "../c"], output_sequence_length=5),
            layers.Embedding(6, 4, mask_zero=True),
            layers.Bidirectional(layers.LSTM(3, return_sequences=True)),
            layers.GRU(3),
            layers.Dense(2, activation="softmax"),
        ]
    )
    _savings(text, tmp_path)
    assert scan(tmp_path) == ()


def test_preprocessing_networks_have_no_findings(tmp_path):
    layers = keras.layers
    word, number = keras.Input((1,), dtype="string"), keras.Input((1,), dtype="int64")
    known = layers.StringLookup(vocabulary=["x", "y"], output_mode="one_hot")(word)
    hashed = layers.CategoryEncoding(7)(layers.Hashing(7)(word))
    count = layers.IntegerLookup(vocabulary=[2**40, 6], output_mode="one_hot")(number)
    _savings(keras.Model([word, number], [known, hashed, count]), tmp_path)
    assert scan(tmp_path) == ()


NETWORKS = sorted(
    name
    for name in vars(keras.applications)
    if name[0].isupper() and callable(getattr(keras.applications, name)) and name != "NASNetLarge"
)
SMALLEST = {"InceptionResNetV2": 75, "InceptionV3": 75, "Xception": 71}
# The smallest of each family, here with its top and at its own size of pictures.
FAMILIES = (
    "ConvNeXtTiny",
    "DenseNet121",
    "EfficientNetB0",
    "EfficientNetV2B0",
    "InceptionResNetV2",
    "InceptionV3",
    "MobileNet",
    "MobileNetV2",
    "MobileNetV3Small",
    "NASNetMobile",
    "ResNet50",
    "ResNet50V2",
    "VGG16",
    "Xception",
)


def _savings_of_keras(name, folder, **options):
    """Write a network in every form that Keras has, one of them at a time, and return what is found in each."""
    model = getattr(keras.applications, name)(weights=None, **options)
    ways = {
        "model.keras": model.save,
        "model.h5": model.save,
        "model.weights.h5": model.save_weights,
        "exported": lambda path: model.export(path, verbose=False),
    }
    found = {}
    for file, write in ways.items():
        (folder / name).mkdir()
        write(os.fspath(folder / name / file))
        found[file] = scan(folder / name / file)
        shutil.rmtree(folder / name)  # up to 1.5 GB for one network
    return found


NOTHING = {"model.keras": (), "model.h5": (), "model.weights.h5": (), "exported": ()}


def test_each_family_of_keras_is_there():
    modules = {name: getattr(keras.applications, name).__module__ for name in NETWORKS if name != "VGG19"}
    assert sorted(modules[name] for name in FAMILIES) == sorted(set(modules.values()))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*NETWORKS, "NASNetLarge"])
def test_no_network_of_keras_has_findings(name, tmp_path):
    size = SMALLEST.get(name, 32)
    assert _savings_of_keras(name, tmp_path, include_top=False, input_shape=(size, size, 3)) == NOTHING


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_no_network_of_keras_with_its_top_has_findings(name, tmp_path):
    assert _savings_of_keras(name, tmp_path) == NOTHING
