"""The package `tftransfer`: what it needs, and its command. Build and tool settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "tftransfer/__init__.py").read_text(), re.MULTILINE)[1]
# model-signing imports pyOpenSSL, which sigstore no longer brings along.
SIGN = ["model-signing>=1.1,<2", "pyOpenSSL>=25"]

LITERT = ["ai-edge-litert>=2.3"]
ONNX = ["tf2onnx>=1.17", "onnxruntime>=1.20"]

setup(
    name="tftransfer",
    version=VERSION,
    description="Transfer learning for Keras 3 and TensorFlow: fine-tune, measure, serve",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["tftransfer", "tftransfer.*"]),
    package_data={"tftransfer": ["assets/*", "py.typed"]},
    install_requires=[
        "tensorflow>=2.21,<2.22",
        "keras>=3.15,<3.16",
        "tensorflow-datasets>=4.9.8",
        "importlib_resources>=6",  # TensorFlow Datasets imports it without asking for it
        "numpy>=2.0",
        "scikit-learn>=1.6",
        "scipy>=1.14",
        "threadpoolctl>=3.5",
        "h5py>=3.12",
        "safetensors>=0.5",
        "Pillow>=11",
        "matplotlib>=3.10",
        "rich>=13.9",
        "psutil>=6",
        "tensorboard>=2.20",
        "tensorflow-serving-api>=2.21,<2.22",
    ],
    extras_require={
        "gpu": ["tensorflow[and-cuda]>=2.21,<2.22"],
        "sign": SIGN,
        "litert": LITERT,
        "onnx": ONNX,
        "dev": [
            *SIGN,
            *LITERT,
            *ONNX,
            "hypothesis>=6.100",
            "mypy>=1.13",
            "pytest>=8.3",
            "pytest-xdist>=3.6",
            "ruff>=0.8",
        ],
    },
    entry_points={"console_scripts": ["tftransfer=tftransfer.cli:main"]},
)
