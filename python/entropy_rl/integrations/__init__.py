"""Training on the highest-entropy tokens inside other trainers: verl and TRL.

Both integrations replace and call functions that their trainer does not document. The extras `verl` and `trl` of
pyproject.toml have the versions that the tests run. Another version works if it has the same functions: each
integration lists them as hooks, checks them when it is imported, and refuses to work without one.
"""

import inspect
import warnings
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from entropy_rl import extras
from entropy_rl.errors import one_line

# Names of hooks, "module:qualified.name", and their parameters. "self, x, ..." accepts more parameters after these,
# "..., x, y" any parameters with these among them.
Hooks = Mapping[str, str]


def missing_hook(package: str, hooks: Hooks) -> str | None:
    """None if the installed `package`, "verl" or "trl", has all hooks. Otherwise one line that names the first one that
    is missing or has other parameters."""
    where = f"{package} {extras.installed_version(package)}"
    for name, parameters in hooks.items():
        module, _, path = name.partition(":")
        shown = f"{module}.{path}"
        try:
            hook: Any = import_module(module)
        except ImportError as error:
            return (
                f"{shown}, which entropy-rl-ext needs, cannot be imported from {where} ({one_line(error)}): "
                f"{install_tested(package)}"
            )
        for part in path.split("."):
            hook = getattr(hook, part, None)
        if hook is None:
            return f"{where} has no {shown}, which entropy-rl-ext needs: {install_tested(package)}"
        actual = list(inspect.signature(hook).parameters)
        if not _fits(actual, parameters.split(", ")):
            return (
                f"{shown} of {where} takes ({', '.join(actual)}), but entropy-rl-ext needs ({parameters}): "
                f"{install_tested(package)}"
            )
    return None


def _fits(actual: list[str], wanted: list[str]) -> bool:
    if wanted[0] == "...":
        return set(wanted[1:]) <= set(actual)
    if wanted[-1] == "...":
        return actual[: len(wanted) - 1] == wanted[:-1]
    return actual == wanted


def untested(package: str) -> str | None:
    """None if the installed version of `package` is one that the tests run, otherwise one line that says so."""
    outside = [text for requirement in extras.requirements(package) if (text := extras.lacking(requirement))]
    return f"entropy-rl-ext is tested with {outside[0]}" if outside else None


def warn_if_untested(package: str) -> None:
    """One warning if the installed version of `package` is not one that the tests run."""
    text = untested(package)
    if text is not None:
        warnings.warn(text, stacklevel=3)


def install_tested(package: str) -> str:
    """How to install a version of `package` that the tests run."""
    requirements = extras.requirements(package)
    return f"pip install '{requirements[0]}'" if requirements else extras.install(package)
