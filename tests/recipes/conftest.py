"""Recipes as a user runs them, but in this process."""

import importlib.util
import sys

import pytest

from tftransfer import cli


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
