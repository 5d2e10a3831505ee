"""Data parallelism: what one process needs to know of the others that `torchrun` started."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """This process's rank among `size`, and its device. Without torchrun there is one rank."""

    rank: int
    size: int
    device: torch.device

    def share(self, num_items: int) -> slice:
        """The consecutive items that are this rank's; sizes differ by one at most."""
        first = num_items * self.rank // self.size
        return slice(first, num_items * (self.rank + 1) // self.size)

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their sums over ranks: a message per dtype, equal bits on all."""
        if self.size == 1:
            return
        for dtype in sorted({tensor.dtype for tensor in tensors}, key=str):
            same = [tensor for tensor in tensors if tensor.dtype == dtype]
            flat = torch.cat([tensor.reshape(-1) for tensor in same])
            torch.distributed.all_reduce(flat)
            for tensor, total in zip(same, flat.split([t.numel() for t in same]), strict=True):
                tensor.copy_(total.view_as(tensor))

    def largest(self, value: int) -> int:
        """The largest of the ranks' values; waits for all of them."""
        if self.size == 1:
            return value
        values = torch.tensor([value], device=self.device)
        torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX)
        return int(values)

    def agree(self, value: int) -> bool:
        """Whether all ranks have the same value; waits for all of them."""
        return self.largest(value) == -self.largest(-value)

    def wait(self) -> None:
        """Return when every rank has called this."""
        if self.size > 1:
            torch.distributed.barrier()

    def leave(self) -> None:
        """Leave the group of processes, all together; this is the last call."""
        self.wait()
        if self.size > 1:
            torch.distributed.destroy_process_group()

    def broadcast_(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by those of rank 0."""
        if self.size > 1:
            for tensor in tensors:
                torch.distributed.broadcast(tensor.detach(), src=0)

    def gather(self, mine: Tensor, num_items: int) -> Tensor:
        """Join the ranks' shares, rows of a tensor, of `num_items` items in the items' order."""
        whole = mine.new_zeros(num_items, *mine.shape[1:])
        whole[self.share(num_items)] = mine
        self.sum_([whole])
        return whole


def ranks(device: str | torch.device | None = None) -> Ranks:
    """Join the group of processes that `torchrun` describes in the environment, if it does.

    Args:
        device: None for a GPU where there is one (that of the local rank), else the CPU.

    Raises:
        ValueError: for a device that this machine does not have.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if device is None:
        device = f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device must be a device torch knows, got {str(device)!r}") from None
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", local_rank)
    try:
        torch.empty(0, device=device)
    except Exception as error:  # torch refuses each kind of device by an error of another type
        reason = re.split(r"\n|\. ", str(error))[0]
        raise ValueError(f"device must be one of this machine, got {device}: {reason}") from None
    if device.type == "meta":
        raise ValueError("device must be one that computes, got meta")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Ranks(int(os.environ.get("RANK", 0)), size, device)
