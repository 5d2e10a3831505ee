"""Importance sampling of timesteps: the terms of the bound that vary most are looked at most."""

import torch
from torch import Tensor

from dpm_fast import noise
from dpm_fast.layers import check_positive

# Share of the probability that is spread evenly: no term weighs more than 1 / FLOOR of what it
# would in an even choice, whatever the estimates say.
FLOOR = 0.1
# Terms of a timestep that its running second moment remembers.
WINDOW = 100
# Until every timestep has been seen as often as this, all are equally likely.
WARM_UP = 4
_MASS = 2**30  # of all timesteps, nearly; times a place below 2**32 it must fit in 63 bits


class Importance:
    """Running second moments of the terms of the bound, and the timesteps that follow from them.

    The probability of a timestep is FLOOR / n + (1 - FLOOR) sqrt(m_t) / sum sqrt(m) over n
    timesteps, with m_t the mean square of its latest terms ([iDDPM] section 3.3, there without
    the floor's bound on weights). A term enters an estimate divided by its probability, which is
    therefore unbiased whatever the moments are.

    Terms are recorded as they are computed and change nothing until `update`. So all that is
    estimated between two updates follows from the same probabilities, in any division into
    batches; the recorded sums of several processes may be added up before it.

    Args:
        num_steps: T.
        device: where the terms are.

    Attributes:
        moments: (2, T + 1) float64, the state: number of terms seen and their second moment,
            nats^2, by t.
        recorded: (2, T + 1) float64, number and sum of the squares of terms since the last update.
    """

    def __init__(self, num_steps: int, device: torch.device | str = "cpu"):
        check_positive(num_steps=num_steps)
        self.moments = torch.zeros(2, num_steps + 1, dtype=torch.float64, device=device)
        self.recorded = torch.zeros_like(self.moments)

    def masses(self, first: int) -> Tensor:
        """The timesteps' probabilities as whole numbers in proportion, (T - first + 1,) int64."""
        num_seen, second_moment = self.moments[:, first:]
        root = second_moment.sqrt()
        share = FLOOR / len(root) + (1 - FLOOR) * root / root.sum()
        ready = (num_seen >= WARM_UP).all() & (root.sum() > 0) & root.sum().isfinite()
        share = torch.where(ready, share, torch.full_like(share, 1 / len(root)))
        # Whole numbers: their sums have the same bits in any order, on any device.
        return (share * _MASS).long().clamp_min(1)

    def timesteps(
        self,
        seed: int,
        example_ids: Tensor,
        first: int,
        stratum: int = 0,
        num_strata: int = 1,
        draw: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """One timestep in first..T for each example, from one of strata of equal probability.

        Args:
            seed, example_ids, stratum, draw: as for `noise.place_in_stratum`.
            first: the least timestep.
            num_strata: number of strata.

        Returns:
            t: (N,) int64.
            weight: (N,) float64; the mean of weight * term(t) is the sum of term over first..T,
                once averaged over the strata.
        """
        place = noise.place_in_stratum(seed, example_ids, stratum, draw)
        return self.timestep_at(place, first, stratum, num_strata)

    def timestep_at(
        self, place: Tensor, first: int, stratum: int | Tensor, num_strata: int
    ) -> tuple[Tensor, Tensor]:
        """`timesteps` at places (N,) of a stratum, or of one for each, (N,) int64; see
        `noise.place_in_stratum`."""
        masses = self.masses(first)
        ends = masses.cumsum(0)
        place = (stratum * ends[-1] + (place * ends[-1] >> 32)) // num_strata
        index = torch.searchsorted(ends, place, right=True)
        return first + index, ends[-1] / masses[index].double()

    @torch.no_grad()
    def record(self, t: Tensor, nats: Tensor) -> None:
        """Take note of terms (N,) in nats at timesteps t (N,); those not finite are left out."""
        square = nats.detach().double().square()
        finite = square.isfinite()
        add_by_timestep(self.recorded[0], t, finite.double())
        add_by_timestep(self.recorded[1], t, torch.where(finite, square, 0.0))

    @torch.no_grad()
    def update(self) -> None:
        """Move the second moments towards those of the recorded terms, and forget the terms."""
        num, total = self.recorded
        num_seen, second_moment = self.moments
        rate = num / (num_seen.clamp_max(WINDOW) + num).clamp_min(1)
        second_moment += rate * (total / num.clamp_min(1) - second_moment)
        num_seen += num
        self.recorded.zero_()


def add_by_timestep(totals: Tensor, t: Tensor, values: Tensor) -> None:
    """totals[t[n]] += values[n] for totals (T + 1,), t (N,) int64 and values (N,), in place."""
    # In a fixed order: `index_add_` adds by atomics on a GPU, this sorts.
    totals.index_put_((t,), values, accumulate=True)
