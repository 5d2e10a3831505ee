"""Sums of the terms of a bound in float64, in an order that no division into batches changes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dpm_fast.importance import add_by_timestep
from dpm_fast.pairs import Block, Pairs


class Sums:
    """The terms of pairs, added up block by block as they come.

    Nothing here is as long as the pairs: those of a block wait until the last of them is there.

    Args:
        pairs: whose terms come, in their order.

    Attributes:
        num_done: pairs whose terms came.
        nats: (N,) float64, means over the draws, summed over slots.
        per_timestep: (T + 1,) float64, the same summed over examples.
        mc_variance: () float64, the Monte-Carlo variance of sum(nats) that draws of timesteps tell.
        strata: (strata, draws) float64, terms of strata summed over examples.
        waiting: (block,) float64, terms of the block that is not complete.
    """

    def __init__(self, pairs: Pairs):
        self.pairs, self.num_done = pairs, 0
        device = pairs.example_ids.device
        self.nats = torch.zeros(len(pairs.example_ids), dtype=torch.float64, device=device)
        self.per_timestep = self.nats.new_zeros(pairs.num_steps + 1)
        self.mc_variance = self.nats.new_zeros(())
        self.strata = self.nats.new_zeros(pairs.num_strata, pairs.draws)
        self.waiting = self.nats.new_zeros(pairs.longest_block)

    def add(self, nats: Tensor) -> None:
        """Take the weighted terms (B,) of the next pairs."""
        while len(nats):
            block = self.pairs.block(self.num_done)
            now, nats = nats.tensor_split([block.end - self.num_done])
            begin = self.num_done - block.begin
            self.waiting[begin : begin + len(now)] = now
            self.num_done += len(now)
            if self.num_done == block.end:
                self._add_block(block)

    def state(self) -> dict[str, Tensor]:
        """All that later sums depend on, by name."""
        waiting = self.num_done - self._block_begin()
        return {
            "num_done": torch.tensor(self.num_done),
            "nats": self.nats,
            "per_timestep": self.per_timestep,
            "mc_variance": self.mc_variance,
            "strata": self.strata,
            "waiting": self.waiting[:waiting],
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on where `state` was asked for.

        Raises:
            ValueError: for a state of other pairs.
        """
        num_done = state.get("num_done")
        is_number = num_done is not None and num_done.shape == () and num_done.dtype == torch.int64
        if not is_number or not 0 <= int(state["num_done"]) <= len(self.pairs):
            raise ValueError(f"num_done must be in 0..{len(self.pairs)}, got {num_done}")
        self.num_done = int(state["num_done"])
        for name, ours in self.state().items():
            theirs = state.get(name)
            if theirs is None or (theirs.shape, theirs.dtype) != (ours.shape, ours.dtype):
                given = None if theirs is None else f"{theirs.dtype} {tuple(theirs.shape)}"
                raise ValueError(f"{name} must be {ours.dtype} {tuple(ours.shape)}, got {given}")
            ours.copy_(theirs)

    def _block_begin(self) -> int:
        if self.num_done == len(self.pairs):
            return self.num_done
        return self.pairs.block(self.num_done).begin

    def _add_block(self, block: Block) -> None:
        values = self.waiting[: block.end - block.begin]
        terms = values.view(block.num_slots, block.num_examples, self.pairs.draws)
        rows = slice(block.first_example, block.first_example + block.num_examples)
        stratum = block.first_slot - self.pairs.num_timesteps
        if stratum >= 0:
            self.nats[rows] += terms.sum(dim=(0, 2))
            t = self.pairs.batch(block.begin, block.end).t
            add_by_timestep(self.per_timestep, t, values)
            self.strata[stratum : stratum + block.num_slots] += terms.sum(dim=1)
            return
        means = terms.mean(dim=2)
        self.nats[rows] += means.sum(dim=0)
        last = self.pairs.last - block.first_slot
        timesteps = slice(last - block.num_slots + 1, last + 1)
        self.per_timestep[timesteps] += means.sum(dim=1).flip(0)
        if self.pairs.draws > 1:
            self.mc_variance += terms.var(dim=2).sum() / self.pairs.draws
