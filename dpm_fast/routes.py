"""Which timesteps a reverse trajectory passes, and by which kernels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dpm_fast import noise, respacing

if TYPE_CHECKING:
    from dpm_fast.model import DiffusionModel


@dataclass(frozen=True)
class Route:
    """Where a trajectory goes.

    Attributes:
        reverse: the kernels of its steps.
        timesteps: from which a step is taken, descending.
        start: the first timestep.
        end: where the last step leads.
        final: "mean" or "sample", how a step to x_0 is taken.
        writes_known: whether known elements have their clean values at the end, whatever its t.
    """

    reverse: Any
    timesteps: Sequence[int]
    start: int
    end: int
    final: str
    writes_known: bool

    @property
    def states(self) -> Sequence[int]:
        """All timesteps that it passes, descending."""
        if isinstance(self.timesteps, range):
            return range(self.start, self.end - 1, -1)
        return [*self.timesteps, self.end] if self.timesteps else [self.end]


def route_of(
    model: DiffusionModel,
    start: int | None,
    stop: int | None,
    final: str | None,
    num_inference_steps: int | None,
    timesteps: Iterable[int] | None,
    eta: float | None,
    is_drawn: bool,
) -> Route:
    """The way that `DiffusionModel.sample` is asked for by arguments of these names.

    Args:
        start: its timestep.
        is_drawn: whether the last step is drawn where it would take the mean by default.

    Raises:
        TypeError, ValueError: for what is no way, or a way that the model cannot go.
    """
    num_steps, reverse = model.process.num_steps, model.reverse
    if final not in (None, "x_1", "mean", "sample"):
        raise ValueError(f"final must be 'x_1', 'mean' or 'sample', got {final!r}")
    if start is not None and not 1 <= start <= num_steps:
        raise ValueError(f"start t must be in 1..{num_steps}, got {start}")
    kept: Sequence[int] = range(1, num_steps + 1)
    if timesteps is not None:
        if num_inference_steps is not None:
            raise ValueError("timesteps and num_inference_steps exclude each other, got both")
        kept = respacing.checked_timesteps(timesteps, num_steps)
        if start is None and kept[-1] < num_steps:
            raise ValueError(
                f"timesteps must include T = {num_steps}, where x_T is drawn, got at most "
                f"{kept[-1]}: give start=(t, x_t) to begin there"
            )
        if start is not None and start not in kept:
            raise ValueError(f"start t must be {one_of(kept)}, got {start}")
    elif num_inference_steps is not None:
        kept = respacing.spaced(num_inference_steps, start or num_steps)
    if len(kept) < num_steps or eta is not None:
        if model.process.kind != "gaussian":
            raise ValueError(
                "num_inference_steps, timesteps and eta require a Gaussian process, "
                "got a binomial one"
            )
        reverse = respacing.RespacedReverse(model.reverse, list(kept), eta)
    t_start = kept[-1] if start is None else start
    stop = None if stop is None else noise.check_integer(stop, "stop")
    if stop is not None and (not 0 <= stop <= t_start or (stop and stop not in kept)):
        at = f"in 0..{t_start}" if len(kept) == num_steps else f"0 or {one_of(kept)}"
        raise ValueError(f"stop must be {at}, where this trajectory goes, got {stop}")
    if final == "x_1" and (stop not in (None, 1) or 1 not in kept):
        given = f"stop {stop}" if stop not in (None, 1) else f"timesteps from {kept[0]} on"
        raise ValueError(f"final 'x_1' is the state at t = 1, got it with {given}")
    end = stop
    if final is None:
        final = reverse.default_final
        if final == "x_1" and (stop is not None or 1 not in kept):
            final = "mean"
        final = "sample" if is_drawn and final == "mean" else final
    if end is None:
        end = 1 if final == "x_1" else 0
    steps: Sequence[int] = range(t_start, end, -1)
    if len(kept) < num_steps:
        steps = [t for t in reversed(kept) if end < t <= t_start]
    return Route(reverse, steps, t_start, end, final, stop is None)


def one_of(kept: Sequence[int]) -> str:
    """As messages name them, who need not read hundreds."""
    few = list(map(str, kept))
    if len(few) > 8:
        few[3:-3] = ["..."]
    return f"one of the timesteps {', '.join(few)}"
