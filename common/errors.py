"""The error that a user can put right. Imports nothing, so that every module may import it."""


class InputError(ValueError):
    """A file or a setting that the user gave cannot be used.

    The message is one line: `FILE_OR_SETTING: found X, expected Y`, or `--SETTING VALUE: must be ...`.
    """


def one_line(error: BaseException, limit: int = 300) -> str:
    """Return the message of an exception of a library as one line of at most `limit` characters, to end one of ours."""
    return " ".join(str(error).split())[:limit] or type(error).__name__
