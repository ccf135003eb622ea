"""The exceptions of sparselab: each states what happened, where, and what to do about it.

Wrong arguments raise the built-in `ValueError` or `TypeError`. The classes here are for trouble that only shows once
work has begun, or that lies in files and models rather than in a call.
"""

from collections.abc import Iterator
from contextlib import contextmanager


class SparselabError(Exception):
    """Base of every error that sparselab raises itself, apart from ValueError and TypeError."""


@contextmanager
def naming(layer: str) -> Iterator[None]:
    """What goes wrong inside is said of this layer."""
    try:
        yield
    except (SparselabError, ValueError) as error:
        raise type(error)(f"{layer}: {error}") from error


class SingularHessianError(SparselabError):
    """A Hessian is not positive definite even after damping; nothing is put in its place."""


class NonFiniteError(SparselabError):
    """A weight, an input or a loss is NaN or infinite."""


class ModelLoadError(SparselabError):
    """A model folder or hub id cannot be opened as a causal language model."""


class UnsupportedModelError(SparselabError):
    """The model has no list of decoder blocks with linear layers that sparselab can find."""


class NotEnoughMemoryError(SparselabError):
    """The work would not fit into memory."""


class LostRankError(SparselabError):
    """Another of the processes that share the work has ended."""


class OutputError(SparselabError):
    """An output folder is in use, holds something already, or cannot be written."""


class ReplayError(SparselabError):
    """Work that was done again came to other numbers, or would have started from other things."""


class LostWorkerError(SparselabError):
    """Processes that do the runs of a sweep have ended again and again."""
