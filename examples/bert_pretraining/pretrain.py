"""Pretrains BERT with MAdam, LaMAdam or AdamW; the command line and the training loop.

python examples/bert_pretraining/pretrain.py --help
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import checkpoint
import report
import torch
from corpus import load_corpus, train_tokenizer
from data import IGNORED_LABEL, PretrainingExamples, tokenize
from errors import UserError
from model import SHAPES, decay_groups, pretraining_losses
from optimizers import build_optimizer, warmup_polynomial
from settings import parse_settings, resumed_settings, saved_settings, validate
from tokenizers import Tokenizer
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import BertForPreTraining

# Held-out pairs and masks do not depend on --seed, so that runs compare.
EVAL_SEED = 0
PLOT, METRICS, TOKENIZER, TENSORBOARD = "loss.png", "metrics.json", "tokenizer.json", "tensorboard"
STATE_FORMAT = 1


class StopFlag:
    """Turns the first SIGTERM or SIGINT into a flag; a second one acts as usual."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopFlag:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        self.__exit__()


class Run:
    """Everything that a training run consists of and that a checkpoint restores."""

    def __init__(self, settings: dict[str, Any], state: dict[str, Any] | None) -> None:
        """Builds the run.

        Args:
            settings: All settings.
            state: Checkpoint to go on from, or None.
        """
        self.settings = settings
        self.out: Path = settings["out"]
        self.device = _device(settings["device"])
        torch.manual_seed(settings["seed"])

        self._load_data(state)
        config = SHAPES[settings["config"]].config(settings["vocab_size"])
        self.model = BertForPreTraining(config).to(self.device).train()
        groups = decay_groups(self.model, settings["weight_decay"])
        self.optimizer, self.clip_and_step = build_optimizer(groups, settings)
        self.scheduler = warmup_polynomial(
            self.optimizer, settings["steps"], settings["warmup"], settings["decay_power"]
        )
        self.step = 0
        self.history: dict[str, list] = {"train": [], "held_out": []}
        self.held_out_nsp_accuracy = float("nan")
        self.seconds = {"train": 0.0, "optimizer": 0.0}
        if state:
            self._restore(state)

    def _load_data(self, state: dict[str, Any] | None) -> None:
        settings = self.settings
        length = settings["sequence_length"]
        train, held_out = load_corpus(settings["corpus"], settings["held_out_share"])
        self.tokenizer = (
            Tokenizer.from_str(state["tokenizer"])
            if state
            else train_tokenizer(train, settings["vocab_size"])
        )
        known = self.tokenizer.get_vocab_size()
        # A pair always has room for one whole sentence on either side.
        stores = [tokenize(part, self.tokenizer, (length - 3) // 2) for part in (train, held_out)]
        self.fingerprint = [store.fingerprint() for store in stores]
        if state and state["fingerprint"] != self.fingerprint:
            raise UserError(
                "--resume: the text of --corpus is not the text that the checkpoint was made with."
            )
        self.examples = PretrainingExamples(stores[0], length, known, settings["seed"])
        held_out_examples = PretrainingExamples(stores[1], length, known, EVAL_SEED)
        count = min(settings["eval_examples"], len(held_out_examples))
        self.held_out = held_out_examples.batch(0, count)
        self.unigram_mlm = self._unigram_loss(stores[0].tokens)
        print(
            f"corpus: {len(train)} training and {len(held_out)} held-out documents, "
            f"{len(stores[0].tokens):,} and {len(stores[1].tokens):,} tokens, "
            f"{known} word pieces; {len(self.examples)} examples an epoch"
        )

    def _unigram_loss(self, tokens: Any) -> float:
        """Held-out loss of predicting every masked token by its (add-one) training frequency."""
        vocab = self.settings["vocab_size"]
        counts = torch.bincount(torch.from_numpy(tokens).long(), minlength=vocab).double() + 1
        labels = self.held_out["labels"]
        return -(counts / counts.sum()).log()[labels[labels != IGNORED_LABEL]].mean().item()

    def state(self) -> dict[str, Any]:
        """All that `_restore` needs: tensors and plain Python values."""
        return {
            "format": STATE_FORMAT,
            "settings": saved_settings(self.settings),
            "device": self.device.type,
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "cpu_rng": torch.get_rng_state(),
            "cuda_rng": [torch.cuda.get_rng_state()] if self.device.type == "cuda" else [],
            "tokenizer": self.tokenizer.to_str(),
            "fingerprint": self.fingerprint,
            "history": self.history,
            "held_out_nsp_accuracy": self.held_out_nsp_accuracy,
            "seconds": self.seconds,
        }

    def _restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.step = state["step"]
        self.history = state["history"]
        self.held_out_nsp_accuracy = state["held_out_nsp_accuracy"]
        self.seconds = state["seconds"]
        torch.set_rng_state(state["cpu_rng"])
        if state["cuda_rng"] and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"][0])

    def save(self) -> Path:
        """Writes a checkpoint."""
        return checkpoint.save(self.out, self.step, self.state())

    def _micro_batches(self, batch: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        pieces = {k: t.split(self.settings["micro_batch_size"]) for k, t in batch.items()}
        count = len(pieces["labels"])
        return [{k: p[i].to(self.device) for k, p in pieces.items()} for i in range(count)]

    def train_step(self) -> tuple[float, float, float, float]:
        """One optimizer step over a batch, by accumulation.

        Returns:
            Loss (MLM + NSP), MLM loss, seconds of the step, seconds of the optimizer in it.
        """
        start = self._clock()
        size = self.settings["batch_size"]
        batch = self.examples.batch(self.step * size, size)
        masked = int((batch["labels"] != IGNORED_LABEL).sum())
        mlm_total = torch.zeros((), device=self.device)
        nsp_total = torch.zeros((), device=self.device)
        self.optimizer.zero_grad()
        for micro_batch in self._micro_batches(batch):
            mlm, nsp, _ = pretraining_losses(self.model, micro_batch)
            (mlm / masked + nsp / size).backward()
            mlm_total += mlm.detach() / masked
            nsp_total += nsp.detach() / size
        before = self._clock()
        self.clip_and_step()
        end = self._clock()
        self.scheduler.step()
        self.step += 1
        return (mlm_total + nsp_total).item(), mlm_total.item(), end - start, end - before

    @torch.no_grad()
    def evaluate(self) -> tuple[float, float]:
        """Held-out MLM loss per masked token and share of correct next-sentence answers."""
        self.model.eval()
        mlm_sum, correct = 0.0, 0
        for micro_batch in self._micro_batches(self.held_out):
            mlm, _, right = pretraining_losses(self.model, micro_batch)
            mlm_sum += mlm.item()
            correct += int(right)
        self.model.train()
        masked = int((self.held_out["labels"] != IGNORED_LABEL).sum())
        return mlm_sum / masked, correct / len(self.held_out["labels"])

    def _clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def metrics(self, saved: Path) -> dict[str, Any]:
        """The figures of the finished run."""
        train, held_out = self.history["train"], self.history["held_out"]
        return {
            "optimizer": self.settings["optimizer"],
            "steps": self.step,
            "batch_size": self.settings["batch_size"],
            "train_loss_first": train[0][0],
            "train_loss_last": train[-1][0],
            "train_mlm_first": train[0][1],
            "train_mlm_last": train[-1][1],
            "held_out_mlm_start": held_out[0][1],
            "held_out_mlm_end": held_out[-1][1],
            "held_out_nsp_accuracy": self.held_out_nsp_accuracy,
            "unigram_mlm": self.unigram_mlm,
            "sequences_per_second": self.step * self.settings["batch_size"] / self.seconds["train"],
            "optimizer_ms": 1e3 * self.seconds["optimizer"] / self.step,
            "optimizer_share": self.seconds["optimizer"] / self.seconds["train"],
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "device": self.device.type,
            "torch": torch.__version__,
            "plot": str(self.out / PLOT),
            "metrics": str(self.out / METRICS),
            "checkpoint": str(saved),
            "settings": saved_settings(self.settings),
            "history": self.history,
        }


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: cuda was asked for, but torch sees no CUDA device.")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        # Without both, two runs on a GPU differ in the last bits.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    return torch.device(name)


def train(run: Run) -> signal.Signals | None:
    """Trains to the last step, or to the step in which SIGTERM or SIGINT comes.

    Returns:
        The signal that stopped the run, or None when it is finished.
    """
    settings, steps = run.settings, run.settings["steps"]
    # Entries after the checkpoint belong to steps that are about to be repeated.
    purge = run.step + 1 if run.step else None
    log = SummaryWriter(str(run.out / TENSORBOARD), purge_step=purge)
    quiet = 0.1 if sys.stderr.isatty() else 10.0
    bar = tqdm(total=steps, initial=run.step, unit="step", mininterval=quiet, dynamic_ncols=True)

    def evaluate() -> None:
        mlm, run.held_out_nsp_accuracy = run.evaluate()
        run.history["held_out"].append([run.step, mlm])
        log.add_scalar("loss/held_out_mlm", mlm, run.step)
        log.add_scalar("accuracy/held_out_nsp", run.held_out_nsp_accuracy, run.step)
        bar.write(f"step {run.step:>6}: held-out MLM loss {mlm:.4f}", file=sys.stdout)

    with StopFlag() as stop, log, bar:
        if not run.history["held_out"]:
            evaluate()
        while run.step < steps and not stop.signal:
            lr = run.scheduler.get_last_lr()[0]
            loss, mlm, seconds, optimizer_seconds = run.train_step()
            if not loss < float("inf"):
                raise UserError(
                    f"--lr: the loss is {loss} at step {run.step}; lower the peak of {lr:.3g}."
                )
            run.seconds["train"] += seconds
            run.seconds["optimizer"] += optimizer_seconds
            run.history["train"].append([loss, mlm])
            speed = settings["batch_size"] / seconds
            scalars = {
                "loss/train": loss,
                "loss/train_mlm": mlm,
                "lr": lr,
                "speed/sequences_per_second": speed,
                "speed/optimizer_ms": 1e3 * optimizer_seconds,
            }
            for name, value in scalars.items():
                log.add_scalar(name, value, run.step)
            bar.set_postfix_str(
                f"loss {loss:.3f}, lr {lr:.2e}, {speed:.0f} seq/s, "
                f"optimizer {1e3 * optimizer_seconds:.1f} ms",
                refresh=False,
            )
            bar.update()
            if run.step % settings["eval_every"] == 0 or run.step == steps:
                evaluate()
            if run.step % settings["checkpoint_every"] == 0 and run.step < steps:
                run.save()
        return stop.signal if run.step < steps else None


def _prepare(argv: Sequence[str] | None) -> Run:
    settings, explicit = parse_settings(argv)
    out: Path = settings["out"]
    if out.exists() and not out.is_dir():
        raise UserError(f"--out: {out} is a file, not a folder.")
    state = None
    if settings["resume"]:
        state, path, damaged = checkpoint.load_latest(out)
        for aside in damaged:
            print(f"passed over a damaged checkpoint, now {aside}", file=sys.stderr)
        if state.get("format") != STATE_FORMAT:
            raise UserError(f"--resume: {path} was written by another version of this example.")
        settings = resumed_settings(settings, explicit, state["settings"])
        print(f"resuming from {path} at step {state['step']}")
    elif not settings["overwrite"] and out.is_dir() and any(out.iterdir()):
        raise UserError(
            f"--out: {out} is not empty; give --resume to go on with the run in it, --overwrite "
            "to delete that run, or another folder."
        )
    validate(settings)
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    settings["threads"] = torch.get_num_threads()
    run = Run(settings, state)
    if state:
        saved = state["settings"]["threads"], state["device"]
        if saved != (settings["threads"], run.device.type):
            print(
                f"note: the checkpoint was made on {saved[1]} with {saved[0]} threads, not on "
                f"{run.device.type} with {settings['threads']}; the last bits will differ",
                file=sys.stderr,
            )
    else:
        if settings["overwrite"]:
            _delete_run(out)
        out.mkdir(parents=True, exist_ok=True)
        run.tokenizer.save(str(out / TOKENIZER))
    return run


def _delete_run(out: Path) -> None:
    """Deletes what a run writes, nothing else."""
    files = [out / name for name in (PLOT, METRICS, TOKENIZER)]
    for path in [*files, *out.glob("checkpoint*.pt"), *out.glob("checkpoint*.pt.damaged")]:
        path.unlink(missing_ok=True)
    shutil.rmtree(out / TENSORBOARD, ignore_errors=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    try:
        run = _prepare(argv)
        stopped_by = train(run)
        saved = run.save()
        if stopped_by:
            print(
                f"stopped by {stopped_by.name} after step {run.step}, checkpoint written: {saved}\n"
                f"go on with: python {sys.argv[0]} --out {run.out} --resume"
            )
            return 128 + stopped_by
        metrics = run.metrics(saved)
        title = f"BERT {run.settings['config']}, {run.settings['optimizer']}"
        report.plot_losses(run.out / PLOT, run.history, run.unigram_mlm, title)
        report.write_metrics(run.out / METRICS, metrics)
        print(report.summary(metrics))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written after the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
