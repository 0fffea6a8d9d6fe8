"""Where a program computes: its options, and the device that they choose."""

from __future__ import annotations

import argparse
import os

import torch
from errors import UserError
from options import number


def add_options(parser: argparse._ActionsContainer) -> None:
    """Adds `--device` and `--threads`."""
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where")
    parser.add_argument(
        "--threads", type=number(int, 0), default=0, help="CPU threads; 0: torch's choice"
    )


def chosen(name: str, process: int = 0) -> torch.device:
    """The device of this process, on which two runs give the same bits.

    Args:
        name: What `--device` says.
        process: Number of this process among those of the machine.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: cuda was asked for, but torch sees no CUDA device.")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        # Without both, two runs on a GPU differ in the last bits.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        if process >= torch.cuda.device_count():
            raise UserError(
                f"--device: a machine with {torch.cuda.device_count()} CUDA devices cannot take "
                f"{process + 1} processes; give torchrun a lower --nproc-per-node."
            )
        torch.cuda.set_device(process)
    return torch.device(name)
