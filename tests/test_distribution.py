import keras
import pytest

from tftransfer import distribution
from tftransfer.errors import InputError


def test_the_processor_is_chosen_where_there_is_no_gpu():
    with distribution.devices("cpu") as chosen:
        assert chosen.replicas == 1
        assert chosen.precision == "float32"
        assert chosen.reason.startswith("1 x CPU")


def test_precision_holds_inside_the_block_only():
    before = keras.config.dtype_policy()
    with distribution.devices("cpu", "mixed_bfloat16"):
        assert keras.config.dtype_policy().name == "mixed_bfloat16"
    assert keras.config.dtype_policy() is before


def test_heads_compute_in_float32_in_mixed_precision():
    from tftransfer import builders

    with distribution.devices("cpu", "mixed_bfloat16"):
        model = builders.image_classifier("MobileNet-0.25", 3, image_size=32, weights=None)
    assert model.output.dtype == "float32"
    assert model.get_layer("conv1").compute_dtype == "bfloat16"
    assert model.get_layer("conv1").kernel.dtype == "float32"


@pytest.mark.parametrize(
    ("capabilities", "precision"),
    [
        ([[8, 0]], "mixed_bfloat16"),
        ([[9, 0], [7, 5]], "mixed_float16"),
        ([[6, 1]], "float32"),
        ([], "float32"),
    ],
)
def test_precision_follows_the_weakest_gpu(capabilities, precision):
    assert distribution._by_compute_capability(capabilities)[0] == precision


@pytest.mark.parametrize(
    ("choice", "said"), [("gpus", "auto, cpu, gpu"), ("0", "from 1"), ("99", "asks for 99"), ("²", "from 1")]
)
def test_bad_choices_are_refused(choice, said):
    with pytest.raises(InputError, match=said), distribution.devices(choice):
        pass


def test_gpu_is_refused_where_there_is_none():
    import tensorflow as tf

    if tf.config.list_physical_devices("GPU"):
        with distribution.devices("gpu") as chosen:
            assert "GPU" in chosen.reason
        return
    with pytest.raises(InputError, match="TensorFlow sees none"), distribution.devices("gpu"):
        pass


def test_unknown_precision_is_refused():
    with pytest.raises(InputError, match="mixed_bfloat16"), distribution.devices("cpu", "float16"):
        pass


@pytest.mark.parametrize("precision", [pytest.param("mixed_bfloat16", marks=pytest.mark.slow), "mixed_float16"])
def test_a_network_trains_in_mixed_precision(small_task, small_data, precision):
    from tftransfer import builders, training
    from tftransfer.strategies import Phase

    with distribution.devices("cpu", precision):
        model = builders.image_classifier("MobileNet-0.25", 3, image_size=32, weights="demo", dropout=0.0)
    phase = Phase("probe", "head", 10, 0.05, warmup=0)
    losses = training.fine_tune(model, small_task, small_data, (phase,), batch_size=8)["loss"]
    assert losses[-1] < 0.8 * losses[0]
    assert model.get_layer("logits").kernel.dtype == "float32"


def test_a_model_of_another_strategy_is_refused(small_network):
    import tensorflow as tf

    model = small_network()
    other = tf.distribute.OneDeviceStrategy("/cpu:0")
    with other.scope(), pytest.raises(InputError, match="same `with tft.devices"):
        distribution.strategy_of(model)


_TWO_DEVICES = """
    from tftransfer import builders, distribution, strategies, tasks, training
    from tftransfer.averages import Ema

    def examples(count, seed):
        return _examples(*_coloured(count, 32, seed))

    # 27 examples in batches of 8: the last batch of an epoch, 3, does not split evenly over two devices.
    data = Data("colours", ("a", "b", "c"), examples(27, 0), examples(9, 1), examples(6, 2))
    task = tasks.SingleLabel(data.labels)

    def trained(devices):
        keras.utils.set_random_seed(0)
        with distribution.devices(devices) as chosen:
            model = builders.image_classifier("MobileNet-0.25", 3, image_size=32, weights="demo", dropout=0.0)
        began = [w.numpy() for w in model.weights]
        before = [w.numpy() for w in model.weights if "moving" in w.path]
        tune = strategies.Phase("tune", "last:3", 2, 1e-4, average=Ema(0.5))
        history = training.fine_tune(model, task, data, (tune,), batch_size=8)
        after = [w.numpy() for w in model.weights if "moving" in w.path]
        frozen = all(np.array_equal(one, two) for one, two in zip(before, after))
        ended = [w.numpy() for w in model.weights]
        assert any(not np.array_equal(old, new) for old, new in zip(began, ended)), "nothing was learned"
        return chosen, history, ended, frozen

    one, history_one, weights_one, frozen_one = trained("1")
    two, history_two, weights_two, frozen_two = trained("2")
    apart = max(float(np.linalg.norm(a - b) / max(np.linalg.norm(a), 1e-12)) for a, b in zip(weights_one, weights_two))
    moved = {name: max(abs(a - b) for a, b in zip(history_one[name], history_two[name])) for name in history_one}
    print(json.dumps({"replicas": [one.replicas, two.replicas], "frozen": [frozen_one, frozen_two],
                      "weights": apart, "history": moved}))
"""


_EXTRAS_ON_TWO_DEVICES = (
    _TWO_DEVICES.partition("    def trained(devices):")[0]
    + """
    from tftransfer.adapters import Lora
    from tftransfer.penalties import EWC, DistillFromSource

    def small():
        keras.utils.set_random_seed(0)
        inputs = keras.Input((32, 32, 3))
        x = keras.layers.Rescaling(1 / 255)(inputs)
        x = keras.layers.Conv2D(4, 5, strides=4, name="low")(x)
        x = keras.layers.add([x, keras.layers.Conv2D(4, 3, padding="same", name="high")(x)])
        x = keras.layers.GlobalAveragePooling2D()(x)
        return keras.Model(inputs, keras.layers.Dense(3, name="logits")(x))

    Phase = strategies.Phase
    tried = {
        "EWC": Phase("EWC", "all", 1, 1e-2, optimizer="sgd", carry_moments=True, penalty=EWC(1.0, examples=4)),
        "distillation": Phase("distillation", "all", 1, 1e-2, penalty=DistillFromSource()),
        "LoRA": Phase("LoRA", "head", 1, 1e-2, adapter=Lora(2)),
        "views": Phase("views", "all", 1, 1e-2, augmentation="light", views=2, average_views=True),
        "mixing": Phase("mixing", "all", 1, 1e-2, mixup=0.4, cutmix=1.0, stochastic_depth=0.3),
    }
    found = {}
    for name, phase in tried.items():
        ended = []
        for devices in ("1", "2"):
            with distribution.devices(devices):
                model = small()
            before = model.get_layer("high").kernel.numpy()
            history = training.fine_tune(model, task, data, (phase,), batch_size=8)
            assert np.isfinite(history["loss"]).all(), name
            assert not np.array_equal(before, model.get_layer("high").kernel.numpy()), name
            ended.append(np.concatenate([w.numpy().ravel() for w in model.weights]))
        found[name] = float(np.linalg.norm(ended[0] - ended[1]) / np.linalg.norm(ended[0]))
    print(json.dumps(found))
"""
)


_SHARES = """
    from tftransfer import distribution

    found = {}
    for devices in ("1", "2", "3", "4"):
        with distribution.devices(devices) as chosen:
            strategy = chosen.strategy
        for count in range(1, 12):
            rows = np.arange(count, dtype=np.float32)
            batches = tf.data.Dataset.from_tensors((([rows],), rows[:, None], rows)).repeat(2)
            first, again = distribution.shared_out(batches, strategy)
            shares = [strategy.experimental_local_results(part) for part in (first[-2], again[-2], first[1])]
            whole = [np.concatenate(share).ravel().tolist() for share in shares]
            counts = strategy.experimental_local_results(first[-1]) if devices != "1" else []
            found[f"{devices} {count}"] = [[len(part) for part in shares[0]], whole, list(map(float, counts))]
    print(json.dumps(found))
"""


def test_every_device_has_a_share_of_every_batch(run_on_devices):
    for name, (sizes, (rows, *others), counts) in run_on_devices(_SHARES, count=4).items():
        devices, count = map(int, name.split())
        few = count < devices
        assert others == [rows, rows]
        assert rows == list(range(count)) * (devices if few else 1), name
        assert max(sizes) - min(sizes) <= 1, name
        assert len(sizes) == devices
        assert counts == ([] if devices == 1 else [1, *[0 if few else 1] * (devices - 1)])


_FEW_ON_TWO_DEVICES = """
    from tftransfer import distribution, tasks, training
    from tftransfer.penalties import DistillFromSource
    from tftransfer.strategies import Phase

    # 9 examples in batches of 4: the last batch of an epoch has one, as has all of validation.
    parts = (_examples(*_coloured(count, 32, seed)) for seed, count in enumerate((9, 1, 6)))
    data = Data("colours", ("a", "b", "c"), *parts)
    layers = keras.layers

    def network():
        keras.utils.set_random_seed(0)
        inputs = keras.Input((32, 32, 3))
        x = layers.Conv2D(4, 5, strides=4, name="low")(layers.Rescaling(1 / 255)(inputs))
        x = layers.BatchNormalization(momentum=0.5, name="norm")(x)
        x = layers.add([x, layers.Conv2D(4, 3, padding="same", name="high")(x)])
        return keras.Model(inputs, layers.Dense(3, name="logits")(layers.GlobalAveragePooling2D()(x)))

    tried = {
        "statistics": (Phase("statistics", "all", 2, 1e-2, optimizer="sgd", train_batch_norm=True), 4),
        "frozen below": (Phase("frozen", "last:2", 2, 1e-2, optimizer="sgd", penalty=DistillFromSource()), 4),
        "one by one": (Phase("alone", "head", 1, 1e-2, optimizer="sgd"), 1),
    }
    found = {}
    for name, (phase, size) in tried.items():
        ended = []
        for devices in ("1", "2"):
            with distribution.devices(devices):
                model = network()
            history = training.fine_tune(model, tasks.SingleLabel(data.labels), data, (phase,), batch_size=size)
            assert history.phases[0].skipped == 0, history.phases[0].faults
            ended.append({**history, **{w.path: w.numpy() for w in model.weights}})
        one, two = ended
        found[name] = {key: float(np.abs(np.subtract(one[key], two[key])).max()) for key in one}
    print(json.dumps(found))
"""


def test_batches_with_fewer_examples_than_devices_are_those_of_one_device(run_on_devices):
    """Weights, statistics of BatchNorm, losses and metrics, in training and validation."""
    for name, apart in run_on_devices(_FEW_ON_TWO_DEVICES).items():
        assert {key: value for key, value in apart.items() if value > 1e-5} == {}, name


@pytest.mark.slow
def test_two_devices_train_as_one(run_on_devices):
    found = run_on_devices(_TWO_DEVICES)
    assert found["replicas"] == [1, 2]
    assert found["frozen"] == [True, True]
    assert found["weights"] < 1e-5
    assert found["history"]["loss"] < 1e-5
    assert found["history"]["val_loss"] < 1e-5


@pytest.mark.slow
def test_what_a_phase_adds_works_on_two_devices_as_on_one(run_on_devices):
    """Each device mixes and drops its own examples, so that these alone differ."""
    apart = run_on_devices(_EXTRAS_ON_TWO_DEVICES)
    assert apart.pop("mixing") > 1e-5
    assert max(apart.values()) < 1e-5, apart


_RESUMED_ON_TWO_DEVICES = (
    _EXTRAS_ON_TWO_DEVICES.partition("    tried = {")[0]
    + """
    import tempfile
    from tftransfer import checkpoints

    phase = Phase("tune", "all", 2, 1e-2, mixup=0.4, average=Ema(1.0), train_batch_norm=True)
    write, left = checkpoints.save_progress, [None]

    def write_and_end(*given, **named):
        write(*given, **named)
        left[0] = left[0] and left[0] - 1
        if left[0] == 0:
            raise KeyboardInterrupt

    checkpoints.save_progress = write_and_end

    def trained(ends_after, **given):
        left[0] = ends_after
        with distribution.devices("2"):
            model = small()
        try:
            history = training.fine_tune(model, task, data, (phase,), batch_size=8, save_every=0, **given)
        except KeyboardInterrupt:
            return None
        return dict(history), np.concatenate([w.numpy().ravel() for w in model.weights])

    with tempfile.TemporaryDirectory() as folder:
        straight = trained(None, output=folder + "/straight")
        ended = [trained(number, output=folder + "/stopped") for number in (2, 3)]
        resumed = trained(None, output=folder + "/stopped")
    same = bool(np.array_equal(straight[1], resumed[1]))
    print(json.dumps([ended == [None, None], same, straight[0] == resumed[0]]))
"""
)


@pytest.mark.slow
def test_a_run_on_two_devices_goes_on_within_an_epoch_with_the_same_bits(run_on_devices):
    assert run_on_devices(_RESUMED_ON_TWO_DEVICES) == [True, True, True]
