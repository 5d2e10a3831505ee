"""Whole reverse trajectories as a few launches, where a model and a request allow it.

Kernels compute the network too: a tile of examples goes through many timesteps without leaving a
core's cache. They know the networks and the processes of this package as they are; with anything
else `sampling.reverse_trajectory` goes step by step.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from dpm_fast import dispatch, noise
from dpm_fast.binomial import BinomialDiffusion
from dpm_fast.gaussian import GaussianDiffusion
from dpm_fast.known_networks import (
    CallCounter,
    KnownNetwork,
    is_as_made,
    is_known,
    parameters_of,
    work_of,
)
from dpm_fast.layers import MultiscaleConv
from dpm_fast.networks import ConvDenseNetwork
from dpm_fast.ops.bernoulli import check_flips
from dpm_fast.ops.bound_terms import BoundTermsInputs, bound_terms
from dpm_fast.ops.multiscale_conv import LANES
from dpm_fast.ops.step import checked_variance
from dpm_fast.ops.tail import MAX_PIXEL_LAYERS
from dpm_fast.ops.trajectory import TrajectoryInputs, trajectory
from dpm_fast.ops.whole_network import image_sizes

if TYPE_CHECKING:
    from dpm_fast.model import DiffusionModel
    from dpm_fast.sampling import Posterior, Request

_log = logging.getLogger("dpm_fast")

# Multiply-adds of a launch, about 0.7 s of one core: Ctrl-C is heard between launches. A launch
# begins by bringing the parameters into the order of its kernels.
_LAUNCH_WORK = 2**35
# Launches of a GPU wait in its queue whatever their length; where it has a display, one may take
# seconds at most. However few the examples, a step takes microseconds.
_LAUNCH_WORK_OF_GPU = 2**41
_LEAST_STEP_WORK_OF_GPU = 2**22
# Terms of the bound of a launch, 8 bytes each.
_PAIRS_OF_LAUNCH = 2**16
_PAIRS_OF_LAUNCH_OF_GPU = 2**20
# What noise and a step of an element take, in multiply-adds of vector code.
_ELEMENT_WORK = 64
# Multiply-adds of a step up to which a GPU takes whole trajectories without being asked to. They
# were never timed on one, but should not lose up to here: a step by itself is 20 kernels and more,
# of 2 us each even in a graph. These are 7 us at an A100's peak, 2 us at an H100's, and a fifth of
# it is enough. At some larger size a vendor's matrix products are worth their launches.
_STEP_WORK_OF_GPU = 2**26
# The same of images, never timed on a GPU either. Their steps are 45 launches and more, 90 us in a
# graph. For the 2015 network without its dense path a multiprocessor takes 34,000 products of
# tensor cores to a step of one image in float32's precision, three for one: 40 us at half of an
# H100's peak, for as many images as it has multiprocessors. These are two such rounds, whatever
# the precision; beyond, where a vendor's convolutions fill the GPU, what there is to win is less
# certain.
_IMAGE_STEP_WORK_OF_GPU = 2**30


def can_launch(
    model: DiffusionModel, posterior: Posterior, num_examples: int, batch_size: int = 1024
) -> bool:
    """Whether `launch` may take the place of single steps, of ``batch_size`` examples at a time;
    says which in a debug log."""
    reason = _why_stepwise(model, posterior, num_examples, batch_size)
    if reason is None:
        _log.debug("sample: whole trajectories in the kernel of %s", type(model.network).__name__)
    else:
        _log.debug("sample: step by step, since %s", reason)
    return reason is None


def examples_of_launch(model: DiffusionModel, batch_size: int) -> int:
    """How many examples go together: more than ``batch_size``, as they take no memory beyond their
    own, but so few that a step of theirs is not too long for a launch."""
    network = cast("KnownNetwork", model.network)
    return max(batch_size, _launch_work(network.readout.weight) // work_of(network))


def launch(
    model: DiffusionModel,
    x: Tensor,
    request: Request,
    ids: Tensor,
    posterior: Posterior,
    visit: Callable[[int, Tensor], None],
    wanted: Collection[int],
) -> Tensor:
    """`sampling.reverse_trajectory` of a model that `can_launch`, with the same noise.

    Args:
        x: (N, *event) float32.
        request: of which these are some examples; by its batch size hooks count calls.
        posterior: of these examples, see `Posterior.to_batch`.
        visit: called with (t, x_t) for those timesteps in ``wanted`` that a step leads to, and for
            those where the request's callback is due, between launches.

    Returns:
        (N, *event).
    """
    route = request.route
    timesteps, states = route.timesteps, route.states
    if not timesteps or not len(x):
        return x
    event = x.shape[1:]
    network = cast("KnownNetwork", model.network)
    y, spread = _observed(x, posterior, model.process.kind == "binomial")
    mask, values = posterior.known or (None, None)
    y, spread, mask, values = (
        None if tensor is None else tensor.flatten(1) for tensor in (y, spread, mask, values)
    )
    is_forward = posterior.known is not None and posterior.known_as == "forward"
    seed, _, ids, _ = noise.check(request.seed, noise.Stream.REVERSE, ids, timesteps[0])
    previous = torch.zeros(timesteps[0] + 1, dtype=torch.int64)
    previous[list(timesteps)] = torch.tensor(states[1:])
    inputs = TrajectoryInputs(
        rows=route.reverse.table(x.device).float(),
        is_binomial=model.process.kind == "binomial",
        **vars(parameters_of(network, timesteps[0], _stored_as(network))),
        seed=seed,
        example_ids=ids.contiguous(),
        levels=_levels(model.process, x.device) if is_forward else None,
        mask=mask,
        values=values,
        y=y,
        spread=spread,
        previous=previous.to(x.device),
        first=timesteps[0],
        last=timesteps[-1],
        mean_at_1=route.final == "mean",
        wanted=[],
    )
    x = x.flatten(1).contiguous()
    work = len(x) * (work_of(network) + _ELEMENT_WORK * x.shape[1])
    work = work if x.is_cpu else max(work, _LEAST_STEP_WORK_OF_GPU)
    num_steps = max(1, _launch_work(x) // work)
    begin = 0
    while begin < len(timesteps):
        end = min(begin + num_steps, len(timesteps))
        due = [k for k in range(begin + 1, end + 1) if request.calls_back(states[k])]
        end = due[0] if due else end
        here = [t for t in states[begin + 1 : end + 1] if t in wanted or (due and t == states[end])]
        steps = timesteps[begin:end]
        x, found = trajectory(x, inputs._replace(first=steps[0], last=steps[-1], wanted=here))
        for hook in model.network._forward_hooks.values():
            cast("CallCounter", hook).count(len(steps) * -(-len(x) // request.batch_size))
        for t, state in zip(here, found, strict=True):
            visit(t, state.unflatten(1, event))
        begin = end
    return x.unflatten(1, event)


def why_not_bound(model: DiffusionModel, x_0: Tensor, edge: str) -> str | None:
    """Why `BoundTerms` cannot compute the terms of single timesteps, or None."""
    from dpm_fast.sampling import Posterior

    if "term_nats" in vars(model) or "nats_of_output" in vars(model):
        return "the model has terms of its own"
    if edge.startswith("discretized"):
        return f"no kernel has the edge {edge!r}"
    if torch.promote_types(x_0.dtype, torch.float32) != torch.float32:
        return f"no kernel has terms of {x_0.dtype}"
    reason = _why_stepwise(model, Posterior(), len(x_0) * model.process.num_steps)
    is_of_images = isinstance(model.network, ConvDenseNetwork)
    if reason is None and is_of_images and dispatch.trajectory_limits(x_0) is None:
        return "a CPU's kernels have no terms of images"
    return reason


class BoundTerms:
    """Terms of the bound of a model for which `why_not_bound` has no reason.

    Args:
        last: the greatest timestep of any call.
    """

    def __init__(self, model: DiffusionModel, last: int, seed: int, device: torch.device):
        self._network = cast("KnownNetwork", model.network)
        self._inputs = BoundTermsInputs(
            rows=model.reverse.table(device).float(),
            levels=_levels(model.process, device),
            is_binomial=model.process.kind == "binomial",
            **vars(parameters_of(self._network, last, _stored_as(self._network))),
            seed=seed,
            noise_ids=torch.empty(0, dtype=torch.int64, device=device),
            first=last,
            last=last,
        )
        # Pairs of a launch, after which Ctrl-C is heard, and which leave a GPU no time to wait.
        work = work_of(self._network) + _ELEMENT_WORK * math.prod(self._network.event_shape)
        most = _PAIRS_OF_LAUNCH if device.type == "cpu" else _PAIRS_OF_LAUNCH_OF_GPU
        self.most_pairs = max(1, min(most, _launch_work(self._inputs.rows) // work))

    def __call__(self, x_0: Tensor, noise_ids: Tensor, first: int, last: int) -> Tensor:
        """Of examples x_0 (N, *event) float32 at t = first ... last, (first - last + 1, N) float64
        nats; the same noise as of `DiffusionModel.term_nats`."""
        seed, _, ids, _ = noise.check(self._inputs.seed, noise.Stream.FORWARD, noise_ids, first)
        for hook in self._network._forward_hooks.values():
            cast("CallCounter", hook).count(1)
        inputs = self._inputs._replace(
            seed=seed, noise_ids=ids.contiguous(), first=first, last=last
        )
        return bound_terms(x_0.flatten(1).contiguous(), inputs)


def _why_stepwise(
    model: DiffusionModel, posterior: Posterior, num_examples: int, batch_size: int = 1024
) -> str | None:
    """Why a trajectory must go step by step, or None."""
    from dpm_fast.model import DiffusionModel

    network = model.network
    if not is_known(network):
        return f"no kernel has a network of type {type(network).__name__}"
    if type(model) is not DiffusionModel or "network_output" in vars(model) or model.t_base != 1:
        return "the model calls its network in its own way"
    if type(model.process) not in (GaussianDiffusion, BinomialDiffusion):
        return f"no kernel has a process of type {type(model.process).__name__}"
    if not is_as_made(network):
        return "the network has hooks, or layers other than those it was made with"
    weight = network.readout.weight
    if any(p.dtype != torch.float32 or p.device != weight.device for p in network.parameters()):
        return "the network is not float32 on one device"
    if posterior.log_r is not None:
        return "log_r is a function of Python"
    if posterior.observed is not None and posterior.guidance == "x0":
        return "guidance 'x0' moves the mean by a drift"
    if torch.compiler.is_compiling():
        return "it is being compiled"
    if dispatch.requested() not in ("auto", "native"):
        return f"the backend {dispatch.requested()!r} was asked for"
    if dispatch.backend("trajectory", weight) != "native":
        return "native kernels are absent"
    is_on_gpu = dispatch.trajectory_limits(weight) is not None
    dtype = _stored_as(network)
    is_narrow = is_on_gpu and isinstance(network, ConvDenseNetwork) and dtype == torch.bfloat16
    if dtype != torch.float32 and not is_narrow:
        return f"autocast asks for {dtype}, which no kernel has here"
    if is_on_gpu:
        return _why_not_on_gpu(network, min(num_examples, batch_size))
    if isinstance(network, ConvDenseNetwork) and not _fills_lanes(network, num_examples):
        return f"{num_examples} images leave lanes empty, and convolutions take parts of them"
    return None


def _why_not_on_gpu(network: KnownNetwork, num_examples: int) -> str | None:
    """The number is that of examples in a step, if steps were taken one by one."""
    limits = dispatch.trajectory_limits(network.readout.weight)
    assert limits is not None
    small = parameters_of(network, 1, _stored_as(network))
    if isinstance(network, ConvDenseNetwork):
        if network.dense is not None:
            return "a GPU's kernel for images has no room for a dense path"
        sizes, most_work = image_sizes(small), _IMAGE_STEP_WORK_OF_GPU
        num_layers = len(sizes.layers) + len(sizes.pixel_layers) + 1
        too_many = (
            _too_many("scales", sizes.num_scales, limits.max_scales)
            or _too_many("layers of each pixel", len(sizes.pixel_layers), MAX_PIXEL_LAYERS)
            or _too_many("layers", num_layers, limits.max_image_layers)
        )
        needed = 0 if too_many else limits.image_bytes_needed(*sizes, 1)[0]
    else:
        shapes = [
            (w.shape[-1], w.shape[-2], w.dim() == 3, b.dim() == 2)
            for w, b in zip(small.weights, small.biases, strict=True)
        ]
        most_work, units = _STEP_WORK_OF_GPU, 0 if small.scales is None else len(small.scales)
        too_many = _too_many("layers", len(shapes), limits.max_layers)
        needed = 0 if too_many else limits.bytes_needed(network.event_shape[0], units, shapes)
    if too_many:
        return too_many
    if needed > limits.shared_bytes:
        return f"the network needs {needed} bytes of the {limits.shared_bytes} that a block has"
    if dispatch.requested() == "auto" and num_examples * work_of(network) > most_work:
        return "steps of so much work are left to matrix products, unless native is asked for"
    return None


def _stored_as(network: KnownNetwork) -> torch.dtype:
    """The type of convolutions and of the layers of each pixel."""
    device = network.readout.weight.device.type
    if not torch.is_autocast_enabled(device):
        return torch.float32
    return torch.get_autocast_dtype(device)


def _too_many(what: str, number: int, most: int) -> str | None:
    return f"its {number} {what} are more than a kernel's {most}" if number > most else None


def _launch_work(x: Tensor) -> int:
    return _LAUNCH_WORK if x.is_cpu else _LAUNCH_WORK_OF_GPU


def _fills_lanes(network: ConvDenseNetwork, num_examples: int) -> bool:
    """Whether so many whole images keep the lanes of all threads busy; fewer are better cut into
    parts, step by step."""
    layers: list[MultiscaleConv] = list(network.conv)  # type: ignore[arg-type]
    shapes = [layer.weights[0].shape for layer in layers]
    x = torch.empty(1).expand(num_examples, *network.event_shape)  # for its sizes
    lanes = LANES * torch.get_num_threads()
    full = num_examples / (max(1, -(-num_examples // lanes)) * lanes)
    route = dispatch.convolution_route(x, shapes, layers[0].num_scales, full)
    return route == "native" and full >= 0.6 and len(network.pixel) <= 2 * MAX_PIXEL_LAYERS


def _observed(
    x: Tensor, posterior: Posterior, is_binomial: bool
) -> tuple[Tensor | None, Tensor | None]:
    """y and its variance, or the probabilities of a flip."""
    if posterior.observed is None:
        return None, None
    y, sigma = posterior.observed
    sigma = torch.as_tensor(sigma)
    if is_binomial:
        check_flips(sigma)
        return y, sigma
    return y, checked_variance((sigma.double() ** 2).float(), x, torch.float32)


def _levels(process: GaussianDiffusion | BinomialDiffusion, device: torch.device) -> Tensor:
    """Coefficients of the forward process, (T + 1, 2)."""
    t = torch.arange(process.num_steps + 1, device=device)
    if isinstance(process, GaussianDiffusion):
        return process.coefficients(t)
    return process.noise_rows(t, t[:, None].float())
