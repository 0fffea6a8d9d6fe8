"""Types of command-line options."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any


def number(
    kind: type, low: float, high: float = float("inf"), *, open_low: bool = False
) -> Callable[[str], Any]:
    """An argparse type for a number in [low, high], or (low, high] with `open_low`."""

    def convert(text: str) -> Any:
        value = kind(text)
        if not (low < value if open_low else low <= value) or not value <= high:
            bracket = "(" if open_low else "["
            raise argparse.ArgumentTypeError(f"{text} is outside {bracket}{low}, {high}]")
        return value

    convert.__name__ = kind.__name__
    return convert
