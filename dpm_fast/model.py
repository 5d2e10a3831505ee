"""A diffusion model: a process, a network and a parameterization, with loss, bound and samples."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dpm_fast import bound, losses, noise, ops, particles, reference, sampling
from dpm_fast.binomial import BinomialDiffusion
from dpm_fast.bound import Bound
from dpm_fast.gaussian import GaussianDiffusion
from dpm_fast.importance import Importance
from dpm_fast.layers import check_timesteps
from dpm_fast.memory import num_bytes
from dpm_fast.noise import has_values
from dpm_fast.routes import route_of
from dpm_fast.sampling import Posterior

if TYPE_CHECKING:
    from dpm_fast.data import DataSpec

_UP_TO_FLOAT32 = (torch.float32, torch.bfloat16, torch.float16)
_CHECKED_ELEMENTS = 2**20  # of data at a time
_OF_TRAINING = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)


class DiffusionModel(nn.Module):
    """A diffusion probabilistic model p(x_0) ([DPM] section 2).

    Args:
        process: the forward process.
        network: any module (x, t) -> output with x (N, C, *spatial) or (N, D) and t (N,) int64 in
            1..T; the output is a tensor, or the attribute ``sample`` of what is returned. A
            Gaussian process takes 2 C output channels, mu_out before sigma2_out, or C for a fixed
            variance; a binomial process C logits. x has the dtype of its first parameter:
            `model.bfloat16()` rounds what the network sees, and nothing else.
        parameterization: what the outputs mean, see `GaussianReverse` and `BinomialReverse`;
            default "perturbation" and "rate".
        variance: see `GaussianReverse`; default the parameterization's own.
        clamp: (low, high) for a predicted x_0.
        data: scale, range and grid of the data. Needed for the edge "discretized", for the
            dequantization of discrete data, and for figures in the units of the data.
        t_base: the network's first timestep: 1, or 0 for networks that count from 0 (their t is
            ours less one).

    Raises:
        TypeError: for a process, a network or data of another kind.
        ValueError: for options that do not fit together.
    """

    def __init__(
        self,
        process: GaussianDiffusion | BinomialDiffusion,
        network: nn.Module,
        parameterization: str | None = None,
        *,
        variance: str | None = None,
        clamp: tuple[float, float] | None = None,
        data: DataSpec | None = None,
        t_base: int = 1,
    ):
        super().__init__()
        if not isinstance(process, GaussianDiffusion | BinomialDiffusion):
            raise TypeError(
                "process must be a GaussianDiffusion or a BinomialDiffusion, "
                f"got {type(process).__name__}"
            )
        if not callable(network) or isinstance(network, type):
            is_class = isinstance(network, type)
            given = f"the class {network.__name__}" if is_class else type(network).__name__
            raise TypeError(f"network must be a module, got {given}")
        if data is not None:
            _check_spec(data)
        if t_base not in (0, 1):
            raise ValueError(f"t_base must be 0 or 1, got {t_base!r}")
        if data is not None and (data.kind == "binary") != (process.kind == "binomial"):
            raise ValueError(
                f"data of kind {data.kind!r} do not fit a {process.kind} process: binary data take "
                "BinomialDiffusion, all others GaussianDiffusion"
            )
        self.process, self.network, self.data, self.t_base = process, network, data, t_base
        self.reverse: Any = process.reverse(parameterization, variance, clamp)  # type: ignore[arg-type]
        self._check_network()

    @property
    def event_shape(self) -> tuple[int, ...] | None:
        """Shape of one example, where the data or the network tell it."""
        if self.data is not None:
            return tuple(self.data.shape)
        shape = getattr(self.network, "event_shape", None)
        return None if shape is None else tuple(shape)

    def network_output(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The network at x_t (N, *event) and our t (N,) in 1..T, in the dtype of its parameters.

        A bfloat16 or float16 network sees x_t rounded; the trajectory itself stays in float32.
        """
        parameters = getattr(self.network, "parameters", None)
        parameter = next(parameters(), None) if parameters is not None else None
        if parameter is not None and parameter.dtype in _UP_TO_FLOAT32:
            x_t = x_t.to(parameter.dtype) if x_t.dtype in _UP_TO_FLOAT32 else x_t
        out = self.network(x_t, t - 1 if self.t_base == 0 else t)
        if isinstance(out, Tensor):
            return out
        sample = getattr(out, "sample", None)  # as diffusers' networks have it
        if not isinstance(sample, Tensor):
            raise TypeError(f"the network must return a tensor, got {type(out).__name__}")
        return sample

    def term_nats(
        self, x_0: Tensor, t: Tensor, seed: int, example_ids: Tensor, edge: str = "decoder"
    ) -> Tensor:
        """One term of the code length -K per example: KL at t >= 2, the decoder at t = 1.

        Args:
            x_0: (N, *event), model scale.
            t: (N,) int64 in 1..T.
            seed, example_ids: of the noise of x_t.
            edge: one of `dpm_fast.bound.EDGES`.

        Returns:
            (N,) float64 nats.
        """
        check_timesteps(t, self.process.num_steps, x_0)
        x_0 = _wide(x_0)
        x_t = self.process.sample_x_t(x_0, t, seed, example_ids)
        return self.nats_of_output(x_0, x_t, t, self.network_output(x_t, t), edge)

    def nats_of_output(self, x_0: Tensor, x_t: Tensor, t: Tensor, out: Tensor, edge: str) -> Tensor:
        """`term_nats` for the network's output ``out`` at x_t and t."""
        if not edge.startswith("discretized"):
            return self.reverse.kl(x_0, x_t, t, out)
        assert self.data is not None
        return self.reverse.kl(x_0, x_t, t, out, edge, self.data.bins)

    def loss(
        self,
        x_0: Tensor,
        *,
        seed: int,
        example_ids: Tensor,
        kind: str = "bound",
        edge: str = "decoder",
        vb_weight: float = 1e-3,
        importance: Importance | None = None,
        check_values: bool | None = None,
    ) -> Tensor:
        """A stochastic training loss: one timestep per example, spread evenly by example id.

        - "bound": an unbiased estimate of -K / (D ln 2), bits/dim of the scaled data
        - "simple": mean squared error of mu_out per element ([DDPM] equation 14), a number without
          unit; t in 1..T
        - "hybrid": simple + vb_weight * bits/dim of the terms of the bound, whose gradient acts on
          the variance only ([iDDPM] equation 16; vb_weight 1e-3 there, with T = 1000)

        Args:
            x_0: (N, *event), model scale; discrete data are dequantized here unless the edge is
                "discretized".
            seed: of the noise.
            example_ids: (N,) int64 global ids: in training the number of examples seen so far,
                so that no noise is used twice.
            kind: "bound", "simple" or "hybrid".
            edge: of the bound, see `bound`; t = 1 takes part unless it is "paper".
            vb_weight: weight of the bound in "hybrid".
            importance: chooses the timesteps of "bound" in place of an even spread, and records
                the terms; its `Importance.update` is the caller's.
            check_values: look at the values of x_0 too, see `check_data`; False for examples that
                have been checked.

        Returns:
            Scalar, differentiable with respect to the network and a learned schedule.

        Raises:
            ValueError, TypeError: for data or options that do not fit the model.
        """
        self._check_options(edge)
        self.check_data(x_0, values=check_values)
        if kind not in losses.KINDS:
            raise ValueError(f"kind must be one of {', '.join(losses.KINDS)}, got {kind!r}")
        _check_example_ids(example_ids, len(x_0))
        if example_ids.device != x_0.device:
            raise ValueError(
                f"example_ids must be on {x_0.device} like x_0, got {example_ids.device}"
            )
        if kind != "bound" and self.process.kind != "gaussian":
            raise ValueError(f"loss kind {kind!r} requires a Gaussian process")
        if kind == "hybrid" and self.reverse.num_outputs == 1:
            raise ValueError(
                f"loss kind 'hybrid' requires a learned variance, got {self.reverse.variance!r}"
            )
        if kind == "hybrid" and not torch.compiler.is_compiling():
            _check_weight(vb_weight)
        if importance is not None:
            if kind != "bound":
                raise ValueError(f"importance requires the loss kind 'bound', got {kind!r}")
            self._check_importance(importance)
        with self.process.shared_tables():
            return losses.estimate(
                self,
                _wide(x_0),
                seed=seed,
                example_ids=example_ids,
                kind=kind,
                edge=edge,
                vb_weight=vb_weight,
                importance=importance,
            )

    def bound(
        self,
        x_0: Tensor,
        *,
        timesteps: str | int = "exact",
        importance: Importance | None = None,
        edge: str = "decoder",
        seed: int = 0,
        example_ids: Tensor | None = None,
        draws: int = 1,
        batch_size: int | None = None,
        max_memory: int | str | None = None,
        progress: bool | Callable[[int, int], object] = False,
        partial: str | os.PathLike[str] | None = None,
    ) -> Bound:
        """Lower bound on log p(x_0) of each example ([DPM] equations 10 to 14).

        Args:
            x_0: (N, *event), model scale. Discrete data are dequantized here, one draw of uniform
                noise per example, unless the edge is "discretized".
            timesteps: "exact" (every t once), or the number of timesteps per example, one from
                each of as many strata; t = 1 is always evaluated. T or more are every t.
            importance: makes the strata equal in probability instead of length, see `Importance`;
                that of a `Trainer` knows the model's terms. It is left as it is.
            edge: "decoder" (a bound for every example and any scale), "discretized" (the same,
                with the probability of the data's bin at t = 1), "discretized_tanh" ([iDDPM]'s
                approximation of it), "paper" ([DPM] equation 14, a bound only averaged over data
                with E |x_0|^2 = D).
            seed: of the noise.
            example_ids: (N,) int64, default 0..N - 1.
            draws: noise draws per (example, timestep), each with timesteps of its own in the
                strata; two or more give `Bound.mc_stderr`.
            batch_size: (example, timestep) pairs in one call of the network, 1024 by default: few
                examples fill a batch with many of their timesteps. The result depends on it only
                by the rounding of the network, whose matrix products torch orders by their size.
            max_memory: bytes, or text as "2GiB", that the work may hold beyond the model, x_0 and
                the result: takes as many pairs to a call as fit, but no more than ``batch_size``
                where that is given too. Known from the peaks of a few calls, see
                `dpm_fast.memory.peak_bytes`.
            progress: True for a line on standard error, or a function that is called with the
                number of terms done and that of all, before each call of the network and at the
                end.
            partial: a file for the sums of a bound that is not finished, written every half
                minute and when SIGINT, SIGTERM or an error ends the work; the same call goes on
                from there, with equal bits on as many threads with an equal batch_size. It stays
                when the bound is finished, and gives it again.

        Raises:
            ValueError, TypeError: for data or options that do not fit the model; a ``max_memory``
                too small for one pair; a file ``partial`` that is of another bound, or none.
            dpm_fast.signals.Interrupted: a KeyboardInterrupt, after a signal, with ``partial``.
            OSError: where ``partial`` cannot be written.
        """
        self._check_options(edge)
        self.check_data(x_0, values=True)
        self._warn_of_training_mode()
        if not (isinstance(timesteps, str) and timesteps == "exact"):
            number = noise.as_integer(timesteps)
            if number is None or number < 1:
                raise ValueError(
                    f"timesteps must be 'exact' or an integer of at least 1, got {timesteps!r}"
                )
            timesteps = number if number < self.process.num_steps else "exact"
        draws = _at_least_1(draws, "draws")
        batch_size = None if batch_size is None else _at_least_1(batch_size, "batch_size")
        max_bytes = None if max_memory is None else num_bytes(max_memory, "max_memory")
        if not isinstance(progress, bool) and not callable(progress):
            raise TypeError(
                "progress must be True, False or a function of two numbers, "
                f"got {type(progress).__name__}"
            )
        if importance is not None:
            if timesteps == "exact":
                raise ValueError(
                    "importance requires a number of timesteps below "
                    f"T = {self.process.num_steps}, got all"
                )
            self._check_importance(importance)
        if example_ids is None:
            example_ids = torch.arange(len(x_0))
        _check_example_ids(example_ids, len(x_0))
        with self.process.shared_tables():
            return bound.estimate(
                self,
                x_0,
                timesteps=timesteps,
                importance=importance,
                edge=edge,
                seed=seed,
                example_ids=example_ids.to(x_0.device),
                draws=draws,
                batch_size=batch_size,
                max_memory=max_bytes,
                progress=progress,
                partial=partial,
            )

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        seed: int = 0,
        example_ids: Tensor | None = None,
        posterior: Posterior | None = None,
        start: tuple[int, Tensor] | None = None,
        stop: int | None = None,
        final: str | None = None,
        num_inference_steps: int | None = None,
        timesteps: Iterable[int] | None = None,
        eta: float | None = None,
        return_trajectory: Iterable[int] | None = None,
        callback: Callable[[int, Tensor], object] | None = None,
        callback_every: int = 1,
        num_particles: int | None = None,
        batch_size: int = 1024,
        use_graphs: bool | None = None,
    ) -> Any:
        """Samples of the model, or of its product with other distributions ([DPM] section 2.5).

        Args:
            n: how many.
            seed: of the noise; the noise is a function of (seed, example id) alone.
            example_ids: (n,) int64, default 0..n - 1.
            posterior: factors that multiply the model, see `Posterior`.
            start: (t, x_t): start the reverse trajectory there instead of at x_T; known elements
                of the posterior are put in place, an observation does not replace it.
            stop: t in 0..T, give back x_t of there, as it is on the way; ``start`` goes on from it,
                with the same ``timesteps`` (``num_inference_steps`` spaces 1..t anew).
            final: how it ends where nothing stops it: "x_1" stops before the last step (the 2015
                code; default of "perturbation" and "decay"), "mean" takes the mean of that step
                (default of the others), "sample" draws it too (default of binomial processes).
            num_inference_steps: take so many steps instead of T (one fewer to x_1), from timesteps
                evenly spaced over 1..T, or 1..t of ``start``, both ends among them. Gaussian
                processes of any parameterization but "decay". A step's noise is that of the
                timestep that it comes from, its variance the model's for a step of that length
                ([iDDPM] section 4).
            timesteps: those from which steps are taken, in place of evenly spaced ones; T is among
                them, or the t of ``start``.
            eta: in [0, 1]: the variance of each step is eta^2 times that of
                q(x_s | x_t, x_0), in place of the model's: 0 is DDIM, without noise after the
                start.
            return_trajectory: timesteps whose states are wanted too, among those that the
                trajectory passes, its first and its last included.
            callback: called with (t, x_t), of a batch (b, *event), at the start, after every
                ``callback_every`` steps, and at the end; batches follow one another. Where a
                kernel runs whole trajectories, it comes between launches. It must not change the
                model.
            callback_every: number of steps, at least 1.
            num_particles: k particles for each of the n examples, weighted and resampled so that
                they are of the product itself, however crude the perturbed kernels are
                (sequential Monte Carlo, `dpm_fast.particles`). They start at N(0, I) whatever was
                observed, or all of an example at its given start; the noise of particle i of
                example id is that of id k + i. Every state is drawn: ``final`` is "sample"
                where it would be "mean". Known elements (known_as "forward") cross a bridge of the
                forward process to their values.
            batch_size: examples, or particles, in one call of the network. The result depends on
                it only by the rounding of the network (about 2e-7 of float32 outputs); not at all
                where a kernel runs whole trajectories (`dpm_fast.trajectory`), which takes more at
                once.
            use_graphs: on a GPU, capture a step as a CUDA graph and replay it, where no kernel runs
                whole trajectories (`dpm_fast.graphs`); by default only with DPM_FAST_GRAPHS=1, as
                this has not run on a GPU yet.

        Returns:
            (n, *event) in model scale; with ``return_trajectory`` also {t: x_t}; with
            ``num_particles`` a `WeightedSamples` of (n, k, *event).

        Raises:
            ValueError, TypeError: for shapes, options or values that do not fit the model. Values
                are looked at on a CPU only.
        """
        n, batch_size = noise.check_integer(n, "n"), noise.check_integer(batch_size, "batch_size")
        if example_ids is not None:
            _check_example_ids(example_ids, n)
        if posterior is not None and not isinstance(posterior, Posterior):
            raise TypeError(f"posterior must be a Posterior, got {type(posterior).__name__}")
        if callback is not None and not callable(callback):
            raise TypeError(f"callback must be a function, got {type(callback).__name__}")
        start = sampling.checked_start(start)
        self._warn_of_training_mode()
        with self.process.shared_tables():
            request = sampling.Request(
                n,
                seed,
                example_ids,
                posterior or Posterior(),
                start,
                return_trajectory,
                batch_size,
                route_of(
                    self,
                    None if start is None else start[0],
                    stop,
                    final,
                    num_inference_steps,
                    timesteps,
                    eta,
                    num_particles is not None,
                ),
                callback,
                _at_least_1(callback_every, "callback_every"),
                use_graphs,
            )
            if num_particles is not None:
                num_particles = noise.check_integer(num_particles, "num_particles")
                return particles.sample(self, request, num_particles)
            return sampling.sample(self, request)

    def dequantize(self, x_0: Tensor, seed: int, example_ids: Tensor) -> Tensor:
        """x_0 plus uniform noise of one grey level for discrete data, x_0 itself otherwise."""
        if self.data is None or self.data.kind != "discrete":
            return x_0
        event = x_0.shape[1:]
        u = ops.uniform(seed, noise.Stream.DEQUANTIZE, example_ids, 0, event, x_0.dtype)
        return x_0 + (u - 0.5) * self.data.bin_width

    def null_nats(self, x_0: Tensor, edge: str) -> Tensor:
        """Code length of the null model on the same data, nats per example.

        The null model is N(0, I) on Gaussian data, integrated over each grey level's bin for a
        discretized edge, or independent bits of the prior rate.

        Args:
            x_0: (N, *event), model scale.
            edge: one of `dpm_fast.bound.EDGES`.

        Returns:
            (N,) float64, summed over elements.
        """
        if edge.startswith("discretized"):
            assert self.data is not None
            zero = torch.zeros((), dtype=torch.float64, device=x_0.device)
            nats = reference.bin_nats(edge)(x_0, zero, zero + 1, self.data.bins)
            return reference.sum_over_event(nats)
        return self.process.null_nats(x_0)

    def check_data(self, x_0: Tensor, *, values: bool | None = None) -> None:
        """Refuse data that the model cannot take.

        Values are checked here, once, and not by the ops of a step: `ops.bernoulli_noise` takes
        NaN for 0, and `ops.bernoulli_kl` makes 0 nats of rows that are all 0.

        Args:
            x_0: what should be (N, *event) floating point, finite, N >= 1; 0 and 1 only for a
                binomial process; on the grid of the grey levels for discrete data.
            values: look at the values too; by default only on a CPU, where that waits for nothing.
                Under `torch.compile` and transforms of `torch.func` they are never looked at.

        Raises:
            TypeError: for an integer tensor, or no tensor.
            ValueError: for a wrong shape, no examples, or wrong values.
        """
        if not isinstance(x_0, Tensor) or not x_0.is_floating_point():
            given = x_0.dtype if isinstance(x_0, Tensor) else type(x_0).__name__
            raise TypeError(f"x_0 must be a floating-point tensor in model scale, got {given}")
        shape = self.event_shape
        if (shape is not None and tuple(x_0.shape[1:]) != shape) or x_0.dim() < 2:
            wanted = "*event" if shape is None else ", ".join(map(str, shape))
            raise ValueError(f"x_0 must have shape (N, {wanted}), got {tuple(x_0.shape)}")
        if len(x_0) == 0:
            raise ValueError("x_0 must have at least one example, got none")
        parameter = next(self.parameters(), x_0)
        if (parameter.dtype == torch.float64) != (x_0.dtype == torch.float64):
            raise TypeError(
                f"x_0 must have dtype {parameter.dtype} like the model, got {x_0.dtype}"
            )
        if parameter.device != x_0.device:
            raise ValueError(f"x_0 must be on {parameter.device} like the model, got {x_0.device}")
        if not has_values():
            return
        if not (x_0.device.type == "cpu" if values is None else values):
            return
        rows = max(1, _CHECKED_ELEMENTS // max(1, x_0[0].numel()))
        for part in x_0.split(rows):  # of a whole data set, copies would take memory
            self._check_values(part)

    def _check_values(self, x_0: Tensor) -> None:
        if not bool(torch.isfinite(x_0).all()):
            raise ValueError("x_0 must be finite, got NaN or infinity")
        if self.process.kind == "binomial" and not bool(((x_0 == 0) | (x_0 == 1)).all()):
            raise ValueError("x_0 must be 0 or 1 for a binomial process, got other values")
        if self.data is not None and self.data.kind == "discrete":
            self.data.check_on_grid(x_0)

    def extra_repr(self) -> str:
        reverse, data = self.reverse, None if self.data is None else self.data.name
        return (
            f"parameterization={reverse.parameterization!r}, variance={reverse.variance!r}, "
            f"t_base={self.t_base}, data={data!r}"
        )

    def _warn_of_training_mode(self) -> None:
        """Dropout would change a sample or a bound from call to call."""
        if not self.training or not isinstance(self.network, nn.Module):
            return
        if any(m.training and isinstance(m, _OF_TRAINING) for m in self.network.modules()):
            warnings.warn(
                "the network's dropout or batch normalization is in training mode: "
                "model.eval() before samples and bounds",
                stacklevel=3,
            )

    def _check_network(self) -> None:
        """Refuse a network that tells of itself what does not fit."""
        required = {"num_steps": self.process.num_steps, "num_outputs": self.reverse.num_outputs}
        if self.data is not None:
            required["event_shape"] = tuple(self.data.shape)
        for name, value in required.items():
            actual = getattr(self.network, name, value)
            if (tuple(actual) if name == "event_shape" else actual) != value:
                of = "the data" if name == "event_shape" else f"the {self.process.kind} process"
                if name == "num_outputs" and self.process.kind == "gaussian":
                    reverse = self.reverse
                    of = f"{reverse.parameterization!r} with variance {reverse.variance!r}"
                raise ValueError(f"network must have {name} {value} for {of}, got {actual}")

    def _check_importance(self, importance: Importance) -> None:
        if not isinstance(importance, Importance):
            raise TypeError(f"importance must be an Importance, got {type(importance).__name__}")
        shape = tuple(importance.moments.shape)
        if shape != (2, self.process.num_steps + 1):
            raise ValueError(
                f"importance must have num_steps {self.process.num_steps}, got {shape[1] - 1}"
            )

    def _check_options(self, edge: str) -> None:
        if edge not in bound.EDGES:
            raise ValueError(f"edge must be one of {', '.join(bound.EDGES)}, got {edge!r}")
        if edge.startswith("discretized") and (self.data is None or self.data.kind != "discrete"):
            given = "none" if self.data is None else f"{self.data.kind} data"
            raise ValueError(
                f"edge {edge!r} requires discrete data and their DataSpec, got {given}"
            )


def _wide(x_0: Tensor) -> Tensor:
    """bfloat16 and float16 examples in float32: x_t rounded to bfloat16 moved a bound by 0.01 bits
    per example (2 dimensions), since the terms compare it with an x_t that is exact."""
    return x_0.float() if x_0.dtype in _UP_TO_FLOAT32 else x_0


def _check_spec(data: object) -> None:
    from dpm_fast.data import Data, DataSpec

    if not isinstance(data, DataSpec):
        hint = ": give its spec" if isinstance(data, Data) else ""
        raise TypeError(f"data must be a DataSpec, got {type(data).__name__}{hint}")


def _check_weight(vb_weight: float) -> None:
    if isinstance(vb_weight, bool) or not isinstance(vb_weight, Real):
        raise TypeError(f"vb_weight must be a number, got {type(vb_weight).__name__}")
    if not 0 <= float(vb_weight) < math.inf:
        raise ValueError(f"vb_weight must be finite and not negative, got {vb_weight}")


def _at_least_1(value: int, name: str) -> int:
    number = noise.as_integer(value)
    if number is None or number < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    return number


def _check_example_ids(example_ids: Tensor, n: int) -> None:
    if not isinstance(example_ids, Tensor):
        raise TypeError(f"example_ids must be an int64 tensor, got {type(example_ids).__name__}")
    if example_ids.shape != (n,):
        raise ValueError(f"example_ids must have shape ({n},), got {tuple(example_ids.shape)}")
    if example_ids.dtype != torch.int64:
        raise ValueError(f"example_ids must have dtype int64, got {example_ids.dtype}")
