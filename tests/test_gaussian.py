"""Gaussian diffusion: tables, gradients of the terms, learned schedules, refusals."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dpm_fast import reference
from dpm_fast.binomial import BinomialDiffusion
from dpm_fast.gaussian import PARAMETERIZATIONS, GaussianDiffusion, GaussianReverse
from dpm_fast.reference import ReverseRow

NUM_STEPS = 6
VARIANCES = ("logit_scaled", "logit", "fixed_small", "fixed_large", "learned_range", "learned")
X_0 = torch.tensor([[0.3, -1.2], [0.8, 0.1], [-0.4, 1.5]], dtype=torch.float64)
T = torch.tensor([1, 3, NUM_STEPS])
IDS = torch.arange(3)


def process(learned: bool = False) -> GaussianDiffusion:
    return GaussianDiffusion.from_schedule("erase", NUM_STEPS, learned=learned)


def outputs(num_outputs: int) -> Tensor:
    z = torch.randn(3, 2 * num_outputs, generator=torch.Generator().manual_seed(1))
    return 0.3 * z.double()


def test_tables_follow_from_the_steps() -> None:
    tables = process().tables()
    assert all(column.dtype == torch.float64 for column in tables)
    torch.testing.assert_close(tables.alpha_bar, (1 - tables.beta).cumprod(0))
    torch.testing.assert_close(tables.beta_bar, 1 - tables.alpha_bar)
    # N(x_t; sqrt(alpha) x, beta) N(x; sqrt(alpha_bar) x_0, beta_bar), normalized in x
    before, beta = tables.beta_bar[1:-1], tables.beta[2:]
    precision = (1 - beta) / beta + 1 / before
    torch.testing.assert_close(tables.sigma2_q[2:], 1 / precision)
    torch.testing.assert_close(tables.c_0[2:], tables.alpha_bar[1:-1].sqrt() / before / precision)
    torch.testing.assert_close(tables.c_x[2:], (1 - beta).sqrt() / beta / precision)
    assert (tables.sigma2_q[1], tables.c_x[1]) == (0, 0)
    assert tables.c_0[1].item() == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("name", PARAMETERIZATIONS)
def test_terms_are_the_textbook_divergence(name: str, variance: str) -> None:
    p = process()
    reverse = p.reverse(name, variance)
    x_t, out = p.sample_x_t(X_0, T, 0, IDS), outputs(reverse.num_outputs)
    mu_p, sigma2_p = reverse.moments(x_t, T, out)
    tables = p.tables()
    mu_q = tables.c_0[T, None] * X_0 + tables.c_x[T, None] * x_t
    sigma2_q = tables.sigma2_q[T, None]
    difference = (mu_q - mu_p) ** 2
    expected = 0.5 * (sigma2_p.log() - sigma2_q.log() + (sigma2_q + difference) / sigma2_p - 1)
    decoder = 0.5 * (math.log(2 * math.pi) + sigma2_p.log() + (X_0 - mu_p) ** 2 / sigma2_p)
    expected = torch.where(T[:, None] == 1, decoder, expected).sum(dim=1)
    torch.testing.assert_close(reverse.kl(X_0, x_t, T, out), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("name", PARAMETERIZATIONS)
def test_gradients(name: str, variance: str, learned: bool) -> None:
    p = process(learned).double()
    reverse = p.reverse(name, variance)
    out = outputs(reverse.num_outputs).requires_grad_()
    inputs = [out]
    if learned:
        assert p.schedule_weights is not None
        inputs.append(p.schedule_weights)

    def terms(out: Tensor, *_: Tensor) -> Tensor:
        return reverse.kl(X_0, p.sample_x_t(X_0, T, 0, IDS), T, out)

    assert torch.autograd.gradcheck(terms, inputs)
    gradients = torch.autograd.grad(terms(out).sum(), inputs)
    assert all(g.isfinite().all() and g.abs().max() > 1e-6 for g in gradients)


@pytest.mark.parametrize("name", PARAMETERIZATIONS)
def test_a_schedule_that_erases_everything_predicts_no_eps(name: str) -> None:
    erasing = GaussianDiffusion.from_schedule("erase_paper", NUM_STEPS)
    if name == "epsilon":
        with pytest.raises(ValueError, match=r"'epsilon' requires .* alpha_bar_T .*; got 0$"):
            erasing.reverse(name)
        return
    table = erasing.reverse(name).table()[1:]
    assert not table.isnan().any()
    low, high = (ReverseRow._fields.index(bound) for bound in ("low", "high"))
    assert table[:, [i for i in range(table.shape[1]) if i not in (low, high)]].isfinite().all()
    x = X_0[:, :1].float()
    reverse = erasing.reverse(name)
    out = torch.zeros(3, reverse.num_outputs)
    nats = reverse.kl(x, erasing.sample_x_t(x, T, 0, IDS), T, out)
    assert nats.isfinite().all()


def test_tables_of_a_learned_schedule_are_shared_while_asked_for() -> None:
    p = process(learned=True)
    reverse = p.reverse()
    assert p.tables() is not p.tables()
    with p.shared_tables():
        tables, rows = p.tables(), reverse.table()
        with p.shared_tables():
            assert p.tables() is tables and reverse.table() is rows
            with torch.no_grad():  # without a graph: another one
                assert not p.tables().beta.requires_grad
        assert p.tables("cpu") is tables
    assert p.tables() is not tables


def test_fixed_tables_are_made_once_per_device() -> None:
    p = process()
    reverse = p.reverse()
    assert p.tables() is p.tables(torch.device("cpu"))
    assert reverse.table() is reverse.table("cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="requires a GPU")
def test_a_device_without_a_number_is_the_current_one() -> None:
    p = process()
    reverse = p.reverse()
    assert p.tables("cuda") is p.tables("cuda:0")
    assert reverse.table("cuda") is reverse.table("cuda:0")


@pytest.mark.parametrize("t", [-1, 0, NUM_STEPS + 1])
def test_timesteps_outside_the_tables_are_refused(t: int) -> None:
    p, x, ts = process(), X_0, torch.tensor([2, t, 2])
    reverse, out = p.reverse(), outputs(2)
    for call in (
        lambda: reverse.kl(x, x, ts, out),
        lambda: reverse.moments(x, ts, out),
        lambda: reverse.row(ts, x),
    ):
        with pytest.raises(ValueError, match=r"t must lie in 1..6, got"):
            call()
    if t != 0:
        with pytest.raises(ValueError, match=r"t must lie in 0..6, got"):
            p.sample_x_t(x, ts, 0, IDS)
        with pytest.raises(ValueError, match=r"t must lie in 0..6, got"):
            p.coefficients(ts)
    else:
        assert torch.equal(p.sample_x_t(x, ts, 0, IDS)[1], x[1])


@pytest.mark.parametrize("t", [3, 3.0, np.int64(3), [1, 2, 3], None])
def test_timesteps_are_a_tensor(t: Any) -> None:
    p, x = process(), X_0
    bits = BinomialDiffusion(NUM_STEPS)
    for call in (
        lambda: p.coefficients(t),
        lambda: p.sample_x_t(x, t, 0, IDS),
        lambda: p.reverse().rows(t, x),
        lambda: bits.noise_rows(t, x),
        lambda: bits.reverse().rows(t, x),
    ):
        with pytest.raises(TypeError, match=r"^t must be an int64 tensor, .*, got \w+$"):
            call()


def test_coefficients_refuse_tensors_that_are_no_timesteps() -> None:
    with pytest.raises(TypeError, match=r"t must have dtype torch.int64, got torch.float32"):
        process().coefficients(torch.ones(3))
    with pytest.raises(ValueError, match=r"t must have shape \(N,\), got \(\)"):
        process().coefficients(torch.tensor(3))


def test_betas_are_not_rounded() -> None:
    assert GaussianDiffusion([0.1, 1e-7]).tables().beta.tolist() == [0, 0.1, 1e-7]


def test_first_step_of_a_learned_schedule_stays() -> None:
    p = process(learned=True)
    initial = process().tables().beta
    torch.testing.assert_close(p.tables().beta, initial, rtol=1e-9, atol=1e-12)
    assert p.schedule_weights is not None
    p.schedule_weights.data.fill_(1.0)
    moved = p.tables().beta
    assert moved[1] == initial[1]
    assert (moved[2:] > initial[2:] + 1e-3).all()
    assert (moved[2:] < 1).all()
    clone = copy.deepcopy(p)
    assert torch.equal(clone.tables().beta, moved)
    fresh = process(learned=True)
    fresh.load_state_dict(p.state_dict())
    assert torch.equal(fresh.tables().beta, moved)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tables_survive_a_narrow_model(dtype: torch.dtype) -> None:
    p = process().to(dtype)
    assert all(map(torch.equal, p.tables(), process().tables()))
    reverse = p.reverse()
    x = X_0.to(dtype)
    assert reverse.row(T, x).base.dtype == torch.float32
    nats = reverse.kl(x, x, T, outputs(2).to(dtype))
    wide = reverse.kl(x.double(), x.double(), T, outputs(2).to(dtype).double())
    torch.testing.assert_close(nats, wide, rtol=1e-4, atol=1e-5)


@given(
    z=st.lists(st.floats(-30, 30), min_size=4, max_size=4),
    t=st.integers(2, NUM_STEPS),
    name=st.sampled_from(list(PARAMETERIZATIONS)),
    variance=st.sampled_from(["own", *VARIANCES]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_divergences_are_not_negative(
    z: list[float], t: int, name: str, variance: str, dtype: torch.dtype
) -> None:
    reverse = GaussianReverse(process(), name, None if variance == "own" else variance)
    x_0 = X_0[:1].to(dtype)
    out = torch.tensor([z], dtype=dtype)[:, : 2 * reverse.num_outputs]
    nats = reverse.kl(x_0, x_0 + 1, torch.tensor([t]), out)
    assert not nats.isnan().any()
    assert (nats >= 0).all()


def test_divergence_of_nearly_equal_variances_keeps_its_digits() -> None:
    x = torch.tensor([1e-6, -1e-4, 0.04, 0.06, -3.0])
    exact = torch.special.expm1(x.double()) - x.double()
    exact[:2] = x.double()[:2] ** 2 / 2 + x.double()[:2] ** 3 / 6
    torch.testing.assert_close(
        reference.expm1_minus_identity(x).double(), exact, rtol=1e-5, atol=0.0
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("eps",), r"parameterization must be one of perturbation, .*, got 'eps'"),
        (("epsilon", "small"), r"variance must be one of logit_scaled, .*, got 'small'"),
        (("decay", None, (-1, 1)), r"clamp must be .* predicts x_0; got \(-1, 1\) with 'decay'"),
        (("epsilon", None, (1.0,)), r"clamp must be \(low, high\) .*; got \(1.0,\)"),
        (("epsilon", None, (math.nan, 1)), r"clamp must be \(low, high\) .*; got \(nan, 1\)"),
        (("epsilon", None, (1, -1)), r"clamp must be \(low, high\) with low < high, .*\(1, -1\)"),
    ],
)
def test_a_reverse_kernel_refuses(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        process().reverse(*arguments)


@pytest.mark.parametrize(
    ("betas", "message"),
    [
        ([0.5], r"betas must have shape \(T,\) with T >= 2, got \(2,\)|got \(1,\)"),
        ([[0.1, 0.2]], r"betas must have shape \(T,\) with T >= 2, got \(1, 2\)"),
        ([0.1, 1.2], r"betas must be in \(0, 1\).*; got 1.2 at t = 2"),
        ([0.0, 0.2], r"betas must be in \(0, 1\).*; got 0 at t = 1"),
        ([math.nan, 0.2], r"betas must be in \(0, 1\).*; got nan at t = 1"),
        ([1.0, 0.2], r"betas must be in \(0, 1\), the last one may be 1; got 1 at t = 1"),
    ],
)
def test_a_process_refuses(betas: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GaussianDiffusion(betas)


def test_a_schedule_must_be_known() -> None:
    with pytest.raises(ValueError, match=r"schedule must be one of erase, .*, got 'square'"):
        GaussianDiffusion.from_schedule("square", 10)
    with pytest.raises(ValueError, match=r"requires num_steps > 20, got 20"):
        GaussianDiffusion.from_schedule("linear", 20)
