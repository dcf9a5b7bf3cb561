"""Errors of the user, which every command reports in one line."""

from pathlib import Path


class UserError(ValueError):
    """An error that the user can fix. Its message is one line: the key or file, its value, what is allowed."""


def one_line(error: BaseException) -> str:
    """The message of an error in one line; its type where it has no message."""
    return " ".join(str(error).split()) or type(error).__name__


def check_file(where: str, path: Path, expected: str) -> None:
    """Raises UserError if there is no file at `path`; the message begins with `where`."""
    if path.is_dir():
        raise UserError(f"{where}: this is a directory; {expected} was expected")
    if not path.is_file():
        raise UserError(f"{where}: there is no such file; {expected} was expected")
