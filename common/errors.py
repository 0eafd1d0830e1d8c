"""The one error of bad input, which every program reports as one line."""


class InputError(ValueError):
    """What the user gave cannot be used. The message: the file or setting, what was found, what is allowed."""
