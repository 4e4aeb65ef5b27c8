import dataclasses
import json

import keras
import numpy as np
import pytest
from safetensors.numpy import save_file

from tftransfer import adapters, builders, strategies, tasks, tensor_files, trainable, training
from tftransfer.adapters import Adapter, Lora
from tftransfer.averages import WiseFt
from tftransfer.errors import InputError, ScanError
from tftransfer.penalties import L2SP
from tftransfer.strategies import Phase

ROW = Lora(rank=2, where="conv", alpha=4.0)


def _phase(epochs: int, **others) -> Phase:
    """Constant rate and one batch an epoch: nothing depends on where a phase ends."""
    return Phase("LoRA", "head", epochs, 0.005, schedule="constant", warmup=0, adapter=ROW, **others)


def _weights(model) -> dict[str, np.ndarray]:
    return {w.path: w.numpy() for w in model.weights if "seed_generator" not in w.path}


@pytest.fixture(scope="module")
def trained(small_network, small_task, small_data):
    """A network trained with LoRA, its weights before, and the adapter; nobody may change them."""
    keras.utils.set_random_seed(0)
    model = small_network()
    before = _weights(model)
    history = training.fine_tune(model, small_task, small_data, (_phase(4),), batch_size=8)
    return model, before, history.adapter


KERNELS = ("conv_1/kernel", "conv_2/kernel", "conv_3/kernel")


def test_training_and_merging_change_the_chosen_kernels_and_the_head_only(trained):
    model, before, adapter = trained
    changed = {path for path, value in _weights(model).items() if not np.array_equal(value, before[path])}
    assert changed == {*KERNELS, "logits/kernel", "logits/bias"}
    assert len(adapter.factors) == 3


def test_the_merged_kernel_is_the_base_plus_the_scaled_product(trained):
    model, before, adapter = trained
    assert adapter.row.scale == 2
    for path, (a, b) in zip(KERNELS, adapter.factors, strict=True):
        expected = before[path] + 2 * (a @ b).reshape(before[path].shape)
        np.testing.assert_allclose(_weights(model)[path], expected, atol=1e-6)
        assert np.linalg.matrix_rank(a.astype(np.float64) @ b.astype(np.float64)) <= 2


LAYERS = {
    "dense": (keras.layers.Dense(5), (4,)),
    "einsum": (keras.layers.EinsumDense("abc,cd->abd", (3, 5)), (3, 4)),
    "embedding": (keras.layers.Embedding(7, 4), (3,)),
    "conv_1d": (keras.layers.Conv1D(5, 3), (6, 4)),
    "conv_2d": (keras.layers.Conv2D(5, 3), (6, 6, 4)),
    "conv_3d": (keras.layers.Conv3D(5, 2), (4, 4, 4, 2)),
    "separable": (keras.layers.SeparableConv2D(5, 3), (6, 6, 4)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_every_kind_of_layer_answers_attached_as_it_does_merged(name):
    layer, shape = keras.layers.deserialize(keras.layers.serialize(LAYERS[name][0])), LAYERS[name][1]
    inputs = keras.Input(shape)
    x = keras.layers.Flatten()(layer(inputs))
    model = keras.Model(inputs, keras.layers.Dense(2, name="logits")(x))
    x = np.random.default_rng(0).integers(0, 7, (2, *shape)).astype(np.float32)
    plain = model(x)
    attached = Lora(rank=2, alpha=6.0).prepare(model, seed=0)
    np.testing.assert_array_equal(attached.call(lambda: model(x), []), plain)
    (_, b), kernel = attached.factors[0], attached.kernels[0]
    b.assign(np.random.default_rng(1).normal(size=b.shape))
    changed = attached.call(lambda: model(x), [])
    expected = kernel.numpy() + 3 * (attached.factors[0][0].numpy() @ b.numpy()).reshape(kernel.shape)
    assert np.abs(changed - plain).max() > 1e-3
    attached.merge()
    np.testing.assert_allclose(kernel.numpy(), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(model(x), changed, rtol=1e-5, atol=1e-5)


def test_nothing_is_left_on_the_model(trained, small_network):
    model = trained[0]
    assert [w.path for w in model.weights] == [w.path for w in small_network().weights]
    assert not model.compiled
    assert all(not getattr(layer, "lora_enabled", False) for layer in model.layers)


def test_attaching_and_detaching_leave_the_base_bit_equal(small_network):
    model = small_network()
    before = _weights(model)
    pictures = np.random.default_rng(0).uniform(0, 255, (2, 32, 32, 3)).astype(np.float32)
    outputs = model(pictures)
    attached = ROW.prepare(model, seed=0)
    np.testing.assert_array_equal(attached.call(lambda: model(pictures), []), outputs)  # B is zero
    attached.factors[0][1].assign(np.ones(attached.factors[0][1].shape))
    assert not np.array_equal(attached.call(lambda: model(pictures), []), outputs)
    del attached
    np.testing.assert_array_equal(model(pictures), outputs)
    for path, value in _weights(model).items():
        np.testing.assert_array_equal(value, before[path])


def test_a_saved_adapter_makes_the_tuned_network_of_its_base(trained, small_network, tmp_path):
    model, _, adapter = trained
    adapter.save(tmp_path / "adapter.safetensors")
    keras.utils.set_random_seed(0)
    base = small_network()
    base.get_layer("logits").set_weights(trained[0].get_layer("logits").get_weights())
    loaded = Adapter.load(tmp_path / "adapter.safetensors")
    assert loaded.labels == ("red", "green", "blue")
    if adapters.base_digest(base) != adapter.base:  # another random start: take the base's weights
        for path, value in trained[1].items():
            next(w for w in base.weights if w.path == path).assign(value)
    loaded.merge_into(base)
    for path, value in _weights(base).items():
        np.testing.assert_array_equal(value, _weights(model)[path])


@pytest.mark.parametrize("dropout", [pytest.param(0.0, marks=pytest.mark.slow), 0.5])
def test_ten_epochs_saved_loaded_and_ten_more_equal_twenty(small_network, small_task, small_data, tmp_path, dropout):
    """Order, augmentation, mixing and dropout go on too; validation is far enough away to keep the last epoch."""
    given = {"task": small_task, "data": dataclasses.replace(small_data, validation=small_data.train), "batch_size": 8}

    def fresh():
        keras.utils.set_random_seed(3)
        return small_network(dropout=dropout)

    def trained(model, epochs, **others):
        phase = _phase(epochs, augmentation="light", mixup=0.2)
        return training.fine_tune(model, strategy=(phase,), **given, **others)

    straight = trained(fresh(), 20)
    first = trained(fresh(), 10)
    assert first.phases[0].best_epoch == 10  # or there would be less to go on from
    first.adapter.save(tmp_path / "adapter.safetensors")
    second = trained(fresh(), 10, adapter=Adapter.load(tmp_path / "adapter.safetensors"))
    assert straight["loss"][0] - straight["loss"][-1] > 0.1  # it learns
    np.testing.assert_allclose([*first["loss"], *second["loss"]], straight["loss"], atol=1e-5)
    np.testing.assert_allclose([*first["val_loss"], *second["val_loss"]], straight["val_loss"], atol=1e-5)


def test_an_adapter_fits_another_copy_whose_layers_keras_numbered_otherwise(small_task, small_data):
    def unnamed():
        keras.utils.set_random_seed(1)
        inputs = keras.Input((32, 32, 3))
        x = keras.layers.Conv2D(4, 3, strides=4)(inputs)
        x = keras.layers.GlobalAveragePooling2D()(x)
        return keras.Model(inputs, keras.layers.Dense(3)(x))

    first, second = unnamed(), unnamed()
    assert first.weights[0].path != second.weights[0].path
    adapter = training.fine_tune(first, small_task, small_data, (_phase(1),), batch_size=8).adapter
    adapter.merge_into(second)
    for one, two in zip(first.weights, second.weights, strict=True):
        np.testing.assert_array_equal(one, two)


def test_rank_four_of_convnext_is_below_five_percent(small_task):
    model = builders.image_classifier("ConvNeXtTiny", 3, image_size=32, weights=None)
    trainable.set_trainable(model, "head")
    rows = trainable.audit(model, added=Lora(rank=4).prepare(model, seed=0).sizes())
    assert rows[-1].trainable == 768 * 3 + 3
    assert sum(row.trainable for row in rows) < 0.05 * model.count_params()


def test_an_adapter_for_another_base_is_refused_by_digest(trained, small_network):
    keras.utils.set_random_seed(9)
    with pytest.raises(InputError, match=rf"trained on {trained[2].base[:16]}, this network is [0-9a-f]{{16}}"):
        trained[2].merge_into(small_network())


def test_another_head_is_refused(trained, small_network):
    adapter = trained[2]
    other = small_network(num_classes=4)
    changed = dataclasses.replace(adapter, base=adapters.base_digest(other))
    with pytest.raises(InputError, match="as many classes"):
        changed.merge_into(other)


def test_another_strategy_cannot_go_on_from_an_adapter(trained, small_network, small_task, small_data):
    with pytest.raises(InputError, match="leave out its probe"):
        training.fine_tune(
            small_network(), small_task, small_data, strategies.lora(rank=2, where="conv"), adapter=trained[2]
        )


def test_a_network_without_matching_layers_is_refused(small_network, small_task, small_data):
    phase = Phase("LoRA", "head", adapter=Lora(where="dense"))
    with pytest.raises(InputError, match="matches no kernel below the head.*BatchNormalization, Conv2D.*Groups: "):
        training.fine_tune(small_network(), small_task, small_data, (phase,))


def test_files_that_are_no_adapters_are_refused(tmp_path):
    with pytest.raises(InputError, match="no file"):
        Adapter.load(tmp_path / "missing")
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(InputError, match="text cannot be loaded: header: claims"):
        Adapter.load(tmp_path / "text")
    with pytest.raises(InputError, match="text cannot be read"):
        Adapter.load(tmp_path / "text", trust=True)
    save_file({"x": np.zeros(1)}, tmp_path / "other")
    with pytest.raises(InputError, match="no file of this kind"):
        Adapter.load(tmp_path / "other")


def test_a_flipped_bit_is_seen(trained, tmp_path):
    path = tmp_path / "adapter.safetensors"
    trained[2].save(path)
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"adapter\.safetensors is damaged"):
        Adapter.load(path)


def test_an_adapter_is_scanned_before_it_is_read(trained, tmp_path, monkeypatch, capsys):
    path = tmp_path / "adapter"  # whatever its name is
    trained[2].save(path)
    assert Adapter.load(path).base == trained[2].base
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["b:0"]["data_offsets"] = header["a:0"]["data_offsets"]  # two tensors in one place
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    with monkeypatch.context() as patched:
        patched.setattr(tensor_files, "read", lambda *_: pytest.fail("was read"))
        with pytest.raises(ScanError, match="trusted or not, the library of the format refuses it") as caught:
            Adapter.load(path)
    assert "--trust" not in str(caught.value)
    with pytest.raises(InputError, match="cannot be read"):
        Adapter.load(path, trust=True)
    assert "is loaded without a scan" in capsys.readouterr().err


def test_an_adapter_for_other_labels_is_refused(trained, small_network, small_data):
    task = tasks.SingleLabel(("green", "red", "blue"))
    with pytest.raises(InputError, match="labels"):
        training.fine_tune(small_network(), task, small_data, (_phase(1),), adapter=trained[2])


@pytest.mark.parametrize(
    "others", [{"selector": "norm"}, {"penalty": L2SP()}, {"average": WiseFt()}], ids=lambda others: next(iter(others))
)
def test_what_an_adapter_could_not_hold_is_refused(others):
    with pytest.raises(InputError, match=next(iter(others))):
        Phase("LoRA", **{"selector": "head", "adapter": ROW, **others})


def test_a_base_that_nobody_has_is_refused(small_network, small_task, small_data):
    strategy = (Phase("full", "all", 1), _phase(1))
    with pytest.raises(InputError, match="'full' before it changes that"):
        training.fine_tune(small_network(), small_task, small_data, strategy)


@pytest.mark.parametrize(
    "bad", [{"rank": 0}, {"rank": 1.5}, {"where": "attention"}, {"where": 3}, {"alpha": -1.0}, {"alpha": "a"}]
)
def test_bad_rows_are_refused(bad):
    with pytest.raises(InputError):
        Lora(**bad)


def test_a_rank_above_that_of_every_kernel_is_refused(small_network):
    assert len(Lora(rank=8).prepare(small_network(), 0).kernels) == 3  # of eight columns
    with pytest.raises(InputError, match="`rank` must be at most 8 here"):
        Lora(rank=9).prepare(small_network(), 0)


def test_a_bad_pattern_is_refused(small_network):
    with pytest.raises(InputError, match="regular expression"):
        Lora(where="re:(").prepare(small_network(), 0)
