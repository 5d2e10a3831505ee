"""Times of every op beside eager PyTorch, torch.compile and the libraries people use now."""

import torch

# float32 is float32: on a GPU torch's convolutions would keep 10 bits, and kernels here as many.
torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]
