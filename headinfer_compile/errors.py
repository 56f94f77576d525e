"""The errors users meet. Each message says what was found, where, and what to do."""

from __future__ import annotations


class HeadInferError(RuntimeError):
    """Base of every error this package raises on its own account."""


class OptionError(HeadInferError, ValueError):
    """An option is unknown, of the wrong type, or out of range."""


class CacheError(HeadInferError, ValueError):
    """A cache was used in a way that its contents do not allow; what it holds is intact."""


class ClosedError(CacheError):
    """The cache was closed and holds nothing any more."""


class DeclinedError(HeadInferError):
    """A pass could not rewrite an attention and ``strict=True`` forbids the fallback."""


class DoesNotFitError(HeadInferError, MemoryError):
    """The request needs more GPU or host memory than there is or than the budget allows."""


class ScheduleError(HeadInferError):
    """A schedule breaks one of the invariants of ``docs/design.md``; it was not run."""


class HostAttentionError(HeadInferError):
    """Attention on the CPU failed; the tokens of the step it belonged to were dropped again."""
