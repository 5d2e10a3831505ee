"""The examples of a training run, in an order that is a function and not a state."""

import functools

import torch
from torch import Tensor

from dpm_fast import noise
from dpm_fast.data import Data, model_dtype
from dpm_fast.model import DiffusionModel

_EXAMPLES_PER_CHECK = 4096


class TrainingData:
    """Examples on the device that trains, given out in the model's scale.

    A run numbers the examples it sees from 0 on; numbers e * size to (e + 1) * size - 1 are epoch
    e, a permutation of the data that follows from the seed and e alone.

    Args:
        data: a `Data`, or a tensor (N, *event), in the units of ``model.data`` if the model has
            that, else in the model's.
        model: that will take them.
        seed: of the order.
        device: where to keep them.

    Raises:
        ValueError, TypeError: for data that are empty, not finite, or do not fit the model, such as
            grey levels that are none.
    """

    def __init__(self, data: Data | Tensor, model: DiffusionModel, seed: int, device: torch.device):
        if isinstance(data, Tensor):
            self.spec, examples = model.data, data
        elif not isinstance(data, Data):
            raise TypeError(
                f"data must be a Data or a tensor, got {type(data).__name__} "
                "(dpm_fast.data.load makes Data of arrays and Datasets)"
            )
        elif model.data is not None and model.data != data.spec:
            raise ValueError(f"data must have the model's {model.data}, got {data.spec}")
        elif model.data is None and (data.spec.kind == "discrete" or data.spec.scale != 1):
            raise ValueError(
                f"the model must be made with data=data.spec, the scale of {data.spec.name!r}, "
                "for its figures to be in the units of the data"
            )
        else:
            self.spec, examples = data.spec, data.train
        shape = model.event_shape if self.spec is None else tuple(self.spec.shape)
        if shape is not None and tuple(examples.shape[1:]) != shape:
            wanted = ", ".join(map(str, shape))
            raise ValueError(f"data must have shape (N, {wanted}), got {tuple(examples.shape)}")
        if len(examples) == 0:
            raise ValueError("data must have at least one example, got none")
        if examples.is_floating_point() and not bool(torch.isfinite(examples).all()):
            raise ValueError("data must be finite, got NaN or infinity")
        self._examples = examples.to(device)
        self._seed, self._dtype = seed, model_dtype(model)
        # Once and for all: no step does, which on a GPU would wait for the one before it.
        for part in self._examples.split(_EXAMPLES_PER_CHECK):
            model.check_data(self._in_model_scale(part), values=True)

    def batch(self, first: int, last: int) -> Tensor:
        """The run's examples ``first`` to ``last`` - 1, (last - first, *event), model scale."""
        indices = epoch_order(self._seed, first, last, len(self._examples), self._examples.device)
        return self._in_model_scale(self._examples[indices])

    def _in_model_scale(self, x: Tensor) -> Tensor:
        return x if self.spec is None else self.spec.to_model(x, self._dtype)


def epoch_order(seed: int, first: int, last: int, size: int, device: torch.device) -> Tensor:
    """Places in the data of a run's examples ``first`` to ``last`` - 1, (last - first,) int64."""
    epochs = range(first // size, (last - 1) // size + 1)
    parts = [
        _permutation(seed, epoch, size, device)[max(first - epoch * size, 0) : last - epoch * size]
        for epoch in epochs
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, size: int, device: torch.device) -> Tensor:
    ids = torch.arange(epoch * size, (epoch + 1) * size, device=device)
    high, low = noise.words(seed, noise.Stream.ORDER, ids, 0, 2).unbind(dim=1)
    return (high * 2**31 + (low >> 1)).argsort(stable=True)
