"""Checkpoint files: atomic, self-verifying, the last few kept; what is in them it only numbers.

The name of a file carries 64 bits of the SHA-256 of its bytes, so that one rename publishes both.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Any

import files
import torch
from errors import UserError

# Of what pretrain.py saves; another one is refused.
FORMAT = 4
_NAME = re.compile(r"checkpoint-(\d{8})-([0-9a-f]{16})\.pt")
TEMPORARY = "checkpoint.tmp"


def save(directory: Path, step: int, state: dict[str, Any], keep: int = 2) -> Path:
    """Writes `state` and removes all but the newest `keep` checkpoints.

    The bytes reach the disk under a temporary name first: whenever the process or the machine
    stops, the checkpoints before this one are intact.
    """
    temporary = directory / TEMPORARY
    files.write_synced(temporary, lambda file: torch.save({"format": FORMAT, **state}, file))
    path = directory / f"checkpoint-{step:08d}-{_digest(temporary)}.pt"
    files.publish(temporary, path)
    others = [other for other in checkpoints(directory) if other != path]
    same_step = [other for other in others if _step(other) == step]
    earlier = [other for other in others if _step(other) != step]
    for old in same_step + earlier[keep - 1 :]:
        old.unlink()
    return path


def checkpoints(directory: Path) -> list[Path]:
    """Checkpoint files, newest first, whether sound or not."""
    found = [path for path in directory.glob("checkpoint-*.pt") if _NAME.fullmatch(path.name)]
    return sorted(found, reverse=True)


def load_latest(directory: Path) -> tuple[dict[str, Any], Path, list[Path]]:
    """Loads the newest sound checkpoint.

    A damaged one is renamed to `*.damaged`, so that it neither counts as kept nor is lost.

    Returns:
        The state with all tensors on the CPU, its file, and the damaged files it passed over.
    """
    damaged = []
    for path in checkpoints(directory):
        if _is_sound(path):
            return _load(path, "--resume"), path, damaged
        aside = path.with_suffix(".pt.damaged")
        os.replace(path, aside)
        damaged.append(aside)
    found = f"only damaged checkpoints ({len(damaged)})" if damaged else "no checkpoint"
    raise UserError(f"--resume: {found} in {directory}; start without --resume.")


def newest_sound(directory: Path, option: str) -> tuple[dict[str, Any], Path]:
    """The newest sound checkpoint of a run that is only read: nothing is renamed."""
    for path in checkpoints(directory):
        if _is_sound(path):
            return _load(path, option), path
    raise UserError(f"{option}: no sound checkpoint in {directory}.")


def _is_sound(path: Path) -> bool:
    return _digest(path) == _NAME.fullmatch(path.name).group(2)


def _load(path: Path, option: str) -> dict[str, Any]:
    state = torch.load(path, map_location="cpu", weights_only=True)
    if state.pop("format", None) != FORMAT:
        raise UserError(f"{option}: {path} was written by another version of this example.")
    return state


def _step(path: Path) -> int:
    return int(_NAME.fullmatch(path.name).group(1))


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:16]
