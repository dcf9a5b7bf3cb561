"""Mistakes of the user's, which every command tells in one line."""


class UserError(ValueError):
    """A mistake that the user can mend. Its message is one line: what is wrong, its value, what is allowed."""


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
