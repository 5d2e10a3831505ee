"""Calls timed in alternating rounds of one process, the disturbed ones thrown away."""

import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

Call = Callable[[], object]
TimeCalls = Callable[[Call, int], float]

_ROUND_SECONDS = 2e-3
_MIN_ROUNDS, _MAX_ROUNDS = 9, 200
# Part of a round that threads may spend waiting for a processor before it counts as disturbed.
_MAX_WAIT = 0.02


class Timing(NamedTuple):
    """Seconds per call of each of several calls, and how much their rounds were disturbed."""

    seconds: dict[str, list[float]]
    disturbed: float
    busy: bool


def alternate(calls: Mapping[str, Call], time_calls: TimeCalls, seconds: float) -> Timing:
    """Times calls in turn, round by round.

    A round repeats a call for about 2 ms after one call that nobody times. It is thrown away if
    threads of this process had to wait for a processor meanwhile; on a busy machine measuring
    goes on for up to three times as long, and then takes the rounds that waited least.
    """
    repeats = {name: _warm_up(call, time_calls, seconds) for name, call in calls.items()}
    rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        for num_rounds in range(1, _MAX_ROUNDS + 1):
            for name, call in calls.items():
                if repeats[name] > 1:
                    call()
                waited = _seconds_waited()
                per_call = time_calls(call, repeats[name])
                waited = _seconds_waited() - waited
                rounds[name].append((waited / (per_call * repeats[name]), per_call))
            passed = (time.perf_counter() - start) / (seconds * len(calls))
            enough = all(len(_calm(r)) >= _MIN_ROUNDS for r in rounds.values())
            if num_rounds >= _MIN_ROUNDS and (passed > 3 or (passed > 1 and enough)):
                break
    finally:
        gc.enable()
    calm = {name: _calm(r) for name, r in rounds.items()}
    disturbed = 1 - sum(map(len, calm.values())) / (num_rounds * len(calls))
    busy = min(map(len, calm.values())) < _MIN_ROUNDS
    for name, r in rounds.items():
        if len(calm[name]) < _MIN_ROUNDS:
            calm[name] = [per_call for _, per_call in sorted(r)[:_MIN_ROUNDS]]
    return Timing(calm, disturbed, busy)


def _calm(rounds: list[tuple[float, float]]) -> list[float]:
    return [per_call for waited, per_call in rounds if waited <= _MAX_WAIT]


def timer(device: torch.device) -> TimeCalls:
    """A function (call, repeats) -> seconds per call."""
    return _cuda_seconds if device.type == "cuda" else _cpu_seconds


def percentiles(values: list[float]) -> tuple[float, float, float]:
    """The 20th, the 50th and the 80th."""
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return tenths[1], tenths[4], tenths[7]


def _warm_up(call: Call, time_calls: TimeCalls, seconds: float) -> int:
    """Calls until times fall no further; returns how many calls make a round."""
    end = time.perf_counter() + max(seconds, 1.0)
    best, since_best = math.inf, 0
    while since_best < 3 and time.perf_counter() < end:
        repeats = max(1, min(1000, int(_ROUND_SECONDS / best))) if best < math.inf else 1
        per_call = time_calls(call, repeats)
        since_best = since_best + 1 if per_call > 0.97 * best else 0
        best = min(best, per_call)
    return max(1, math.ceil(_ROUND_SECONDS / best))


def _cpu_seconds(call: Call, repeats: int) -> float:
    start = time.perf_counter_ns()
    for _ in itertools.repeat(None, repeats):
        call()
    return (time.perf_counter_ns() - start) * 1e-9 / repeats


def _cuda_seconds(call: Call, repeats: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in itertools.repeat(None, repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3 / repeats


def _seconds_waited() -> float:
    """Time that threads of this process were ready and had no processor; 0 where unknown."""
    nanoseconds = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        try:
            nanoseconds += int(path.read_text().split()[1])
        except OSError:  # the thread has ended, or the kernel keeps no such figures
            continue
    return nanoseconds * 1e-9
