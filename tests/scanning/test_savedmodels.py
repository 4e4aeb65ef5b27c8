"""Crafted SavedModels: each is refused, naming what is in it, without being loaded."""

from __future__ import annotations

import os
import shutil

import pytest
import tensorflow as tf
from tensorflow.core.framework import attr_value_pb2, graph_pb2, node_def_pb2, op_def_pb2
from tensorflow.core.protobuf import meta_graph_pb2, saved_model_pb2, saved_object_graph_pb2

from tftransfer.scanning import graphs, savedmodel, scan

FUNCTIONS = {
    "function": "__inference_serve_",
    "branch": "cond_true_",
    "loop": "while_body_",
    "dataset": "Dataset_map_lambda",
    "initializer": "__inference__initializer_",
}


def node(operation, name="evil", **attributes):
    made = node_def_pb2.NodeDef(name=name, op=operation)
    for key, value in attributes.items():
        made.attr[key].CopyFrom(value)
    return made


def text_attribute(value):
    return attr_value_pb2.AttrValue(s=value)


def constant(*texts, name="text"):
    made = node("Const", name, dtype=attr_value_pb2.AttrValue(type=tf.string.as_datatype_enum))
    made.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(list(texts), tf.string))
    return made


def graph_text(operation):
    return graph_pb2.GraphDef(node=[node(operation)]).SerializeToString()


def function_of(saved_model, part):
    """The function that plays a part in the exported graph."""
    library = saved_model.meta_graphs[0].graph_def.library.function
    return next(function for function in library if FUNCTIONS[part] in function.signature.name)


def put(saved_model, place, made):
    """Put a node into one of the places where an operation can hide."""
    graph = saved_model.meta_graphs[0].graph_def
    if place == "graph":
        graph.node.append(made)
    elif place in FUNCTIONS:
        function_of(saved_model, place).node_def.append(made)
    else:
        content = graph_pb2.GraphDef(node=[made]).SerializeToString()
        if place == "text in a text":
            inner = graph_pb2.GraphDef(node=[constant(content, name="inner")])
            content = inner.SerializeToString()
        graph.node.append(constant(b"label", content))


def test_what_tensorflow_writes_has_no_findings(everything, edited):
    assert scan(everything) == ()
    assert scan(edited(lambda saved_model: None)) == (), "serialised again"


PLACES = ("graph", "function", "branch", "loop", "dataset", "initializer", "text", "text in a text")
OPERATIONS = """
    ReadFile WriteFile MatchingFiles PyFunc EagerPyFunc PyFuncStateless TFRecordDatasetV2 TextLineDataset
    FixedLengthRecordDatasetV2 LoadDataset SaveDatasetV2 CacheDatasetV2 SnapshotDatasetV2 RemoteCall RpcServer
    RpcCall DataServiceDatasetV4 DebugIdentityV3 DumpTensor ImmutableConst XlaCustomCallV2 XlaCallModule
    XlaHostCompute Abort CreateSummaryFileWriter WriteSummary DecodeProtoV2 GenerateVocabRemapping
    FileSystemSetConfiguration Save Restore Skipgram SqlDataset GeneratorDataset DatasetFromGraph
    LoadTPUEmbeddingADAMParameters _Send WholeFileReaderV2 CollectiveReduceV2 FixedUnigramCandidateSampler
    Evil>Custom
"""


@pytest.mark.parametrize("operation", OPERATIONS.split())
def test_operations_that_touch_files_or_processes_are_refused(operation, edited, problems_of):
    place = PLACES[OPERATIONS.split().index(operation) % 6]
    found = problems_of(edited(lambda saved_model: put(saved_model, place, node(operation))))
    assert len(found) == 1
    assert f"node evil: operation {operation} " in found[0]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("operation", ["WriteFile", "PyFunc"])
def test_they_are_found_in_every_place(operation, place, edited, problems_of):
    found = problems_of(edited(lambda saved_model: put(saved_model, place, node(operation))))
    assert len(found) == 1
    assert f"operation {operation} " in found[0]
    if place in FUNCTIONS:
        assert FUNCTIONS[place] in found[0], "the function is named"


HIDDEN = {
    "function": lambda: _function(node("WriteFile")).SerializeToString(),
    "library": lambda: graph_pb2.GraphDef(library={"function": [_function(node("WriteFile"))]}).SerializeToString(),
    "node": lambda: node("WriteFile").SerializeToString(),
    "MetaGraph": lambda: meta_graph_pb2.MetaGraphDef(graph_def={"node": [node("WriteFile")]}).SerializeToString(),
}


def _function(*nodes):
    function = graph_pb2.GraphDef().library.function.add()
    function.signature.name = "hidden"
    function.node_def.extend(nodes)
    return function


@pytest.mark.parametrize("form", HIDDEN)
def test_texts_that_are_graphs_in_any_form_are_read(form, edited, problems_of):
    content = HIDDEN[form]()
    found = problems_of(edited(lambda saved_model: put(saved_model, "loop", constant(content))))
    assert len(found) == 1
    assert "operation WriteFile" in found[0]


def _packed(saved_model):
    made = constant()
    content, label = graph_text("WriteFile"), b"label"
    made.attr["value"].tensor.ClearField("string_val")
    made.attr["value"].tensor.tensor_content = bytes([len(label), len(content)]) + label + content
    put(saved_model, "graph", made)


def _attribute(saved_model):
    put(saved_model, "graph", node("NoOp", serialized=text_attribute(graph_text("WriteFile"))))


def _list_attribute(saved_model):
    made = node("NoOp")
    made.attr["graphs"].list.s.append(graph_text("WriteFile"))
    put(saved_model, "graph", made)


def _function_attribute(saved_model):
    made = node("PartitionedCall")
    made.attr["f"].func.name = function_of(saved_model, "branch").signature.name
    made.attr["f"].func.attr["extra"].s = graph_text("WriteFile")
    put(saved_model, "graph", made)


def _attribute_of_a_function(saved_model):
    function_of(saved_model, "loop").attr["extra"].s = graph_text("WriteFile")


def _collection(saved_model):
    saved_model.meta_graphs[0].collection_def["extra"].bytes_list.value.append(graph_text("WriteFile"))


def _second_graph(saved_model):
    saved_model.meta_graphs.add().graph_def.node.append(node("WriteFile"))


@pytest.mark.parametrize(
    "change",
    [
        _packed,
        _attribute,
        _list_attribute,
        _function_attribute,
        _attribute_of_a_function,
        _collection,
        _second_graph,
    ],
)
def test_nothing_hides_in_other_corners(change, edited, problems_of):
    found = problems_of(edited(change))
    assert len(found) == 1
    assert "operation WriteFile" in found[0]


def test_texts_in_texts_end_somewhere(edited, problems_of):
    def nest(saved_model):
        content = graph_text("NoOp")
        for _ in range(graphs.MOST_NESTED + 1):
            content = graph_pb2.GraphDef(node=[constant(content)]).SerializeToString()
        put(saved_model, "graph", constant(content))

    assert "deep" in problems_of(edited(nest))[0]


def test_labels_are_no_graphs(edited):
    labels = [b"\n\x05hello", b"\x12\x03abc", b"\n\n\x01", bytes(range(256)), b"WriteFile", "größer".encode(), b""]
    assert scan(edited(lambda saved_model: put(saved_model, "graph", constant(*labels)))) == ()


# Paths: of the saver, of tables, of what is printed.


def _read_by_constant(saved_model):
    function = function_of(saved_model, "function")
    function.node_def.append(constant(b"/etc/passwd", name="path"))
    function.node_def.append(node("RestoreV2"))
    function.node_def[-1].input.append("path:output:0")


def _written_by_constant(saved_model):
    _read_by_constant(saved_model)
    function_of(saved_model, "function").node_def[-1].op = "SaveV2"


def _written_by_request(saved_model):
    function = function_of(saved_model, "function")
    function.node_def.append(node("SaveV2"))
    function.node_def[-1].input.append(function.signature.input_arg[0].name)


def _in_the_savers_function(saved_model):
    """`tf.saved_model.save` writes a function that saves; here it saves elsewhere."""
    function = _saver(saved_model)
    function.node_def.append(constant(b"/etc/cron.d/evil", name="path"))
    save = next(one for one in function.node_def if one.op == "SaveV2")
    save.input[0] = "path:output:0"


def _suffix_of_the_saver(saved_model):
    function = _saver(saved_model)
    for one in function.node_def:
        if one.op == "Const" and one.attr["value"].tensor.string_val[:1] == [b".part"]:
            one.attr["value"].tensor.string_val[0] = b"/../../evil"


def _saver(saved_model):
    library = saved_model.meta_graphs[0].graph_def.library.function
    return next(function for function in library if "traced_save" in function.signature.name)


def _saver_called_by_a_signature(saved_model):
    graph = saved_model.meta_graphs[0].graph_def
    request = next(one for one in graph.node if one.name.startswith("serving_default"))
    graph.node.append(node("StatefulPartitionedCall"))
    graph.node[-1].input.extend([request.name, request.name])
    graph.node[-1].attr["f"].func.name = _saver(saved_model).signature.name


def _saver_in_python(saved_model):
    saved_model.meta_graphs[0].object_graph_def.concrete_functions[_saver(saved_model).signature.name].SetInParent()


def _saver_as_a_map(saved_model):
    graph = saved_model.meta_graphs[0].graph_def
    graph.node.append(node("MapDataset"))
    graph.node[-1].attr["f"].func.name = _saver(saved_model).signature.name


def _never_called(saved_model):
    function = saved_model.meta_graphs[0].graph_def.library.function.add()
    function.signature.name = "alone"
    function.signature.input_arg.add(name="path")
    function.node_def.append(node("RestoreV2"))
    function.node_def[-1].input.append("path")


@pytest.mark.parametrize(
    ("change", "operation", "said"),
    [
        (_read_by_constant, "RestoreV2", "the constant '/etc/passwd'"),
        (_written_by_constant, "SaveV2", "the constant '/etc/passwd'"),
        (_written_by_request, "SaveV2", "a request"),
        (_in_the_savers_function, "SaveV2", "the constant '/etc/cron.d/evil'"),
        (_suffix_of_the_saver, "SaveV2", "the constant '/../../evil'"),
        (_saver_called_by_a_signature, "SaveV2", "a request"),
        (_saver_in_python, "SaveV2", "a request"),
        (_saver_as_a_map, "SaveV2", "operation MapDataset"),
        (_never_called, "RestoreV2", "where a scan cannot follow"),
    ],
)
def test_only_the_saver_may_read_and_write_where_it_is_told(change, operation, said, edited, problems_of):
    found = problems_of(edited(change))
    assert any(f"operation {operation} takes its path from" in line and said in line for line in found), found


def _by_name(info, name):
    info.name = name


def _without_number(info, name):
    """TensorFlow reads `asset` as `asset:0`."""
    info.name = name.removesuffix(":0")


def _sparse(info, name):
    info.coo_sparse.values_tensor_name = name


def _composite(info, name):
    info.composite_tensor.components.add().name = name


@pytest.mark.parametrize("way", [_by_name, _without_number, _sparse, _composite])
@pytest.mark.parametrize("whose", ["saver", "asset"])
def test_no_signature_may_take_a_path(whose, way, edited, problems_of):
    def change(saved_model):
        meta_graph = saved_model.meta_graphs[0]
        asset = meta_graph.asset_file_def[0].tensor_info.name
        name = meta_graph.saver_def.filename_tensor_name if whose == "saver" else asset
        way(meta_graph.signature_def["evil"].inputs["path"], name)

    assert any("signature evil: takes the path of" in line for line in problems_of(edited(change)))


def _separator_of_the_saver(saved_model):
    """What joins the saver's argument and a suffix is a part of the path too."""
    for one in _saver(saved_model).node_def:
        if one.op == "StringJoin":
            one.attr["separator"].s = b"/../../evil"


def test_separators_are_parts_of_a_path(edited, problems_of):
    found = problems_of(edited(_separator_of_the_saver))
    assert any("SaveV2 takes its path from the separator '/../../evil'" in line for line in found), found


def _main_nodes(saved_model):
    return saved_model.meta_graphs[0].graph_def.node


def _table_from_a_constant(saved_model):
    nodes = _main_nodes(saved_model)
    nodes.append(constant(b"/etc/passwd", name="path"))
    initialize = next(one for one in nodes if "_initializer_" in one.attr["f"].func.name)
    initialize.input[0] = "path"


def _table_from_a_constant_object(saved_model):
    """As Python's loader reads it: what a function captures is in the graph of objects."""
    _main_nodes(saved_model).append(constant(b"/etc/passwd", name="path"))
    objects = saved_model.meta_graphs[0].object_graph_def
    objects.nodes.add().constant.operation = "path"
    bound = next(one for name, one in objects.concrete_functions.items() if "_initializer_" in name)
    bound.bound_inputs[0] = len(objects.nodes) - 1


def _table_from_another_object(saved_model):
    objects = saved_model.meta_graphs[0].object_graph_def
    bound = next(one for name, one in objects.concrete_functions.items() if "_initializer_" in name)
    bound.bound_inputs[0] = 10_000


def _asset_assigned_again(saved_model):
    nodes = _main_nodes(saved_model)
    nodes.append(constant(b"/etc/passwd", name="path"))
    assign = next(one for one in nodes if one.op == "AssignVariableOp" and "asset_path" in one.input[1])
    nodes.append(node("AssignVariableOp", "again"))
    nodes[-1].input.extend([assign.input[0], "path"])


def _asset_by_a_second_handle(saved_model):
    nodes = _main_nodes(saved_model)
    assign = next(one for one in nodes if one.op == "AssignVariableOp" and "asset_path" in one.input[1])
    handle = next(one for one in nodes if one.name == assign.input[0])
    function_of(saved_model, "function").node_def.append(handle)


def _asset_given_to_a_function(saved_model):
    nodes = _main_nodes(saved_model)
    assign = next(one for one in nodes if one.op == "AssignVariableOp" and "asset_path" in one.input[1])
    nodes.append(node("StatefulPartitionedCall"))
    nodes[-1].attr["f"].func.name = function_of(saved_model, "function").signature.name
    nodes[-1].input.append(assign.input[0])


def _asset_by_another_container(saved_model):
    """The container without a name is "localhost"."""
    _asset_by_a_second_handle(saved_model)
    function_of(saved_model, "function").node_def[-1].attr["container"].s = b"localhost"


def _asset_by_a_request(saved_model):
    """A request may set any tensor, not only a placeholder."""
    _, call = _initializer(saved_model)
    saved_model.meta_graphs[0].signature_def["evil"].inputs["path"].name = f"{call.input[0]}:0"


def _initializer(saved_model):
    """The function that reads the table, its argument, and the node that calls it."""
    function = next(
        one
        for one in saved_model.meta_graphs[0].graph_def.library.function
        if any(node.op == "InitializeTableFromTextFileV2" for node in one.node_def)
    )
    nodes = _main_nodes(saved_model)
    return function, next(one for one in nodes if one.attr["f"].func.name == function.signature.name)


def _path_behind_a_list(saved_model):
    """A call gives the inputs one after the other, however many of them belong to an argument that is a list."""
    function, call = _initializer(saved_model)
    function.signature.input_arg.insert(0, op_def_pb2.OpDef.ArgDef(name="xs", type=7, number_attr="N"))
    _main_nodes(saved_model).append(constant(b"/etc/passwd", name="path"))
    asset = call.input[0]
    del call.input[:]
    call.op = function.signature.name
    call.input.extend([asset, asset, "path"])


def _path_given_to_another_implementation(saved_model):
    """Functions of one interface stand for each other: TensorFlow's optimizer chooses by device."""
    function, _ = _initializer(saved_model)
    library = saved_model.meta_graphs[0].graph_def.library.function
    harmless = library.add()
    harmless.signature.name = "harmless"
    harmless.signature.input_arg.add(name="path", type=7)
    for one in (harmless, function):
        one.attr["api_implements"].s = b"reading"
    _main_nodes(saved_model).extend([constant(b"/etc/passwd", name="path"), node("StatefulPartitionedCall")])
    _main_nodes(saved_model)[-1].attr["f"].func.name = "harmless"
    _main_nodes(saved_model)[-1].input.append("path")


@pytest.mark.parametrize(
    "change",
    [
        _asset_by_a_request,
        _asset_by_another_container,
        _path_behind_a_list,
        _path_given_to_another_implementation,
        _table_from_a_constant,
        _table_from_a_constant_object,
        _table_from_another_object,
        _asset_assigned_again,
        _asset_by_a_second_handle,
        _asset_given_to_a_function,
    ],
)
def test_tables_are_read_from_assets_only(change, edited, problems_of):
    found = problems_of(edited(change))
    assert any("operation InitializeTableFromTextFileV2 takes its path from" in line for line in found), found


def _field(number, content):
    size, length = len(content), b""
    while size > 127:
        size, length = size >> 7, length + bytes([size & 127 | 128])
    return bytes([number << 3 | 2]) + length + bytes([size]) + content


def test_an_object_is_of_one_kind(edited, problems_of):
    """An asset and, in the bytes after it, a constant: TensorFlow takes what comes last."""
    file = edited(lambda saved_model: None) / "saved_model.pb"
    saved_model = saved_model_pb2.SavedModel.FromString(file.read_bytes())
    _main_nodes(saved_model).append(constant(b"/etc/passwd", name="path"))
    objects = saved_model.meta_graphs[0].object_graph_def
    both = saved_object_graph_pb2.SavedObject(constant={"operation": "path"}).SerializeToString()
    nodes = [one.SerializeToString() + (both if one.HasField("asset") else b"") for one in objects.nodes]
    objects.ClearField("nodes")
    content = objects.SerializeToString() + b"".join(_field(1, one) for one in nodes)
    saved_model.meta_graphs[0].ClearField("object_graph_def")
    meta_graph = saved_model.meta_graphs[0].SerializeToString() + _field(7, content)
    saved_model.ClearField("meta_graphs")
    file.write_bytes(saved_model.SerializeToString() + _field(2, meta_graph))
    read = saved_model_pb2.SavedModel.FromString(file.read_bytes()).meta_graphs[0].object_graph_def
    assert any(one.constant.operation == "path" for one in read.nodes)
    assert not any(one.HasField("asset") for one in read.nodes)
    found = problems_of(file.parent)
    assert any("takes its path from an object that is no asset" in line for line in found), found


def _parsed(saved_model):
    put(saved_model, "loop", node("ParseTensor", out_type=attr_value_pb2.AttrValue(type=tf.resource.as_datatype_enum)))


def _parsed_list(saved_model):
    """A list in a variant may hold handles."""
    put(saved_model, "loop", node("ParseTensor", out_type=attr_value_pb2.AttrValue(type=tf.variant.as_datatype_enum)))


def _sparse_handles(saved_model):
    handle = attr_value_pb2.AttrValue(type=tf.resource.as_datatype_enum)
    put(saved_model, "graph", node("DeserializeManySparse", dtype=handle))


def _restored(saved_model):
    next(one for one in _saver_nodes(saved_model, "RestoreV2")).attr["dtypes"].list.type[0] = (
        tf.resource.as_datatype_enum
    )


def _saver_nodes(saved_model, operation):
    library = saved_model.meta_graphs[0].graph_def.library.function
    return [one for function in library for one in function.node_def if one.op == operation]


def _requested(saved_model):
    put(saved_model, "graph", node("Placeholder", dtype=attr_value_pb2.AttrValue(type=tf.resource.as_datatype_enum)))


@pytest.mark.parametrize("change", [_parsed, _parsed_list, _sparse_handles, _restored, _requested])
def test_handles_are_not_made_of_data(change, edited, problems_of):
    """Such a handle would reach the variable in which an asset's path is kept."""
    found = problems_of(edited(change))
    assert len(found) == 1
    assert "of data, which no exported graph does" in found[0]


def _stream_by_the_caller(saved_model):
    """In a function, an attribute may be left to each call of it."""
    printed = node("PrintV2", output_stream=attr_value_pb2.AttrValue(placeholder="stream"))
    put(saved_model, "function", printed)


def _text_by_the_caller(saved_model):
    function = _saver(saved_model)
    suffix = next(one for one in function.node_def if one.op == "Const" and b".part" in str(one).encode())
    suffix.attr["value"].placeholder = "text"


@pytest.mark.parametrize(("change", "name"), [(_stream_by_the_caller, "output_stream"), (_text_by_the_caller, "value")])
def test_attributes_are_not_left_to_the_callers(change, name, edited, problems_of):
    assert any(f"attribute {name} is left to the callers" in line for line in problems_of(edited(change)))


@pytest.mark.parametrize("stream", ["stderr", "log(info)"])
def test_printing_is_allowed(stream, edited):
    printed = node("PrintV2", output_stream=text_attribute(stream.encode()))
    assert scan(edited(lambda saved_model: put(saved_model, "loop", printed))) == ()


def test_printing_into_a_file_is_not(edited, problems_of):
    printed = node("PrintV2", output_stream=text_attribute(b"file:///tmp/evil"))
    assert "PrintV2 writes to the file" in problems_of(edited(lambda s: put(s, "loop", printed)))[0]


# Claims and sizes.


def _bomb(saved_model):
    made = node("Const", dtype=attr_value_pb2.AttrValue(type=1))
    made.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(1.0))
    for size in (1 << 20, 1 << 20):
        made.attr["value"].tensor.tensor_shape.dim.add(size=size)
    put(saved_model, "loop", made)


def _negative(saved_model):
    made = node("Const")
    made.attr["value"].tensor.tensor_shape.dim.add(size=-5)
    put(saved_model, "graph", made)


def _handle(saved_model):
    made = node("Const")
    made.attr["value"].tensor.dtype = tf.resource.as_datatype_enum
    put(saved_model, "graph", made)


def _disguise(saved_model):
    function = saved_model.meta_graphs[0].graph_def.library.function.add()
    function.signature.name = "ReadFile"
    put(saved_model, "graph", node("ReadFile"))


def _dimensions(saved_model):
    made = node("Const")
    for _ in range(graphs.MOST_DIMENSIONS + 1):
        made.attr["value"].tensor.tensor_shape.dim.add(size=2**62)
    put(saved_model, "graph", made)


def _same_function(saved_model):
    library = saved_model.meta_graphs[0].graph_def.library.function
    library.add().signature.name = library[0].signature.name


def _function_without_a_name(saved_model):
    saved_model.meta_graphs[0].graph_def.library.function.add()


def _same_node(saved_model):
    put(saved_model, "loop", function_of(saved_model, "loop").node_def[0])


def _inputs(saved_model):
    put(saved_model, "loop", node("Identity"))
    function_of(saved_model, "loop").node_def[-1].input.extend(["x"] * (graphs.MOST_PARTS + 1))


def _texts(saved_model):
    made = node("NoOp")
    made.attr["keys"].list.s.extend([b"x"] * (graphs.MOST_PARTS + 1))
    put(saved_model, "loop", made)


def _empty(saved_model):
    saved_model.ClearField("meta_graphs")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_bomb, "claims 4398046511104 bytes"),
        (_negative, "impossible shape [-5]"),
        (_handle, "type resource"),
        (_disguise, "name of the operation ReadFile"),
        (_empty, "holds no graph"),
        (_dimensions, "255 dimensions"),
        (_same_function, "several of one name"),
        (_function_without_a_name, "functions without a name"),
        (_same_node, "several nodes of one name"),
        (_inputs, "100001 inputs"),
        (_texts, "100001 parts"),
    ],
)
def test_impossible_claims_are_refused(change, said, edited, problems_of):
    assert said in problems_of(edited(change))[0]


def test_sizes_have_limits(edited, everything, problems_of, monkeypatch, tmp_path):
    monkeypatch.setattr(graphs, "MOST_NODES", 50)
    assert "more than 50" in problems_of(everything)[0]
    folder = edited(lambda saved_model: None)
    os.truncate(folder / "saved_model.pb", savedmodel.LARGEST_MODEL + 1)  # a hole, no bytes on the disk
    assert f"more than {savedmodel.LARGEST_MODEL}" in problems_of(folder)[0]


# The folder.


@pytest.mark.parametrize("name", ["/etc/passwd", "../saved_model.pb", "sub/../../x", "..\\x", "C:x", "missing.txt", ""])
def test_assets_are_files_of_the_folder(name, edited, problems_of):
    def change(saved_model):
        saved_model.meta_graphs[0].asset_file_def[0].filename = name

    assert any("asset" in line and ("assets/" in line or "not there" in line) for line in problems_of(edited(change)))


def test_assets_in_a_collection_are_read_too(edited, problems_of):
    def change(saved_model):
        asset = meta_graph_pb2.AssetFileDef(filename="/etc/passwd")
        saved_model.meta_graphs[0].collection_def["saved_model_assets"].any_list.value.add().Pack(asset)

    assert "asset '/etc/passwd'" in problems_of(edited(change))[0]


def _link_asset(folder):
    (folder / "assets" / "words.txt").unlink()
    (folder / "assets" / "words.txt").symlink_to("/etc/hostname")


def _link_variables(folder):
    shutil.move(folder / "variables", folder.with_name("elsewhere"))
    (folder / "variables").symlink_to(folder.with_name("elsewhere"))


def _library(folder):
    (folder / "assets.extra").mkdir()
    (folder / "assets.extra" / "custom_ops.so").write_bytes(b"")


def _hidden_library(folder):
    (folder / "assets" / "vocabulary.txt").write_bytes(b"\x7fELF...")


def _no_variables(folder):
    shutil.rmtree(folder / "variables")


def _missing_shard(folder):
    shard = folder / "variables" / "variables.data-00000-of-00001"
    shard.rename(shard.with_name("variables.data-00000-of-00002"))


def _text_form(folder):
    (folder / "saved_model.pbtxt").write_text("")


def _legacy_code(folder):
    (folder / "keras_metadata.pb").write_bytes(b'..{"class_name": "Lambda"}')


def _cut_short(folder):
    os.truncate(folder / "saved_model.pb", 1000)


def _no_graph(folder):
    (folder / "saved_model.pb").unlink()
    (folder / "saved_model.cpb").write_bytes(b"")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_link_asset, "link"),
        (_link_variables, "link"),
        (_library, "code (.so)"),
        (_hidden_library, "(ELF)"),
        (_no_variables, "variables.index: is not there"),
        (_missing_shard, "1 files of variables"),
        (_text_form, "saved_model.pbtxt: a form"),
        (_legacy_code, "keras_metadata.pb: holds layers"),
        (_cut_short, "damaged"),
        (_no_graph, "saved_model.cpb: a form"),
    ],
)
def test_what_lies_in_the_folder_is_judged(change, said, edited, problems_of):
    folder = edited(lambda saved_model: None)
    change(folder)
    assert any(said in line for line in problems_of(folder)), problems_of(folder)


# The same from TensorFlow itself: what would be run, and is not.


def _write_in_condition(path, x):
    return tf.cond(x > 0, lambda: _written(path, x), lambda: x)


def _write_in_loop(path, x):
    return tf.while_loop(lambda i: i < 1, lambda i: (_written(path, i) + 1,), (x * 0,))[0]


def _write_in_dataset(path, x):
    return tf.data.Dataset.from_tensors(x).map(lambda value: _written(path, value)).reduce(0.0, lambda a, b: a + b)


def _written(path, x):
    with tf.control_dependencies([tf.io.write_file(path, "written")]):
        return tf.identity(x)


@pytest.mark.parametrize("way", [_written, _write_in_condition, _write_in_loop, _write_in_dataset])
def test_traced_models_that_write_are_refused_and_not_run(way, tmp_path, problems_of):
    sentinel = tmp_path / "sentinel"
    module = tf.Module()
    signature = [tf.TensorSpec([], tf.float32)]
    module.serve = tf.function(lambda x: way(os.fspath(sentinel), x), input_signature=signature)
    tf.saved_model.save(module, os.fspath(tmp_path / "model"), signatures=module.serve)
    found = problems_of(tmp_path / "model")
    assert found
    assert all("operation WriteFile reads or writes files" in line for line in found)
    assert not sentinel.exists()
    if way is _write_in_condition:  # that the model would have done it
        tf.saved_model.load(os.fspath(tmp_path / "model")).serve(1.0)
        assert sentinel.exists()
