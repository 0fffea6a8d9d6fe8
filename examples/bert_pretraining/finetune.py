"""Fine-tunes a pretrained model on a classification set (Sec. 5.3 of the paper, GLUE's form).

python examples/bert_pretraining/finetune.py --checkpoint runs/bert-1 --task-file SST-2/train.tsv \
    --task-dev SST-2/dev.tsv
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import checkpoint
import devices
import numpy as np
import recipes
import report
import task
import torch
from errors import UserError, exit_status
from model import decay_groups
from optimizers import OPTIMIZERS, build_optimizer, warmup_polynomial
from options import number
from task import EncodedRows, Row
from tokenizers import Tokenizer
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from transformers import BertForSequenceClassification

# Peak lr and eps of the paper on GLUE (Fig. 4, App. I): MAdam's lr is Fig. 4's, four times Adam's,
# as Sec. 5.3 says. The paper fine-tunes nothing with LAMB.
_PAPER = {
    "madam": (4e-5, 1e-6),
    "lamadam": (4e-5, 1e-15),
    "adamw": (1e-5, 1e-6),
    "lamb": (None, None),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Fine-tunes a pretrained model on a classification set.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    count = number(int, 1)
    positive = number(float, 0.0, open_low=True)
    parser.add_argument(
        "--checkpoint", type=Path, required=True, metavar="RUN", help="folder of a pretrain.py run"
    )
    parser.add_argument(
        "--task-file", type=Path, required=True, metavar="TSV", help="training rows"
    )
    exclusive = parser.add_mutually_exclusive_group()
    exclusive.add_argument(
        "--task-dev", type=Path, metavar="TSV", help="rows to test on; None: a share of the others"
    )
    exclusive.add_argument(
        "--dev-share", type=number(float, 0.0, 0.9), default=0.1, help="without --task-dev"
    )
    parser.add_argument(
        "--text-columns",
        nargs="+",
        default=[],
        metavar="NAME",
        help="one or two columns; numbers from 1 on say that there is no header; without it, the "
        "names that GLUE uses",
    )
    parser.add_argument("--label-column", metavar="NAME", help="the same for the label")
    parser.add_argument(
        "--damaged-rows",
        choices=("error", "skip"),
        default="error",
        help="rows with more or fewer columns than the first line: refuse the file, or leave them "
        "out",
    )
    parser.add_argument("--out", type=Path, help="write metrics.json into this folder")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the metrics.json in --out"
    )
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="madam", help="optimizer")
    parser.add_argument(
        "--lr", type=positive, help="peak lr; None: the paper's, which has none for lamb"
    )
    parser.add_argument(
        "--eps", type=number(float, 0.0), help="added to the root of v; None: the paper's"
    )
    parser.add_argument(
        "--betas",
        nargs=2,
        type=number(float, 0.0, 1.0),
        default=[0.9, 0.98],
        metavar=("ALPHA", "BETA"),
        help="as in pretrain.py; the paper's for GLUE",
    )
    parser.add_argument(
        "--beta-min", type=number(float, 0.0, 1.0, open_low=True), default=0.5, help="of MaxVA"
    )
    parser.add_argument("--weight-decay", type=number(float, 0.0), default=0.1, help="decoupled")
    parser.add_argument("--max-grad-norm", type=positive, default=1.0, help="clips gradients")
    parser.add_argument("--warmup", type=number(float, 0.0, 0.9), default=0.06, help="share")
    parser.add_argument("--epochs", type=count, default=3, help="passes over the training rows")
    parser.add_argument("--batch-size", type=count, default=32, help="rows per step")
    parser.add_argument(
        "--sequence-length", type=number(int, 8), default=128, help="longer rows are cut"
    )
    parser.add_argument(
        "--seeds", type=count, default=1, help="runs, with other heads, orders and dropout"
    )
    devices.add_options(parser)
    return parser


def _complete(options: argparse.Namespace) -> None:
    """Puts the paper's lr and eps where none were given."""
    lr, eps = _PAPER[options.optimizer]
    if options.lr is None:
        if lr is None:
            raise UserError(
                f"--lr: the paper fine-tunes nothing with {options.optimizer}; give an lr."
            )
        options.lr = lr
    if options.eps is None:
        options.eps = eps


def _read(path: Path, option: str, options: argparse.Namespace) -> list[Row]:
    rows, left_out = task.read_rows(
        path, option, options.text_columns, options.label_column, options.damaged_rows
    )
    if left_out:
        print(
            f"left out {left_out} of {left_out + len(rows)} rows of {path}: damaged",
            file=sys.stderr,
        )
    return rows


def _rows(options: argparse.Namespace) -> tuple[list[Row], list[Row], list[str]]:
    """Training rows, rows to test on, labels."""
    if len(options.text_columns) > 2:
        raise UserError("--text-columns: a row has one text or two.")
    rows = _read(options.task_file, "--task-file", options)
    if options.task_dev:
        train, dev = rows, _read(options.task_dev, "--task-dev", options)
    else:
        train, dev = task.split(rows, options.dev_share)
    labels = sorted({row.label for row in train})
    if not 1 < len(labels) <= max(2, len(train) // 2):
        raise UserError(
            f"--task-file: {options.task_file} has {len(labels)} labels in {len(train)} training "
            "rows; a classification set has at least two, each of several rows."
        )
    unknown = sorted({row.label for row in dev} - set(labels))
    if unknown:
        raise UserError(
            f"--task-dev: labels that the training rows have not: {', '.join(unknown[:5])}."
        )
    if not dev:
        raise UserError("--dev-share: no row is left to test on; raise it or give --task-dev.")
    return train, dev, labels


def _model(
    state: dict[str, Any], labels: int, sequence_length: int, seed: int
) -> BertForSequenceClassification:
    """The pretrained encoder with a new head."""
    shape = recipes.shape(state["settings"])
    if sequence_length > shape.positions:
        raise UserError(
            f"--sequence-length: {sequence_length} is more than the {shape.positions} positions of "
            "the model."
        )
    embedding = state["model"]["bert.embeddings.word_embeddings.weight"]
    config = shape.config(len(embedding))
    config.num_labels = labels
    torch.manual_seed(seed)
    model = BertForSequenceClassification(config)
    encoder = {name: t for name, t in state["model"].items() if name.startswith("bert.")}
    missing, unexpected = model.load_state_dict(encoder, strict=False)
    assert not unexpected
    assert all(name.startswith("classifier.") for name in missing)
    return model


def _fine_tune(
    model: BertForSequenceClassification,
    train: EncodedRows,
    options: argparse.Namespace,
    seed: int,
    bar: tqdm,
) -> list[float]:
    """Trains `model`; the loss of every step."""
    device = next(model.parameters()).device
    groups = decay_groups(model, options.weight_decay)
    settings = {**vars(options), "state_dtype": "float32"}
    optimizer, clip_and_step = build_optimizer(groups, settings, options.lr)
    per_epoch = -(-len(train) // options.batch_size)
    factor = warmup_polynomial(options.epochs * per_epoch, options.warmup, 1.0, whole=False)
    scheduler = LambdaLR(optimizer, factor)
    losses = []
    model.train()
    for epoch in range(options.epochs):
        order = np.random.default_rng([seed, epoch]).permutation(len(train))
        for indices in np.array_split(order, per_epoch):
            batch = {name: t.to(device) for name, t in train.batch(indices).items()}
            optimizer.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            clip_and_step()
            scheduler.step()
            losses.append(loss.item())
            if not losses[-1] < float("inf"):
                raise UserError(f"--lr: the loss is {losses[-1]}; lower {options.lr:g}.")
            bar.set_postfix_str(f"loss {losses[-1]:.3f}", refresh=False)
            bar.update()
    return losses


@torch.no_grad()
def _predict(
    model: BertForSequenceClassification, rows: EncodedRows, batch_size: int
) -> np.ndarray:
    device = next(model.parameters()).device
    model.eval()
    answers = []
    for first in range(0, len(rows), batch_size):
        batch = rows.batch(range(first, min(first + batch_size, len(rows))))
        batch.pop("labels")
        logits = model(**{name: t.to(device) for name, t in batch.items()}).logits
        answers.append(logits.argmax(-1).cpu().numpy())
    return np.concatenate(answers)


def scores(answers: np.ndarray, truth: np.ndarray, labels: int) -> dict[str, float]:
    """Accuracy, and with two labels F1 of the second one and Matthews' correlation."""
    found = {"accuracy": float((answers == truth).mean())}
    if labels == 2:
        tp, tn = (int(((answers == k) & (truth == k)).sum()) for k in (1, 0))
        fp, fn = (int(((answers == k) & (truth == 1 - k)).sum()) for k in (1, 0))
        found["f1"] = 2 * tp / (2 * tp + fp + fn) if tp else 0.0
        product = float((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
        found["matthews"] = (tp * tn - fp * fn) / product**0.5 if product else 0.0
    return found


def _run(options: argparse.Namespace) -> str:
    _complete(options)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = devices.chosen(options.device)
    metrics_file = options.out and options.out / "metrics.json"
    if metrics_file and metrics_file.exists() and not options.overwrite:
        raise UserError(f"--out: {metrics_file} exists; give --overwrite or another folder.")
    train_rows, dev_rows, labels = _rows(options)
    if not options.checkpoint.is_dir():
        raise UserError(f"--checkpoint: {options.checkpoint} is no folder of a pretrain.py run.")
    state, path = checkpoint.newest_sound(options.checkpoint, "--checkpoint")
    tokenizer = Tokenizer.from_str(state["tokenizer"])
    train, dev = (
        EncodedRows(rows, labels, tokenizer, options.sequence_length)
        for rows in (train_rows, dev_rows)
    )
    steps = options.epochs * -(-len(train) // options.batch_size)
    runs = []
    started = time.perf_counter()
    with tqdm(total=options.seeds * steps, unit="step", dynamic_ncols=True) as bar:
        for seed in range(options.seeds):
            model = _model(state, len(labels), options.sequence_length, seed).to(device)
            losses = _fine_tune(model, train, options, seed, bar)
            answers = _predict(model, dev, options.batch_size)
            runs.append({"losses": losses, **scores(answers, dev.answers, len(labels))})
    (_, most), *_ = Counter(dev.answers.tolist()).most_common(1)
    metrics = {
        "checkpoint": str(path),
        "pretraining_step": state["step"],
        "labels": labels,
        "train_rows": len(train),
        "dev_rows": len(dev),
        "majority": most / len(dev),
        "seconds": time.perf_counter() - started,
        "options": {name: str(value) for name, value in vars(options).items()},
        "runs": runs,
    }
    if metrics_file:
        options.out.mkdir(parents=True, exist_ok=True)
        report.write_metrics(metrics_file, metrics)
    return _summary(metrics)


def _summary(metrics: dict[str, Any]) -> str:
    runs = metrics["runs"]
    names = [name for name in ("accuracy", "f1", "matthews") if name in runs[0]]
    lines = [
        f"{metrics['train_rows']} training rows, {metrics['dev_rows']} to test on, "
        f"{len(metrics['labels'])} labels, {metrics['seconds']:.0f} s",
        f"{'most frequent label:':<21}{metrics['majority']:.2%}",
    ]
    for name in names:
        values = [run[name] for run in runs]
        spread = (
            f" (median of {len(values)}, standard deviation {statistics.stdev(values):.2%})"
            if len(values) > 1
            else ""
        )
        lines.append(f"{name + ':':<21}{statistics.median(values):.2%}{spread}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = _parser().parse_args(argv)
    return exit_status(lambda: print(_run(options)), "interrupted")


if __name__ == "__main__":
    sys.exit(main())
