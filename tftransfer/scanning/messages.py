"""The parts of TensorFlow's protocol buffers that a scan looks at, described here: TensorFlow is not imported.

Texts are read as bytes, so that none is refused that TensorFlow would read, and maps as lists of entries, so that an
entry that a later one hides is seen too. Whether the numbers are TensorFlow's is a test.
"""

from __future__ import annotations

import functools
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

# A field is `number type`; + after the type repeats it.
FIELDS = {
    "SavedModel": {"meta_graphs": "2 MetaGraphDef+"},
    "MetaGraphDef": {
        "graph_def": "2 GraphDef",
        "saver_def": "3 SaverDef",
        "collection_def": "4 CollectionEntry+",
        "signature_def": "5 SignatureEntry+",
        "asset_file_def": "6 AssetFileDef+",
        "object_graph_def": "7 SavedObjectGraph",
    },
    "GraphDef": {"node": "1 NodeDef+", "library": "2 FunctionDefLibrary"},
    "FunctionDefLibrary": {"function": "1 FunctionDef+"},
    "FunctionDef": {
        "signature": "1 OpDef",
        "node_def": "3 NodeDef+",
        "attr": "5 AttrEntry+",
        "arg_attr": "7 ArgEntry+",
    },
    "ArgEntry": {"key": "1 uint32", "value": "2 ArgAttrs"},
    "ArgAttrs": {"attr": "1 AttrEntry+"},
    "OpDef": {"name": "1 bytes", "input_arg": "2 ArgDef+"},
    "ArgDef": {"name": "1 bytes", "number_attr": "5 bytes", "type_list_attr": "6 bytes"},
    "NodeDef": {"name": "1 bytes", "op": "2 bytes", "input": "3 bytes+", "attr": "5 AttrEntry+"},
    "AttrEntry": {"key": "1 bytes", "value": "2 AttrValue"},
    "AttrValue": {
        "list": "1 ListValue",
        "s": "2 bytes",
        "type": "6 int32",
        "tensor": "8 TensorProto",
        "placeholder": "9 bytes",
        "func": "10 NameAttrList",
    },
    "ListValue": {"s": "2 bytes+", "type": "6 int32+", "tensor": "8 TensorProto+", "func": "9 NameAttrList+"},
    "NameAttrList": {"name": "1 bytes", "attr": "2 AttrEntry+"},
    "TensorProto": {
        "dtype": "1 int32",
        "tensor_shape": "2 TensorShapeProto",
        "tensor_content": "4 bytes",
        "string_val": "8 bytes+",
    },
    "TensorShapeProto": {"dim": "2 Dim+"},
    "Dim": {"size": "1 int64"},
    "SaverDef": {"filename_tensor_name": "1 bytes"},
    "CollectionEntry": {"key": "1 bytes", "value": "2 CollectionDef"},
    "CollectionDef": {"bytes_list": "2 BytesList", "any_list": "5 AnyList"},
    "BytesList": {"value": "1 bytes+"},
    "AnyList": {"value": "1 Any+"},
    "Any": {"type_url": "1 bytes", "value": "2 bytes"},
    "SignatureEntry": {"key": "1 bytes", "value": "2 SignatureDef"},
    "SignatureDef": {"inputs": "1 TensorEntry+", "outputs": "2 TensorEntry+"},
    "TensorEntry": {"key": "1 bytes", "value": "2 TensorInfo"},
    "TensorInfo": {"name": "1 bytes", "coo_sparse": "4 CooSparse", "composite_tensor": "5 CompositeTensor"},
    "CooSparse": {
        "values_tensor_name": "1 bytes",
        "indices_tensor_name": "2 bytes",
        "dense_shape_tensor_name": "3 bytes",
    },
    "CompositeTensor": {"components": "2 TensorInfo+"},
    "AssetFileDef": {"tensor_info": "1 TensorInfo", "filename": "2 bytes"},
    "SavedObjectGraph": {"nodes": "1 SavedObject+", "concrete_functions": "2 ConcreteEntry+"},
    "SavedObject": {
        "user_object": "4 SavedUserObject",
        "asset": "5 SavedAsset",
        "function": "6 SavedFunction",
        "variable": "7 SavedVariable",
        "bare_concrete_function": "8 SavedBareConcreteFunction",
        "constant": "9 SavedConstant",
        "resource": "10 SavedResource",
        "captured_tensor": "12 CapturedTensor",
    },
    "SavedUserObject": {"identifier": "1 bytes"},
    "SavedAsset": {"asset_file_def_index": "1 int32"},
    "SavedFunction": {"concrete_functions": "1 bytes+"},
    "SavedVariable": {"dtype": "1 int32"},
    "SavedBareConcreteFunction": {"concrete_function_name": "1 bytes"},
    "SavedResource": {"device": "1 bytes"},
    "CapturedTensor": {"name": "1 bytes"},
    "SavedConstant": {"operation": "1 bytes"},
    "ConcreteEntry": {"key": "1 bytes", "value": "2 SavedConcreteFunction"},
    "SavedConcreteFunction": {"bound_inputs": "2 int32+"},
}
_PACKAGE = "tftransfer.scanning"
_KINDS = {"bytes": 12, "int32": 5, "uint32": 13, "int64": 3}  # FieldDescriptorProto.Type
_MESSAGE, _OPTIONAL, _REPEATED = 11, 1, 3


@functools.cache
def message(name: str) -> Any:
    """Return the class of a message, such as `"SavedModel"`; it has `FromString`."""
    return message_factory.GetMessageClass(_pool().FindMessageTypeByName(f"{_PACKAGE}.{name}"))


@functools.cache
def _pool() -> descriptor_pool.DescriptorPool:
    """Return a pool of our own: TensorFlow's messages have these names in the common one."""
    file = descriptor_pb2.FileDescriptorProto(name="scanning.proto", package=_PACKAGE, syntax="proto3")
    for name, fields in FIELDS.items():
        described = file.message_type.add(name=name)
        for field, text in fields.items():
            number, kind = text.rstrip("+").split()
            label = _REPEATED if text.endswith("+") else _OPTIONAL
            if kind in _KINDS:
                described.field.add(name=field, number=int(number), label=label, type=_KINDS[kind])
            else:
                type_name = f".{_PACKAGE}.{kind}"
                described.field.add(name=field, number=int(number), label=label, type=_MESSAGE, type_name=type_name)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return pool
