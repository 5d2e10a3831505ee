"""The op `readout`: the last linear layer, contracted with its temporal basis first."""

import torch
from torch import Tensor

from dpm_fast import reference
from dpm_fast.ops.common import check_examples


def readout(features: Tensor, weight: Tensor, bias: Tensor, basis_rows: Tensor) -> Tensor:
    """A linear layer whose coefficients are a mixture of bumps in time, at every pixel.

        W_n = sum_j g_nj W_j,  b_n = sum_j g_nj b_j,  out_n = W_n features_n + b_n

    Contracting the layer before it is applied, 5 to 10 times as fast as after it, leaves one
    batched matrix product, which reads the features once: that is PyTorch's on every backend.
    Networks of images have it inside of `image_network`, where features are not written at all.

    Args:
        features: (N, F, *spatial); float32, bfloat16, float16 or float64.
        weight: (J, O, F), of the dtype of the features, as the next two.
        bias: (J, O).
        basis_rows: (N, J), g of each example's timestep (`dpm_fast.reference.temporal_basis`), or
            (1, J) where all examples share it.

    Returns:
        (N, O, *spatial), differentiable with respect to everything given.

    Raises:
        TypeError: for a dtype that does not fit.
        ValueError: for a shape or device that does not fit.

    Reference: `dpm_fast.reference.readout`.
    """
    check_examples(features, "features")
    for name, tensor in (("weight", weight), ("bias", bias), ("basis_rows", basis_rows)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.device != features.device:
            raise ValueError(f"{name} must be on {features.device}, got {tensor.device}")
        is_autocast = torch.is_autocast_enabled(features.device.type)
        if tensor.dtype != features.dtype and not (is_autocast and tensor.is_floating_point()):
            raise TypeError(
                f"{name} must have dtype {features.dtype} like features, got {tensor.dtype}"
            )
    if weight.dim() != 3 or weight.shape[2] != features.shape[1]:
        raise ValueError(
            f"weight must have shape (J, O, {features.shape[1]}), got {tuple(weight.shape)}"
        )
    num_bumps, num_outputs, _ = weight.shape
    n = features.shape[0]
    if bias.shape != (num_bumps, num_outputs):
        raise ValueError(
            f"bias must have shape ({num_bumps}, {num_outputs}), got {tuple(bias.shape)}"
        )
    if (
        basis_rows.dim() != 2
        or basis_rows.shape[1] != num_bumps
        or basis_rows.shape[0] not in (1, n)
    ):
        raise ValueError(
            f"basis_rows must have shape ({n}, {num_bumps}) or (1, {num_bumps}), "
            f"got {tuple(basis_rows.shape)}"
        )
    return reference.readout(features, weight, bias, basis_rows)
