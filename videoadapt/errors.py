"""The errors that users see: one line each, saying what was given, what was expected and what to do.

The command line prints the line alone: exit code 2 for `UserError` (the input must change), 1 for `RunError`.
"""


class UserError(ValueError):
    """Something that was given (config, file, tensor, name) cannot be used; nothing was changed on disk."""


class ConfigError(UserError):
    """A config file or an override is wrong; the message names the field."""


class VideoError(UserError):
    """A video cannot be read, or not the frames that were asked for; the message names the file."""


class CheckpointError(UserError):
    """A checkpoint or weights file is torn, foreign, or of another architecture."""


class RunError(RuntimeError):
    """A run had to stop through no fault of its input: a loss that is not finite, a full disk."""
