"""Judge the description of a Keras network: whatever it names is built, so every name must be on a list."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any

from tftransfer.scanning.archives import is_plain
from tftransfer.scanning.finding import Advised, Damage, Problems
from tftransfer.scanning.lists import BARE, FUNCTIONS, OWN, bare_classes, classes

LARGEST_CONFIG = 64 * 2**20
DEEPEST = 200
MOST_VALUES = 5_000_000

LARGEST_NUMBER = 2**31
"""Of units, sizes and other whole numbers, but for seeds, vocabularies and literal values."""

LARGEST_SHAPE = 2**33
"""Numbers in a tensor of a shape that is given."""

UNSAFE = (
    "trusted or not, Keras refuses it in its safe mode; if you trust its source, "
    "`keras.saving.load_model(PATH, safe_mode=False)` loads it and runs its code"
)
FOREIGN = (
    "`--trust` alone does not help, because Keras finds only what is registered with it; if you trust its source, "
    "import that in Python and load the file with `trust=True`"
)

# Layers that Keras' safe mode refuses.
_UNSAFE = ("TFSMLayer", "TorchModuleWrapper")
# Keras' own wrappings of values; what they hold is looked through like the rest.
_VALUES = frozenset(
    {
        "TensorShape",
        "__bytes__",
        "__ellipsis__",
        "__keras_tensor__",
        "__numpy__",
        "__slice__",
        "__tensor__",
        "__tuple__",
    }
)
_ARRAYS = ("__numpy__", "__tensor__")
_MOST_DIMENSIONS = 32
_LONGEST_KEY = 60  # that is shown
# Keys under which any whole number is in order, and so is a list of them.
_FREE_KEYS = frozenset(
    {"mask_token", "mask_value", "oov_token", "salt", "seed", "shared_object_id", "value", "vocabulary"}
)
# Keys whose value Keras reads as a file's path if it is a text.
_PATH_KEYS = frozenset({"filepath", "idf_weights", "path", "vocabulary"})
_BUILT_IN = re.compile(r"keras(\.[a-z_]+)*")


def config_text_problems(text: str | bytes, *, modules_needed: bool) -> Problems:
    """Yield what is wrong with a network's description in JSON.

    Args:
        text: The JSON.
        modules_needed: Whether each class must come with its module, as in `.keras` files. Those of Keras 1 and 2
            name none.
    """
    if len(text) > LARGEST_CONFIG:
        yield "", f"{len(text)} characters: more than {LARGEST_CONFIG}"
        return
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        yield "", Damage(f"is no JSON that can be read: {type(error).__name__}")
        return
    if not isinstance(config, dict):
        yield "", "is no JSON object"
        return
    yield from _value_problems(config, modules_needed)


def _value_problems(config: dict[str, Any], modules_needed: bool) -> Problems:
    todo: list[tuple[Any, str, str, int]] = [(config, "", "", 0)]  # value, its key, where, how deep
    count = 0
    while todo:
        value, key, where, depth = todo.pop()
        count += 1
        if count > MOST_VALUES or depth > DEEPEST:
            yield where, f"more than {MOST_VALUES} values, or more than {DEEPEST} deep"
            return
        if isinstance(value, dict):
            if key in _PATH_KEYS and value.get("class_name") not in _ARRAYS:
                yield where, "is neither a list nor an array"
            yield from ((where, problem) for problem in _object_problems(value, modules_needed))
            todo.extend(
                (part, name, f"{where}.{name[:_LONGEST_KEY]}".lstrip("."), depth + 1) for name, part in value.items()
            )
        elif isinstance(value, list):
            if _is_huge_shape(where, value):
                yield where, f"is the shape of too large a tensor: {value}"
            todo.extend((part, key, f"{where}[{number}]", depth + 1) for number, part in enumerate(value))
        elif isinstance(value, str) and key in _PATH_KEYS and not where.endswith("]"):
            problem = f"is the path of a file, which Keras would read: {value[:80]!r}"
            yield where, Advised(problem, UNSAFE) if key == "vocabulary" else problem
        elif _is_whole(value) and abs(value) > LARGEST_NUMBER and key not in _FREE_KEYS:
            yield where, f"is too large a number: {str(value)[:40]}"


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_huge_shape(where: str, values: list[Any]) -> bool:
    sizes = [abs(value) for value in values[:_MOST_DIMENSIONS] if _is_whole(value) and value]
    return ("shape" in where or "size" in where) and math.prod(sizes) > LARGEST_SHAPE


def _object_problems(value: dict[str, Any], modules_needed: bool) -> Iterator[str]:
    """Judge a dict: does it name a class or function, and how is a layer of that class called?"""
    if "class_name" in value:
        yield from _name_problems(value, modules_needed)
    inner = value.get("config")
    for holder in (value, inner if isinstance(inner, dict) else {}):
        name = holder.get("name")
        if isinstance(name, str) and name and not is_plain(name.replace(":", "_")):
            yield f"has a name that leads to another folder: {name[:80]!r}"
    nodes = value.get("inbound_nodes")
    if isinstance(nodes, list) and any(isinstance(node, dict) and not _has_tensor(node) for node in nodes):
        yield "is called without a tensor of the network, while it is loaded"


def _name_problems(value: dict[str, Any], modules_needed: bool) -> Iterator[str]:
    name, module, registered = value["class_name"], value.get("module"), value.get("registered_name")
    parts = (name, module or "", registered or "")
    if not all(isinstance(part, str) for part in parts):
        yield "has a class, module or registered name that is no text"
    elif name in _VALUES:
        if module or registered:  # which makes Keras look for a class of that name there
            yield f"{name} of {module or registered} is no class"
    elif name == "__lambda__" or name == "Lambda":
        yield Advised(f"{name}: holds Python code, which would be run", UNSAFE)
    elif name == "function":
        yield from _function_problems(value.get("config"), module, registered)
    elif module is None and not registered:
        if modules_needed:
            yield f"class {name} names no module"
        elif name not in bare_classes():
            yield Advised(f"class {name} is not on the list", _advice(name, FOREIGN))
    elif not _is_listed(name, module or "", registered):
        yield _refusal(name, module or "", registered)


def _function_problems(name: Any, module: str | None, registered: str | None) -> Iterator[str]:
    known = isinstance(name, str) and name in classes()[FUNCTIONS]
    plain = module is None or module == "builtins" or _BUILT_IN.fullmatch(module)
    if not (known and plain and registered in (None, "function", name)):
        problem = f"function {str(name)[:80]!r} of {module} is not on the list"
        yield problem if _BUILT_IN.fullmatch(module or "") else Advised(problem, FOREIGN)


def _is_listed(name: str, module: str, registered: str | None) -> bool:
    if registered and registered.startswith(f"{OWN}>"):
        own = module == OWN or module.startswith(f"{OWN}.")
        return own and name in classes()[OWN] and registered == f"{OWN}>{name}"
    return name in classes().get(module, ()) and module not in (FUNCTIONS, OWN, BARE) and registered in (None, name)


def _refusal(name: str, module: str, registered: str | None) -> str:
    of = f" of {module}" if module else ""
    if registered and ">" in registered:
        return Advised(f"class {registered}{of} is somebody's own: only its authors can say what it does", FOREIGN)
    if name in classes().get(module, ()):
        return f"class {name}{of} is registered as {registered}, which Keras' own is not"
    advice = _advice(name, "" if _BUILT_IN.fullmatch(module) else FOREIGN)
    problem = f"class {name}{of} is not on the list"
    return Advised(problem, advice) if advice else problem


def _advice(name: str, otherwise: str) -> str:
    return UNSAFE if name in _UNSAFE else otherwise


def _has_tensor(node: dict[str, Any]) -> bool:
    todo: list[Any] = [node]
    while todo:
        value = todo.pop()
        if isinstance(value, dict):
            if value.get("class_name") == "__keras_tensor__":
                return True
            todo.extend(value.values())
        elif isinstance(value, list):
            todo.extend(value)
    return False
