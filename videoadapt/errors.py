"""The errors that users see: one line that says what was given, what was expected and what to do.

The command line prints only this line. Its exit code is 2 for `UserError` (the input must be changed) and 1 for
`RunError` (the input is valid).
"""


class UserError(ValueError):
    """An input (config, file, tensor, name) cannot be used. Nothing was changed on disk."""


class ConfigError(UserError):
    """A config file or an override is wrong. The message names the field."""


class VideoError(UserError):
    """A video, or the requested frames of it, cannot be read. The message names the file."""


class CheckpointError(UserError):
    """A checkpoint or a weights file is damaged, of an unknown format, or of another architecture."""


class RunError(RuntimeError):
    """A run had to stop although its input is valid: the loss is not finite, a disk is full, a rank died."""
