"""Progress lines with the time left, for work of known length: calls of a network, terms."""

import contextlib
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

from torch import nn
from tqdm import tqdm

from dpm_fast.known_networks import CallCounter
from dpm_fast.model import DiffusionModel
from dpm_fast.routes import route_of

# Shorter work needs no line.
_SECONDS_BEFORE_IT_SHOWS = 2.0


def of_terms(total: int) -> "tqdm[Any]":
    """A line that counts the terms of a bound."""
    return _line(total, "bound", "term")


@contextlib.contextmanager
def network_calls(
    network: nn.Module, total: int, name: str, *, show: bool = True
) -> Iterator[None]:
    """While entered, a line on standard error counts the calls of ``network``.

    Args:
        network: of the model that works.
        total: number of calls to come.
        name: of the work.
        show: False for the ranks that keep silent.
    """
    with _line(total, name, "call", show=show) as bar:
        hook = network.register_forward_hook(CallCounter(bar.update))
        try:
            yield
        finally:
            hook.remove()


def of_samples(
    model: DiffusionModel,
    num: int,
    batch_size: int = 1024,
    num_inference_steps: int | None = None,
    *,
    show: bool = True,
) -> AbstractContextManager[None]:
    """`network_calls` for drawing ``num`` samples of a model, ``batch_size`` at a time."""
    route = route_of(model, None, None, None, num_inference_steps, None, None, False)
    calls = len(route.timesteps) * -(-num // batch_size)
    return network_calls(model.network, calls, "samples", show=show)


def _line(total: int, name: str, unit: str, *, show: bool = True) -> "tqdm[Any]":
    return tqdm(
        total=total,
        desc=name,
        unit=unit,
        disable=not show,
        delay=_SECONDS_BEFORE_IT_SHOWS,
        dynamic_ncols=True,
        # A log that is not a terminal gets a line now and then.
        mininterval=0.2 if sys.stderr.isatty() else 20,
    )
