"""Noise as a function: published vectors, the formula of the normals, independence of batches."""

import itertools
import math
import re

import numpy as np
import pytest
import torch

from dpm_fast import noise
from dpm_fast.noise import Stream
from tolerances import NORMAL_ATOL, mean_stderr_multiple

WORD = 2**32 - 1
CORNER_WORDS = [0, 1, 127, 128, 129, 2**24 + 1, 2**30, 2**31 - 1, 2**31, 2**31 + 1, 3 * 2**30]
CORNER_WORDS += [WORD - 256, WORD - 128, WORD - 127, WORD - 1, WORD]


def philox_in_integers(counter, key):
    """Philox4x32-10 as in the paper of Salmon et al., on Python's unbounded integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        product_0, product_1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1 = (product_1 >> 32) ^ c1 ^ k0, product_1 & WORD
        c2, c3 = (product_0 >> 32) ^ c3 ^ k1, product_0 & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return [c0, c1, c2, c3]


def box_muller(words):
    """Normals in float64 from words (N, 4 k), the uniforms being float32 as the contract says."""
    u = words.numpy().astype(np.float32) * np.float32(2**-32) + np.float32(2**-33)
    u = u.astype(np.float64).reshape(len(words), -1, 2)
    radius, angle = np.sqrt(-2 * np.log(u[..., 0])), 2 * math.pi * u[..., 1]
    return np.stack((radius * np.cos(angle), radius * np.sin(angle)), axis=-1).reshape(words.shape)


def ids(*values):
    return torch.tensor(values, dtype=torch.int64)


def as_int64(array):
    return torch.from_numpy(array.astype(np.int64))


def test_published_vectors(golden):
    stored = golden("philox")
    vectors = zip(
        *(stored[f"kat/{name}"].tolist() for name in ("counter", "key", "rounds", "expected")),
        strict=True,
    )
    for counter, key, rounds, expected in vectors:
        assert [int(w) for w in noise.philox4x32(counter, tuple(key), rounds)] == expected
        if rounds == 10:
            assert philox_in_integers(counter, key) == expected


@pytest.mark.parametrize("seed", [0, 42, 1099511627781])
def test_streams_of_the_published_generator(golden, seed):
    stored = golden("philox")
    counter = as_int64(stored["stream/counter"])
    key = tuple(stored[f"stream/seed_{seed}/key"].tolist())
    assert key == (seed & WORD, seed >> 32)
    out = torch.stack(noise.philox4x32(counter.unbind(1), key), dim=1)
    assert torch.equal(out, as_int64(stored[f"stream/seed_{seed}/out"]))
    few = torch.stack(noise.philox4x32(counter[:64].unbind(1), key, 7), dim=1)
    assert torch.equal(few, as_int64(stored[f"stream/seed_{seed}/out_7rounds"]))


def test_random_counters_and_keys(golden):
    stored = golden("philox")
    counter, key = as_int64(stored["random/counter"]), as_int64(stored["random/key"])
    for rounds, name in ((10, "random/out"), (7, "random/out_7rounds")):
        out = torch.stack(noise.philox4x32(counter.unbind(1), key.unbind(1), rounds), dim=1)
        assert torch.equal(out, as_int64(stored[name]))


@pytest.mark.parametrize("seed", [0, 7, -1, -5, -(2**63), 2**40 + 3, 2**63, 2**64 - 1])
def test_counter_and_key_of_words(seed):
    example_ids = ids(0, 1, 2**31, 2**32, 2**40 + 9, 2**63 - 1, -1, -(2**63))
    t = ids(0, 1, 2, 999, 2**16, 2**24 - 1, 5, 40)
    for stream in Stream:
        got = noise.words(seed, stream, example_ids, t, 6)
        for row, example, step in zip(got.tolist(), example_ids.tolist(), t.tolist(), strict=True):
            expected = []
            for group in range(2):
                counter = (group, step | stream << 24, example & WORD, example >> 32 & WORD)
                expected += philox_in_integers(counter, (seed & WORD, seed >> 32 & WORD))
            assert row == expected[:6]


def test_seeds_are_equal_modulo_2_to_the_64():
    at = (Stream.FORWARD, ids(0, 1, 2), 1, 8)
    assert torch.equal(noise.words(-5, *at), noise.words(2**64 - 5, *at))


def test_normals_follow_the_formula():
    example_ids = torch.arange(2000)
    words = noise.words(3, Stream.REVERSE, example_ids, 17, 100)
    eps = noise.normal(3, Stream.REVERSE, example_ids, 17, (4, 25))
    assert eps.shape == (2000, 4, 25) and eps.dtype == torch.float32
    np.testing.assert_allclose(eps.flatten(1), box_muller(words), rtol=0, atol=NORMAL_ATOL)


def test_normals_of_corner_words(monkeypatch):
    quadruples = torch.tensor([(a, b, b, a) for a, b in itertools.product(CORNER_WORDS, repeat=2)])
    monkeypatch.setattr(noise, "words", lambda *args: quadruples)
    eps = noise.normal(0, Stream.FORWARD, torch.arange(len(quadruples)), 1, (4,))
    np.testing.assert_allclose(eps, box_muller(quadruples), rtol=0, atol=NORMAL_ATOL)
    # The smallest uniform is 2**-33: no normal lies beyond sqrt(66 ln 2).
    assert 6.76 < eps.abs().max() < 6.77


def test_uniforms_of_corner_words(monkeypatch):
    row = torch.tensor([CORNER_WORDS])
    monkeypatch.setattr(noise, "words", lambda *args: row)
    u = noise.uniform(0, Stream.FORWARD, ids(0), 1, (len(CORNER_WORDS),))[0]
    assert u[0].item() == 2.0**-33 and u[-1].item() == 1.0
    assert bool((u > 0).all()) and bool((u.diff() >= 0).all())
    exact = (np.array(CORNER_WORDS) + 0.5) / 2**32
    np.testing.assert_allclose(u, exact, rtol=2**-23)


@pytest.mark.parametrize("draw", [noise.normal, noise.uniform])
def test_float64_carries_the_float32_values(draw):
    at = (9, Stream.INITIAL, ids(4, 5), 3, (3, 5))
    assert torch.equal(draw(*at, torch.float64), draw(*at).double())


@pytest.mark.parametrize("draw", [noise.normal, noise.uniform])
@pytest.mark.parametrize(("num_examples", "event"), [(29, (5,)), (29, (2, 3, 3)), (30, (9001,))])
@pytest.mark.parametrize("batch_size", [1, 7])
def test_batches_do_not_matter(draw, num_examples, event, batch_size):
    example_ids = torch.arange(num_examples) * 2**33 - 5
    t = torch.arange(num_examples) % 11
    whole = draw(-3, Stream.FORWARD, example_ids, t, event)
    parts = [
        draw(-3, Stream.FORWARD, some, steps, event)
        for some, steps in zip(example_ids.split(batch_size), t.split(batch_size), strict=True)
    ]
    assert torch.equal(torch.cat(parts), whole)
    order = torch.arange(num_examples).flip(0)
    assert torch.equal(draw(-3, Stream.FORWARD, example_ids[order], t[order], event)[order], whole)


def test_elements_do_not_depend_on_the_shape_of_the_event():
    at = (1, Stream.FORWARD, ids(0, 8), 5)
    longer = noise.normal(*at, (23,))
    assert torch.equal(noise.normal(*at, (2, 3, 3)).flatten(1), longer[:, :18])


def test_no_examples_and_no_elements():
    assert noise.normal(0, Stream.FORWARD, ids(), 1, (3, 2)).shape == (0, 3, 2)
    assert noise.normal(0, Stream.FORWARD, ids(1), 1, (0,)).shape == (1, 0)


def test_every_coordinate_gives_independent_numbers():
    n = 40_000
    coordinates = [(0, stream, 0, 1) for stream in Stream]
    coordinates += [(1, Stream.FORWARD, 0, 1), (2**32, Stream.FORWARD, 0, 1)]
    coordinates += [(0, Stream.FORWARD, 1, 1), (0, Stream.FORWARD, 2**32, 1)]
    coordinates += [(0, Stream.FORWARD, 0, 2), (0, Stream.FORWARD, 0, 2**16)]
    eps = torch.cat(
        [
            noise.normal(seed, stream, ids(example), t, (n,), torch.float64)
            for seed, stream, example, t in coordinates
        ]
    )
    pairs = torch.triu_indices(len(eps), len(eps), offset=1)
    correlation = (eps @ eps.T / n)[pairs[0], pairs[1]]
    assert correlation.abs().max() < mean_stderr_multiple(pairs.shape[1]) / math.sqrt(n)


def test_moments_of_the_normals():
    n = 2**20
    eps = noise.normal(11, Stream.DATA, torch.arange(n // 4), 0, (4,), torch.float64)
    # mean and variance of eps**k: E eps**2k - (E eps**k)**2
    for k, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        allowed = mean_stderr_multiple(6) * math.sqrt(variance / n)
        assert abs((eps**k).mean().item() - mean) < allowed
    for shift in (1, 2):  # within a Box-Muller pair, and between the pairs of a group
        product = eps * eps.roll(shift, dims=1)
        assert abs(product.mean().item()) < mean_stderr_multiple(6) / math.sqrt(n)


@pytest.mark.parametrize(("first", "last"), [(1, 40), (2, 1000), (2, 2), (5, 14)])
@pytest.mark.parametrize("num_strata", [1, 3])
def test_timesteps_cover_each_stratum_evenly(first, last, num_strata):
    num_terms, rounds = last - first + 1, 50
    example_ids = torch.arange(num_terms * rounds) + 12345
    width = num_terms / num_strata
    counts = torch.zeros(num_terms)
    for stratum in range(num_strata):
        t = noise.stratified_timesteps(6, example_ids, first, last, stratum, num_strata)
        assert t.dtype == torch.int64
        assert first + math.floor(stratum * width) <= t.min()
        assert t.max() < first + math.ceil((stratum + 1) * width)
        counts += torch.bincount(t - first, minlength=num_terms)
    # N points of the golden-ratio sequence leave an interval of length h with N h points but for
    # fewer than 3; a random choice would stray by sqrt(N h). A timestep lies in up to two strata.
    assert (counts - rounds * num_strata).abs().max() <= 3 * min(2, num_strata)


def test_every_timestep_is_equally_likely_over_seeds():
    num_terms, num_seeds = 7, 3000
    t = torch.cat([noise.stratified_timesteps(s, ids(3), 2, 8) for s in range(num_seeds)])
    share = torch.bincount(t - 2, minlength=num_terms) / num_seeds
    p = 1 / num_terms
    allowed = mean_stderr_multiple(num_terms) * math.sqrt(p * (1 - p) / num_seeds)
    assert (share - p).abs().max() < allowed


def test_draws_of_a_stratum_are_independent():
    n = 1500
    t = torch.cat(
        [
            noise.stratified_timesteps(seed, ids(3), 2, 1001, 1, 3, draw)
            for seed in range(n)
            for draw in range(2)
        ]
    ).view(n, 2)
    correlation = torch.corrcoef(t.T.double())[0, 1].item()
    assert abs(correlation) < mean_stderr_multiple() / math.sqrt(n)


def test_timesteps_do_not_depend_on_the_batch():
    example_ids = torch.arange(100) * 3
    t = noise.stratified_timesteps(1, example_ids, 2, 50)
    assert torch.equal(noise.stratified_timesteps(1, example_ids[60:70], 2, 50), t[60:70])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": 2**64}, f"seed must be a 64-bit integer, got {2**64}"),
        ({"seed": -(2**63) - 1}, f"seed must be a 64-bit integer, got {-(2**63) - 1}"),
        ({"stream": 256}, "stream must be in 0..255, got 256"),
        ({"stream": -1}, "stream must be in 0..255, got -1"),
        (
            {"example_ids": torch.zeros(2, 1, dtype=torch.int64)},
            "example_ids must be a 1-d int64 tensor, got torch.int64 of shape (2, 1)",
        ),
        (
            {"example_ids": torch.zeros(2)},
            "example_ids must be a 1-d int64 tensor, got torch.float32 of shape (2,)",
        ),
        ({"t": -1}, "t must be in 0..2**24 - 1, got -1"),
        ({"t": 2**24}, "t must be in 0..2**24 - 1, got 16777216"),
        (
            {"t": torch.zeros(3, dtype=torch.int64)},
            "t must be an int64 tensor of shape (2,), got torch.int64 of shape (3,)",
        ),
        (
            {"t": torch.zeros(2)},
            "t must be an int64 tensor of shape (2,), got torch.float32 of shape (2,)",
        ),
    ],
)
@pytest.mark.parametrize("draw", [noise.normal, noise.uniform])
def test_messages(draw, arguments, message):
    valid = {"seed": 0, "stream": Stream.FORWARD, "example_ids": ids(0, 1), "t": 1}
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        draw(**valid | arguments, event_shape=(2,))
