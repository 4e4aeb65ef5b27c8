"""NumPy arrays, `tf.data` and TensorFlow Datasets as sources."""

import re

import numpy as np
import pytest
import tensorflow as tf

from tftransfer import tasks
from tftransfer.data import load, records, streams
from tftransfer.errors import InputError

SIZE = (6, 6)
PICTURES = np.random.default_rng(0).integers(0, 256, (24, 6, 6, 3), np.uint8)
LABELS = np.arange(24) % 3


def refused(source, message, **options):
    with pytest.raises(InputError, match=message) as caught:
        load(source, image_size=SIZE, **options)
    assert "\n" not in str(caught.value)


def held(examples):
    return np.stack([examples.pictures.load(tf.constant(i, tf.int64)) for i in range(len(examples))])


def test_arrays_of_every_shape_and_type_are_the_same():
    gray = np.repeat(PICTURES[..., :1], 3, axis=3)
    expected = load((gray, LABELS), image_size=SIZE)[0]
    for same in (gray[..., 0], gray[..., :1], gray.astype(np.float32), gray.astype(np.int64)):
        data, task = load((same, LABELS), image_size=SIZE)
        np.testing.assert_array_equal(held(data.train), held(expected.train))
        assert data.fingerprint == expected.fingerprint
    assert task.labels == ("0", "1", "2")


def test_the_same_bytes_in_another_shape_are_other_pictures():
    both = [PICTURES.reshape(24, *sides, 3) for sides in ((4, 9), (9, 4))]
    digests = [set(load((part, LABELS), image_size=SIZE)[0].train.pictures.digests) for part in both]
    assert not digests[0] & digests[1]


def test_arrays_with_splits_names_and_many_classes():
    parts = {
        "train": (PICTURES, LABELS),
        "val": (PICTURES[:3], LABELS[:3]),
        "test": (PICTURES[3:6], LABELS[3:6]),
    }
    data, _ = load(parts, image_size=SIZE)
    np.testing.assert_array_equal(held(data.train), PICTURES)
    np.testing.assert_array_equal(data.test.targets, [0, 1, 2])
    names = np.array(["b", "a"] * 12)
    assert load((PICTURES, names), image_size=SIZE)[1].labels == ("a", "b")
    tens = np.repeat([2, 10, 1], 8)
    assert load((PICTURES, tens), image_size=SIZE)[1].labels == ("1", "2", "10")


def test_arrays_of_several_labels_and_of_numbers():
    several = np.random.default_rng(0).integers(0, 2, (24, 4))
    data, task = load((PICTURES, several), image_size=SIZE)
    assert task == tasks.MultiLabel(("0", "1", "2", "3"))
    assert sum(part.targets.sum() for part in (data.train, data.validation, data.test)) == several.sum()
    _, task = load((PICTURES, np.linspace(0, 1, 24)), image_size=SIZE, task_kind="regression")
    assert task == tasks.Regression()


def test_rare_labels_do_not_eat_the_training_split():
    pictures, several = np.zeros((300, 6, 6, 3), np.uint8), np.zeros((300, 151), int)
    several[:, 0] = several[np.arange(300), 1 + np.arange(300) // 2] = 1
    data, _ = load((pictures, several), image_size=SIZE)
    assert (len(data.train), len(data.validation), len(data.test)) == (216, 24, 60)


def test_too_few_training_examples_for_the_missing_splits():
    several = np.eye(2)[np.arange(24) % 2]
    parts = {"train": (PICTURES[:1], several[:1]), "test": (PICTURES, several)}
    refused(parts, "at least 2 usable training pictures.* Received: 1")


def test_bad_arrays():
    refused((PICTURES / 255.0, LABELS), r"look like \[0, 1\].*multiply by 255")
    refused((np.full((24, 6, 6, 3), np.nan), LABELS), "NaN")
    refused((PICTURES.astype(float) * 2, LABELS), r"must be in \[0, 255\]")
    refused((np.zeros((24, 6, 6, 4), np.uint8), LABELS), "Composite the alpha channel")
    refused((np.zeros((24, 6)), LABELS), r"Received: shape=\(24, 6\)")
    refused((PICTURES, LABELS[:5]), "24 pictures, 5 labels")
    refused((PICTURES,), "pair")
    refused({"test": (PICTURES, LABELS)}, "keys of a dict of splits")
    refused(42, "source of type int")


def test_streams_of_pixels_and_of_encoded_pictures_equal_arrays():
    expected, task = load((PICTURES, LABELS), image_size=SIZE)
    pixels = tf.data.Dataset.from_tensor_slices((PICTURES, LABELS))
    encoded = pixels.map(lambda picture, label: (tf.io.encode_png(picture), label))
    for stream in (pixels, encoded, {"train": pixels}):
        data, same = load(stream, image_size=SIZE)
        np.testing.assert_array_equal(held(data.test), held(expected.test))
        assert same == task


def test_one_dark_picture_does_not_make_a_stream_look_scaled():
    pictures = PICTURES.astype(np.float32)
    pictures[5] = 1
    data, _ = load(tf.data.Dataset.from_tensor_slices((pictures, LABELS)), image_size=SIZE)
    assert data.found == 24
    scaled = tf.data.Dataset.from_tensor_slices((pictures / 255, LABELS))
    refused(scaled, r"pictures of train look like \[0, 1\].*multiply by 255")


def test_whole_floats_are_the_classes_of_their_integers():
    tens = np.repeat([2.0, 10.0, 1.0], 8)
    assert load((PICTURES, tens), image_size=SIZE)[1].labels == ("1", "2", "10")
    assert load((PICTURES, tens / 4), image_size=SIZE)[1].labels == ("0.25", "0.5", "2.5")


def test_labels_of_several_shapes_are_refused():
    refused((PICTURES, [[1], [1, 2]] * 12), "labels of train must all have one shape")
    parts = {"train": (PICTURES, np.eye(3)[LABELS]), "test": (PICTURES, LABELS)}
    refused(parts, r"same number of columns. Received: shapes train \(24, 3\), test \(24,\)")
    signature = (tf.TensorSpec((6, 6, 3), tf.uint8), tf.TensorSpec((None,), tf.int64))
    ragged = tf.data.Dataset.from_generator(
        lambda: ((picture, [1] * (1 + number % 2)) for number, picture in enumerate(PICTURES)),
        output_signature=signature,
    )
    refused(ragged, r"labels of train must all have one shape. Received: shapes \[\(1,\), \(2,\)\]")


def test_labels_that_are_not_utf_8_are_escaped():
    assert load((PICTURES, np.array([b"a", b"caf\xe9"] * 12)), image_size=SIZE)[1].labels == ("a", "caf\\xe9")


def test_what_tensorflow_datasets_marks_as_unlabelled_is_left_out():
    encoded = tf.io.encode_png(PICTURES[0])

    def part(split, labels):
        return split, [(encoded, tf.constant(label)) for label in labels]

    parts = {"train": part("train", [0, -1, 1]), "test": part("test", [-1, -1])}
    listing = streams._copied(parts, "some", 10**6, ("cat", "dog"))
    assert listing.labels == ("cat", "dog")
    assert listing.names == ("train[0]", "train[2]")
    assert [note.split(" have")[0] for note in listing.notes] == [
        "1 examples of split 'train'",
        "2 examples of split 'test'",
    ]
    with pytest.raises(InputError, match=r"label 2 of train\[1\] is none of the 2 classes"):
        streams._copied({"train": part("train", [0, 2])}, "some", 10**6, ("cat", "dog"))
    with pytest.raises(InputError, match="no example of some has a label"):
        streams._copied({"train": part("train", [-1])}, "some", 10**6, ("cat", "dog"))


def test_bad_streams():
    pixels = tf.data.Dataset.from_tensor_slices((PICTURES, LABELS))
    refused(pixels, "bound of 0 MiB.*memory_budget", memory_budget=100)
    refused(pixels.batch(2), "unbatch")
    refused(pixels.repeat(), "infinite")
    refused(pixels.map(lambda picture, label: picture), "no pairs")
    refused(pixels.take(0), "empty")
    refused(pixels.map(lambda picture, label: ({"image": picture}, label)), "no pairs of tensors")
    encoded = pixels.map(lambda picture, label: (tf.io.encode_png(picture), label))
    refused(encoded.batch(2), "unbatch")


@pytest.fixture
def tiny_catalogue(tmp_path, monkeypatch):
    """A data set of TensorFlow Datasets that needs no network."""
    tfds = pytest.importorskip("tensorflow_datasets")

    class TinyShapes(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(None, None, 3)),
                "label": tfds.features.ClassLabel(names=["square", "circle"]),
            }
            features = tfds.features.FeaturesDict(features)
            return tfds.core.DatasetInfo(builder=self, features=features, supervised_keys=("image", "label"))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(0, 16), "test": self._generate_examples(16, 24)}

        def _generate_examples(self, start, end):
            for number in range(start, end):
                yield number, {"image": PICTURES[number], "label": number % 2}

    monkeypatch.setattr(tfds, "builder", lambda name: TinyShapes(data_dir=tmp_path))
    return tfds


@pytest.mark.filterwarnings("ignore")  # TFDS' own
def test_tensorflow_datasets(tiny_catalogue):
    data, task = load("tfds:tiny_shapes", image_size=SIZE)
    assert task.labels == ("square", "circle")
    assert (len(data.train), len(data.validation), len(data.test)) == (14, 2, 8)
    assert data.name == "tiny_shapes"
    expected = {PICTURES[number].tobytes() for number in range(16, 24)}
    assert {picture.tobytes() for picture in held(data.test)} == expected


def _damaged(path, change):
    """Prepare the data set and change the file of its training split, a list of records."""
    load("tfds:tiny_shapes", image_size=SIZE)
    (file,) = path.rglob("*train*.tfrecord*")
    contents = [record.data for record in records.records(file)]
    frames = [records.framed(content) for content in contents]
    change(frames)
    file.write_bytes(b"".join(frames))
    return file.name


def _flip(place):
    def change(frames):
        frame = bytearray(frames[5])
        frame[place] ^= 4
        frames[5] = bytes(frame)

    return change


FAULTS = {
    "data": (_flip(20), {5: "its data are damaged"}),
    "checksum": (_flip(-1), {5: "its data are damaged"}),
    "length": (_flip(0), {5: "its length is damaged", **dict.fromkeys(range(6, 16), "cannot be found: the length .*")}),
    "cut short": (lambda frames: frames.append(frames.pop()[:-3]), {15: "the file ends within this record"}),
    "missing": (lambda frames: frames.pop(), {15: "missing: the file ends before it"}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fault", FAULTS)
def test_damaged_and_missing_records_are_set_aside_by_number(tiny_catalogue, tmp_path, fault):
    change, expected = FAULTS[fault]
    name = _damaged(tmp_path, change)
    budget = PICTURES.nbytes * 2  # the copy is counted once, though the split is read twice
    data, _ = load("tfds:tiny_shapes", image_size=SIZE, memory_budget=budget)
    assert data.found == 24
    assert len(data.train) + len(data.validation) + len(data.test) + len(data.quarantined) == 24
    assert [item.file for item in data.quarantined] == [f"{name}, record {number}" for number in expected]
    assert all(re.fullmatch(expected[n], item.reason) for n, item in zip(expected, data.quarantined, strict=True))
    assert len(data.seen) == 24


@pytest.mark.filterwarnings("ignore")
def test_a_missing_file_and_more_records_than_the_metadata_say(tiny_catalogue, tmp_path):
    name = _damaged(tmp_path, lambda frames: frames.append(frames[0]))
    data, _ = load("tfds:tiny_shapes", image_size=SIZE)
    assert data.splits["notes"] == [f"{name} holds more than the 16 records that its metadata say"]
    assert (data.found, len(data.quarantined)) == (25, 0)
    next(tmp_path.rglob("*test*.tfrecord*")).unlink()
    refused("tfds:tiny_shapes", "split test of tiny_shapes is empty, or none of its records can be read")


def test_a_damaged_record_of_a_stream_is_named(tmp_path):
    frames = [records.framed(tf.io.encode_png(picture).numpy()) for picture in PICTURES]
    file = tmp_path / "own.tfrecord"
    file.write_bytes(b"".join(frames[:7]) + frames[7][:-1] + b"!" + b"".join(frames[8:]))
    pixels = tf.data.TFRecordDataset(str(file))
    stream = tf.data.Dataset.zip((pixels, tf.data.Dataset.from_tensor_slices(LABELS)))
    refused(stream, "element 7 of train .* cannot be read: corrupted record at")


@pytest.mark.filterwarnings("ignore")
def test_an_unknown_data_set():
    refused("tfds:no_such_data_set", "'no_such_data_set' of TensorFlow Datasets cannot be had")
