"""The lower bound on log p(x_0): its estimators over timesteps, and the result with its units."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dpm_fast import dispatch
from dpm_fast.importance import Importance
from dpm_fast.memory import largest_batch
from dpm_fast.ops.common import takes_tf32
from dpm_fast.pairs import Pairs
from dpm_fast.signals import Interrupted, SignalNote
from dpm_fast.sums import Sums
from dpm_fast.trajectory import BoundTerms, why_not_bound

if TYPE_CHECKING:
    from dpm_fast.model import DiffusionModel
    from dpm_fast.partial import PartialSums

_log = logging.getLogger("dpm_fast")

NATS_PER_BIT = math.log(2.0)
EDGES = ("decoder", "discretized", "discretized_tanh", "paper")
_DEFAULT_PAIRS = 1024
# In a call, whatever the memory. On one thread of Zen 4 a pair took 1.26, 1.01 and 1.01 us in
# batches of 1024, 4096 and 16384 with an MLP of 64-64 units, 7.8, 6.5 and 8.7 us with 256-256.
_MOST_PAIRS = 4096
_SECONDS_BETWEEN_FILES = 30.0


@dataclass(frozen=True)
class Bound:
    """Lower bounds K <= log p(x_0), one per example: of a density of the model's scaled data, or,
    for a discretized edge, of the probability of its grey levels.

    Attributes:
        bound_nats: (N,) float64, K: higher is better.
        null_nats: (N,) float64, the same for the null model: N(0, I) on the same data (integrated
            over each bin for a discretized edge), or independent bits of the prior rate.
        per_timestep_nats: (T + 1,) float64, mean over examples of the term of each timestep:
            KL for t >= 2, the decoder's -log p(x_0 | x_1) at t = 1 (0 for the edge "paper").
            Entry 0 is 0. mean(K) = -sum(per_timestep_nats) - mean(prior_nats).
        prior_nats: (N,) float64, the part of -K without a network.
        mc_variance_nats2: Monte-Carlo variance of the mean of K, as far as examples vary
            independently of each other; or None with a single draw.
        num_dims: D, elements of one event.
        bits_per_dim_offset: added to bits/dim for the units of the data: -log2 of their scale.
        edge: how the trajectory ends, one of `EDGES`.
        strata_nats: (strata, draws) float64, mean over examples of the term of each stratum in
            each draw, or None where every timestep is evaluated. All examples share where a
            stratum is looked at, so that only draws tell the Monte-Carlo variance.
        settings: how the figure was made.
    """

    bound_nats: Tensor
    null_nats: Tensor
    per_timestep_nats: Tensor
    prior_nats: Tensor
    mc_variance_nats2: float | None
    num_dims: int
    edge: str
    strata_nats: Tensor | None = None
    bits_per_dim_offset: float = 0.0
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def bound_bits(self) -> Tensor:
        """K in bits per example, (N,)."""
        return self.bound_nats / NATS_PER_BIT

    @property
    def bits_per_dim(self) -> Tensor:
        """-K / (D ln 2), (N,): the code length per dimension, lower is better."""
        return -self.bound_bits / self.num_dims

    @property
    def data_bits_per_dim(self) -> Tensor:
        """Code length per dimension in the units of the data, (N,)."""
        return self.bits_per_dim + self.bits_per_dim_offset

    @property
    def gap_to_null_bits(self) -> Tensor:
        """K - K_null in bits per example, (N,): what the model gains over no model."""
        return (self.bound_nats + self.null_nats) / NATS_PER_BIT

    @property
    def stderr(self) -> float:
        """Standard error of the mean of `bound_bits` over examples, bits; NaN for one example."""
        return standard_error(self.bound_bits)

    @property
    def mc_stderr(self) -> float | None:
        """Monte-Carlo error of the mean of `bound_bits`, bits; None without repeated draws."""
        if self.mc_variance_nats2 is None:
            return None
        variance = self.mc_variance_nats2
        if self.strata_nats is not None:
            variance += self.strata_nats.var(dim=1).sum().item() / self.strata_nats.shape[1]
        return math.sqrt(variance) / NATS_PER_BIT

    def __repr__(self) -> str:
        return (
            f"Bound(bound_nats {tuple(self.bound_nats.shape)}, "
            f"K {self.bound_bits.mean():.4f} ± {self.stderr:.4f} bits per example, "
            f"{self.bits_per_dim.mean():.4f} bits/dim, edge {self.edge!r})"
        )

    def __str__(self) -> str:
        gap, mc_stderr = self.gap_to_null_bits, "unknown, of one draw (draws=2 tells it)"
        if self.mc_stderr is not None:
            mc_stderr = f"{self.mc_stderr:.4f} bits per example"
        of = "grey levels" if self.edge.startswith("discretized") else "scaled data"
        k = f"{self.bound_bits.mean():.4f} ± {self.stderr:.4f} bits per example ({of})"
        rows = [
            ("bound K", k),
            ("Monte-Carlo error", mc_stderr),
            ("null model", f"{-self.null_nats.mean() / NATS_PER_BIT:.4f} bits per example"),
            ("K - K_null", f"{gap.mean():.4f} ± {standard_error(gap):.4f} bits per example"),
            ("code length", f"{self.bits_per_dim.mean():.4f} bits/dim ({of})"),
        ]
        if self.bits_per_dim_offset:
            rows += [("", f"{self.data_bits_per_dim.mean():.4f} bits/dim (units of the data)")]
        rows += [
            ("edge", self.edge),
            ("examples", f"{len(self.bound_nats)} of {self.num_dims} dimensions"),
        ]
        rows += [(name, str(value)) for name, value in self.settings.items()]
        return "\n".join(f"{name:<18} {value}" for name, value in rows)


@torch.no_grad()
def estimate(
    model: DiffusionModel,
    x_0: Tensor,
    *,
    timesteps: str | int,
    importance: Importance | None,
    edge: str,
    seed: int,
    example_ids: Tensor,
    draws: int,
    batch_size: int | None,
    max_memory: int | None,
    progress: bool | Callable[[int, int], object],
    partial: str | os.PathLike[str] | None,
) -> Bound:
    """See `DiffusionModel.bound`."""
    num_steps, num_examples = model.process.num_steps, len(x_0)
    is_exact = isinstance(timesteps, str)
    pairs = Pairs(
        num_steps,
        example_ids,
        last=num_steps if is_exact else 1,
        first=2 if edge == "paper" else 1,
        num_strata=0 if isinstance(timesteps, str) else timesteps,
        draws=draws,
        seed=seed,
        importance=importance,
    )
    terms = _Terms(model, x_0, pairs, edge, seed)
    sums, file = Sums(pairs), None
    if partial is not None:
        from dpm_fast.partial import PartialSums, bound_identity

        options: dict[str, Any] = {"timesteps": timesteps, "importance": importance}
        options |= {"edge": edge, "seed": seed, "draws": draws, "example_ids": example_ids}
        file = PartialSums(partial, bound_identity(model, x_0, **options))
        file.load(sums)
    most = _MOST_PAIRS if max_memory else _DEFAULT_PAIRS
    if terms.kernel is not None:
        most = terms.kernel.most_pairs
    size = min(len(pairs), batch_size or most)
    if max_memory is not None and size:
        size = largest_batch(terms.trial, size, max_memory, x_0.device)
    kernels = dispatch.backend("kl" if model.process.kind == "gaussian" else "bernoulli_kl", x_0)
    num_calls = -(-len(pairs) // size)
    calls = _counted(num_calls, "network call")
    if terms.kernel is not None:
        calls = f"{_counted(num_calls, 'launch', 'launches')}, network included,"
    path = f"{calls} of {_counted(size, 'term')} at most, kernels: {kernels}"
    if terms.kernel is None:
        _log.debug("bound: the network is called by itself, since %s", terms.why_apart)
    _log.debug("bound: %d examples in %s", num_examples, path)
    _add_up(terms, sums, size, progress, file)
    by_rows = [terms.without_network(i, i + size) for i in range(0, num_examples, size)]
    prior, null = torch.cat(by_rows, dim=1)
    spec = model.data
    return Bound(
        bound_nats=-(sums.nats + prior),
        null_nats=null,
        per_timestep_nats=sums.per_timestep / num_examples,
        prior_nats=prior,
        mc_variance_nats2=sums.mc_variance.item() / num_examples**2 if draws > 1 else None,
        num_dims=math.prod(x_0.shape[1:]),
        edge=edge,
        strata_nats=None if is_exact else sums.strata * (draws / num_examples),
        bits_per_dim_offset=(
            0.0 if spec is None or edge.startswith("discretized") else -spec.log2_jacobian_per_dim
        ),
        settings={
            "num_steps": num_steps,
            "timesteps": timesteps,
            "estimator": _estimator(timesteps, importance),
            "draws": draws,
            "seed": seed,
            "parameterization": model.reverse.parameterization,
            "variance": model.reverse.variance,
            "precision": _precision(model, x_0),
            "path": path,
        },
    )


class _Terms:
    """The terms of pairs, and those of examples that take no network."""

    def __init__(self, model: DiffusionModel, x_0: Tensor, pairs: Pairs, edge: str, seed: int):
        self.model, self.x_0, self.pairs = model, x_0, pairs
        self.edge, self.seed = edge, seed
        self.kernel: BoundTerms | None = None
        self.why_apart = "in strata each example has its own timestep"
        if not pairs.num_strata:
            self.why_apart = why_not_bound(model, x_0, edge) or ""
            if not self.why_apart:
                self.kernel = BoundTerms(model, pairs.last, seed, x_0.device)

    def __call__(self, begin: int, end: int) -> Tensor:
        """Weighted terms of the pairs begin..end - 1, float64 nats."""
        if self.kernel is not None:
            return torch.cat(
                [
                    self.kernel(
                        self._examples(self.x_0[rows], self.pairs.example_ids[rows]),
                        ids,
                        first,
                        last,
                    ).flatten()
                    for rows, first, last, ids in self.pairs.runs(begin, end)
                ]
            )
        rows, t, noise_ids, weight = self.pairs.batch(begin, end)
        x_0 = self._examples(self.x_0[rows], self.pairs.example_ids[rows])
        nats = self.model.term_nats(x_0, t, self.seed, noise_ids, self.edge)
        return nats if weight is None else weight * nats

    def without_network(self, begin: int, end: int) -> Tensor:
        """The prior's terms and the null model's of examples, (2, B) float64 nats."""
        x_0 = self._examples(self.x_0[begin:end], self.pairs.example_ids[begin:end])
        prior = self.model.process.prior_nats(x_0, self.edge).double()
        return torch.stack((prior, self.model.null_nats(x_0, self.edge)))

    def trial(self, size: int) -> None:
        """What a batch of a size takes memory for."""
        self(0, size)
        self.without_network(0, size)

    def _examples(self, x_0: Tensor, example_ids: Tensor) -> Tensor:
        """In the precision of the terms, and with the noise that makes densities of grey levels."""
        x_0 = x_0.to(torch.promote_types(x_0.dtype, torch.float32))
        if self.edge.startswith("discretized"):
            return x_0
        return self.model.dequantize(x_0, self.seed, example_ids)


def _add_up(
    terms: _Terms,
    sums: Sums,
    size: int,
    progress: bool | Callable[[int, int], object],
    file: PartialSums | None,
) -> None:
    """All terms that are not among the sums, so many at a time."""
    total = len(sums.pairs)
    with contextlib.ExitStack() as stack:
        report = stack.enter_context(_reporting(progress, total))
        if file is None:
            while sums.num_done < total:
                report(sums.num_done)
                sums.add(terms(sums.num_done, min(sums.num_done + size, total)))
            report(total)
            return
        signals = stack.enter_context(SignalNote())
        file.save(sums)  # at once: a place that cannot be written is noticed now
        saved = time.monotonic()
        while sums.num_done < total and not signals.number:
            try:
                report(sums.num_done)
                nats = terms(sums.num_done, min(sums.num_done + size, total))
            except BaseException:  # the sums change only after a call
                file.save(sums)
                raise
            sums.add(nats)
            if time.monotonic() - saved > _SECONDS_BETWEEN_FILES:
                file.save(sums)
                saved = time.monotonic()
        file.save(sums)
        report(sums.num_done)
    if signals.number:
        where = f"their sums are in {file.path}, from which the same call goes on"
        raise Interrupted(signals.number, f"{sums.num_done} of {total} terms", where)


@contextlib.contextmanager
def _reporting(
    progress: bool | Callable[[int, int], object], total: int
) -> Iterator[Callable[[int], object]]:
    """A function to tell how many of the terms are done."""
    if not isinstance(progress, bool):
        yield lambda num_done: progress(num_done, total)
    elif not progress:
        yield lambda num_done: None
    else:
        try:
            from dpm_fast.progress import of_terms
        except ImportError:
            raise ImportError(
                "progress=True requires tqdm, got none: pip install 'dpm_fast[train]'"
            ) from None
        with of_terms(total) as bar:
            yield lambda num_done: bar.update(num_done - bar.n)


def standard_error(x: Tensor) -> float:
    """Standard error of the mean of independent numbers (N,)."""
    return math.nan if len(x) < 2 else (x.std() / math.sqrt(len(x))).item()


def _counted(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or f'{one}s'}"


def _precision(model: DiffusionModel, x_0: Tensor) -> str:
    """Of the network: its dtype, and what torch makes of it."""
    device = x_0.device.type
    dtype = next(model.parameters(), x_0).dtype
    if torch.is_autocast_enabled(device):
        return f"{dtype}, autocast to {torch.get_autocast_dtype(device)}".replace("torch.", "")
    rounded = device == "cuda" and dtype == torch.float32 and takes_tf32()
    return f"{dtype}{', convolutions to TensorFloat-32' if rounded else ''}".replace("torch.", "")


def _estimator(timesteps: str | int, importance: Importance | None) -> str:
    if timesteps == "exact":
        return "exact"
    return "stratified" if importance is None else "importance"
