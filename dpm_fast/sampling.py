"""Sampling: the reverse trajectory, and products of the model with other distributions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from dpm_fast import graphs, noise, ops, reference, trajectory
from dpm_fast.routes import Route, one_of

if TYPE_CHECKING:
    from dpm_fast.model import DiffusionModel


@dataclass(frozen=True)
class Posterior:
    """Factors r(x_0) that multiply the model: p(x_0) r(x_0), renormalized ([DPM] section 2.5).

    All that are given act together. Shapes broadcast against (N, *event), in the model's scale.

    Args:
        known: (mask, values): elements where the mask is true have these values. The result
            carries them bit for bit.
        observed: (y, sigma): y = x_0 + sigma * noise, an infinite sigma for elements that were not
            observed. For binary data sigma is the probability that a bit of y was flipped, in
            (0, 1/2]. A Gaussian trajectory under guidance "x_t" starts at y, unless its start is
            given; one of bits starts at the prior, since y says less the nearer sigma is to 1/2.
        log_r: any differentiable function (N, *event) -> (N,), log r in nats.
        known_as: what known elements are during the trajectory, from its start on: the clean
            values ("clean", the 2015 code) or these noised to the level of each step ("forward",
            which mixes better).
        guidance: where ``observed`` acts: on x_{t-1} as if it were x_0 ("x_t", the paper: r is
            held constant in t), or on the x_0 that the model predicts, with variance
            1 - alpha_bar_t ("x0"; Gaussian processes only).

    Raises:
        TypeError: for factors of the wrong kind.
        ValueError: for options and values out of range.
    """

    known: tuple[Tensor, Tensor] | None = None
    observed: tuple[Tensor, Tensor | float] | None = None
    log_r: Callable[[Tensor], Tensor] | None = None
    known_as: Literal["clean", "forward"] = "clean"
    guidance: Literal["x_t", "x0"] = "x_t"

    def __post_init__(self) -> None:
        if self.known_as not in ("clean", "forward"):
            raise ValueError(f"known_as must be 'clean' or 'forward', got {self.known_as!r}")
        if self.guidance not in ("x_t", "x0"):
            raise ValueError(f"guidance must be 'x_t' or 'x0', got {self.guidance!r}")
        if self.log_r is not None and not callable(self.log_r):
            raise TypeError(f"log_r must be a function, got {type(self.log_r).__name__}")
        if self.known is not None:
            mask, values = _pair("known", self.known, "(mask, values)", (Tensor, Tensor))
            if mask.dtype != torch.bool:
                raise ValueError(f"known mask must have dtype bool, got {mask.dtype}")
            if not bool(torch.isfinite(values).all()):
                raise ValueError(
                    "known values must be finite, also where the mask is False: got NaN or infinity"
                )
        if self.observed is not None:
            kinds = (Tensor, (Tensor, Real))
            y, sigma = _pair("observed", self.observed, "(y, sigma)", kinds)
            sigma = torch.as_tensor(sigma)
            if not bool((sigma > 0).all()):
                raise ValueError(f"observed sigma must be positive, got {sigma.min().item():g}")
            if not bool(torch.isfinite(y).all()):
                raise ValueError("observed y must be finite, got NaN or infinity")

    @property
    def moves_mean(self) -> bool:
        """Whether a factor moves the mean of a step by what the op does not know."""
        is_x_0 = self.observed is not None and self.guidance == "x0"
        return is_x_0 or self.log_r is not None

    def to_batch(
        self, shape: torch.Size, index: slice, like: Tensor, repeats: int = 1
    ) -> Posterior:
        """The factors of some of the examples, each ``repeats`` times: (N, *event) in the dtype and
        device of a batch."""

        def take(value: Tensor | float, name: str, dtype: torch.dtype) -> Tensor:
            tensor = torch.as_tensor(value, dtype=dtype, device=like.device)
            try:
                batch = tensor.expand(shape)[index]
                return batch if repeats == 1 else batch.repeat_interleave(repeats, 0)
            except RuntimeError:
                raise ValueError(
                    f"{name} must broadcast to {tuple(shape)}, got {tuple(tensor.shape)}"
                ) from None

        known = observed = None
        if self.known is not None:
            known = (
                take(self.known[0], "known mask", torch.bool),
                take(self.known[1], "known values", like.dtype),
            )
        if self.observed is not None:
            observed = (
                take(self.observed[0], "observed y", like.dtype),
                take(self.observed[1], "observed sigma", like.dtype),
            )
        return Posterior(known, observed, self.log_r, self.known_as, self.guidance)


def _pair(name: str, value: Any, meaning: str, kinds: tuple[Any, Any]) -> tuple[Any, Any]:
    if isinstance(value, tuple) and len(value) == 2 and all(map(isinstance, value, kinds)):
        return value
    parts = value if isinstance(value, tuple | list) else (value,)
    raise TypeError(
        f"{name} must be a tuple {meaning} of two tensors, got {type(value).__name__} of "
        f"{', '.join(type(part).__name__ for part in parts)}"
    )


Noise = Callable[[int], Tensor]  # t -> unit Gaussian noise of the step from x_t to x_{t-1}


def start_of_trajectory(
    x: Tensor,
    posterior: Posterior,
    known: tuple[Tensor, Tensor] | None,
    is_binary: bool = False,
) -> Tensor:
    """x_T under a posterior: at y where observed, then with the known elements in place."""
    if posterior.observed is not None and posterior.guidance == "x_t" and not is_binary:
        y, sigma = posterior.observed
        x = torch.where(torch.isinf(torch.as_tensor(sigma)), x, y)
    return _in_place(known, x)


def reverse_trajectory(
    model: DiffusionModel,
    x: Tensor,
    timesteps: Sequence[int],
    seed: int,
    ids: Tensor,
    posterior: Posterior,
    known_at: Callable[[int], tuple[Tensor, Tensor] | None],
    final: str,
    visit: Callable[[int, Tensor], None] | None = None,
    noise_at: Noise | None = None,
    *,
    reverse: Any = None,
    end: int | None = None,
) -> Tensor:
    """A step from each x_t to the next, for t in ``timesteps``.

    Steps write into one tensor, and what else they need is allocated once, so that beside the
    network's outputs a step takes no memory that grows with the examples.

    Args:
        model: whose network is used.
        x: (N, *event), x_t of the first timestep.
        timesteps: descending, at least 1.
        seed: of the noise.
        ids: (N,) int64, global indices of the examples.
        posterior: factors in the shape of x.
        known_at: (mask, values) of the known elements of x_t.
        final: "mean" takes the mean of a step to x_0, anything else draws there too.
        visit: called with (t, x_t) after each step; the next one writes over x_t.
        noise_at: given noise in place of that of the seed, for a Gaussian process.
        reverse: the kernels, by default the model's.
        end: where the last step leads, by default to the timestep below.

    Returns:
        (N, *event).
    """
    reverse = model.reverse if reverse is None else reverse
    if end is None:
        end = timesteps[-1] - 1 if timesteps else 0
    x = x.clone(memory_format=torch.contiguous_format)
    t_of_each = torch.empty(len(x), dtype=torch.int64, device=x.device)
    table = reverse.table(x.device).to(torch.promote_types(x.dtype, torch.float32))
    rows = table[:1].repeat(len(x), 1)
    for t, to in zip(timesteps, [*timesteps[1:], end], strict=False):
        t_of_each.fill_(t)
        rows.copy_(table[t])
        at_mean = to == 0 and final == "mean"
        eps = None if noise_at is None or at_mean else noise_at(t)
        x = single_step(
            model, reverse, x, t_of_each, rows, seed, ids, posterior, known_at(to), at_mean, eps
        )
        if visit is not None:
            visit(to, x)
    return x


def single_step(
    model: DiffusionModel,
    reverse: Any,
    x: Tensor,
    t: Tensor,
    rows: Tensor,
    seed: int,
    ids: Tensor,
    posterior: Posterior,
    known: tuple[Tensor, Tensor] | None,
    at_mean: bool = False,
    eps: Tensor | None = None,
) -> Tensor:
    """A step of ``reverse`` from x_t, with a t and a row of its table for each example (N, ...).

    It may write into x, and is given the known elements of where it leads.
    """
    given = (reverse, x, t, rows, model.network_output(x, t), seed, ids, posterior, known, at_mean)
    if model.process.kind == "gaussian":
        return _gaussian_step(*given, eps)
    return _binomial_step(*given)


def _gaussian_step(
    reverse: Any,
    x: Tensor,
    t: Tensor,
    rows: Tensor,
    out: Tensor,
    seed: int,
    ids: Tensor,
    posterior: Posterior,
    known: tuple[Tensor, Tensor] | None,
    at_mean: bool,
    eps: Tensor | None,
) -> Tensor:
    """One step of the op, into x; what it does not know by itself comes as a drift of the mean."""
    mu_out, sigma2_out = reverse.split(x, out)
    observed = drift = None
    if posterior.observed is not None and posterior.guidance == "x_t":
        y, sigma2_y = observation(posterior, x)
        observed = y, sigma2_y.expand_as(x)
    if posterior.moves_mean or eps is not None:
        mu, sigma2 = reference.reverse_moments(x, mu_out, sigma2_out, rows)
        mu, sigma2, shift = perturbed(reverse, x, t, mu, sigma2, posterior, x.dtype)
        if reverse.is_deterministic:
            return _in_place(known, (mu + shift).to(x.dtype))
        if eps is not None:
            shift = shift + sigma2.sqrt() * eps
        drift = (shift / sigma2).to(x.dtype)
    return ops.step_(
        x,
        mu_out,
        sigma2_out,
        rows,
        seed,
        ids,
        t,
        known=known,
        observed=observed,
        drift=drift,
        deterministic=at_mean or eps is not None or reverse.is_deterministic,
    )


def observation(posterior: Posterior, x: Tensor) -> tuple[Tensor, Tensor]:
    """y and sigma_y^2 of a Gaussian process, in the dtype of x."""
    assert posterior.observed is not None
    y, sigma = posterior.observed
    # Squared in float64: the square of a small sigma is 0 in a narrow type.
    sigma2_y = torch.as_tensor(sigma, dtype=torch.float64, device=x.device) ** 2
    return y.to(x.dtype), sigma2_y.to(x.dtype)


def perturbed(
    reverse: Any,
    x: Tensor,
    t: Tensor,
    mu: Tensor,
    sigma2: Tensor,
    posterior: Posterior,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel N(mu, sigma2) from x_t under ``observed`` and ``log_r``: its mean before a shift,
    its variance, and the shift.

    Args:
        reverse: the kernels.
        x: (N, *event), x_t.
        t: (N,) int64.
        mu, sigma2: moments of p(x_{t-1} | x_t), shapes that broadcast to that of x.
        posterior: of these examples.
        dtype: of what ``log_r`` is given.
    """
    shift = torch.zeros_like(mu)
    if posterior.observed is not None:
        y, sigma2_y = observation(posterior, x)
        if posterior.guidance == "x_t":
            mu, sigma2 = reference.observe(mu, sigma2, y, sigma2_y)
        else:
            # x_0 given x_t as N(prediction, 1 - alpha_bar_t), times N(y, sigma_y^2)
            prediction = reverse.x_0_from_mean(mu, x, t)
            variance = reverse.beta_bar(t, x)
            shifted, _ = reference.observe(prediction, variance, y, sigma2_y)
            shift = reverse.row(t, x).c_0 * (shifted - prediction)
    if posterior.log_r is not None:
        shift = shift + sigma2 * _gradient(posterior.log_r, (mu + shift).to(dtype))
    return mu, sigma2, shift


def _binomial_step(
    reverse: Any,
    x: Tensor,
    t: Tensor,
    rows: Tensor,
    out: Tensor,
    seed: int,
    ids: Tensor,
    posterior: Posterior,
    known: tuple[Tensor, Tensor] | None,
    at_mean: bool,
) -> Tensor:
    out, drift = reverse.split(x, out)[0], None
    observed = None
    if posterior.observed is not None:
        observed = posterior.observed[0], torch.as_tensor(posterior.observed[1])
    if posterior.log_r is not None:
        logit = reference.bernoulli_logit(x, out, rows)
        _, drift = perturbed_logit(logit, posterior, x.dtype)
    return ops.bernoulli_step_(
        x, out, rows, seed, ids, t,
        known=known, observed=observed, drift=drift, deterministic=at_mean,
    )  # fmt: skip


def perturbed_logit(
    logit: Tensor, posterior: Posterior, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """The logit of x_{t-1} = 1 under ``observed``, and what ``log_r`` adds to it."""
    if posterior.observed is not None:
        y, flip = posterior.observed
        logit = reference.bernoulli_observe(logit, y, torch.as_tensor(flip, device=y.device))
    if posterior.log_r is None:
        return logit, None
    # First order in x about the mean rate, as the Gaussian case is about the mean.
    return logit, _gradient(posterior.log_r, torch.sigmoid(logit).to(dtype))


def value_of(log_r: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """log r of x, (N,)."""
    value = log_r(x)
    if not isinstance(value, Tensor):
        raise TypeError(f"log_r must return a tensor, got {type(value).__name__}")
    if value.shape != x.shape[:1]:
        raise ValueError(f"log_r must return shape {tuple(x.shape[:1])}, got {tuple(value.shape)}")
    if is_wrong(value.isnan() | (value == torch.inf)):
        raise ValueError("log_r must be a number or -infinity, got NaN or infinity")
    return value


def _gradient(log_r: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        value = value_of(log_r, x)
        (gradient,) = (
            torch.autograd.grad(value.sum(), x, allow_unused=True)
            if value.requires_grad
            else (None,)
        )
        if gradient is None:
            raise ValueError(
                "log_r must be differentiable with respect to its argument, got a result that "
                "does not depend on it (a constant, or computed of detached tensors)"
            )
    if is_wrong(~gradient.isfinite()):
        raise ValueError("log_r must have a finite gradient, got NaN or infinity")
    return gradient


@dataclass(frozen=True)
class Request:
    """What is asked of `DiffusionModel.sample`, whose arguments these are."""

    n: int
    seed: int
    example_ids: Tensor | None
    posterior: Posterior
    start: tuple[int, Tensor] | None
    return_trajectory: Iterable[int] | None
    batch_size: int
    route: Route
    callback: Callable[[int, Tensor], object] | None = None
    callback_every: int = 1
    use_graphs: bool | None = None

    def ids(self, device: torch.device) -> Tensor:
        """Of the examples, (n,)."""
        given = torch.arange(self.n) if self.example_ids is None else self.example_ids
        return given.to(device)

    def calls_back(self, t: int) -> bool:
        """Whether a callback is due at x_t."""
        route = self.route
        if self.callback is None or t not in route.states:
            return False
        return t == route.end or route.states.index(t) % self.callback_every == 0


def sample(model: DiffusionModel, request: Request) -> Tensor | tuple[Tensor, dict[int, Tensor]]:
    """See `DiffusionModel.sample`."""
    process, seed, n, route = model.process, request.seed, request.n, request.route
    wanted = _wanted(request.return_trajectory)
    event_shape = check(model, request)
    _check_wanted(wanted or [], route)
    device, dtype = place_of(model)
    shape = torch.Size((n, *event_shape))
    ids = request.ids(device)
    done: list[Tensor] = []
    states: dict[int, list[Tensor]] = {t: [] for t in wanted or ()}
    in_one = trajectory.can_launch(model, request.posterior, n, request.batch_size)
    batch_size = request.batch_size
    captured = None
    if not in_one:
        captured = graphs.graphs_of(model, request, device)
    if in_one:
        batch_size = trajectory.examples_of_launch(model, batch_size)

    def visit(t: int, x: Tensor) -> None:
        if t in states:
            states[t].append(x.clone())
        if request.callback is not None and request.calls_back(t):
            request.callback(t, x.clone())  # which may keep it, or write into it

    for first in range(0, n, batch_size):
        index = slice(first, min(first + batch_size, n))
        batch_ids = ids[index]
        x = start_of_batch(model, request, shape, index, batch_ids)
        here = request.posterior.to_batch(shape, index, x)
        known_at = _known_at(process, here, seed, batch_ids)
        known = known_at(route.start)
        if request.start is None:
            x = start_of_trajectory(x, here, known, process.kind == "binomial")
        else:
            x = _in_place(known, x)
        visit(route.start, x)
        if in_one:
            x = trajectory.launch(model, x, request, batch_ids, here, visit, states)
        else:
            by_steps = partial(
                reverse_trajectory, model, seed=seed, ids=batch_ids, posterior=here,
                known_at=known_at, final=route.final, visit=visit, reverse=route.reverse,
            )  # fmt: skip
            if captured is None:
                x = by_steps(x, route.timesteps, end=route.end)
            else:
                inputs = graphs.inputs_of(batch_ids, here)
                x = captured.reverse_trajectory(
                    x, route.timesteps, route.end, inputs, by_steps, visit
                )
        if here.known is not None and route.writes_known:
            x = torch.where(here.known[0], here.known[1], x)
        done.append(x)
    samples = torch.cat(done) if done else torch.empty(shape, dtype=dtype, device=device)
    if wanted is None:
        return samples
    return samples, {t: torch.cat(parts) if parts else samples for t, parts in states.items()}


def _wanted(return_trajectory: Iterable[int] | None) -> list[int] | None:
    """The timesteps as a sorted list of ints."""
    if return_trajectory is None:
        return None
    if isinstance(return_trajectory, Tensor) and return_trajectory.ndim:
        return_trajectory = return_trajectory.tolist()
    if isinstance(return_trajectory, Tensor | str) or not isinstance(return_trajectory, Iterable):
        raise TypeError(
            "return_trajectory must be an iterable of timesteps, got "
            f"{type(return_trajectory).__name__}"
        )
    name = "each timestep of return_trajectory"
    return sorted({noise.check_integer(t, name) for t in return_trajectory})


def checked_start(start: object) -> tuple[int, Tensor] | None:
    """The pair of `DiffusionModel.sample`, its t as an int."""
    if start is None:
        return None
    if not isinstance(start, tuple | list) or len(start) != 2:
        raise TypeError(f"start must be a pair (t, x_t), got {type(start).__name__}")
    t, x_t = start
    if isinstance(t, Tensor) and t.ndim == 0:
        t = t.item()
    t = noise.check_integer(t, "start t")
    if not isinstance(x_t, Tensor):
        raise TypeError(f"start x_t must be a tensor, got {type(x_t).__name__}")
    return t, x_t


def place_of(model: DiffusionModel) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of a model's samples."""
    parameter = next(model.parameters(), torch.empty(0))
    is_wide = parameter.dtype == torch.float64
    return parameter.device, torch.float64 if is_wide else torch.float32


def start_of_batch(
    model: DiffusionModel,
    request: Request,
    shape: torch.Size,
    index: slice,
    ids: Tensor,
    repeats: int = 1,
) -> Tensor:
    """Where some of the examples (N, *event) start, each ``repeats`` times: at x_T, or as given."""
    device, dtype = place_of(model)
    if request.start is None:
        return model.process.sample_x_T(shape[1:], request.seed, ids, dtype)
    x = request.start[1].to(device, dtype).expand(shape)[index]
    return x if repeats == 1 else x.repeat_interleave(repeats, 0)


def check(model: DiffusionModel, request: Request) -> tuple[int, ...]:
    """Refuse what the model cannot do; the shape of one example."""
    event, n, start = model.event_shape, request.n, request.start
    is_gaussian = model.process.kind == "gaussian"
    if n < 0 or request.batch_size < 1:
        name, least, given = ("n", 0, n) if n < 0 else ("batch_size", 1, request.batch_size)
        raise ValueError(f"{name} must be at least {least}, got {given}")
    if start is not None:
        x_t = start[1]
        event = event or tuple(x_t.shape[1:])
        if tuple(x_t.shape) not in ((n, *event), (1, *event), event):
            raise ValueError(f"start x_t must have shape {(n, *event)}, got {tuple(x_t.shape)}")
        if is_wrong(~x_t.isfinite()):
            raise ValueError("start x_t must be finite, got NaN or infinity")
        if not is_gaussian and is_wrong(~_is_bit(x_t)):
            raise ValueError("start x_t must be 0 or 1 for a binomial process, got other values")
    if event is None:
        raise ValueError("sample requires data or a network with event_shape, got neither")
    if not is_gaussian and request.posterior.guidance == "x0":
        raise ValueError("guidance 'x0' requires a Gaussian process, got a binomial one")
    if not is_gaussian:
        _check_bits(request.posterior)
    posterior = request.posterior
    if request.route.reverse.is_deterministic and (
        posterior.log_r is not None or (posterior.observed and posterior.guidance == "x_t")
    ):
        raise ValueError(
            "eta must be above 0 with log_r, or observed under guidance 'x_t': they move a step by "
            "as much as its variance, got 0"
        )
    return event


def _check_wanted(wanted: list[int], route: Route) -> None:
    if set(wanted) <= set(route.states):
        return
    if isinstance(route.timesteps, range):
        where = f"timesteps in {route.end}..{route.start}"
    else:
        where = one_of(route.states)
    raise ValueError(f"return_trajectory must be {where}, where this trajectory goes, got {wanted}")


def is_wrong(wrong: Tensor) -> bool:
    """Whether a check fails anywhere; on a CPU only, elsewhere it would wait for the device."""
    return wrong.device.type == "cpu" and bool(wrong.any())


def _in_place(known: tuple[Tensor, Tensor] | None, x: Tensor) -> Tensor:
    return x if known is None else torch.where(known[0], known[1], x)


def _check_bits(posterior: Posterior) -> None:
    if posterior.known is not None and not bool(_is_bit(posterior.known[1]).all()):
        raise ValueError("known values must be 0 or 1 for a binomial process, got other values")
    if posterior.observed is None:
        return
    y, flip = posterior.observed[0], torch.as_tensor(posterior.observed[1])
    if not bool(_is_bit(y).all()):
        raise ValueError("observed y must be 0 or 1 for a binomial process, got other values")
    if not bool((flip <= 0.5).all()):
        raise ValueError(
            "observed sigma must be the probability of a flip, in (0, 1/2] for a binomial process, "
            f"got {flip.max().item():g}"
        )


def _is_bit(x: Tensor) -> Tensor:
    return (x == 0) | (x == 1)


def _known_at(
    process: Any, posterior: Posterior, seed: int, ids: Tensor
) -> Callable[[int], tuple[Tensor, Tensor] | None]:
    if posterior.known is None or posterior.known_as == "clean":
        return lambda t: posterior.known
    mask, values = posterior.known

    def noised(t: int) -> tuple[Tensor, Tensor]:
        level = torch.full_like(ids, t)
        return mask, process.sample_x_t(values, level, seed, ids) if t else values

    return noised
