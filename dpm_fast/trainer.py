"""Training: the loop, with averaged weights, resumption, and data parallelism under torchrun."""

import contextlib
import copy
import hashlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dpm_fast import checkpoint, noise
from dpm_fast.checkpoint import Checkpoint, CheckpointError
from dpm_fast.config import TrainConfig
from dpm_fast.data import Data
from dpm_fast.identity import check_identity, identity
from dpm_fast.importance import Importance
from dpm_fast.metrics import Meter, progress_bar, recorder, summary
from dpm_fast.model import DiffusionModel
from dpm_fast.optimization import (
    learning_rate,
    make_optimizer,
    optimizer_tensors,
    restore_optimizer,
)
from dpm_fast.parallel import ranks
from dpm_fast.run_checkpoints import RunCheckpoints
from dpm_fast.signals import Interrupted, SignalNote
from dpm_fast.training_data import TrainingData

# Each question whether any rank wants to stop is a message among all of them.
_STEPS_BETWEEN_STOP_CHECKS = 10


class NonFiniteGradientError(RuntimeError):
    """A gradient was not finite and the run's policy is to raise."""


@dataclass(frozen=True)
class TrainResult:
    """What `Trainer.fit` has done, resumed parts included.

    ``stopped_by`` is "train_steps", "until" or "max_seconds".
    """

    step: int
    num_examples_seen: int
    train_seconds: float
    skipped_steps: int
    stopped_by: str

    @property
    def examples_per_second(self) -> float:
        return self.num_examples_seen / max(self.train_seconds, 1e-9)


class Trainer:
    """Minimizes ``model.loss`` by stochastic gradient descent.

    The examples of a step are numbered by the examples seen before them, from the run's beginning;
    their noise, their timesteps and their order in each epoch follow from that number and the
    seed. So a run that is stopped and resumed takes the same steps as one that is not, and ranks
    share a batch without changing it.

    Args:
        model: trained in place.
        data: a `Data`, or a tensor (N, *event), in the units of ``model.data`` if the model has
            that, else in the model's.
        config: see `TrainConfig`.
        out: the run's directory, made if need be; None keeps nothing on disk.
        resume: "auto" continues the run in ``out`` if there is one; a path continues from that
            run or checkpoint; None starts afresh. An ``out`` that holds another run is refused;
            later checkpoints of a resumed one are removed once training has gone on.
        device: where to train; None for a GPU if there is one.
        progress: show a progress bar (on rank 0).

    Attributes:
        averaged: the model with exponentially averaged weights, or ``model`` itself without
            ``config.ema_decay``. Samples and bounds should come from this one.
        importance: how large the terms of each timestep are, where ``config.timesteps`` wants that
            known, else None; `DiffusionModel.bound` can use it too.
        step: training steps taken.

    Raises:
        ValueError, TypeError: for data that are empty, not finite, or do not fit the model.
        CheckpointError: for a checkpoint that cannot be used, or a directory that cannot.
    """

    def __init__(
        self,
        model: DiffusionModel,
        data: Data | Tensor,
        config: TrainConfig | None = None,
        *,
        out: str | Path | None = None,
        resume: str | Path | None = None,
        device: str | torch.device | None = None,
        progress: bool = True,
    ):
        if not isinstance(model, DiffusionModel):
            raise TypeError(f"model must be a DiffusionModel, got {type(model).__name__}")
        if config is not None and not isinstance(config, TrainConfig):
            raise TypeError(f"config must be a TrainConfig, got {type(config).__name__}")
        self.config = config or TrainConfig()
        self.ranks = ranks(device)
        if self.config.batch_size < self.ranks.size:
            raise ValueError(
                f"batch_size must be at least the number of ranks, {self.ranks.size}, "
                f"got {self.config.batch_size}"
            )
        self.model = model.to(self.ranks.device)
        self._data = TrainingData(data, model, self.config.seed, self.ranks.device)
        self._trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if not self._trained:
            raise ValueError("model must have a parameter that requires a gradient, got none")
        self.ranks.broadcast_([*model.parameters(), *model.buffers()])
        self.averaged = model
        if self.config.ema_decay is not None:
            self.averaged = copy.deepcopy(model).requires_grad_(False).eval()
        self.optimizer = make_optimizer(list(self._trained.values()), self.config)
        self.step = 0
        self.num_examples_seen = 0
        self.train_seconds = 0.0
        self._meter = Meter(self.ranks.device)
        self.importance = (
            Importance(model.process.num_steps, self.ranks.device)
            if self.config.timesteps == "importance"
            else None
        )
        self._seconds_at_row = 0.0
        self._torch_generator = (
            torch.cuda.default_generators[self.ranks.device.index]
            if self.ranks.device.type == "cuda"
            else torch.default_generator
        )
        self._show = progress and self.ranks.rank == 0
        self.out = None if out is None else Path(out)
        self._checkpoints = RunCheckpoints(
            self.out, resume, self.config.keep_checkpoints, writes=self.ranks.rank == 0
        )
        self._begin(self._checkpoints.found)

    def writing(self) -> contextlib.AbstractContextManager[None]:
        """While entered, as `fit` does itself, no other process can write this run.

        Raises:
            CheckpointError: if another one does, or has done since this trainer was made.
        """
        return self._checkpoints.writing()

    def fit(self, until: int | None = None) -> TrainResult:
        """Train up to ``config.train_steps``, or up to step ``until`` if that is less.

        Raises:
            Interrupted: after SIGINT or SIGTERM.
            NonFiniteGradientError: where the policy is to raise, or there was no other gradient;
                none was applied.
            CheckpointError: when a checkpoint cannot be written, or another process writes this
                run; earlier ones are untouched.
        """
        last = self.config.train_steps
        if until is not None:
            last = min(noise.check_integer(until, "until"), last)
        deadline = time.perf_counter() + (self.config.max_seconds or math.inf)
        stop = False
        self.model.train()
        with contextlib.ExitStack() as stack:
            signals = stack.enter_context(SignalNote())
            stack.enter_context(self.writing())
            self._save()  # at once: a directory that cannot be written is noticed now
            out = self.out if self.ranks.rank == 0 else None
            record = stack.enter_context(recorder(out, self.step, self.config.tensorboard))
            bar = stack.enter_context(progress_bar(last, self.step, show=self._show))
            stack.enter_context(self._borrowed_generator())
            self._lap_began = time.perf_counter()
            while self.step < last and not stop:
                self._take_step()
                bar.update()
                stop = self._should_stop(signals, deadline)
                if self.step % self.config.log_every == 0 or self.step == self.config.train_steps:
                    row = self._row()
                    self._checkpoints.rewind()
                    record(row)
                    bar.set_postfix_str(summary(row), refresh=False)
                if self.step % self.config.checkpoint_every == 0:
                    self._lap()
                    self._save()
            self._lap()
            self._save()
        # Since the last question a signal may have reached some of the ranks: all stop, or none.
        if number := self.ranks.largest(signals.number):
            saved = f"the checkpoint is in {self.out}" if self.out else ""
            raise Interrupted(number, f"step {self.step}", saved)
        if self.step and self._meter.num_skipped == self.step:
            raise NonFiniteGradientError(
                f"gradients must be finite, got none that was in {self.step} steps: nothing was "
                "trained"
            )
        stopped_by = "train_steps" if self.step == self.config.train_steps else "until"
        return TrainResult(
            step=self.step,
            num_examples_seen=self.num_examples_seen,
            train_seconds=self.train_seconds,
            skipped_steps=self._meter.num_skipped,
            stopped_by="max_seconds" if self.step < last else stopped_by,
        )

    def _take_step(self) -> None:
        config, device = self.config, self.ranks.device
        share = self.ranks.share(config.batch_size)
        first, end = self.num_examples_seen + share.start, self.num_examples_seen + share.stop
        x_0, example_ids = self._data.batch(first, end), torch.arange(first, end, device=device)
        # Dropout in a network draws from torch's generator: let that follow from the examples too.
        self._torch_generator.manual_seed((config.seed * 0x9E3779B97F4A7C15 + first) % 2**64)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
            loss = self.model.loss(
                x_0,
                seed=config.seed,
                example_ids=example_ids,
                kind=config.loss,
                edge=config.edge,
                importance=self.importance,
                check_values=False,  # `TrainingData` has looked at them all
            )
        # A rank's loss is the mean of its share; the sum over ranks is the mean of the batch.
        loss = loss * ((end - first) / config.batch_size)
        self.optimizer.zero_grad()
        loss.backward()
        loss = loss.detach()
        gradients = [p.grad for p in self._trained.values() if p.grad is not None]
        recorded = [] if self.importance is None else [self.importance.recorded]
        self.ranks.sum_([*gradients, loss, *recorded])
        if self.importance is not None:
            self.importance.update()
        norm = get_total_norm(gradients)
        if config.max_gradient_norm is not None:
            clip_grads_with_norm_(self._trained.values(), config.max_gradient_norm, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, self.step)
        self._step_optimizer(norm.isfinite())
        self.step += 1
        self.num_examples_seen += config.batch_size
        self._meter.add(loss, norm)
        if config.ema_decay is not None:
            self._average(config.ema_decay)

    def _step_optimizer(self, finite: Tensor) -> None:
        """Apply a gradient that is finite. With Adam, a GPU need not be asked whether it is."""
        if isinstance(self.optimizer, torch.optim.Adam):
            # The fused kernel leaves parameters and moments as they are where this flag is set;
            # torch's gradient scaler uses it in the same way.
            self.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
            self.optimizer.step()
        elif bool(finite):
            self.optimizer.step()

    @torch.no_grad()
    def _average(self, decay: float) -> None:
        # Not `AveragedModel`: its counter costs a wait for the GPU at each step, and it has no
        # warm-up, which is what makes a short run forget its initial weights.
        decay = min(decay, (1 + self.step) / (10 + self.step))
        averages, values = list(self.averaged.parameters()), list(self.model.parameters())
        get_ema_multi_avg_fn(decay)(averages, values, self.step)
        for average, value in zip(self.averaged.buffers(), self.model.buffers(), strict=True):
            average.copy_(value)

    def _row(self) -> dict[str, Any]:
        """A row of metrics.jsonl, over the steps since the last one."""
        self._check_policy()
        # Other losses than the bound are no code length.
        means = self._meter.take("loss_bits_per_dim" if self.config.loss == "bound" else "loss")
        self._lap()
        num_steps = self.step % self.config.log_every or self.config.log_every
        seconds = max(self.train_seconds - self._seconds_at_row, 1e-9)
        self._seconds_at_row = self.train_seconds
        return {
            "step": self.step,
            "num_examples_seen": self.num_examples_seen,
            **means,
            "learning_rate": learning_rate(self.config, self.step - 1),
            "examples_per_second": num_steps * self.config.batch_size / seconds,
            "seconds": self.train_seconds,
        }

    def _check_policy(self) -> None:
        if self.config.nonfinite == "raise" and (num_skipped := self._meter.num_skipped):
            raise NonFiniteGradientError(
                f"gradients must be finite, got {num_skipped} that were not in the first "
                f"{self.step} steps"
            )

    def _lap(self) -> None:
        """Add the time since the last lap to the training time."""
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.train_seconds += now - self._lap_began
        self._lap_began = now

    def _should_stop(self, signals: SignalNote, deadline: float) -> bool:
        if self.ranks.size > 1 and self.step % _STEPS_BETWEEN_STOP_CHECKS:
            return False
        signals.number = self.ranks.largest(signals.number)
        timed_out = self.ranks.largest(int(time.perf_counter() >= deadline))
        return bool(signals.number or timed_out)

    def _begin(self, found: Checkpoint | None) -> None:
        """Go on from a checkpoint, if it is the one that all ranks have found."""
        state = "" if found is None else json.dumps([found.step, found.state], sort_keys=True)
        digest = hashlib.sha256(state.encode()).digest()
        # Also, no rank gets past this, and writes, before all have read what there is.
        if not self.ranks.agree(int.from_bytes(digest[:7], "little")):
            ours = "none" if found is None else found.path
            raise CheckpointError(
                f"all ranks must go on from the same checkpoint, got {ours} on rank "
                f"{self.ranks.rank} and another on another: do they see the same directory?"
            )
        if found is not None:
            self._restore(found)

    def _save(self) -> None:
        """Save a checkpoint, unless this step's has been saved."""
        self._check_policy()
        if not self._checkpoints.wants(self.step):
            return
        parts = {
            "weights": self.model.state_dict(),
            "optimizer": optimizer_tensors(self.optimizer, list(self._trained)),
            "meter": {"sums": self._meter.sums},
        }
        if self.importance is not None:
            parts["importance"] = {"moments": self.importance.moments}
        if self.averaged is not self.model:
            parts["averaged"] = self.averaged.state_dict()
        state = {
            "num_examples_seen": self.num_examples_seen,
            "train_seconds": self.train_seconds,
            "seconds_at_row": self._seconds_at_row,
            "seed": self.config.seed,
            "model": identity(self.model, self._data.spec),
        }
        self._checkpoints.save(self.step, parts, state)

    def _restore(self, found: Checkpoint) -> None:
        """Take over everything from a checkpoint, after checking that it fits."""
        source = str(found.path)
        check_identity(found, self.model, self._data.spec)
        for part in ("weights", "optimizer", "meter"):
            if part not in found.parts:
                raise CheckpointError(f"{source} lacks {part}.safetensors")
        averaged = found.parts.get("averaged", found.parts["weights"])
        for tensors in (found.parts["weights"], averaged):
            checkpoint.check_fits(self.model.state_dict(), tensors, source)
        checkpoint.check_fits({"sums": self._meter.sums}, found.parts["meter"], source)
        # A run that begins to use them has none: the moments then start afresh.
        moments = found.parts.get("importance")
        if self.importance is not None and moments is not None:
            required = {"moments": self.importance.moments}
            checkpoint.check_fits(required, moments, source)
        counts = {
            key: checkpoint.number(found, key)
            for key in ("num_examples_seen", "train_seconds", "seconds_at_row")
        }
        if (seed := found.state.get("seed")) != self.config.seed:
            raise CheckpointError(f"{source} is of a run with seed {seed}, not {self.config.seed}")
        if found.step > self.config.train_steps:
            raise CheckpointError(
                f"train_steps must be at least {found.step}, which {source} has taken, "
                f"got {self.config.train_steps}"
            )
        restore_optimizer(self.optimizer, self._trained, found.parts["optimizer"], source)
        self.model.load_state_dict(found.parts["weights"])
        if self.averaged is not self.model:
            self.averaged.load_state_dict(averaged)
        self._meter.sums.copy_(found.parts["meter"]["sums"])
        if self.importance is not None and moments is not None:
            self.importance.moments.copy_(moments["moments"])
        self.step = found.step
        self.num_examples_seen = int(counts["num_examples_seen"])
        self.train_seconds = counts["train_seconds"]
        self._seconds_at_row = counts["seconds_at_row"]

    @contextlib.contextmanager
    def _borrowed_generator(self) -> Iterator[None]:
        """Give torch's generators back as they were."""
        devices = [self.ranks.device] if self.ranks.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            yield
