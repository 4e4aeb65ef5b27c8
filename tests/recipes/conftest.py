"""Recipes as a user runs them, but in this process."""

import functools
import importlib.util
import sys

import pytest

from tftransfer import cli
from tftransfer.checks import forgetting


@pytest.fixture(scope="session", autouse=True)
def _signs_are_generated_once():
    """Drawing the old task's pictures takes seconds, and each run of a recipe would draw the same ones."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(forgetting, "demo_source", functools.cache(forgetting.demo_source))
        yield


@pytest.fixture(scope="session")
def recipe_named(repository):
    """Return a function from a recipe's name to one that runs it with arguments and returns its exit code."""

    def load(name):
        path = repository / "recipes" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(f"{name}_recipe", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)

        def run(*arguments: object) -> int:
            before, sys.argv = sys.argv, [path.name, *map(str, arguments)]
            try:
                return cli.guarded(module.main)
            except SystemExit as stopped:
                return stopped.code
            finally:
                sys.argv = before

        return run

    return load
