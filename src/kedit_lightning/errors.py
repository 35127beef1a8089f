"""Errors that a user can act on.

Each is a :class:`KEditError` and a built-in type too, so that both ``except KEditError`` and
``except ValueError`` do what a caller expects.  A message is one sentence that says what is wrong,
where (record, field, layer), and the ways out.
"""

from __future__ import annotations


class KEditError(Exception):
    """Something the user can put right; the command line turns it into one sentence."""

    #: With what the command line ends.
    exit_code: int = 2


class InvalidRequestError(KEditError, ValueError):
    """A request, probe or record holds a value that cannot be used."""


class DataFileError(KEditError, ValueError):
    """A data file is absent, unreadable, or holds records that do not fit its schema."""


class DataFileNotFoundError(DataFileError, FileNotFoundError):
    """A data file is absent, or no file was named where one is needed."""


class MissingNeedsError(KEditError, ValueError):
    """A method needs something of its requests that they do not carry."""


class UnsupportedUseError(KEditError, ValueError):
    """A method, model or protocol was asked for something it does not do."""


class BaseModelNotFoundError(KEditError, OSError):
    """The base model is neither packaged, nor a folder, nor reachable on the hub."""


class BaseModelMismatchError(KEditError, ValueError):
    """A saved edit or checkpoint belongs to another base model."""


class ModuleNotLocatedError(KEditError, LookupError):
    """The structure of the base model has no place of the kind that was asked for."""


class NonFiniteError(KEditError, ArithmeticError):
    """A quantity that would reach the weights is NaN or infinite."""


class StatisticsNotFoundError(KEditError, FileNotFoundError):
    """Key statistics that a closed-form method needs are absent."""


class CacheError(KEditError, OSError):
    """A file of the cache cannot be written."""


class EditFileError(KEditError, ValueError):
    """A saved edit cannot be read."""


class EditOrderError(KEditError, RuntimeError):
    """An edit cannot be applied or rolled back where the stack stands now."""


class LedgerError(KEditError, ValueError):
    """A ledger is damaged, or was asked for what it does not have."""


class FactsNotWrittenError(KEditError, RuntimeError):
    """Facts do not hold under the edits that were to write them."""

    exit_code = 3


class SweepError(KEditError, ValueError):
    """A sweep cannot be begun, continued, or evaluated."""


class StreamStopped(KEditError, RuntimeError):  # noqa: N818 - it ends a run, and not as an error
    """A stream of edits ends with what was written so far.

    Args:
        reason: Why, in a sentence.
        keeps: Whether the edit that was being checked is kept.
    """

    exit_code = 3

    def __init__(self, reason: str, keeps: bool = False) -> None:
        super().__init__(reason)
        self.keeps = keeps


class NotReproducedError(KEditError, RuntimeError):
    """A run that was repeated gave other numbers."""

    exit_code = 3


class FactsNotWrittenWarning(UserWarning):
    """Facts do not hold under the edits, where that is no error."""


class CheckpointError(KEditError, ValueError):
    """A checkpoint of a method is absent, unreadable, or another method's."""


class NothingToFitError(KEditError, RuntimeError):
    """``fit`` was called on a method that learns nothing before its requests."""


class ResumeError(KEditError, ValueError):
    """An output folder cannot be continued with the present settings."""


class OutputFolderError(KEditError, OSError):
    """An output folder is in use, or cannot be written to."""

    @classmethod
    def of(cls, path: object, error: OSError) -> OutputFolderError:
        """The error of a file or folder that could not be written."""
        return cls(
            f"{path} could not be written ({error.strerror or error}); make room or change its "
            "rights"
        )


class TemporaryFileError(KEditError, OSError):
    """What does not fit into memory cannot be written to a temporary file either."""


class MissingExtraError(KEditError, ImportError):
    """An optional dependency is not installed."""


def one_line(error: BaseException) -> str:
    """What an error says, with its notes, in one line.

    Args:
        error: The error.
    """
    return " ".join("; ".join([str(error), *getattr(error, "__notes__", ())]).split())


def article_list(items: list[str], limit: int = 12) -> str:
    """Join names for a message, cutting a long list with a count.

    >>> article_list(["a", "b", "c"], limit=2)
    'a, b and 1 more'
    """
    if len(items) <= limit:
        return ", ".join(items)
    return f"{', '.join(items[:limit])} and {len(items) - limit} more"
