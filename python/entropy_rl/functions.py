"""Functions in Python files of the user's: their import, and what their errors look like."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from entropy_rl.errors import UserError, check_file, one_line


def import_function(path: str, name: str, module_name: str, *, path_key: str, name_key: str) -> Callable[..., Any]:
    """The function `name` of the file at `path`, which is imported under `module_name`.

    Args:
        path_key, name_key: the key and value that give the path and the name, as errors begin.

    Raises:
        UserError: there is no such file or function, or the file cannot be imported.
    """
    file = Path(path).expanduser()
    check_file(path_key, file, "a Python file")
    spec = importlib.util.spec_from_file_location(module_name, file)
    if spec is None or spec.loader is None:
        raise UserError(f"{path_key}: a Python file, its name ending in .py, was expected")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UserError(f"{path_key}: it cannot be imported: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"{name_key}: {path} has no function of this name")
    return function


def what_it_raised(error: Exception) -> str:
    """What a user's function raised and where, in one line."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    place = "" if frame is None else f" in {frame.tb_frame.f_code.co_filename}:{frame.tb_lineno}"
    return f"it raised {type(error).__name__}{place}: {one_line(error)}"
