"""The (example, timestep) pairs of a bound, in the order in which batches take them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dpm_fast import noise
from dpm_fast.importance import Importance

# Terms that are added up at a time, in any division into batches: so few that torch leaves a sum to
# one thread, and its order is the same on any number of them.
_TERMS_PER_BLOCK = 16384


class Batch(NamedTuple):
    """Consecutive pairs, each tensor (B,).

    Attributes:
        rows: the examples' places in the data.
        t: the timestep.
        noise_ids: of the forward noise, different for the draws of an example.
        weight: float64, by which the term enters the sums; None for 1.
    """

    rows: Tensor
    t: Tensor
    noise_ids: Tensor
    weight: Tensor | None


class Run(NamedTuple):
    """Pairs of the same examples at t = first, first - 1 ... last: (B,) rows and noise ids."""

    rows: Tensor
    first: int
    last: int
    noise_ids: Tensor


class Block(NamedTuple):
    """Pairs begin..end - 1, whose terms are added up at a time: ``num_slots`` slots, from
    ``first_slot`` on, of the examples first_example..first_example + num_examples - 1."""

    begin: int
    end: int
    first_slot: int
    num_slots: int
    first_example: int
    num_examples: int


class Pairs:
    """All pairs, numbered: a slot is a timestep, or a stratum of them, of all examples.

    Timesteps come first, from ``last`` down to ``first``, then the strata. In a slot example
    follows example, each with its draws. So consecutive pairs fill batches whatever the number of
    examples, and what a pair is follows from its number alone.

    Args:
        num_steps: T.
        example_ids: (N,) int64.
        last, first: timesteps that are evaluated one by one; none where last < first.
        num_strata: of the timesteps 2..T.
        draws: of each example in each slot.
        seed: of the places in the strata.
        importance: of the strata, None for equal ones.
    """

    def __init__(
        self,
        num_steps: int,
        example_ids: Tensor,
        *,
        last: int,
        first: int,
        num_strata: int,
        draws: int,
        seed: int,
        importance: Importance | None,
    ):
        self.num_steps, self.example_ids = num_steps, example_ids
        self.last, self.num_strata, self.draws = last, num_strata, draws
        self.num_timesteps = max(0, last - first + 1)
        self.pairs_per_slot = len(example_ids) * draws
        self.importance = importance
        self.longest_block = max(draws, min(_TERMS_PER_BLOCK, len(self)))
        if num_strata:
            self.offsets = noise.stratum_offsets(seed, num_strata, draws, example_ids.device)

    def __len__(self) -> int:
        return (self.num_timesteps + self.num_strata) * self.pairs_per_slot

    def batch(self, begin: int, end: int) -> Batch:
        """The pairs begin..end - 1."""
        border = self.num_timesteps * self.pairs_per_slot
        if end <= border:
            return self._of_timesteps(begin, end)
        if begin >= border:
            return self._of_strata(begin - border, end - border)
        first, second = self._of_timesteps(begin, border), self._of_strata(0, end - border)
        assert second.weight is not None
        ones = second.weight.new_ones(border - begin)
        return Batch(
            torch.cat((first.rows, second.rows)),
            torch.cat((first.t, second.t)),
            torch.cat((first.noise_ids, second.noise_ids)),
            torch.cat((ones, second.weight)),
        )

    def runs(self, begin: int, end: int) -> Iterator[Run]:
        """The pairs begin..end - 1, all of single timesteps, as whole slots and parts of them."""
        size = self.pairs_per_slot
        while begin < end:
            slot, inside = divmod(begin, size)
            # A part of a slot, up to its end; or as many slots as are whole.
            num_slots = 1 if inside else max(1, (end - begin) // size)
            stop = min(end, (slot + num_slots) * size)
            count = min(stop - begin, size)
            _, rows, draw = self._places(begin, begin + count)
            ids = self.example_ids[rows] * self.draws + draw
            first = self.last - slot
            yield Run(rows, first, first - num_slots + 1, ids)
            begin = stop

    def block(self, number: int) -> Block:
        """The block that a pair belongs to."""
        size, slot = self.pairs_per_slot, number // self.pairs_per_slot
        if size > _TERMS_PER_BLOCK:
            most = max(1, _TERMS_PER_BLOCK // self.draws) * self.draws
            inside = number % size // most * most
            begin, end = slot * size + inside, slot * size + min(inside + most, size)
            return Block(begin, end, slot, 1, inside // self.draws, (end - begin) // self.draws)
        # Not across the border: the terms of strata are added up otherwise.
        origin, stop = 0, self.num_timesteps
        if slot >= self.num_timesteps:
            origin, stop = self.num_timesteps, self.num_timesteps + self.num_strata
        most = _TERMS_PER_BLOCK // size
        first_slot = origin + (slot - origin) // most * most
        last_slot = min(first_slot + most, stop)
        return Block(
            first_slot * size, last_slot * size, first_slot, last_slot - first_slot,
            0, len(self.example_ids),
        )  # fmt: skip

    def _of_timesteps(self, begin: int, end: int) -> Batch:
        slot, rows, draw = self._places(begin, end)
        return Batch(rows, self.last - slot, self.example_ids[rows] * self.draws + draw, None)

    def _of_strata(self, begin: int, end: int) -> Batch:
        stratum, rows, draw = self._places(begin, end)
        ids = self.example_ids[rows]
        place = noise.spread_by_id(ids, self.offsets[stratum * self.draws + draw])
        where = (stratum, self.num_strata)
        if self.importance is None:
            t = noise.timestep_at(place, 2, self.num_steps, *where)
            weight: Tensor | float = float(self.num_steps - 1)
        else:
            t, weight = self.importance.timestep_at(place, 2, *where)
        weight = torch.as_tensor(weight, dtype=torch.float64, device=t.device).expand(len(t))
        noise_ids = (ids * self.num_strata + stratum) * self.draws + draw
        return Batch(rows, t, noise_ids, weight / (self.num_strata * self.draws))

    def _places(self, begin: int, end: int) -> tuple[Tensor, Tensor, Tensor]:
        """Slot, row of the data and draw."""
        number = torch.arange(begin, end, device=self.example_ids.device)
        slot = number // self.pairs_per_slot
        inside = number - slot * self.pairs_per_slot
        if self.draws == 1:
            return slot, inside, torch.zeros_like(inside)
        rows = inside // self.draws
        return slot, rows, inside - rows * self.draws
