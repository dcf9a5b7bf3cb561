"""The extras of this package (pyproject.toml): what they require, and one line where a package is missing."""

import re
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires, version

DISTRIBUTION = "entropy-rl-ext"


def install(extra: str) -> str:
    """How to install an extra."""
    return f"pip install --no-build-isolation -e '.[{extra}]' in a clone of the package"


def requirements(extra: str) -> list[str]:
    """The requirements of an extra, such as "transformers<6,>=5.5.3". Empty if this package is not installed but found
    on the search path."""
    try:
        declared = requires(DISTRIBUTION) or []
    except PackageNotFoundError:
        return []
    split = [text.partition(";") for text in declared]
    return [text.strip() for text, _, marker in split if f"extra == '{extra}'" in marker.replace('"', "'")]


def package_of(requirement: str) -> str:
    return re.split(r"[<>=!~ ]", requirement)[0]


def installed_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def lacking(requirement: str) -> str | None:
    """None if a requirement is met, otherwise the requirement and what is installed."""
    installed = installed_version(package_of(requirement))
    if installed is None:
        return requirement
    try:
        from packaging.requirements import Requirement
    except ModuleNotFoundError:  # nothing that torch requires brings it
        return None
    met = Requirement(requirement).specifier.contains(installed, prereleases=True)
    return None if met else f"{requirement} ({installed} is installed)"


def missing_package(command: str, error: ModuleNotFoundError) -> str:
    """The line for a command that cannot import a package of the extra `train`. Raises `error` if the missing module
    is this package's own."""
    if error.name is None or error.name.startswith("entropy_rl"):
        raise error
    return f"error: {command} needs {error.name}, which is not installed; install it with: {install('train')}"


def run_module(module: str) -> int:
    """Runs `main` of a module that needs the extra `train`, for `python -m`. Returns its exit status, or 2 if a package
    is missing."""
    try:
        status: int = import_module(module).main()
    except ModuleNotFoundError as error:
        print(missing_package(f"python -m {module}", error), file=sys.stderr)
        return 2
    return status
