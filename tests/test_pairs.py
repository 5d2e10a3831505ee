"""The pairs of a bound: each once, in an order of its own, and added up in that order."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dpm_fast import noise, pairs
from dpm_fast.importance import Importance
from dpm_fast.pairs import Batch, Pairs
from dpm_fast.sums import Sums

NUM_STEPS, SEED = 9, 3
IDS = torch.tensor([4, -7, 2**40, 0, 11])


def importance() -> Importance:
    known = Importance(NUM_STEPS)
    known.moments[0] = 100
    known.moments[1] = 10 ** torch.linspace(2, -2, NUM_STEPS + 1)
    return known


KINDS: dict[str, dict[str, Any]] = {
    "exact": {"last": NUM_STEPS, "first": 1, "num_strata": 0, "importance": None},
    "exact, paper": {"last": NUM_STEPS, "first": 2, "num_strata": 0, "importance": None},
    "strata": {"last": 1, "first": 1, "num_strata": 4, "importance": None},
    "strata, paper": {"last": 1, "first": 2, "num_strata": 3, "importance": None},
    "importance": {"last": 1, "first": 1, "num_strata": 5, "importance": importance()},
}


def make(kind: str, draws: int, num_examples: int = len(IDS)) -> Pairs:
    return Pairs(NUM_STEPS, IDS[:num_examples], draws=draws, seed=SEED, **KINDS[kind])


def one_by_one(kind: str, draws: int) -> list[tuple[int, int, int, float]]:
    """Row, t, noise id and weight of every pair, by loops and by timesteps chosen one at a time."""
    options, found = KINDS[kind], []
    for t in range(options["last"], options["first"] - 1, -1):
        for row, i in enumerate(IDS.tolist()):
            found += [(row, t, i * draws + d, 1.0) for d in range(draws)]
    num_strata = options["num_strata"]
    for stratum in range(num_strata):
        for row, i in enumerate(IDS.tolist()):
            for d in range(draws):
                place = (stratum, num_strata, d)
                weight: Any = NUM_STEPS - 1
                if options["importance"] is None:
                    t = noise.stratified_timesteps(SEED, IDS[row : row + 1], 2, NUM_STEPS, *place)
                else:
                    t, weight = importance().timesteps(SEED, IDS[row : row + 1], 2, *place)
                noise_id = (i * num_strata + stratum) * draws + d
                found.append((row, int(t), noise_id, float(weight) / (num_strata * draws)))
    return found


def rows_of(batch: Batch) -> list[tuple[Any, ...]]:
    weight = torch.ones(len(batch.t)) if batch.weight is None else batch.weight
    columns = batch.rows, batch.t, batch.noise_ids, weight
    return list(zip(*(column.tolist() for column in columns), strict=True))


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_batches_of_any_size_hold_every_pair_once(kind: str, draws: int, size: int) -> None:
    every = make(kind, draws)
    expected = one_by_one(kind, draws)
    assert len(every) == len(expected)
    found: list[tuple[Any, ...]] = []
    for begin in range(0, len(every), size):
        found += rows_of(every.batch(begin, min(begin + size, len(every))))
    assert found == [pytest.approx(row, rel=1e-15, abs=0) for row in expected]


@pytest.mark.parametrize("num_terms", [1, 4, 14, 40])
@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_short_and_follow_each_other(
    monkeypatch: pytest.MonkeyPatch, kind: str, draws: int, num_terms: int
) -> None:
    monkeypatch.setattr(pairs, "_TERMS_PER_BLOCK", num_terms)
    every, number, num_blocks = make(kind, draws), 0, 0
    while number < len(every):
        block = every.block(number)
        assert block.begin == number
        assert all(every.block(i) == block for i in range(block.begin, block.end))
        assert 0 < block.end - block.begin <= every.longest_block <= max(num_terms, draws)
        batch = every.batch(block.begin, block.end)
        examples = range(block.first_example, block.first_example + block.num_examples)
        expected = [row for _ in range(block.num_slots) for row in examples for _ in range(draws)]
        assert batch.rows.tolist() == expected
        assert block.end <= every.num_timesteps * every.pairs_per_slot or batch.weight is not None
        number, num_blocks = block.end, num_blocks + 1
    assert num_blocks >= len(every) / max(num_terms, draws)


def terms_of(every: Pairs) -> Tensor:
    generator = torch.Generator().manual_seed(len(every))
    return torch.randn(len(every), dtype=torch.float64, generator=generator).exp()


@pytest.mark.parametrize("num_terms", [4, 40, 10**6])
@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_sums_are_those_of_the_definition(
    monkeypatch: pytest.MonkeyPatch, kind: str, draws: int, num_terms: int
) -> None:
    monkeypatch.setattr(pairs, "_TERMS_PER_BLOCK", num_terms)
    every = make(kind, draws)
    sums, terms, batch = Sums(every), terms_of(every), every.batch(0, len(every))
    sums.add(terms)
    border = every.num_timesteps * every.pairs_per_slot
    share = torch.ones(len(every), dtype=torch.float64)
    share[:border] /= draws
    nats, per_timestep = torch.zeros(len(IDS)).double(), torch.zeros(NUM_STEPS + 1).double()
    for row, t, value in zip(batch.rows, batch.t, terms * share, strict=True):
        nats[row] += value
        per_timestep[t] += value
    torch.testing.assert_close(sums.nats, nats, rtol=1e-14, atol=0)
    torch.testing.assert_close(sums.per_timestep, per_timestep, rtol=1e-14, atol=0)
    exact = terms[:border].view(-1, draws)
    variance = exact.var(dim=1).sum().item() / draws if draws > 1 and border else 0.0
    assert sums.mc_variance.item() == pytest.approx(variance, rel=1e-13)
    strata = terms[border:].view(every.num_strata, len(IDS), draws).sum(dim=1)
    torch.testing.assert_close(sums.strata, strata, rtol=1e-14, atol=0)


@settings(max_examples=30, deadline=None)
@given(data=st.data(), kind=st.sampled_from(list(KINDS)), draws=st.sampled_from([1, 2]))
def test_sums_have_the_same_bits_in_any_division_and_after_a_rest(
    data: st.DataObject, kind: str, draws: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairs, "_TERMS_PER_BLOCK", data.draw(st.sampled_from([3, 17, 10**6])))
        every = make(kind, draws)
        terms, whole, parts = terms_of(every), Sums(every), Sums(every)
        whole.add(terms)
        while parts.num_done < len(every):
            size = data.draw(st.integers(1, len(every)))
            parts.add(terms[parts.num_done : parts.num_done + size])
            if data.draw(st.booleans()):
                state = {name: x.clone() for name, x in parts.state().items()}
                parts = Sums(every)
                parts.restore(state)
        for name, expected in whole.state().items():
            assert torch.equal(parts.state()[name], expected), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_done": torch.tensor(10**6)}, r"num_done must be in 0\.\.45, got 1000000"),
        ({"num_done": torch.tensor(1.0)}, r"num_done must be in 0\.\.45, got 1\.0"),
        ({"nats": torch.zeros(4).double()}, r"nats must be torch.float64 \(5,\), got .*\(4,\)"),
        ({"waiting": torch.zeros(7)}, r"waiting must be torch.float64 \(7,\), got torch.float32"),
    ],
)
def test_a_state_of_other_pairs_is_refused(change: dict[str, Tensor], message: str) -> None:
    sums = Sums(make("exact", 1))
    sums.add(torch.ones(7, dtype=torch.float64))
    with pytest.raises(ValueError, match=message):
        Sums(make("exact", 1)).restore(sums.state() | change)
