"""What can go wrong, as exceptions: each names what came, what was expected and what to do."""

import difflib
from collections.abc import Iterable


class FkdError(Exception):
    """Work that failed or a check that did not hold; the command line ends with `exit_status` and no traceback."""

    exit_status = 1


class RequestError(FkdError):
    """A request that cannot be right: a missing folder, a wrong option, an output that belongs to another config."""

    exit_status = 2


class ImageError(FkdError):
    """An image whose bytes are damaged, changed or not an image; the message names it. `--on_unreadable skip` skips it."""


class ImageAccessError(FkdError):
    """An image that cannot be opened (missing, no permission, a failing disk): it may be sound, so it is never skipped."""


class StoreError(FkdError):
    """A store that is missing, incomplete, foreign, newer, altered, or made from other images."""


class StoreAccessError(StoreError):
    """A part of a store that cannot be opened or listed (no permission, a failing disk): it may be sound."""


class NotFoundError(StoreError, RequestError):
    """A store, a column of a store or label maps that the user named and that do not exist: the request is wrong."""


class CheckpointError(RequestError):
    """A checkpoint of another layout than the one asked for, or one that cannot be read without executing code."""


def did_you_mean(word: str, known: Iterable[str], dashes: str = "") -> str:
    """The end of a message about an unknown word: the nearest known one, or nothing where none is near.

    >>> did_you_mean("feature_k", ["feature_kl", "cosine"])
    '; did you mean feature_kl?'
    """
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {dashes}{near[0]}?" if near else ""
