"""The user's own functions, written as module:function on the command line."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fkd_ssl.errors import FkdError, RequestError, did_you_mean


def load_function(name: str, what: str) -> Callable[..., Any]:
    """Imports the function `module:function`, also from the current folder. `what` says what it makes, for messages.

    Raises:
        RequestError: The module or the function does not exist.
        FkdError: The module failed when it was imported.
    """
    module_name, _, function_name = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError) as error:
        raise RequestError(f"{what} {name}: {error} (the current folder is on the path)") from error
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise FkdError(f"{what} {name}: its module failed: {type(error).__name__}: {error}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        hint = did_you_mean(name, [f"{module_name}:{key}" for key, value in vars(module).items() if callable(value)])
        raise RequestError(f"{what} {name}: module {module_name!r} has no function {function_name!r}{hint}")
    checked: Callable[..., Any] = function
    return checked


def call(function: Callable[..., Any], name: str, what: str, **given: Any) -> Any:
    """Calls the function and returns its result. Raises FkdError, with `what` and `name` in the message, if it fails."""
    try:
        return function(**given)
    except FkdError:
        raise
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise FkdError(f"{what} {name}: {type(error).__name__}: {error}") from error
