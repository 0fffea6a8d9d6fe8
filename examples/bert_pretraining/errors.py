"""Exceptions whose text is meant for the user, and how a program ends on them."""

from __future__ import annotations

import sys
from collections.abc import Callable


class UserError(Exception):
    """Bad input or settings, told in one sentence that names the option to change."""


class DivergedError(UserError):
    """The loss is no number any more."""


def exit_status(work: Callable[[], int | None], interrupted: str) -> int:
    """Does a program's work; tells the user what went wrong.

    Args:
        work: Returns the exit status, None for 0.
        interrupted: What to say after Ctrl-C.
    """
    try:
        return work() or 0
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
