"""The error that a user can correct. Imports nothing, so that every module can import it."""


class InputError(ValueError):
    """A file or a setting given by the user cannot be used.

    The message is one line: `FILE_OR_SETTING: found X, expected Y`, or `--SETTING VALUE: must be ...`.
    """


def one_line(error: BaseException | str, limit: int = 300) -> str:
    """Return a library's error message as one line of at most `limit` characters, for the end of an InputError."""
    if isinstance(error, MemoryError):
        return "not enough memory"
    return " ".join(str(error).split())[:limit] or type(error).__name__
