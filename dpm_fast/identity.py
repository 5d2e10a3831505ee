"""What a checkpoint records of a model besides its weights, whose shapes do not tell everything."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from dpm_fast.binomial import BinomialDiffusion
from dpm_fast.data import DataSpec
from dpm_fast.gaussian import GaussianDiffusion
from dpm_fast.model import DiffusionModel

if TYPE_CHECKING:
    from dpm_fast.checkpoint import Checkpoint


def identity(model: DiffusionModel, spec: DataSpec | None) -> dict[str, Any]:
    """The process, the parameterization and the scale of the data, as JSON knows them."""
    process, reverse = model.process, model.reverse
    found: dict[str, Any] = {
        "process": process.kind,
        "num_steps": process.num_steps,
        "parameterization": reverse.parameterization,
        "variance": reverse.variance,
        "clamp": getattr(reverse, "clamp", None),
        "t_base": model.t_base,
        "data": None if spec is None else spec.to_dict(),
    }
    if isinstance(process, BinomialDiffusion):
        found["prior_rate"] = process.prior_rate
    elif isinstance(process, GaussianDiffusion):
        # In float32: the last bits in float64 differ between the libraries of two machines.
        betas = process._initial_beta.float().numpy().tobytes()
        found["betas_sha256"] = hashlib.sha256(betas).hexdigest()
    return json.loads(json.dumps(found))


def check_identity(found: Checkpoint, model: DiffusionModel, spec: DataSpec | None) -> None:
    """Refuse the checkpoint of another model, or of one that was trained on other data.

    Raises:
        CheckpointError: naming what differs.
    """
    from dpm_fast.checkpoint import CheckpointError  # needs an extra, which a bound does not

    theirs, ours = found.state.get("model"), identity(model, spec)
    if not isinstance(theirs, dict):
        raise CheckpointError(f"{found.path}: model must be a JSON object, got {theirs!r}")
    for name in {**ours, **theirs}:
        if theirs.get(name) != ours.get(name):
            raise CheckpointError(
                f"{found.path} is of a model with {name} {theirs.get(name)!r}, "
                f"not {ours.get(name)!r}"
            )
