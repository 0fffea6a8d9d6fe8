"""Several runs of the pretraining example, one after another, in the processes of one torchrun.

Starting a process takes longer than such a run. The argument is a JSON file with a list of runs:
`argv`; optionally `resume`, a folder and a step whose checkpoint the run goes on from; optionally
`away`, a folder in which process 1 works instead, as if it were on another machine.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import torch.distributed as dist
from bert_runs import example


def main() -> None:
    # A group can be joined only once through torchrun's store.
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    list_of_runs = Path(sys.argv[1])
    for number, run in enumerate(json.loads(list_of_runs.read_text())):
        argv = run["argv"]
        if "resume" in run and rank == 0:
            source, step = run["resume"]
            out = Path(argv[argv.index("--out") + 1])
            out.mkdir()
            (found,) = Path(source).glob(f"checkpoint-{step:08d}-*.pt")
            shutil.copy(found, out)
        os.chdir(run["away"] if rank == 1 and "away" in run else list_of_runs.parent)
        try:
            status = example.pretrain.main(argv)
        except SystemExit as error:
            status = error.code
        if rank == 0:
            print(f"run {number} ended with {status}", flush=True)
    dist.destroy_process_group()


main()
