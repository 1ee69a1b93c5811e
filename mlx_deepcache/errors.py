"""The errors that a user can cause or mend; the command line prints each as one line."""

from __future__ import annotations


class UsageError(ValueError):
    """A setting that cannot work, whatever the files hold (exit code 2)."""


class UnknownOption(UsageError, TypeError):
    """A keyword that no option has."""


class Failure(RuntimeError):
    """Something that could not be done (exit code 1)."""


class CheckpointError(Failure):
    """A file or folder that is missing, damaged or not what it should be."""
