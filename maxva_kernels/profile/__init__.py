"""The profiler: `python -m maxva_kernels.profile`, or `maxva-profile`.

    __main__.py (options) -> comparison.py (rounds) -> {models.py, contenders.py, verify.py,
    measure.py} -> report.py (table, JSON, plots, verdicts)

`import maxva_kernels` loads none of it; bench/ measures with it.
"""

from collections.abc import Iterable


class InputError(ValueError):
    """What the user has to change, in one line."""


def unknown(what: str, name: str, known: Iterable[str]) -> InputError:
    """The error of a name that is not known, which lists those that are."""
    return InputError(f"{what} {name!r} is not known; there are {', '.join(known)}")
