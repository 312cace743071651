"""The exit codes of ``aaconv``, and the error of a wrong command line."""

from __future__ import annotations

OK, WRONG_INPUT, NOT_FINITE, DOES_NOT_FIT, TRIAL_FAILED, STOPPED, INTERRUPTED = 0, 2, 3, 4, 5, 75, 130


class UsageError(ValueError):
    """The command line itself is wrong."""
