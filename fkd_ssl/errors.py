"""The exceptions of this library. Each message says what was found, what was expected and what to do."""

import difflib
from collections.abc import Iterable


class FkdError(Exception):
    """The work or a check failed. The command line prints the message without a traceback and exits with `exit_status`."""

    exit_status = 1


class RequestError(FkdError):
    """The request is invalid: a missing folder, a wrong option, or an output that belongs to another config."""

    exit_status = 2


class ImageError(FkdError):
    """An image is damaged or changed, or is not an image. The message names it. `--on_unreadable skip` skips it."""


class ImageAccessError(FkdError):
    """An image cannot be opened (missing, no permission, a failing disk). It may be intact, so it is never skipped."""


class StoreError(FkdError):
    """A store is missing, incomplete, altered, of an unknown or newer format, or made from other images."""


class StoreAccessError(StoreError):
    """A part of a store cannot be opened or listed (no permission, a failing disk). It may be intact."""


class FetchError(StoreAccessError, ImageAccessError):
    """A file on a server cannot be fetched: not found, no permission, no connection, or it changed. It may be intact."""


class NotFoundError(StoreError, RequestError):
    """The store, the column or the label maps that the user named do not exist, so the request is wrong."""


class CheckpointError(RequestError):
    """A checkpoint does not have the requested layout, or cannot be read without executing code."""


def did_you_mean(word: str, known: Iterable[str], dashes: str = "") -> str:
    """Returns the end of a message about an unknown word, which names the most similar known word; "" if none is similar.

    >>> did_you_mean("feature_k", ["feature_kl", "cosine"])
    '; did you mean feature_kl?'
    """
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {dashes}{near[0]}?" if near else ""
