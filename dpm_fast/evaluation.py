"""The figures at the end of a run: bound, limit and null model of held-out data, in data units."""

import json
import math
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpm_fast import __version__, progress
from dpm_fast.bound import NATS_PER_BIT, Bound, standard_error
from dpm_fast.config import EvaluationConfig
from dpm_fast.data import Data, model_dtype
from dpm_fast.model import DiffusionModel
from dpm_fast.parallel import Ranks

# K of [DPM] table 1, for data that are the same as the paper's.
_PAPER_BITS = {"heartbeat": -2.414}


def evaluate(
    model: DiffusionModel,
    data: Data,
    config: EvaluationConfig,
    edge: str,
    ranks: Ranks,
    *,
    max_memory: str | None = None,
    partial: Path | None = None,
) -> Bound:
    """The bound on held-out data, of which each rank computes its share; all get the whole.

    Args:
        model: on the ranks' device.
        data: whose first ``config.eval_examples`` held-out examples are used.
        config: how.
        edge: unless ``config.eval_edge`` names one.
        ranks: those that share the work; one may be alone.
        max_memory: of each rank, see `DiffusionModel.bound`.
        partial: likewise; of several ranks each has its own file, with its number behind the name.
    """
    x_0 = data.spec.to_model(data.test[: config.eval_examples], model_dtype(model))
    x_0 = x_0.to(ranks.device)
    example_ids = torch.arange(len(x_0), device=ranks.device)
    share = ranks.share(len(x_0)) if len(x_0) >= ranks.size else slice(None)
    if partial is not None and ranks.size > 1:
        partial = partial.with_name(f"{partial.name}.{ranks.rank}-of-{ranks.size}")
    bound = model.bound(
        x_0[share],
        timesteps=config.eval_timesteps or "exact",
        edge=config.eval_edge or edge,
        seed=config.eval_seed,
        example_ids=example_ids[share],
        draws=config.eval_draws,
        batch_size=config.eval_batch_size,
        max_memory=max_memory,
        progress=ranks.rank == 0,
        partial=partial,
    )
    return bound if len(bound.bound_nats) == len(x_0) else _joined(bound, len(x_0), ranks)


def sample(
    model: DiffusionModel,
    num: int,
    config: EvaluationConfig,
    ranks: Ranks,
    num_inference_steps: int | None = None,
    eta: float | None = None,
) -> Tensor:
    """Samples, (num, *event) in model scale; each rank draws its share, all get the whole.

    ``num_inference_steps`` and ``eta`` are those of `DiffusionModel.sample`.
    """
    share = ranks.share(num)
    example_ids = torch.arange(num, device=ranks.device)[share]
    batch_size = config.eval_batch_size
    with progress.of_samples(
        model, len(example_ids), batch_size, num_inference_steps, show=ranks.rank == 0
    ):
        samples = model.sample(
            len(example_ids),
            seed=config.eval_seed,
            example_ids=example_ids,
            num_inference_steps=num_inference_steps,
            eta=eta,
            batch_size=batch_size,
        )
    return ranks.gather(samples, num)


def result(bound: Bound, data: Data) -> dict[str, Any]:
    """The figures of a bound in data units: bits per example, and per dimension.

    A density of the scaled data becomes one of the data by the Jacobian of the scale. So for
    discrete data bits per dimension are those of the grey levels.

    Args:
        bound: of the first held-out examples. Beside it stands the paper's, ``paper_bits``, where
            that is known.
        data: that they belong to.
    """
    num_examples = len(bound.bound_nats)
    jacobian_bits = -bound.num_dims * bound.bits_per_dim_offset
    bound_bits = bound.bound_bits.cpu() + jacobian_bits
    figures: dict[str, Any] = {
        "dataset": data.spec.name,
        "bound_bits": bound_bits.mean().item(),
        "edge": bound.edge,
        "stderr_bits": _finite(bound.stderr),
        "mc_stderr_bits": bound.mc_stderr,
        "paper_bits": _PAPER_BITS.get(data.spec.name),
        "limit_bits": data.limit_bits,
        "gap_bits": None,
        "gap_stderr_bits": None,
        "null_bits": -bound.null_nats.mean().item() / NATS_PER_BIT + jacobian_bits,
        "bits_per_dim": bound.data_bits_per_dim.mean().item(),
        "num_steps": bound.settings["num_steps"],
        "num_examples": num_examples,
    }
    if data.log_density is not None:
        # Against the true likelihood of the same examples: what they vary by cancels.
        gap_bits = data.log_density(data.test[:num_examples]).cpu() / NATS_PER_BIT - bound_bits
        figures["gap_bits"] = gap_bits.mean().item()
        figures["gap_stderr_bits"] = _finite(standard_error(gap_bits))
    elif data.limit_bits is not None:
        figures["gap_bits"] = data.limit_bits - figures["bound_bits"]
        figures["gap_stderr_bits"] = figures["stderr_bits"]
    return figures


def to_json(figures: Mapping[str, Any]) -> str:
    """A result as the text of result.json, null for what is not finite."""
    finite = {k: _finite(v) if isinstance(v, float) else v for k, v in figures.items()}
    return json.dumps(finite, indent=2, allow_nan=False) + "\n"


def table(figures: Mapping[str, Any]) -> str:
    """A result as a person reads it."""
    rows = [
        (f"bound K, {figures['edge']} edge", _bits(figures, "bound_bits", "stderr_bits")),
        ("limit, E log2 p of all data", _bits(figures, "limit_bits")),
        ("gap to log2 p of these data", _bits(figures, "gap_bits", "gap_stderr_bits")),
        ("null model", _bits(figures, "null_bits")),
        ("gain over the null model", f"{figures['bound_bits'] - figures['null_bits']:.4f} bits"),
        ("code length", f"{figures['bits_per_dim']:.4f} bits/dim"),
    ]
    if figures["paper_bits"] is not None:
        rows.insert(1, ("[DPM] table 1, paper edge", _bits(figures, "paper_bits")))
    if figures["mc_stderr_bits"] is not None:
        rows.insert(1, ("Monte-Carlo error", _bits(figures, "mc_stderr_bits")))
    if figures.get("valid_fraction") is not None:
        rows.append(("valid samples", f"{100 * figures['valid_fraction']:.1f} %"))
    if "train_seconds" in figures:
        speed = f"{figures['examples_per_second']:.3g} examples/s"
        rows.append(("training", f"{figures['train_seconds']:.0f} s, {speed}"))
    width = max(len(name) for name, _ in rows)
    title = (
        f"{figures['dataset']}: {figures['num_examples']} held-out examples, "
        f"T = {figures['num_steps']}, in the units of the data"
    )
    return "\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in rows)])


def valid_fraction(data: Data, samples: Tensor) -> float | None:
    """The share of samples that are possible examples, where that can be told."""
    if data.spec.name != "heartbeat":
        return None
    from dpm_fast.datasets import is_valid_heartbeat

    return is_valid_heartbeat(samples).double().mean().item()


def versions() -> dict[str, str]:
    """Versions of what a figure depends on."""
    return {
        "dpm_fast": __version__,
        "torch": torch.__version__,
        "numpy": version("numpy"),
        "python": platform.python_version(),
    }


def _joined(bound: Bound, num_examples: int, ranks: Ranks) -> Bound:
    """The bound of all examples, from those of the ranks' shares."""
    num_mine = len(bound.bound_nats)
    per_timestep = bound.per_timestep_nats * (num_mine / num_examples)
    mc_variance = (bound.mc_variance_nats2 or 0.0) * (num_mine / num_examples) ** 2
    total = torch.tensor(mc_variance, dtype=torch.float64, device=ranks.device)
    strata = None if bound.strata_nats is None else bound.strata_nats * (num_mine / num_examples)
    ranks.sum_([per_timestep, total] if strata is None else [per_timestep, total, strata])
    return Bound(
        bound_nats=ranks.gather(bound.bound_nats, num_examples),
        null_nats=ranks.gather(bound.null_nats, num_examples),
        per_timestep_nats=per_timestep,
        prior_nats=ranks.gather(bound.prior_nats, num_examples),
        mc_variance_nats2=None if bound.mc_variance_nats2 is None else total.item(),
        num_dims=bound.num_dims,
        edge=bound.edge,
        strata_nats=strata,
        bits_per_dim_offset=bound.bits_per_dim_offset,
        settings=bound.settings,
    )


def _bits(figures: Mapping[str, Any], name: str, stderr_name: str = "") -> str:
    value, stderr = figures[name], figures.get(stderr_name)
    if value is None:
        return "unknown"
    return f"{value:.4f} bits" if stderr is None else f"{value:.4f} ± {stderr:.4f} bits"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
