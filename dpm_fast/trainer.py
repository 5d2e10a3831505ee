"""Training: the loop, with averaged weights, resumption, and data parallelism under torchrun."""

import copy
import functools
import math
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

from dpm_fast import checkpoint, noise
from dpm_fast.checkpoint import Checkpoint, CheckpointError
from dpm_fast.config import TrainConfig
from dpm_fast.metrics import MetricsFile
from dpm_fast.parallel import Ranks, ranks

if TYPE_CHECKING:
    from dpm_fast.data import Data, DataSpec
    from dpm_fast.model import DiffusionModel

# Steps between two questions whether any rank wants to stop; each is a message among all ranks.
_STEPS_BETWEEN_STOP_CHECKS = 10


class NonFiniteGradientError(RuntimeError):
    """A gradient was not finite and the run's policy is to raise."""


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM ended training; a checkpoint was saved first where there is a directory."""

    def __init__(self, signal_number: int, step: int, saved: Path | None):
        name = signal.Signals(signal_number).name
        super().__init__(
            f"stopped by {name} after step {step}; "
            + (f"checkpoint saved in {saved}" if saved else "nothing was saved")
        )
        self.signal_number = signal_number


@dataclass(frozen=True)
class TrainResult:
    """What `Trainer.fit` did, over the whole run, resumed parts included."""

    step: int
    num_examples_seen: int
    train_seconds: float
    skipped_steps: int
    stopped_by: str  # "train_steps", "until" or "max_seconds"

    @property
    def examples_per_second(self) -> float:
        return self.num_examples_seen / max(self.train_seconds, 1e-9)


class Trainer:
    """Minimizes ``model.loss`` by stochastic gradient descent.

    The examples of a step are numbered by the examples seen before it, from the run's first step
    on; their noise, timesteps and order in each epoch follow from that number and the seed. So a
    run that is stopped and resumed takes the same steps as one that is not, and ranks share a
    batch without changing it.

    Args:
        model: trained in place.
        data: `Data`, or a tensor (N, *event) in the data's units if the model has a data
            specification, else in the model's.
        config: see `TrainConfig`.
        out: the run's directory, made if need be; None keeps nothing on disk.
        resume: "auto" continues the run in ``out`` if there is one, a path continues from that
            run or checkpoint; None starts afresh and refuses an ``out`` with checkpoints.
        device: where to train; None for a GPU if there is one.
        progress: show a progress bar on rank 0.

    Attributes:
        averaged: the model with exponentially averaged weights, or ``model`` itself when
            ``config.ema_decay`` is None. This is the one to sample from and to evaluate.
        step: training steps taken.

    Raises:
        ValueError: for data that do not fit the model, or are empty or not finite.
        CheckpointError: for a checkpoint that cannot be used or a directory that cannot be written.
    """

    def __init__(
        self,
        model: "DiffusionModel",
        data: "Data | Tensor",
        config: TrainConfig | None = None,
        *,
        out: str | Path | None = None,
        resume: str | Path | None = None,
        device: str | torch.device | None = None,
        progress: bool = True,
    ):
        self.config = config or TrainConfig()
        self.ranks = ranks(device)
        if self.config.batch_size < self.ranks.size:
            raise ValueError(
                f"batch_size must be at least the number of ranks, {self.ranks.size}, "
                f"got {self.config.batch_size}"
            )
        self.model = model.to(self.ranks.device)
        self.spec, examples = _training_examples(model, data)
        self._examples = examples.to(self.ranks.device)
        self.ranks.broadcast_([*model.parameters(), *model.buffers()])
        self.averaged = model
        if self.config.ema_decay is not None:
            self.averaged = copy.deepcopy(model).requires_grad_(False).eval()
        self._names = [n for n, p in model.named_parameters() if p.requires_grad]
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        if not self._parameters:
            raise ValueError("model must have at least one parameter that requires a gradient")
        self.optimizer = make_optimizer(self._parameters, self.config)
        self.step = 0
        self.num_examples_seen = 0
        self.train_seconds = 0.0
        # Since the last row of metrics: sums of the losses and gradient norms of finite steps,
        # and the number of these; in all: the steps skipped. Read only when a row is written.
        self._meters = torch.zeros(4, dtype=torch.float64, device=self.ranks.device)
        self._seconds_at_row = 0.0
        self._progress = progress and self.ranks.rank == 0
        self._metrics: MetricsFile | None = None
        self._signal: int | None = None
        self.out = Path(out) if out is not None else None
        self._start(resume)

    def fit(self, until: int | None = None) -> TrainResult:
        """Train to ``config.train_steps``, or to step ``until`` if that is less.

        Returns:
            counts and times of the run.

        Raises:
            Interrupted: after SIGINT or SIGTERM, with a checkpoint saved.
            NonFiniteGradientError: if the policy is to raise; the weights are those before it.
            CheckpointError: when a checkpoint cannot be written; earlier ones are untouched.
        """
        config = self.config
        last = config.train_steps if until is None else min(until, config.train_steps)
        deadline = math.inf if config.max_seconds is None else time.perf_counter() + config.max_seconds
        self.model.train()
        with self._signals_noted(), self._progress_bar(last) as bar, self._files():
            since = time.perf_counter()
            while self.step < last:
                self._take_step()
                bar.update()
                at_row = self.step % config.log_every == 0 or self.step == config.train_steps
                at_checkpoint = self.step % config.checkpoint_every == 0
                stop = self._asked_to_stop(deadline)
                if at_row or at_checkpoint or stop:
                    if self.ranks.device.type == "cuda":
                        torch.cuda.synchronize()
                    now = time.perf_counter()
                    self.train_seconds, since = self.train_seconds + now - since, now
                if at_row:
                    bar.set_postfix_str(self._write_row())
                if at_checkpoint or stop:
                    self._save()
                if stop:
                    break
            self.train_seconds += time.perf_counter() - since
            saved = self._save()
        if self._signal is not None:
            raise Interrupted(self._signal, self.step, saved)
        reached = "train_steps" if self.step == config.train_steps else "until"
        return TrainResult(
            step=self.step,
            num_examples_seen=self.num_examples_seen,
            train_seconds=self.train_seconds,
            skipped_steps=int(self._meters[3]),
            stopped_by=reached if self.step == last else "max_seconds",
        )

    def _take_step(self) -> None:
        config, device = self.config, self.ranks.device
        share = self.ranks.share(config.batch_size)
        example_ids = self.num_examples_seen + torch.arange(share.start, share.stop, device=device)
        x_0 = self._examples[data_indices(example_ids, len(self._examples), config.seed)]
        if self.spec is not None:
            x_0 = self.spec.to_model(x_0)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
            loss = self.model.loss(
                x_0, seed=config.seed, example_ids=example_ids, kind=config.loss, edge=config.edge
            )
        self.optimizer.zero_grad()
        # A rank's loss is the mean of its share; the sum over ranks is the mean of the batch.
        loss = loss * (len(example_ids) / config.batch_size)
        loss.backward()
        loss = loss.detach()
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        self.ranks.sum_([*gradients, loss])
        norm = get_total_norm(gradients)
        finite = norm.isfinite()
        if config.max_gradient_norm is not None:
            clip_grads_with_norm_(self._parameters, config.max_gradient_norm, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, self.step)
        self._apply(finite)
        self.step += 1
        self.num_examples_seen += config.batch_size
        if self.averaged is not self.model:
            self._average()
        observed = torch.stack((loss, norm, torch.ones_like(norm))).double()
        self._meters[:3] += torch.where(finite, observed, 0.0)
        self._meters[3] += ~finite

    def _apply(self, finite: Tensor) -> None:
        """Step the optimizer if the gradient is finite, on a GPU without asking whether it is."""
        if isinstance(self.optimizer, torch.optim.Adam):
            # The fused kernel leaves parameters and moments alone where this flag is set, as
            # torch's gradient scaler has it do.
            self.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
            self.optimizer.step()
        elif bool(finite):
            self.optimizer.step()

    @torch.no_grad()
    def _average(self) -> None:
        # `AveragedModel` does the same but copies its counter to the device, and so waits for it,
        # at each step; and it has no warm-up, which lets a short run forget its first weights.
        assert self.config.ema_decay is not None
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
        averages, values = list(self.averaged.parameters()), list(self.model.parameters())
        get_ema_multi_avg_fn(decay)(averages, values, self.step)  # type: ignore[arg-type]
        for average, value in zip(self.averaged.buffers(), self.model.buffers(), strict=True):
            average.copy_(value)

    def _write_row(self) -> str:
        """Add a row to metrics.jsonl; returns what the progress bar should say."""
        loss, norm, num_finite, skipped = self._meters.tolist()
        if self.config.nonfinite == "raise" and skipped:
            raise NonFiniteGradientError(
                f"{skipped:.0f} of the first {self.step} gradients were not finite, and "
                'nonfinite="raise" forbids to skip them'
            )
        num_steps = self.step % self.config.log_every or self.config.log_every
        seconds = max(self.train_seconds - self._seconds_at_row, 1e-9)
        row = {
            "step": self.step,
            "num_examples_seen": self.num_examples_seen,
            "loss_bits_per_dim": loss / num_finite if num_finite else None,
            "learning_rate": learning_rate(self.config, self.step - 1),
            "gradient_norm": norm / num_finite if num_finite else None,
            "examples_per_second": num_steps * self.config.batch_size / seconds,
            "skipped_steps": int(skipped),
            "seconds": self.train_seconds,
        }
        if self._metrics is not None:
            self._metrics.append(row)
        self._meters[:3] = 0
        self._seconds_at_row = self.train_seconds
        shown = f"{loss / num_finite:.4f} bits/dim" if num_finite else "no finite gradient"
        if skipped:
            shown += f", {skipped:.0f} steps skipped"
        return f"{shown}, {row['examples_per_second']:.3g} examples/s"

    def _start(self, resume: str | Path | None) -> None:
        out, found = self.out, None
        if resume is not None:
            if resume != "auto":
                found = checkpoint.load(Path(resume))
            elif out is None:
                raise ValueError('resume="auto" requires out, the directory of the run to resume')
            elif holds_run(out):
                found = checkpoint.load(out)
        elif out is not None and holds_run(out):
            raise CheckpointError(
                f"{out} holds a run already: resume it (auto), or choose another directory"
            )
        if found is not None:
            self._restore(found)
        if out is None or self.ranks.rank > 0:
            return
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"cannot make the directory {out}: {error.strerror}") from error
        if found is not None and found.path.parent.resolve() == out.resolve():
            checkpoint.rewind(out, found.path)
        else:
            self._save()  # so that a directory that cannot be written is noticed now

    def _save(self) -> Path | None:
        """Save a checkpoint unless this step's exists."""
        ...
