"""Optimizers, their learning-rate schedules, and their state as named tensors."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer, RMSprop

from dpm_fast.checkpoint import CheckpointError, check_tensor
from dpm_fast.config import TrainConfig

# What each optimizer remembers of a parameter, beside the number of its steps.
_MOMENTS = {Adam: ("exp_avg", "exp_avg_sq"), RMSprop: ("square_avg",)}


def make_optimizer(parameters: Sequence[nn.Parameter], config: TrainConfig) -> Optimizer:
    """Adam, or RMSProp as in the 2015 code: g / max(rms, 1e-10), there without a sum."""
    if config.optimizer == "adam":
        return Adam(parameters, config.learning_rate, config.adam_betas, fused=True)
    return RMSprop(parameters, config.learning_rate, config.rmsprop_decay, eps=1e-10)


def learning_rate(config: TrainConfig, step: int) -> float:
    """The learning rate of the step after ``step`` steps.

    A linear warm-up over ``warmup_steps``; times 1, or a decay to ``final_learning_rate`` of the
    initial one at ``train_steps``: half a cosine, or exponential.
    """
    progress = min(step / config.train_steps, 1.0)
    final = config.final_learning_rate
    decay = {
        "constant": 1.0,
        "cosine": final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2,
        "exponential": final**progress,
    }[config.learning_rate_decay]
    warmup = min((step + 1) / (config.warmup_steps + 1), 1.0)
    return config.learning_rate * decay * warmup


def optimizer_tensors(optimizer: Optimizer, names: Sequence[str]) -> dict[str, Tensor]:
    """The optimizer's memory, "<parameter>/<moment>" to tensor."""
    state = optimizer.state_dict()["state"]
    return {
        f"{names[index]}/{key}": tensor
        for index, memory in state.items()
        for key, tensor in memory.items()
        if isinstance(tensor, Tensor)
    }


def restore_optimizer(
    optimizer: Optimizer,
    parameters: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
    source: str,
) -> None:
    """Give an optimizer the memory that `optimizer_tensors` returned.

    Raises:
        CheckpointError: for tensors of another kind of optimizer, or of other parameters.
    """
    keys = {"step", *_MOMENTS[type(optimizer)]}
    memory: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        parameter, _, key = name.rpartition("/")
        if parameter not in parameters or key not in keys:
            raise CheckpointError(
                f"{source} holds {name}, which {type(optimizer).__name__} for this model does not"
            )
        required = torch.zeros(()) if key == "step" else parameters[parameter]
        check_tensor(required, tensor, f"{source}: {name}")
        memory.setdefault(parameter, {})[key] = tensor
    for parameter, found in memory.items():
        if missing := keys - found.keys():
            raise CheckpointError(f"{source} lacks {', '.join(sorted(missing))} of {parameter}")
    groups = optimizer.state_dict()["param_groups"]
    state = {i: memory[name] for i, name in enumerate(parameters) if name in memory}
    optimizer.load_state_dict({"state": state, "param_groups": groups})
