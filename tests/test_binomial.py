"""Binomial diffusion: tables against Bayes' rule, stable terms, refusals."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpm_fast import reference
from dpm_fast.binomial import BinomialDiffusion, BinomialReverse

NUM_STEPS, RHO = 6, 0.2
BITS = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
X_T = torch.tensor([[0.0, 1.0, 0.0, 1.0]])


def transition(beta: float) -> torch.Tensor:
    """[x_{t-1}, x_t]"""
    return torch.tensor(
        [[1 - beta * RHO, beta * RHO], [beta * (1 - RHO), 1 - beta * (1 - RHO)]],
        dtype=torch.float64,
    )


def test_tables_follow_from_the_steps() -> None:
    tables = BinomialDiffusion(NUM_STEPS, RHO).tables()
    marginal = torch.eye(2, dtype=torch.float64)  # [x_0, x_t]
    for t in range(1, NUM_STEPS + 1):
        step = transition(1 / (NUM_STEPS - t + 1))
        joint = marginal[:, :, None] * step  # [x_0, x_{t-1}, x_t]
        marginal = joint.sum(dim=1)
        assert tables.alpha_bar[t].item() == pytest.approx(1 - t / NUM_STEPS, abs=1e-15)
        rate = tables.alpha_bar[t] * torch.tensor([0.0, 1.0]) + (1 - tables.alpha_bar[t]) * RHO
        torch.testing.assert_close(marginal[:, 1], rate.double())
        if t > 1:
            posterior = (joint / marginal[:, None]).permute(1, 0, 2)
            torch.testing.assert_close(tables.posterior[t], posterior)
            entropy = reference.bernoulli_entropy(posterior[1])
            torch.testing.assert_close(tables.posterior_entropy[t], entropy)
    assert tables.alpha_bar[-1] == 0


def test_noised_bits_have_the_rate_of_the_closed_form() -> None:
    process, n = BinomialDiffusion(NUM_STEPS, RHO), 20000
    for bit in (0.0, 1.0):
        x_t = process.sample_x_t(torch.full((n, 1), bit), torch.full((n,), 2), 0, torch.arange(n))
        rate = bit * 4 / 6 + RHO * 2 / 6
        assert x_t.unique().tolist() == [0, 1]
        assert x_t.mean().item() == pytest.approx(rate, abs=5 * math.sqrt(rate * (1 - rate) / n))
    x_T = process.sample_x_T((1,), 0, torch.arange(n), torch.float32)
    assert x_T.mean().item() == pytest.approx(RHO, abs=5 * math.sqrt(RHO * (1 - RHO) / n))


@given(
    logit=st.floats(-60, 60),
    t=st.integers(2, NUM_STEPS),
    name=st.sampled_from(["rate", "perturbation", "x0"]),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_terms_are_divergences(logit: float, t: int, name: str) -> None:
    reverse = BinomialReverse(BinomialDiffusion(NUM_STEPS, RHO), name)
    out = torch.full((1, 4), logit, requires_grad=True)
    nats = reverse.kl(BITS, X_T, torch.tensor([t]), out)
    assert nats.isfinite().all()
    assert nats >= -1e-12
    (gradient,) = torch.autograd.grad(nats.sum(), out)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("rho", [RHO, 0.5])
def test_a_perturbation_of_nothing_reverses_noise_exactly(rho: float) -> None:
    process = BinomialDiffusion(NUM_STEPS, rho)
    tables, reverse = process.tables(), process.reverse("perturbation")
    bits = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    zeros = torch.zeros_like(bits)
    rate = torch.sigmoid(reverse.logit(bits, torch.tensor([3]), zeros))
    torch.testing.assert_close(rate, bits * (1 - tables.beta[3]) + rho * tables.beta[3])
    nats = torch.zeros(2, dtype=torch.float64)
    for t in range(1, NUM_STEPS + 1):
        rate_of_ones = tables.alpha_bar[t] * bits + (1 - tables.alpha_bar[t]) * rho
        for x_t, probability in ((0.0, 1 - rate_of_ones), (1.0, rate_of_ones)):
            x, ts = torch.full_like(bits, x_t), torch.full((2,), t)
            nats += probability[:, 0] * reverse.kl(bits, x, ts, zeros)
    torch.testing.assert_close(nats, process.null_nats(bits), rtol=1e-12, atol=0)


@pytest.mark.parametrize("t", range(2, NUM_STEPS + 1))
def test_a_certain_network_of_x_0_is_the_posterior(t: int) -> None:
    reverse = BinomialReverse(BinomialDiffusion(NUM_STEPS, RHO), "x0")
    out, ts = 80 * (2 * BITS - 1), torch.tensor([t])
    assert abs(reverse.kl(BITS, X_T, ts, out).item()) < 1e-12
    assert reverse.kl(BITS, X_T, ts, -out).item() > 0.1


@pytest.mark.parametrize("name", ["rate", "perturbation", "x0"])
@pytest.mark.parametrize("t", range(1, NUM_STEPS + 1))
def test_rows_are_the_definitions(t: int, name: str) -> None:
    process = BinomialDiffusion(NUM_STEPS, RHO)
    tables, reverse, ts = process.tables(), process.reverse(name), torch.tensor([t])
    x_0, x_t = BITS.double(), X_T.double()
    out = torch.tensor([[0.3, -1.0, 2.0, 0.5]], dtype=torch.float64)
    j, k = BITS.long(), X_T.long()
    q_1 = tables.posterior[t][1]  # [x_0, x_t]
    expected = torch.sigmoid(out)
    if name == "perturbation":
        expected = torch.sigmoid(out + tables.step_logit[t][k])
    elif name == "x0":
        expected = expected * q_1[1][k] + (1 - expected) * q_1[0][k]
    rate = torch.sigmoid(reverse.logit(x_t, ts, out))
    torch.testing.assert_close(rate, expected, rtol=1e-13, atol=0)
    q = q_1[j, k]
    terms = torch.xlogy(q, q / rate) + torch.special.xlogy(1 - q, (1 - q) / (1 - rate))
    nats = reverse.kl(x_0, x_t, ts, out)
    torch.testing.assert_close(nats, terms.sum(dim=1), rtol=1e-12, atol=0)


def test_terms_by_hand() -> None:
    process = BinomialDiffusion(NUM_STEPS, RHO)
    reverse = BinomialReverse(process)
    logit, t = torch.tensor([[0.3, -1.0, 2.0, 0.5]]), torch.tensor([4])
    p = torch.sigmoid(logit.double())
    q = process.tables().posterior[4][1][BITS.long(), X_T.long()]
    expected = (q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()).sum()
    torch.testing.assert_close(reverse.kl(BITS, X_T, t, logit)[0], expected, rtol=1e-6, atol=0)
    decoder = torch.nn.functional.binary_cross_entropy(p, BITS.double(), reduction="sum")
    nats = reverse.kl(BITS, X_T, torch.tensor([1]), logit)[0]
    torch.testing.assert_close(nats, decoder, rtol=1e-6, atol=0)


def test_gradients() -> None:
    for name in ("rate", "perturbation", "x0"):
        reverse = BinomialReverse(BinomialDiffusion(NUM_STEPS, RHO), name)
        out = torch.tensor([[0.3, -1.0, 2.0, 0.5]], dtype=torch.float64, requires_grad=True)
        for t in (1, 3, NUM_STEPS):
            ts = torch.tensor([t])
            assert torch.autograd.gradcheck(
                lambda z, ts=ts, r=reverse: r.kl(BITS.double(), X_T.double(), ts, z), out
            )


def test_refusals() -> None:
    process = BinomialDiffusion(NUM_STEPS)
    for rate in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match=rf"prior_rate must be in \(0, 1\), got {rate}"):
            BinomialDiffusion(NUM_STEPS, rate)
    with pytest.raises(ValueError, match=r"num_steps must be an integer .*, got 1"):
        BinomialDiffusion(1)
    with pytest.raises(
        ValueError, match=r"must be one of rate, perturbation, x0 .*, got 'epsilon'"
    ):
        process.reverse("epsilon")
    with pytest.raises(ValueError, match="takes no variance and no clamp"):
        process.reverse("rate", "learned")
    with pytest.raises(ValueError, match=r"must return shape \(1, 4\) .*, got \(1, 8\)"):
        process.reverse().logit(X_T, torch.tensor([2]), torch.zeros(1, 8))


@pytest.mark.parametrize("t", [-1, 0, NUM_STEPS + 1])
def test_rows_refuse_a_timestep_out_of_range(t) -> None:
    process = BinomialDiffusion(NUM_STEPS, RHO)
    steps = torch.tensor([t])
    with pytest.raises(ValueError, match=rf"t must lie in 1..{NUM_STEPS}, got {t}"):
        process.reverse().rows(steps, BITS)
    if t == 0:
        assert process.noise_rows(steps, BITS).tolist() == [[0, 1]]
        return
    with pytest.raises(ValueError, match=rf"t must lie in 0..{NUM_STEPS}, got {t}"):
        process.noise_rows(steps, BITS)
