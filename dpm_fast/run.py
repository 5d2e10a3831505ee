"""A run directory: opened for training, read back for sampling, evaluated at the end."""

import json
import math
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpm_fast import checkpoint
from dpm_fast.bound import NATS_PER_BIT, Bound
from dpm_fast.config import EvaluationConfig, RunConfig, build_model, load_config
from dpm_fast.data import Data, DataSpec, load
from dpm_fast.model import DiffusionModel

CONFIG, RESULT, SPEC = "config.json", "result.json", "data.json"


@dataclass(frozen=True)
class Run:
    """A trained model with the configuration and the data specification it was made for."""

    path: Path
    config: RunConfig
    model: DiffusionModel
    step: int


def open_run(path: Path) -> Run:
    """The latest checkpoint of a run, with averaged weights where it has them.

    Raises:
        ValueError, CheckpointError: for a directory that holds no readable run.
    """
    found = checkpoint.load(path)
    directory = path if (path / CONFIG).exists() else found.path.parent
    config = load_config(directory / CONFIG)
    try:
        spec = DataSpec.from_dict(json.loads((directory / SPEC).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"cannot read {directory / SPEC}: {error}") from None
    model = build_model(config, spec)
    weights = found.parts.get("averaged", found.parts.get("weights", {}))
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    checkpoint.check_shapes(shapes, weights, str(found.path))
    model.load_state_dict(weights)
    return Run(directory, config, model.eval(), found.step)


def load_data(config: RunConfig) -> Data:
    """The data set of a configuration."""
    data = config.data
    return load(data.dataset, path=data.path, seed=data.data_seed)


def evaluate(model: DiffusionModel, data: Data, config: EvaluationConfig, edge: str) -> Bound:
    """The bound on held-out data, as a configuration asks for it."""
    x_0 = data.spec.to_model(data.test[: config.eval_examples])
    return model.bound(
        x_0,
        timesteps=min(config.eval_timesteps, model.process.num_steps - 1)
        if config.eval_timesteps
        else "exact",
        edge=config.eval_edge or edge,
        seed=config.eval_seed,
        draws=config.eval_draws,
        batch_size=config.eval_batch_size,
    )


def result(bound: Bound, data: Data, config: RunConfig) -> dict[str, Any]:
    """The figures of a run in the units of the data: bits per example, grey levels for images."""
    # A density of scaled data becomes one of the data by the Jacobian of the scaling.
    shift_bits = -bound.num_dims * bound.bits_per_dim_offset
    found: dict[str, Any] = {
        "dataset": config.data.dataset,
        "bound_bits": bound.bound_bits.mean().item() + shift_bits,
        "edge": bound.edge,
        "stderr_bits": _number(bound.stderr),
        "mc_stderr_bits": bound.mc_stderr,
        "limit_bits": data.limit_bits,
        "gap_bits": None,
        "gap_stderr_bits": None,
        "null_bits": -bound.null_nats.mean().item() / NATS_PER_BIT + shift_bits,
        "bits_per_dim": bound.data_bits_per_dim.mean().item(),
        "num_steps": bound.settings["num_steps"],
        "num_examples": len(bound.bound_nats),
    }
    if data.log_density is not None:
        # Paired with the same examples' true likelihood: their spread cancels.
        truth = data.log_density(data.test[: len(bound.bound_nats)]).cpu() / NATS_PER_BIT
        gap = truth - (bound.bound_bits.cpu() + shift_bits)
        found["gap_bits"] = gap.mean().item()
        found["gap_stderr_bits"] = _number((gap.std() / math.sqrt(len(gap))).item())
    elif data.limit_bits is not None:
        found["gap_bits"] = data.limit_bits - found["bound_bits"]
        found["gap_stderr_bits"] = found["stderr_bits"]
    return found


def versions() -> dict[str, str]:
    """Of what a figure depends on."""
    import dpm_fast

    return {
        "dpm_fast": dpm_fast.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def table(found: dict[str, Any]) -> str:
    """The result as a person reads it."""

    def bits(value: float | None, stderr: float | None = None) -> str:
        if value is None:
            return "unknown"
        return f"{value:.4f}" + (f" ± {stderr:.4f}" if stderr is not None else "") + " bits"

    rows = [
        (f"bound K ({found['edge']} edge)", bits(found["bound_bits"], found["stderr_bits"])),
        ("limit, E log2 p", bits(found["limit_bits"])),
        ("gap to the true likelihood", bits(found["gap_bits"], found["gap_stderr_bits"])),
        ("null model", bits(found["null_bits"])),
        ("gain over the null model", bits(found["bound_bits"] - found["null_bits"])),
        ("code length", f"{found['bits_per_dim']:.4f} bits/dim"),
    ]
    if found.get("valid_fraction") is not None:
        rows.append(("valid samples", f"{100 * found['valid_fraction']:.1f} %"))
    if found.get("train_seconds") is not None:
        speed = f"{found['train_seconds']:.0f} s, {found['examples_per_second']:.3g} examples/s"
        rows.append(("training", speed))
    width = max(len(name) for name, _ in rows)
    head = (
        f"{found['dataset']}: {found['num_examples']} held-out examples, T = {found['num_steps']}"
    )
    return "\n".join([head, *(f"  {name:<{width}}  {value}" for name, value in rows)])


def valid_fraction(name: str, samples: Tensor) -> float | None:
    """The share of samples that are possible examples, where that can be told."""
    if name != "heartbeat":
        return None
    from dpm_fast.datasets import is_valid_heartbeat

    return is_valid_heartbeat(samples).double().mean().item()


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
