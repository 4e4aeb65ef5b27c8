"""Ask a model server what is on pictures, by REST or by gRPC.

    python docs/serving/client.py PICTURE... [--grpc] [--host localhost] [--model flowers]

REST needs Python alone; gRPC the packages grpcio and tensorflow-serving-api, which come with tftransfer.
"""

from __future__ import annotations

import argparse
import base64
import json
import urllib.request
from pathlib import Path


def ask_by_rest(host: str, model: str, pictures: list[bytes], port: int = 8501) -> list[tuple[str, float]]:
    """Return label and probability of each picture."""
    # JSON has no bytes: they are sent as base64, marked by `b64`.
    instances = [{"image_bytes": {"b64": base64.b64encode(picture).decode()}} for picture in pictures]
    request = urllib.request.Request(
        f"http://{host}:{port}/v1/models/{model}:predict",
        json.dumps({"signature_name": "serving_default", "instances": instances}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        answers = json.load(response)["predictions"]
    return [(answer["label"], answer["probability"]) for answer in answers]


def ask_by_grpc(host: str, model: str, pictures: list[bytes], port: int = 8500) -> list[tuple[str, float]]:
    """Return label and probability of each picture."""
    import grpc
    import tensorflow as tf
    from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

    request = predict_pb2.PredictRequest()
    request.model_spec.name = model
    request.model_spec.signature_name = "serving_default"
    request.inputs["image_bytes"].CopyFrom(tf.make_tensor_proto(pictures))
    with grpc.insecure_channel(f"{host}:{port}") as channel:
        service = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        outputs = service.Predict(request, timeout=60).outputs
    labels, probabilities = (tf.make_ndarray(outputs[name]) for name in ("label", "probability"))
    return [(label.decode(), float(probability)) for label, probability in zip(labels, probabilities, strict=True)]


def main() -> None:
    """Print a line per picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path, nargs="+", metavar="PICTURE")
    parser.add_argument("--grpc", action="store_true", help="ask by gRPC (default: REST)")
    parser.add_argument("--host", default="localhost", help="(default: %(default)s)")
    parser.add_argument("--model", default="flowers", help="its name in models.config (default: %(default)s)")
    options = parser.parse_args()
    ask = ask_by_grpc if options.grpc else ask_by_rest
    answers = ask(options.host, options.model, [picture.read_bytes() for picture in options.pictures])
    for picture, (label, probability) in zip(options.pictures, answers, strict=True):
        print(f"{picture}\t{label}\t{probability:.4f}")


if __name__ == "__main__":
    main()
