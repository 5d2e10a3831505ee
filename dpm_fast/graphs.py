"""Steps of a reverse trajectory as CUDA graphs: captured once, then replayed at every timestep.

A step of any network in PyTorch is tens of launches, for which a host takes longer than a GPU does;
a graph is one. It reads x_t, t, the ids of the examples and the factors of a posterior from where
they were when it was captured, and all of that is copied there before. The seed is a part of it, as
kernels take it by value, and so are the network's parameters and mode: graphs live as long as the
call of `DiffusionModel.sample`, in which nothing of that changes, one for each shape of a batch.

Python runs only while a step is captured. A module that waits for the GPU, or draws random numbers
on a CPU, cannot be captured; one that does something else in every call, as dropout does, gives
another step than its graph, with which one timestep is compared. Both go step by step, and a debug
log says so.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from dpm_fast.known_networks import CallCounter

if TYPE_CHECKING:
    from dpm_fast.model import DiffusionModel
    from dpm_fast.sampling import Posterior, Request

_log = logging.getLogger("dpm_fast")

_DEVICES = ("cuda",)
# Fewer steps than these are taken one by one. Not measured: a capture takes two steps, is checked
# by another, waits for the GPU and empties torch's cache of memory.
_LEAST_STEPS = 50
# Between a step and its graph, on average relative to how far the step goes: matrix products may
# take another order in a graph, noise and timesteps not. Then the roundings of x itself.
_TOLERANCE = 1e-3
_ROUNDINGS = 4

# (x_t, t, to, *inputs) -> x_to, of tensors alone; it may write into x_t.
Step = Callable[..., Tensor]
Capture = Callable[[Callable[[], None]], Callable[[], None]]


def capture_on_gpu(run: Callable[[], object]) -> Callable[[], None]:
    """Capture what ``run`` launches; the result does it again.

    Raises:
        RuntimeError: where it waits for the GPU, or does something else that no graph can hold.
    """
    stream, before, graph = _stream(), torch.cuda.current_stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(before)
    # The outer context, since torch.cuda.graph stays on its stream where a capture fails.
    with _capturing, torch.cuda.stream(stream):
        try:
            run()  # what libraries do at their first call on a stream must be done before
            # Other threads, those of a data loader say, may do as they like.
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                run()
        finally:
            before.wait_stream(stream)  # where it failed, others get the memory that it works in
    return graph.replay


def _leave_failed_capture(x: Tensor) -> None:
    """Up to torch 2.12 random numbers of a GPU take a capture that failed to be under way until
    another one succeeds (pytorch#171263)."""
    if x.is_cuda:
        place = torch.zeros(1, device=x.device)
        with contextlib.suppress(RuntimeError), torch.cuda.device_of(x):
            capture_on_gpu(place.zero_)


_capturing = threading.Lock()  # a process has one capture at a time
_of_thread = threading.local()


def _stream() -> torch.cuda.Stream:
    """This thread's on the current device, nobody else's: the memory that cuBLAS works in belongs
    to a stream, and goes with a graph that was captured there (pytorch#193402)."""
    streams = vars(_of_thread).setdefault("streams", {})
    device = torch.cuda.current_device()
    if device not in streams:
        streams[device] = torch.cuda.Stream(device)
    return streams[device]


class _Captured:
    """A step of batches of one shape, in place."""

    def __init__(
        self, step: Step, x: Tensor, t: int, inputs: Sequence[Tensor | None], capture: Capture
    ):
        self.x = x.clone()
        self.t = torch.full((len(x),), t, dtype=torch.int64, device=x.device)
        self.to = self.t - 1
        self.inputs = [None if given is None else given.clone() for given in inputs]
        self.replay = capture(lambda: self._run(step))

    def _run(self, step: Step) -> None:
        self.x.copy_(step(self.x, self.t, self.to, *self.inputs))

    def load(self, x: Tensor, inputs: Sequence[Tensor | None]) -> None:
        self.x.copy_(x)
        for place, given in zip(self.inputs, inputs, strict=True):
            if place is not None and given is not None:
                place.copy_(given)

    def __call__(self, t: int, to: int) -> Tensor:
        """x_to, which the next call overwrites."""
        self.t.fill_(t)
        self.to.fill_(to)
        self.replay()
        return self.x


class Graphs:
    """The graphs of one call of `DiffusionModel.sample`.

    Args:
        step: a step that is drawn.
        network: whose calls are counted by its hooks.
    """

    def __init__(self, step: Step, network: nn.Module):
        self.step, self.network = step, network
        self.captured: dict[tuple[torch.Size, torch.dtype], _Captured] = {}
        self.is_possible = True

    def reverse_trajectory(
        self,
        x: Tensor,
        timesteps: Sequence[int],
        end: int,
        inputs: Sequence[Tensor | None],
        by_steps: Callable[..., Tensor],
        visit: Callable[[int, Tensor], None],
    ) -> Tensor:
        """As `sampling.reverse_trajectory`.

        Args:
            x: (N, *event).
            timesteps: descending.
            end: where the last step leads.
            inputs: of the step, those of these examples.
            by_steps: (x, timesteps, end=) takes some of the steps one by one, and visits.
            visit: called with (t, x_t) after each step.
        """
        states, begin = [*timesteps, end], 0
        drawn = states[:-1] if end == 0 else states  # a step to x_0 may take the mean instead
        captured = self.captured.get((x.shape, x.dtype))
        if captured is None and self.is_possible and len(drawn) > _LEAST_STEPS:
            first, second, third, *_ = states
            x = by_steps(x, [first], end=second)  # what a module does in its first call alone
            # Far from the timestep of the comparison, where a t that became a constant is seen.
            captured = self._capture(x, drawn[-2], inputs)
            before, x, begin = x, by_steps(x, [second], end=third), 2
            if captured and not self._agrees(captured, before, second, third, inputs, x):
                captured = None
        if captured is not None:
            captured.load(x, inputs)
            for t, to in itertools.pairwise(drawn[begin:]):
                x = captured(t, to)
                for hook in self.network._forward_hooks.values():
                    cast("CallCounter", hook).count(1)
                visit(to, x)
            begin = len(drawn) - 1
        return by_steps(x, states[begin:-1], end=end)

    def _capture(self, x: Tensor, t: int, inputs: Sequence[Tensor | None]) -> _Captured | None:
        try:
            with _uncounted(self.network), torch.cuda.device_of(x):
                return _Captured(self.step, x, t, inputs, capture_on_gpu)
        except RuntimeError as error:
            first_line = str(error).partition("\n")[0]
            self._give_up(f"a step cannot be captured: {first_line}")
            _leave_failed_capture(x)
            return None

    def _agrees(
        self,
        captured: _Captured,
        x: Tensor,
        t: int,
        to: int,
        inputs: Sequence[Tensor | None],
        expected: Tensor,
    ) -> bool:
        """Whether a replay gives the step that was taken; from then on it is taken for it."""
        captured.load(x, inputs)
        difference = (captured(t, to) - expected).abs().mean()
        rounding = _ROUNDINGS * torch.finfo(x.dtype).eps * expected.abs().mean()
        if not bool(difference <= _TOLERANCE * (expected - x).abs().mean() + rounding):
            self._give_up("a step and its graph differ")
            return False
        self.captured[x.shape, x.dtype] = captured
        _log.debug("sample: steps of shape %s are a CUDA graph", tuple(x.shape))
        return True

    def _give_up(self, reason: str) -> None:
        self.is_possible = False
        _log.debug("sample: no CUDA graph, since %s", reason)


@contextlib.contextmanager
def _uncounted(network: nn.Module) -> Iterator[None]:
    hooks = dict(network._forward_hooks)
    network._forward_hooks.clear()
    try:
        yield
    finally:
        network._forward_hooks.update(hooks)


def graphs_of(model: DiffusionModel, request: Request, device: torch.device) -> Graphs | None:
    """For one call of `DiffusionModel.sample`, or None where it has to go step by step."""
    from dpm_fast import sampling

    if device.type not in _DEVICES:
        return None
    reason = _why_not(model, request, device)
    if reason is not None:
        _log.debug("sample: no CUDA graph, since %s", reason)
        return None
    posterior, reverse, seed = request.posterior, request.route.reverse, request.seed

    def step(
        x: Tensor,
        t: Tensor,
        to: Tensor,
        ids: Tensor,
        mask: Tensor | None,
        values: Tensor | None,
        y: Tensor | None,
        sigma: Tensor | None,
    ) -> Tensor:
        known = None if mask is None or values is None else (mask, values)
        observed = None if y is None or sigma is None else (y, sigma)
        here = copy.copy(posterior)  # a new one would look at values, which waits for the GPU
        object.__setattr__(here, "observed", observed)
        if known is not None and posterior.known_as == "forward":
            known = known[0], model.process.sample_x_t(known[1], to, seed, ids)
        rows = reverse.rows(t, x)
        return sampling.single_step(model, reverse, x, t, rows, seed, ids, here, known)

    return Graphs(step, cast("nn.Module", model.network))


def inputs_of(ids: Tensor, posterior: Posterior) -> tuple[Tensor | None, ...]:
    """What the step of `graphs_of` takes after t, of a posterior in the shape of a batch."""
    mask, values = posterior.known or (None, None)
    y, sigma = posterior.observed or (None, None)
    return ids, mask, values, y, cast("Tensor | None", sigma)


def _why_not(model: DiffusionModel, request: Request, device: torch.device) -> str | None:
    network, wanted = model.network, request.use_graphs
    if wanted is None:
        wanted = os.environ.get("DPM_FAST_GRAPHS") == "1"
    if not wanted:
        return "nobody asked for one"
    if not isinstance(network, nn.Module):
        return "the network is not a module"
    tensors = [*network.parameters(), *network.buffers()]
    if any(tensor.device != device for tensor in tensors):
        return "the network is on several devices"
    if network.training and any(True for _ in network.buffers()):
        return "a network in training may change its buffers, and would once more"
    if request.callback is not None:
        return "Python runs between steps, in the callback"
    if torch.compiler.is_compiling() or (
        device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    ):
        return "it is being compiled, or captured"
    everywhere = nn.modules.module
    if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
        return "modules have hooks"
    for module in network.modules():
        hooks = [
            hook
            for hook in module._forward_hooks.values()
            if module is not network or not isinstance(hook, CallCounter)
        ]
        if hooks or module._forward_pre_hooks:
            return "modules have hooks"
    return None
