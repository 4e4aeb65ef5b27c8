"""What docs/serving.md offers works: its client with servers of our own, its configuration by the server's messages."""

from __future__ import annotations

import base64
import importlib.util
import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import grpc
import pytest
import tensorflow as tf
from google.protobuf import text_format
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc
from tensorflow_serving.config import model_server_config_pb2

from tftransfer.serving import loaders, structure

PAGE = Path(__file__).parents[2] / "docs" / "serving"


@pytest.fixture(scope="module")
def client():
    spec = importlib.util.spec_from_file_location("client", PAGE / "client.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def answer(exported):
    """What the SavedModel answers, in whatever thread a server asks."""
    signatures = structure.signatures(structure.read(exported))

    def run(pictures):
        with loaders.graph_session(exported, signatures) as session:
            return session(loaders.Request("serving_default", loaders.as_texts(pictures)))

    return run


def _expected(answer, pictures):
    found = answer(pictures)
    return [
        (label.decode(), pytest.approx(float(probability)))
        for label, probability in zip(found["label"], found["probability"], strict=True)
    ]


def test_the_client_asks_by_rest(client, answer, pictures):
    """The server speaks TF Serving's row format, see https://www.tensorflow.org/tfx/serving/api_rest."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert (self.path, asked["signature_name"]) == ("/v1/models/roses:predict", "serving_default")
            found = answer([base64.b64decode(row["image_bytes"]["b64"]) for row in asked["instances"]])
            rows = [
                {"label": label.decode(), "probability": float(probability)}
                for label, probability in zip(found["label"], found["probability"], strict=True)
            ]
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"predictions": rows}).encode())

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        given = client.ask_by_rest("127.0.0.1", "roses", pictures, server.server_port)
        server.shutdown()
    assert given == _expected(answer, pictures)


def test_the_client_asks_by_grpc(client, answer, pictures):
    class Service(prediction_service_pb2_grpc.PredictionServiceServicer):
        def Predict(self, request, context):
            assert (request.model_spec.name, request.model_spec.signature_name) == ("roses", "serving_default")
            response = predict_pb2.PredictResponse()
            for name, values in answer(tf.make_ndarray(request.inputs["image_bytes"]).tolist()).items():
                response.outputs[name].CopyFrom(tf.make_tensor_proto(values))
            return response

    server = grpc.server(ThreadPoolExecutor(1))
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(Service(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        given = client.ask_by_grpc("127.0.0.1", "roses", pictures, port)
    finally:
        server.stop(None).wait()
    assert given == _expected(answer, pictures)


def test_the_configuration_names_what_compose_mounts():
    config = text_format.Parse(
        (PAGE / "models.config").read_text(encoding="utf-8"), model_server_config_pb2.ModelServerConfig()
    )
    (model,) = config.model_config_list.config
    compose = (PAGE / "compose.yaml").read_text(encoding="utf-8")
    assert f"/serving:{model.base_path}:ro" in compose
    assert model.model_version_policy.latest.num_versions == 1
    for file in ("models.config", "batching.config"):
        assert f"- ./{file}:/config/{file}:ro" in compose
        assert f"/config/{file}" in compose
    batching = (PAGE / "batching.config").read_text(encoding="utf-8")
    names = re.findall(r"^(\w+) \{ value: \d+ \}$", batching, re.MULTILINE)
    assert names == ["max_batch_size", "batch_timeout_micros", "max_enqueued_batches", "num_batch_threads"]


def test_the_image_is_of_the_tensorflow_that_we_need():
    compose = (PAGE / "compose.yaml").read_text(encoding="utf-8")
    version = re.search(r"image: tensorflow/serving:([\d.]+)", compose)[1]
    assert version.split(".")[:2] == tf.__version__.split(".")[:2]
