"""Runs tests of a file in a process of their own with TRITON_INTERPRET=1.

Triton decides when a kernel is decorated whether it is compiled or interpreted, so one process
cannot do both. Every marked test still reports its own outcome here.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

ACTIVE = os.environ.get("TRITON_INTERPRET") == "1"


def interpreted(test: Callable[..., Any]) -> Callable[..., Any]:
    """Marks a test that needs the interpreter."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> Any:
        if ACTIVE:
            return test(*args, **kwargs)
        path, _, name = os.environ["PYTEST_CURRENT_TEST"].rpartition(" (")[0].partition("::")
        file = str(Path(__file__).parent / Path(path).name)
        outcomes, output = _outcomes(file)
        if name not in outcomes:
            pytest.fail(f"the interpreted run has no outcome of {name}:\n{output}", pytrace=False)
        kind, text = outcomes[name]
        if kind == "skipped":
            pytest.skip(text)
        if kind != "passed":
            pytest.fail(text, pytrace=False)
        return None

    return run


@functools.cache
def _outcomes(file: str) -> tuple[dict[str, tuple[str, str]], str]:
    """Outcome and text of every test of a file, by name, and the end of the output."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        root = Path(file).parent.parent
        command = [
            sys.executable, "-m", "pytest", file, "-q", "-p", "no:cacheprovider",
            f"--rootdir={root}", "-c", str(root / "pyproject.toml"), f"--junitxml={report}",
        ]  # fmt: skip
        ran = subprocess.run(
            command,
            env={**os.environ, "TRITON_INTERPRET": "1"},
            cwd=folder,  # not the root, where the source tree would hide the installed package
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        outcomes = {}
        if report.exists():
            for case in ElementTree.parse(report).iter("testcase"):
                result = next((c for c in case if c.tag in ("failure", "error", "skipped")), None)
                if result is None:
                    outcomes[case.attrib["name"]] = "passed", ""
                else:
                    text = result.text if result.tag != "skipped" else result.attrib["message"]
                    outcomes[case.attrib["name"]] = result.tag, text or ""
    return outcomes, ran.stdout[-4000:]
