"""Runs scenarios on gloo ranks: `python ranks.py WORLD DIRECTORY SHARED MODULE`.

torch is imported once and the ranks are forked. Each writes a JSON file {scenario: "" or its
traceback}; after a failure a rank runs nothing more, as the others may wait for it. MODULE has
scenarios_of(world).
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

#: Seconds: of one collective, and of all scenarios of a world size.
COLLECTIVE, WORLD = 60, 240


def run_world(
    world: int, directory: Path, shared: Path, module: str = "distributed_scenarios"
) -> dict[str, list[str]]:
    """Runs a world in processes of its own; per scenario what each rank has to say."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    process = subprocess.Popen(
        [sys.executable, __file__, str(world), str(directory), str(shared), module],
        env=environment, start_new_session=True, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        _, errors = process.communicate(timeout=WORLD + 30)
    except subprocess.TimeoutExpired:
        errors = "timed out"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    reports = [
        json.loads(path.read_text()) if (path := directory / f"{rank}.json").exists() else {}
        for rank in range(world)
    ]
    names = dict.fromkeys(name for report in reports for name in report)
    missing = f"did not finish; {errors[-2000:]}"
    return {name: [report.get(name, missing) for report in reports] for name in names} | {
        "": [errors[-2000:]]
    }


def _run_rank(rank: int, world: int, directory: Path, shared: Path, module: str) -> None:
    scenarios_of = importlib.import_module(module).scenarios_of
    torch.set_num_threads(1)
    # full_tensor() warns that it takes two collectives on a two-dimensional mesh
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    store = dist.FileStore(str(directory / "store"), world)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=COLLECTIVE)
    )
    report, started = {}, time.monotonic()
    for name, scenario in scenarios_of(world).items():
        try:
            scenario(shared)
            report[name] = ""
        except BaseException:
            report[name] = f"rank {rank}: {traceback.format_exc()}"
        (directory / f"{rank}.json").write_text(json.dumps(report))
        if report[name]:
            break
        if rank == 0 and os.environ.get("MAXVA_RANK_TIMES"):
            print(f"{world} ranks: {time.monotonic() - started:6.2f} s {name}", flush=True)
        started = time.monotonic()


def main() -> None:
    world, directory, shared = int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    scenarios = sys.argv[4]
    # imported once, before the ranks are forked; _dynamo is what DTensor imports when first used
    for module in (scenarios, "torch._dynamo"):
        importlib.import_module(module)

    children = []
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                _run_rank(rank, world, directory, shared, scenarios)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        children.append(pid)
    deadline = time.monotonic() + WORLD
    while children and time.monotonic() < deadline:
        children = [pid for pid in children if os.waitpid(pid, os.WNOHANG) == (0, 0)]
        time.sleep(0.02)
    for pid in children:
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
