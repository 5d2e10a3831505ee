"""Ranks that train together: one run, one checkpoint, one end."""

import contextlib
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import dpm_fast
from dpm_fast import checkpoint
from dpm_fast.checkpoint import CheckpointError
from dpm_fast.metrics import read_metrics
from dpm_fast.model import DiffusionModel
from dpm_fast.signals import Interrupted
from small_runs import (
    CONFIG,
    NUM_STEPS,
    SignalAt,
    assert_equal_bits,
    small_model,
    small_trainer,
    state_of,
)


def _in_a_rank(function: Callable[..., None], rank: int, port: int, *arguments: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    function(rank, *arguments)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@contextlib.contextmanager
def _two_ranks(function: Callable[..., None], *arguments: str) -> Iterator[None]:
    """Call function(rank, *arguments) in two processes, beside the body."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dpm_fast.trainer"])
    processes = [
        context.Process(target=_in_a_rank, args=(function, rank, port, *arguments))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    yield
    for process in processes:
        process.join(timeout=100)
        assert process.exitcode == 0


def _train_in_a_rank(rank: int, out: str) -> None:
    torch.save(_train_and_resume(out), f"{out}-{rank}.pt")


def _train_and_resume(out: str) -> dict[str, Tensor]:
    config = replace(CONFIG, batch_size=15)
    small_trainer(config, small_model(learned=False), out=out, resume="auto").fit(until=7)
    trainer = small_trainer(config, small_model(learned=False), out=out, resume="auto")
    trainer.fit()
    return state_of(trainer)


def test_ranks_share_a_batch_without_changing_the_run(tmp_path: Path) -> None:
    """15 examples among 2 ranks: shares of different sizes still average to the batch's mean."""
    with _two_ranks(_train_in_a_rank, str(tmp_path / "two")):
        one = _train_and_resume(str(tmp_path / "one"))
    first, second = (torch.load(tmp_path / f"two-{r}.pt", weights_only=True) for r in range(2))
    assert_equal_bits(first, second)
    assert one.keys() == first.keys()
    for name in one:
        # The sum over two shares rounds differently, and Adam divides by tiny moments at first.
        torch.testing.assert_close(first[name], one[name], rtol=1e-3, atol=1e-5)
    rows = [read_metrics(tmp_path / run / "metrics.jsonl") for run in ("one", "two")]
    for ours, theirs in zip(*rows, strict=True):
        assert ours["loss_bits_per_dim"] == pytest.approx(theirs["loss_bits_per_dim"], rel=1e-5)


def _resume_what_one_rank_sees(rank: int, out: str) -> None:
    message = "all ranks must go on from the same checkpoint, got .* on rank"
    with pytest.raises(CheckpointError, match=message):
        small_trainer(out=out if rank == 0 else f"{out}-absent", resume="auto")


def test_ranks_go_on_from_the_same_checkpoint_or_not_at_all(tmp_path: Path) -> None:
    small_trainer(out=tmp_path / "run").fit(until=4)
    with _two_ranks(_resume_what_one_rank_sees, str(tmp_path / "run")):
        pass
    assert checkpoint.load(tmp_path / "run").step == 4


def _signal_in_the_last_step_of_one_rank(rank: int, out: str) -> None:
    process = dpm_fast.GaussianDiffusion.from_schedule("log_linear", NUM_STEPS)
    network = SignalAt(12 if rank == 1 else -1, signal.SIGTERM)
    with pytest.raises(Interrupted, match="SIGTERM after step 12"):
        small_trainer(model=DiffusionModel(process, network), out=out).fit()


def test_a_late_signal_to_one_rank_stops_all(tmp_path: Path) -> None:
    with _two_ranks(_signal_in_the_last_step_of_one_rank, str(tmp_path)):
        pass
    assert checkpoint.load(tmp_path).step == 12
