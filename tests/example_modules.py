"""Importing the modules of an example, which lie in a folder that is no package."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace


def import_example(folder: Path, modules: Iterable[str]) -> SimpleNamespace:
    """Imports `modules` from `folder`; none stays importable for the tests of another example."""
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        return SimpleNamespace(**{name: importlib.import_module(name) for name in modules})
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            file = getattr(sys.modules[name], "__file__", None)
            if file and Path(file).parent == folder:
                del sys.modules[name]
