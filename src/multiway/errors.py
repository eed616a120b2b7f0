"""One tree of errors: each says what failed, where, what was expected, and what to do; each knows its exit code.

Exit codes: 0 done, 2 usage or configuration, 65 bad data over the threshold, 66 input missing, 70 bug, 73 cannot
write, 74 corrupt checkpoint with no valid fallback, 75 pre-empted (start me again), 76 numerics, 77 run directory
locked, 78 resume refused. A supervisor may loop on 75 only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar


class MultiwayError(Exception):
    """Root of every error that is the user's to read; anything else that escapes is a bug (70)."""

    exit_code: ClassVar[int] = 70


class ConfigError(MultiwayError):
    """A setting, a name or a combination of parts that cannot work."""

    exit_code = 2


class DataError(MultiwayError):
    """Data that cannot be used: too many bad records, an unusable source or index."""

    exit_code = 65


class RecordError(DataError):
    """One bad record: ``reason`` is a short code for counting, the message names file and key."""

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[Callable[..., RecordError], tuple[str, str]]:
        """Cross from a loader worker with its reason."""
        return _record_error, (str(self), self.reason)


def _record_error(message: str, reason: str) -> RecordError:
    return RecordError(message, reason=reason)


class ShardError(DataError):
    """A shard or file of records that is damaged as a whole or from some offset on."""


class MissingInputError(MultiwayError):
    """A file or folder that was named and is not there."""

    exit_code = 66


class WriteError(MultiwayError):
    """The disk is full, read-only, or refuses."""

    exit_code = 73


class CheckpointError(MultiwayError):
    """A checkpoint that is incomplete or altered, and no older one that is whole."""

    exit_code = 74


class ConversionError(MultiwayError):
    """A foreign weight file whose keys, shapes or content are not what its family has."""

    exit_code = 65


class Preempted(MultiwayError):
    """Asked to stop by a signal: a checkpoint was saved, start the same command again."""

    exit_code = 75


class NumericsError(MultiwayError):
    """Too many steps with a loss or gradient that is not finite."""

    exit_code = 76


class LockedError(MultiwayError):
    """Another process works in this run directory."""

    exit_code = 77


class ResumeError(MultiwayError):
    """The run cannot be continued under these settings."""

    exit_code = 78
