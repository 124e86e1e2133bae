"""The errors that users see: one line that says what was given, what was expected and what to do.

The command line prints only this line. Its exit code is 2 for `UserError` (the input must be changed) and 1 for
`RunError` (the input is valid).
"""

import reprlib
from collections.abc import Iterable

MAX_MESSAGE = 950  # characters; with the words before it, an error stays below 1,000
_SHOWN = 80  # characters of a user's value in a message


class UserError(ValueError):
    """An input (config, file, tensor, name) cannot be used. Nothing was changed on disk."""


class ConfigError(UserError):
    """A config file or an override is wrong. The message names the field.

    Attributes:
        excerpt: The line that is not valid YAML, and below it a caret at the place. Empty for other errors. It is no
            part of the message, which is one line.
    """

    def __init__(self, message: str, excerpt: str = "") -> None:
        super().__init__(message)
        self.excerpt = excerpt


class VideoError(UserError):
    """A video, or the requested frames of it, cannot be read. The message names the file."""


class CheckpointError(UserError):
    """A checkpoint or a weights file is damaged, of an unknown format, or of another architecture."""


class RunError(RuntimeError):
    """A run had to stop although its input is valid: the loss is not finite, a disk is full, a rank died."""


class _Repr(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = _SHOWN
        self.maxlevel = 3


_repr = _Repr()


def shown(value: object) -> str:
    """Returns the representation of a value for a message, at most some 80 characters of each part of it.

    Without a limit, a value of a damaged file would fill the screen.
    """
    text = _repr.repr(value)
    return text if len(text) <= 3 * _SHOWN else f"{text[: 3 * _SHOWN]}..."


def plural(number: int, noun: str) -> str:
    """Returns a number with its noun: `1 video`, `2 videos`, `2 classes`."""
    hisses = noun.endswith(("s", "x", "ch", "sh")) and not noun.endswith("epoch")
    ending = "" if number == 1 else "es" if hisses else "s"
    return f"{number} {noun}{ending}"


def few(names: Iterable[object], limit: int = 5, separator: str = ", ") -> str:
    """Returns the first names of a list for a message, and the number of the others: `a, b, c, d, e and 7 more`."""
    texts = list(map(str, names))
    more = len(texts) - limit
    return separator.join(texts[:limit]) + (f" and {more} more" if more > 0 else "")


def one_line(message: object) -> str:
    """Returns a message as one line of printable characters, cut in the middle if it is too long."""
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(str(message).split()))
    if len(text) <= MAX_MESSAGE:
        return text
    half = (MAX_MESSAGE - 5) // 2  # the remedy stands at the end of a message
    return f"{text[:half]} ... {text[-half:]}"
