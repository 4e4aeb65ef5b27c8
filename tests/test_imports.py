"""The package's surface is lazy, and its modules import one way only."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import tftransfer

PACKAGE = Path(tftransfer.__file__).parent
# From the bottom up: a module imports from its own line and the lines above it only.
LAYERS = (
    {"errors", "locks", "interruption", "versions"},
    {"scanning"},
    {"report", "report_html"},
    {"tasks", "heads", "optimizers", "metrics", "averages"},
    {"tensor_files", "transferability", "shelf"},
    {"data"},
    {"features", "soundness"},
    {"depth", "weights"},
    {"sealed_folders"},
    {"weight_files"},
    {"backbones"},
    {"builders", "trainable"},
    {"adapters", "penalties", "console"},
    {"strategies"},
    {"guard"},
    {"prefix", "constants", "distribution", "callbacks", "mixing", "schedules", "history"},
    {"memory", "memory_probe", "micro_batches"},
    {"trainee", "checkpoints", "planning"},
    {"inference", "feeding", "recording"},
    {"training"},
    {"checks", "ranking", "head_search", "suggestion", "surgery"},
    {"advice", "rate_test"},
    {"serving"},
    {"integrity", "model_card", "signing"},
    {"bundles"},
    {"comparison", "choices", "run_verification", "audits"},
    {"runs"},
    {"exports"},
    {"commands"},
    {"cli"},
)
LEVEL = {module: level for level, modules in enumerate(LAYERS) for module in modules}


def _module(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imported(path: Path) -> set[str]:
    """Return the toolkit's top-level modules that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "tftransfer":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("tftransfer.")}
    return found & set(LEVEL)


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_go_one_way(path):
    module = _module(path)
    assert module in LEVEL, f"give {module} its place in LAYERS"
    upward = {name for name in _imported(path) if LEVEL[name] > LEVEL[module]}
    assert not upward


def _fresh(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


def test_importing_the_package_imports_no_tensorflow():
    loaded = _fresh("import sys, tftransfer; print(sorted({'tensorflow', 'keras', 'numpy'} & set(sys.modules)))")
    assert loaded.strip() == "[]"


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["predict", "--help"], ["nonsense"]])
def test_the_command_line_answers_without_tensorflow(arguments):
    code = (
        "import sys, tftransfer.cli as cli\n"
        f"try: cli.main({arguments!r})\n"
        "except SystemExit: pass\n"
        "print('tensorflow' in sys.modules)"
    )
    assert _fresh(code).splitlines()[-1] == "False"


def test_the_public_surface_is_as_written_down():
    assert tftransfer.__all__ == [
        "InputError",
        "adapters",
        "advice",
        "backbones",
        "builders",
        "bundles",
        "checks",
        "choices",
        "comparison",
        "data",
        "devices",
        "find_learning_rate",
        "fine_tune",
        "load_model",
        "planning",
        "predict",
        "report",
        "runs",
        "scan",
        "serving",
        "set_trainable",
        "strategies",
        "tasks",
    ]
    assert all(getattr(tftransfer, name) is not None for name in tftransfer.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nonsense"):
        _ = tftransfer.nonsense
