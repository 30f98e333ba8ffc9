"""What can go wrong with a build, each with the exit code of the command."""

from __future__ import annotations


class BuildError(Exception):
    """A build that did not end with everything built and verified; the message is one line."""

    code = 1

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class ConfigError(BuildError):
    """A configuration, or a file it names, that cannot be used."""

    code = 2


class NotCaptured(BuildError):
    """A model that does not become one graph."""

    code = 3


class Violated(BuildError):
    """A result that is not what its contracts promise."""

    code = 4


class OverBudget(BuildError):
    """A result that is right, and larger, slower to build or less exact than the configuration allows."""

    code = 5


class Unlocked(BuildError):
    """Versions, sources or artifacts that are not those of the lock file."""

    code = 6


class NotWritten(BuildError):
    """A result that could not be written: a full disk, a folder that is read-only."""

    code = 7


CODES = {
    0: "built and verified",
    1: "anything unexpected",
    **{
        one.code: (one.__doc__ or "").rstrip(".").partition(":")[0]
        for one in (ConfigError, NotCaptured, Violated, OverBudget, Unlocked, NotWritten)
    },
}
