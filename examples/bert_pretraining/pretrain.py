"""Pretrains BERT with MAdam, LaMAdam, LAMB or AdamW; the command line and the training loop.

python examples/bert_pretraining/pretrain.py --help
torchrun --nproc-per-node 2 examples/bert_pretraining/pretrain.py --parallel ddp
"""

from __future__ import annotations

import dataclasses
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any

import checkpoint
import devices
import files
import numpy as np
import recipes
import report
import texts
import torch
from data import IGNORED_LABEL, PretrainingExamples
from errors import DivergedError, UserError, exit_status
from loader import Loader
from model import PretrainingLosses, decay_groups
from optimizers import build_optimizer, schedule, telemetry
from parallel import Ranks, exchanging_gradients, full_state, load_full_state, wrap
from progress import Progress
from settings import parse_settings, resumed_settings, saved_settings, validate
from transformers import BertForPreTraining

# Held-out pairs and masks do not depend on --seed, so that runs compare.
EVAL_SEED = 0
PLOT, METRICS, TOKENIZER, TENSORBOARD = "loss.png", "metrics.json", "tokenizer.json", "tensorboard"
TELEMETRY_PLOT = "telemetry.png"
DIVERGED = 3  # exit status
_GPU_DATA_WORKERS = 4
# The parts of a checkpoint that process 0 alone holds whole.
_TENSORS = ("model", "optimizer")


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

    def __init__(
        self,
        ranks: Ranks,
        settings: dict[str, Any],
        state: dict[str, Any] | None,
        tensors: dict[str, Any],
    ) -> None:
        """Builds the run.

        Args:
            ranks: The processes; all of them build it.
            settings: All settings, the same in all processes.
            state: Checkpoint to go on from, less its tensors, or None.
            tensors: Its tensors in process 0, empty elsewhere.
        """
        self.ranks = ranks
        self.settings = settings
        self.out: Path = settings["out"]
        self.phases = recipes.phases(settings)
        self.step = state["step"] if state else 0
        with ranks.together():
            self.device = devices.chosen(settings["device"], ranks.local)
            self._load_texts(state)
            self.enter_phase()
        ranks.require_same(
            self.texts.fingerprint, "--corpus: not all processes read the same text from it."
        )
        torch.manual_seed(settings["seed"])
        vocab_size = settings["vocab_size"] or self.texts.word_pieces
        config = recipes.shape(settings).config(vocab_size)
        self.model = BertForPreTraining(config).to(self.device)
        blocks = list(self.model.bert.encoder.layer)
        self.losses = wrap(
            PretrainingLosses(self.model).train(), blocks, settings["parallel"], self.device
        )
        self._settle()
        with ranks.together():
            groups = decay_groups(self.model, settings["weight_decay"])
            peak = self.phases[0].lr
            self.optimizer, self.clip_and_step = build_optimizer(groups, settings, peak)
        whole = settings["decay_from"] == "start"
        self.scheduler = schedule(self.optimizer, self.phases, settings["decay_power"], whole)
        self.history: dict[str, list] = {"train": [], "held_out": [], "telemetry": []}
        self.held_out_nsp_accuracy = float("nan")
        self.diverged_at: int | None = None
        self.seconds = {"train": 0.0, "optimizer": 0.0, "data": 0.0}
        if state:
            self._restore(state, tensors)

    def _load_texts(self, state: dict[str, Any] | None) -> None:
        lengths = sorted({phase.sequence_length for phase in self.phases})
        self.texts = texts.load(self.settings, lengths, state["tokenizer"] if state else None)
        if state and state["fingerprint"] != self.texts.fingerprint:
            raise UserError(
                "--resume: the text of --corpus or --shards is not the text that the checkpoint "
                "was made with."
            )
        self.ranks.say(f"corpus: {self.texts.describe()}")

    def enter_phase(self) -> None:
        """Makes the data that of the phase that the next step belongs to."""
        self.phase = next((p for p in self.phases if self.step < p.end), self.phases[-1])
        length, known = self.phase.sequence_length, self.texts.word_pieces
        seed = self.settings["seed"]
        self.examples = PretrainingExamples(
            self.texts.train, length, known, seed, stream=self.phase.number
        )
        held_out_examples = PretrainingExamples(self.texts.held_out, length, known, EVAL_SEED)
        count = min(self.settings["eval_examples"], len(held_out_examples))
        self.held_out = held_out_examples.batch(0, count)
        # Held-out loss of predicting every masked token by its (add-one) training frequency.
        counts = torch.from_numpy(self.texts.counts).double() + 1
        labels = self.held_out["labels"]
        likelihoods = (counts / counts.sum()).log()[labels[labels != IGNORED_LABEL]]
        self.unigram_mlm = -likelihoods.mean().item()
        self.ranks.say(
            f"phase {self.phase.number + 1} of {len(self.phases)}: {self.phase.steps} steps of "
            f"{self.phase.batch_size} examples of {length} tokens, {len(self.examples)} an epoch; "
            f"peak lr {self.phase.lr:.4g}"
        )

    def loader(self) -> Loader:
        """Makes the batches of the phase."""
        count = self.settings["data_workers"]
        if count is None:
            count = _GPU_DATA_WORKERS if self.device.type == "cuda" else 0
        return Loader(self.examples, count)

    def _settle(self) -> None:
        """Makes the first step sum gradients in the order of all the others.

        DDP lays out its buckets anew after the first backward pass, and a resumed run would do so
        at another step than an undisturbed one.
        """
        mlm, nsp, _ = self.losses(self._on_device(self.examples.batch(0, 1)))
        (mlm + nsp).backward()
        self.losses.zero_grad()

    @property
    def made_with(self) -> dict[str, Any]:
        """What the last bits depend on besides the settings that a run keeps."""
        return {
            "device": self.device.type,
            "threads": self.settings["threads"],
            "parallel": self.settings["parallel"],
            "processes": self.ranks.size,
        }

    def state(self) -> dict[str, Any]:
        """All that `_restore` needs: tensors and plain Python values.

        All processes call it; the one of process 0 is the checkpoint.
        """
        model, optimizer = full_state(self.model, self.optimizer)
        return {
            "settings": saved_settings(self.settings),
            "made_with": self.made_with,
            "step": self.step,
            "model": model,
            "optimizer": optimizer,
            "scheduler": self.scheduler.state_dict(),
            "tokenizer": self.texts.tokenizer.to_str(),
            "fingerprint": self.texts.fingerprint,
            "history": self.history,
            "held_out_nsp_accuracy": self.held_out_nsp_accuracy,
            "seconds": self.seconds,
        }

    def _restore(self, state: dict[str, Any], tensors: dict[str, Any]) -> None:
        load_full_state(self.model, self.optimizer, *(tensors[name] for name in _TENSORS))
        self.scheduler.load_state_dict(state["scheduler"])
        self.history = state["history"]
        self.held_out_nsp_accuracy = state["held_out_nsp_accuracy"]
        self.seconds = state["seconds"]
        made_with = state["made_with"]
        if made_with != self.made_with:
            then, now = (_listed(values) for values in (made_with, self.made_with))
            self.ranks.say(
                f"note: the checkpoint was made with {then}, not with {now}; the last bits will "
                "differ",
                file=sys.stderr,
            )

    def save(self) -> Path:
        """Writes a checkpoint; all processes call it."""
        state = self.state()
        return self.ranks.from_first(lambda: checkpoint.save(self.out, self.step, state))

    def _micro_batches(self, batch: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        pieces = {k: t.split(self.phase.micro_batch_size) for k, t in batch.items()}
        count = len(pieces["labels"])
        return [{k: p[i] for k, p in pieces.items()} for i in range(count)]

    def _on_device(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def _seed_dropout(self, first: int) -> None:
        """Makes dropout a function of --seed and the number of a micro-batch's first example.

        So it depends neither on how many processes there are nor on where a run was resumed.
        """
        seeds = np.random.SeedSequence([self.settings["seed"], self.phase.number, first])
        torch.manual_seed(int(seeds.generate_state(1)[0]))

    def _share(self, step: int) -> tuple[int, int]:
        """First example and number of examples of this process in a step of the phase."""
        share = self.phase.batch_size // self.ranks.size
        number = step - self.phase.first_step
        return number * self.phase.batch_size + self.ranks.rank * share, share

    def _micro_losses(
        self, batch: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        reduced = self.settings["precision"] != "float32"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=reduced):
            return self.losses(self._on_device(batch))

    def train_step(self, loader: Loader) -> tuple[float, float, dict[str, float]]:
        """One optimizer step over a batch, by accumulation.

        Returns:
            Loss (MLM + NSP), MLM loss, and seconds: of the step (`train`), and in it of the
            optimizer and of waiting for data.
        """
        start = self._clock()
        size, micro_size = self.phase.batch_size, self.phase.micro_batch_size
        first, share = self._share(self.step)
        batch = loader.batch(first, share)
        got = time.perf_counter()
        if self.step + 1 < self.phase.end:
            loader.expect(*self._share(self.step + 1))
        (masked,) = self.ranks.sums((batch["labels"] != IGNORED_LABEL).sum())
        mlm_total = torch.zeros((), device=self.device)
        nsp_total = torch.zeros((), device=self.device)
        self.optimizer.zero_grad()
        micro_batches = self._micro_batches(batch)
        for index, micro_batch in enumerate(micro_batches):
            self._seed_dropout(first + index * micro_size)
            with exchanging_gradients(self.losses, index == len(micro_batches) - 1):
                mlm, nsp, _ = self._micro_losses(micro_batch)
                # Gradients are averaged over the processes, but the loss is a sum over them.
                ((mlm / masked + nsp / size) * self.ranks.size).backward()
            mlm_total += mlm.detach() / masked
            nsp_total += nsp.detach() / size
        before = self._clock()
        self.clip_and_step()
        end = self._clock()
        self.scheduler.step()
        self.step += 1
        loss, mlm_loss = self.ranks.sums((mlm_total + nsp_total).item(), mlm_total.item())
        seconds = {"train": end - start, "optimizer": end - before, "data": got - start}
        return loss, mlm_loss, seconds

    @torch.no_grad()
    def evaluate(self) -> tuple[float, float]:
        """Held-out MLM loss per masked token and share of correct next-sentence answers."""
        self.losses.eval()
        mlm_sum, correct = 0.0, 0.0
        micro_batches = self._micro_batches(self.held_out)
        for start in range(0, len(micro_batches), self.ranks.size):
            index = start + self.ranks.rank
            # fsdp2 needs every process in every forward pass, even one that has nothing left.
            mlm, _, right = self._micro_losses(micro_batches[min(index, len(micro_batches) - 1)])
            if index < len(micro_batches):
                mlm_sum += mlm.item()
                correct += right.item()
        self.losses.train()
        mlm_sum, correct = self.ranks.sums(mlm_sum, correct)
        masked = int((self.held_out["labels"] != IGNORED_LABEL).sum())
        return mlm_sum / masked, correct / len(self.held_out["labels"])

    def _clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _sequences(self) -> int:
        """Examples trained on so far."""
        done = [max(0, min(self.step, p.end) - p.first_step) * p.batch_size for p in self.phases]
        return sum(done)

    def metrics(self, saved: Path | None) -> dict[str, Any]:
        """The figures of the finished run, or of one that diverged and has no last checkpoint."""
        train, held_out = self.history["train"], self.history["held_out"]
        return {
            "optimizer": self.settings["optimizer"],
            "steps": self.step,
            "phases": [dataclasses.asdict(phase) for phase in self.phases],
            "train_loss_first": train[0][0],
            "train_loss_last": train[-1][0],
            "train_mlm_first": train[0][1],
            "train_mlm_last": train[-1][1],
            "held_out_mlm_start": held_out[0][1],
            "held_out_mlm_end": held_out[-1][1],
            "held_out_nsp_accuracy": self.held_out_nsp_accuracy,
            "unigram_mlm": self.unigram_mlm,
            "sequences_per_second": self._sequences() / self.seconds["train"],
            "optimizer_ms": 1e3 * self.seconds["optimizer"] / self.step,
            "optimizer_share": self.seconds["optimizer"] / self.seconds["train"],
            "data_share": self.seconds["data"] / self.seconds["train"],
            "train_seconds": self.seconds["train"],
            "diverged_at": self.diverged_at,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            **self.made_with,
            "torch": torch.__version__,
            "plot": str(self.out / PLOT),
            "telemetry": str(self.out / TELEMETRY_PLOT) if self.history["telemetry"] else None,
            "metrics": str(self.out / METRICS),
            "checkpoint": str(saved) if saved else None,
            "settings": saved_settings(self.settings),
            "history": self.history,
        }


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def train(run: Run, stop: StopFlag) -> signal.Signals | None:
    """Trains to the last step, or to the end of the step in which a process gets a signal.

    Returns:
        The signal that stopped the run, or None when it is finished.
    """
    steps = run.phases[-1].end
    with Progress(run.out / TENSORBOARD, run.step, steps, run.ranks.first) as progress:
        while run.step < steps:
            begins = run.step == run.phase.first_step
            # A step between two phases is evaluated twice, on the pairs of each.
            wanted = min(2, run.phase.number + 1)
            if begins and [s for s, _ in run.history["held_out"]].count(run.step) < wanted:
                _evaluate(run, progress)
            with run.loader() as loader:
                stopped_by = _train_phase(run, stop, progress, loader)
            if stopped_by:
                return stopped_by
            if run.step < steps:
                run.enter_phase()
    return None


def _train_phase(
    run: Run, stop: StopFlag, progress: Progress, loader: Loader
) -> signal.Signals | None:
    settings, steps = run.settings, run.phases[-1].end
    while run.step < run.phase.end:
        lr = run.scheduler.get_last_lr()[0]
        loss, mlm, seconds = run.train_step(loader)
        told = telemetry(run.optimizer)
        run.history["train"].append([loss, mlm])
        if told:
            run.history["telemetry"].append(told)
        for name in seconds:
            run.seconds[name] += seconds[name]
        if not loss < float("inf"):
            run.diverged_at = run.step
            raise DivergedError(
                f"--lr: the loss is {loss} at step {run.step}; lower the peak of "
                f"{run.phase.lr:.3g}."
            )
        progress.stepped(
            run.step,
            loss,
            mlm,
            lr,
            run.phase.batch_size / seconds["train"],
            1e3 * seconds["optimizer"],
            seconds["data"] / seconds["train"],
            told,
        )
        if run.step % settings["eval_every"] == 0 or run.step == run.phase.end:
            _evaluate(run, progress)
        stopped_by = run.ranks.maximum(stop.signal or 0)
        if run.step < steps and stopped_by:
            return signal.Signals(stopped_by)
        if run.step < steps and run.step % settings["checkpoint_every"] == 0:
            run.save()
    return None


def _evaluate(run: Run, progress: Progress) -> None:
    mlm, run.held_out_nsp_accuracy = run.evaluate()
    run.history["held_out"].append([run.step, mlm])
    progress.evaluated(run.step, mlm, run.held_out_nsp_accuracy)


def _prepare(ranks: Ranks, argv: Sequence[str] | None, held: ExitStack) -> Run:
    tensors: dict[str, Any] = {name: {} for name in _TENSORS}

    def read() -> tuple[dict[str, Any], dict[str, Any] | None]:
        settings, state = _settings_and_state(ranks, argv, held)
        if state:
            tensors.update((name, state.pop(name)) for name in _TENSORS)
        return settings, state

    settings, state = ranks.from_first(read)
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    settings["threads"] = torch.get_num_threads()
    run = Run(ranks, settings, state, tensors)
    if not state:
        ranks.from_first(lambda: _make_folder(run, held))
    return run


def _settings_and_state(
    ranks: Ranks, argv: Sequence[str] | None, held: ExitStack
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    settings, explicit = parse_settings(argv)
    out: Path = settings["out"]
    if out.exists() and not out.is_dir():
        raise UserError(f"--out: {out} is a file, not a folder.")
    state = None
    if settings["resume"]:
        if checkpoint.checkpoints(out):
            held.enter_context(files.owned(out))
        state, path, damaged = checkpoint.load_latest(out)
        for aside in damaged:
            print(f"passed over a damaged checkpoint, now {aside}", file=sys.stderr)
        settings = resumed_settings(settings, explicit, state["settings"])
        print(f"resuming from {path} at step {state['step']}")
    elif not settings["overwrite"] and not files.is_free(out):
        raise UserError(
            f"--out: {out} is not empty; give --resume to go on with the run in it, --overwrite "
            "to delete that run, or another folder."
        )
    validate(settings, ranks.size, ranks.launched)
    return settings, state


def _make_folder(run: Run, held: ExitStack) -> None:
    run.out.mkdir(parents=True, exist_ok=True)
    held.enter_context(files.owned(run.out))
    if run.settings["overwrite"]:
        _delete_run(run.out)
    run.texts.tokenizer.save(str(run.out / TOKENIZER))


def _delete_run(out: Path) -> None:
    """Deletes what a run writes, nothing else."""
    names = [PLOT, TELEMETRY_PLOT, METRICS, TOKENIZER, checkpoint.TEMPORARY]
    patterns = ("checkpoint*.pt", "checkpoint*.pt.damaged", f"{files.TEMPORARY}*")
    found = [path for pattern in patterns for path in out.glob(pattern)]
    for path in [*(out / name for name in names), *found]:
        path.unlink(missing_ok=True)
    shutil.rmtree(out / TENSORBOARD, ignore_errors=True)


def _report(run: Run, saved: Path, stopped_by: signal.Signals | None) -> None:
    if stopped_by:
        mode, size = run.settings["parallel"], run.ranks.size
        launch = f"torchrun --nproc-per-node {size}" if run.ranks.launched else "python"
        option = f" --parallel {mode}" if run.ranks.launched else ""
        print(
            f"stopped by {stopped_by.name} after step {run.step}, checkpoint written: {saved}\n"
            f"go on with: {launch} {sys.argv[0]}{option} --out {run.out} --resume"
        )
        return
    metrics = run.metrics(saved)
    title = f"BERT {run.settings['config']}, {run.settings['optimizer']}"
    report.plot_losses(run.out / PLOT, run.history, run.unigram_mlm, title)
    if run.history["telemetry"]:
        report.plot_telemetry(run.out / TELEMETRY_PLOT, run.history["telemetry"], title)
    report.write_metrics(run.out / METRICS, metrics)
    print(report.summary(metrics))


def _run(ranks: Ranks, argv: Sequence[str] | None, held: ExitStack) -> int:
    try:
        run = _prepare(ranks, argv, held)
        # A signal that comes to one process late must not end it while the others wait for it.
        with StopFlag() as stop:
            try:
                stopped_by = train(run, stop)
            except DivergedError as error:
                ranks.from_first(lambda: report.write_metrics(run.out / METRICS, run.metrics(None)))
                ranks.say(f"error: {error}", file=sys.stderr)
                return DIVERGED
            saved = run.save()
        ranks.from_first(lambda: _report(run, saved, stopped_by))
    except UserError as error:
        ranks.say(f"error: {error}", file=sys.stderr)
        return 2
    return 128 + stopped_by if stopped_by else 0


def _run_together(argv: Sequence[str] | None) -> int:
    with Ranks() as ranks, ExitStack() as held:
        status = _run(ranks, argv, held)
        # torchrun ends the other processes as soon as one has failed.
        ranks.wait()
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    return exit_status(
        lambda: _run_together(argv), "interrupted; nothing was written after the last checkpoint"
    )


if __name__ == "__main__":
    sys.exit(main())
