"""Import functions and classes from outside the package by name."""

import sys
from importlib import import_module
from pathlib import Path
from typing import Any


def imported(path: str) -> Any:
    """Return the object at a dotted path such as "my_module.heun", installed or in the working directory.

    Example:
        >>> imported("math.sqrt")(9)
        3.0

    Raises:
        ImportError: if the module does not exist.
        ValueError: if the path has no module, or the module lacks the name.
    """
    module, _, name = path.rpartition(".")
    if not module:
        raise ValueError(f"expected a path such as my_module.{path}: got {path!r}")
    directory = str(Path.cwd())
    sys.path.append(directory)
    try:
        loaded = import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise ImportError(f"no module {error.name} for {path!r}, neither installed nor in {directory}") from error
    finally:
        sys.path.remove(directory)
    if not hasattr(loaded, name):
        raise ValueError(f"{module} has no {name!r}")
    return getattr(loaded, name)
