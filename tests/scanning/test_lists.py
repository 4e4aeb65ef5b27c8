"""The lists cover what is installed: a new operation or class is judged before it is allowed or refused."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re

import keras
import keras.src
import pytest
from keras.src import api_export
from keras.src.saving.keras_saveable import KerasSaveable
from tensorflow.core.framework import op_def_pb2
from tensorflow.core.protobuf import saved_model_pb2
from tensorflow.python.client import pywrap_tf_session

from tftransfer.scanning import lists, messages

# Classes of Keras that were judged and are not on the list: they run what they are given, read files, or are bases of
# others that no file names.
REFUSED = {
    "keras": "Function Initializer KerasTensor Layer Loss Metric Operation Optimizer Quantizer Regularizer Variable",
    "keras._legacy.layers": "AlphaDropout RandomHeight RandomWidth ThresholdedReLU",  # by their bare names only
    "keras.constraints": "Constraint",
    "keras.distillation": "Distiller",
    "keras.layers": "FlaxLayer JaxLayer Lambda TFSMLayer TorchModuleWrapper Wrapper",
    "keras.optimizers.schedules": "LearningRateSchedule",
    "keras.src.backend.tensorflow.optimizer": "TFOptimizer",
    "keras.src.layers.merging.base_merge": "Merge",
    "keras.src.layers.preprocessing.data_layer": "DataLayer",
    "keras.src.layers.preprocessing.feature_space": "Cross Feature TFDConcat TFDIdentity",
    "keras.src.layers.preprocessing.index_lookup": "IndexLookup",
    "keras.src.layers.rnn.conv_lstm": "ConvLSTM ConvLSTMCell",
    "keras.src.metrics.confusion_metrics": "SensitivitySpecificityBase _ConfusionMatrixConditionCount",
    "keras.src.metrics.iou_metrics": "_IoUBase",
    "keras.src.ops.core": "AssociativeScan Cond ForiLoop Map Scan Switch VectorizedMap WhileLoop",
    "keras.src.ops.linalg": "JVP",
    "keras.src.ops.math": "SegmentReduction",
    "keras.src.trainers.compile_utils": "CompileLoss CompileMetrics MetricsList",
    "keras.utils": "FeatureSpace",
}


def test_every_operation_of_tensorflow_is_judged():
    registered = op_def_pb2.OpList.FromString(pywrap_tf_session.TF_GetBuffer(pywrap_tf_session.TF_GetAllOpList()))
    text = lists.operations()["allowed: TensorFlow Text 2.21"]
    names = {operation.name for operation in registered.op}
    assert names - lists.known_operations() == set()
    assert lists.known_operations() - names - text == set(), "operations that are no longer there"


def test_each_operation_is_judged_once():
    sections = list(lists.operations().values())
    assert sum(map(len, sections)) == len(lists.known_operations())


def test_no_allowed_operation_sounds_like_a_dangerous_one():
    dangerous = "File|Reader|Record|PyFunc|Rpc|Remote|Summary|Debug|Dump|Session|DataService|Collective|TPU|Custom|Xla"
    innocent = {"ShardedFilename", "ShardedFilespec", "InitializeTableFromTextFile", "InitializeTableFromTextFileV2"}
    assert {name for name in lists.allowed_operations() if re.search(dangerous, name)} == innocent


def _classes():
    """Every class of Keras that a description can name, by module."""
    for module in pkgutil.walk_packages(keras.src.__path__, "keras.src."):
        if "_test" not in module.name and ".backend." not in module.name and ".layers." in module.name:
            importlib.import_module(module.name)
    todo, found = [KerasSaveable], {}
    while todo:
        made = todo.pop()
        todo += made.__subclasses__()
        if made is not KerasSaveable and made.__module__.startswith("keras."):
            module, name = (api_export.get_name_from_symbol(made) or f"{made.__module__}.{made.__name__}").rsplit(
                ".", 1
            )
            found.setdefault(module, set()).add(name)
    for module in (keras.initializers, keras.regularizers, keras.constraints, keras.optimizers.schedules):
        for _, made in inspect.getmembers(module, inspect.isclass):
            module_name, name = api_export.get_name_from_symbol(made).rsplit(".", 1)
            found.setdefault(module_name, set()).add(name)
    return found


def test_every_class_of_keras_is_judged():
    listed, unknown = lists.classes(), set()
    for module, names in _classes().items():
        judged = listed.get(module, frozenset()) | set(REFUSED.get(module, "").split())
        unknown |= {f"{module}.{name}" for name in names - judged if not name.startswith("Base")}
    assert unknown == set()


def test_listed_classes_are_there_and_can_be_named():
    special = (lists.FUNCTIONS, lists.OWN, lists.BARE)
    for module, names in lists.classes().items():
        if module.startswith("keras.src."):
            found = vars(importlib.import_module(module))
            assert {name for name in names if name not in found} == set()
        elif module not in special:
            assert {name for name in names if api_export.get_symbol_from_name(f"{module}.{name}") is None} == set()


def test_listed_functions_only_compute():
    places = ("activations", "losses", "metrics")
    for name in lists.classes()[lists.FUNCTIONS]:
        assert any(inspect.isfunction(getattr(getattr(keras, place), name, None)) for place in places)
        assert name not in ("get", "serialize", "deserialize")


@pytest.mark.parametrize("name", sorted(messages.FIELDS))
def test_numbers_of_fields_are_tensorflows(name):
    found = _messages()
    if name.endswith("Entry"):  # of a map
        assert messages.FIELDS[name]["key"][0] == "1"
        assert messages.FIELDS[name]["value"][0] == "2"
        return
    for field, text in messages.FIELDS[name].items():
        number, kind = text.rstrip("+").split()
        theirs = found[name].fields_by_name[field]
        assert theirs.number == int(number)
        assert theirs.is_repeated == text.endswith("+")
        if theirs.message_type is not None and kind.endswith("Entry"):
            _check_entry(theirs.message_type, messages.FIELDS[kind])
        elif theirs.message_type is not None:
            assert theirs.message_type is found[kind]
        else:
            assert _wire(theirs.type) == _wire(_KINDS[kind])


_KINDS = {"bytes": 12, "int32": 5, "uint32": 13, "int64": 3}


def _wire(kind):
    return {9: "length", 12: "length", 3: "varint", 5: "varint", 13: "varint", 14: "varint"}[kind]


def _check_entry(theirs, ours):
    assert theirs.GetOptions().map_entry
    value = theirs.fields_by_name["value"]
    kind = ours["value"].split()[1]
    assert value.message_type.name == kind


def _messages():
    """TensorFlow's messages by name, from that of a SavedModel down."""
    aliases = {"Dim": "TensorShapeProto.Dim", "ArgAttrs": "FunctionDef.ArgAttrs", "ArgDef": "OpDef.ArgDef"}
    aliases |= {"ListValue": "AttrValue.ListValue", "BytesList": "CollectionDef.BytesList"}
    aliases |= {"AnyList": "CollectionDef.AnyList"}
    aliases |= {name: f"TensorInfo.{name}" for name in ("CompositeTensor", "CooSparse")}
    todo, found = [saved_model_pb2.SavedModel.DESCRIPTOR], {}
    while todo:
        one = todo.pop()
        if one.full_name not in found:
            found[one.full_name] = one
            todo += [field.message_type for field in one.fields if field.message_type is not None]
    return {
        name: found.get(f"tensorflow.{aliases.get(name, name)}", found.get(f"google.protobuf.{name}"))
        for name in messages.FIELDS
    }


def test_this_toolkits_registered_classes_are_listed(repository):
    pattern = r'register_keras_serializable\("tftransfer"\)\nclass (\w+)'
    found = {
        name
        for path in (repository / "tftransfer").rglob("*.py")
        for name in re.findall(pattern, path.read_text(encoding="utf-8"))
    }
    assert found == lists.classes()[lists.OWN]
