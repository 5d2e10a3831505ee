"""The ops beside torch on a GPU: its streams, graphs and devices, and nothing that waits for it."""

import logging
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import dpm_fast
import test_bernoulli
import test_graphs
import test_kl
from dpm_fast import dispatch, ops
from dpm_fast.noise import Stream
from dpm_fast.ops.trajectory import TrajectoryInputs, trajectory
from dpm_fast.ops.whole_network import ACTIVATIONS

EVENTS = [(1, 28, 28), (2,)]
SEED = -3


class Given(NamedTuple):
    """Arguments of every op."""

    x_0: Tensor
    x_t: Tensor
    mu_out: Tensor
    sigma2_out: Tensor
    rows: Tensor
    coefficients: Tensor
    bits_0: Tensor
    bits_t: Tensor
    logit_out: Tensor
    bernoulli_rows: Tensor
    rates: Tensor
    mask: Tensor
    flip: Tensor
    ids: Tensor
    t: Tensor


def given(device: str, event: tuple[int, ...]) -> Given:
    gaussian = test_kl.arguments(event)
    x_t, n = gaussian[1], len(gaussian[1])
    arguments = Given(
        *gaussian,
        torch.tensor([[0.8, 0.6]]).repeat(n, 1),
        *test_bernoulli.arguments(event),
        rates=torch.tensor([[0.3, 0.6]]).repeat(n, 1),
        mask=x_t > 0.5,
        flip=torch.full_like(x_t, 0.1),
        ids=torch.arange(n) * 2**33,
        t=torch.tensor(test_kl.T),
    )
    return Given(*(x.to(device) for x in arguments))


def step(g: Given) -> Tensor:
    return ops.step(g.x_t, g.mu_out, g.sigma2_out, g.rows, SEED, g.ids, g.t)


def step_of_a_product(g: Given) -> Tensor:
    factors = {"known": (g.mask, g.x_0), "observed": (g.x_0, 0.3), "drift": g.mu_out}
    return ops.step(g.x_t, g.mu_out, g.sigma2_out, g.rows, SEED, g.ids, g.t, **factors)


def step_in_place(g: Given) -> Tensor:
    return ops.step_(g.x_t.clone(), g.mu_out, g.sigma2_out, g.rows, SEED, g.ids, g.t)


def bernoulli_step(g: Given) -> Tensor:
    factors = {"known": (g.mask, g.bits_0), "observed": (g.bits_0, g.flip), "drift": g.mu_out}
    call = (g.bits_t, g.logit_out, g.bernoulli_rows, SEED, g.ids, g.t)
    return ops.bernoulli_step(*call, **factors)


def bernoulli_step_in_place(g: Given) -> Tensor:
    call = (g.bits_t.clone(), g.logit_out, g.bernoulli_rows, SEED, g.ids, g.t)
    return ops.bernoulli_step_(*call)


def multiscale_conv(g: Given) -> Tensor:
    x = g.mu_out if g.mu_out.dim() == 4 else g.mu_out[..., None, None]
    num_scales = 2 if x.shape[-1] > 1 else 1
    weights = torch.linspace(-1, 1, 5 * x.shape[1] * 9, device=x.device).view(5, -1, 3, 3)
    bias = torch.zeros(5, device=x.device)
    return ops.multiscale_conv(x, [weights] * num_scales, [bias] * num_scales)


def whole_trajectory(g: Given) -> Tensor:
    """Through a layer of 4 units; rows are those of timesteps. Triton has no such kernel."""
    if dispatch.requested() == "triton":
        pytest.skip("runs step by step")
    x = g.x_t.flatten(1)[:, :6].contiguous()
    D = x.shape[1]
    numbers = torch.linspace(-1, 1, 12 * D, device=x.device)
    inputs = TrajectoryInputs(
        rows=g.rows,
        is_binomial=False,
        centers=None,
        scales=None,
        weights=[numbers[: 4 * D].view(4, D), numbers[4 * D :].view(2 * D, 4)],
        biases=[numbers[:4], numbers[: 2 * D]],
        activation=ACTIVATIONS.index("tanh"),
        slope=0.0,
        shape=[],
        num_scales=0,
        after_sum=False,
        conv_weights=[],
        conv_biases=[],
        pixel_weights=[],
        pixel_biases=[],
        seed=SEED,
        example_ids=g.ids,
        levels=None,
        mask=g.mask.flatten(1)[:, :6],
        values=g.x_0.flatten(1)[:, :6],
        y=None,
        spread=None,
        previous=torch.arange(-1, len(g.rows) - 1, device=x.device),
        first=len(g.rows) - 1,
        last=1,
        mean_at_1=False,
        wanted=[1],
    )
    out, states = trajectory(x, inputs)
    return torch.stack((out, *states))


CALLS: dict[str, Callable[[Given], Tensor]] = {
    "kl": lambda g: ops.kl(g.x_0, g.x_t, g.mu_out, g.sigma2_out, g.rows),
    "kl of bins": lambda g: ops.kl(
        g.x_0, g.x_t, g.mu_out, g.sigma2_out, g.rows, edge="discretized", bins=test_kl.GREY
    ),
    "step": step,
    "step of a product": step_of_a_product,
    "step_": step_in_place,
    "noise": lambda g: ops.noise(g.x_0, g.coefficients, SEED, g.ids, g.t),
    "normal": lambda g: ops.normal(SEED, Stream.REVERSE, g.ids, g.t, g.x_0.shape[1:]),
    "uniform": lambda g: ops.uniform(SEED, Stream.REVERSE, g.ids, g.t, g.x_0.shape[1:]),
    "words": lambda g: ops.words(SEED, Stream.REVERSE, g.ids, g.t, 9),
    "bernoulli_noise": lambda g: ops.bernoulli_noise(g.bits_0, g.rates, SEED, g.ids, g.t),
    "bernoulli_step": bernoulli_step,
    "bernoulli_step_": bernoulli_step_in_place,
    "multiscale_conv": multiscale_conv,
    "trajectory": whole_trajectory,
    "bernoulli_kl": lambda g: ops.bernoulli_kl(g.bits_0, g.bits_t, g.logit_out, g.bernoulli_rows),
}
# Calls with a gradient, and with respect to what.
DIFFERENTIABLE = {
    "kl": ("mu_out", "sigma2_out", "rows"),
    "kl of bins": ("mu_out", "sigma2_out", "rows"),
    "noise": ("x_0", "coefficients"),
    "multiscale_conv": ("mu_out",),
    "bernoulli_kl": ("logit_out",),
}


def gradients(name: str, g: Given) -> tuple[Tensor, ...]:
    leaves = {key: getattr(g, key).detach().requires_grad_() for key in DIFFERENTIABLE[name]}
    out = CALLS[name](g._replace(**leaves))
    return torch.autograd.grad(out, tuple(leaves.values()), torch.ones_like(out))


def change(g: Given) -> None:
    """Other inputs at the same addresses: outputs of a network, and the counters of all noise."""
    g.ids.add_(len(g.ids))
    g.t.copy_(g.t.roll(1))
    for out in (g.mu_out, g.sigma2_out, g.logit_out):
        out.mul_(-0.75)


each_call = pytest.mark.parametrize("name", CALLS)
each_gradient = pytest.mark.parametrize("name", DIFFERENTIABLE)
each_event = pytest.mark.parametrize("event", EVENTS, ids=str)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
# torch says once that this mode does not see every way to wait.
without_waiting = pytest.mark.filterwarnings("ignore:Synchronization debug mode")


@pytest.fixture(params=["native", "triton"])
def on_a_gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    if reason := dispatch.why_absent(request.param, "cuda"):
        pytest.skip(reason)
    with dpm_fast.use_backend(request.param):
        yield


@each_event
@each_call
def test_calls_are_what_the_ops_take(name: str, event: tuple[int, ...]) -> None:
    """Also where no GPU runs the tests below: the same calls, and other inputs change them."""
    g = given("cpu", event)
    before = CALLS[name](g).clone()
    assert torch.equal(CALLS[name](g), before)
    change(g)
    if event != (2,) or "bernoulli" not in name:  # ten bits may well stay as they are
        assert not torch.equal(CALLS[name](g), before)


@needs_gpu
@pytest.mark.usefixtures("on_a_gpu")
@each_event
@each_call
def test_work_on_a_side_stream_waits_for_what_came_before_it(name, event) -> None:
    g = given("cuda", event)
    expected = CALLS[name](g)
    late = Given(*map(torch.zeros_like, g))
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for x, of_late in zip(g, late, strict=True):
            of_late.copy_(x)
        found = CALLS[name](late)
    stream.synchronize()
    assert torch.equal(found, expected)


@needs_gpu
@pytest.mark.usefixtures("on_a_gpu")
@each_event
@each_call
def test_a_captured_graph_sees_new_inputs_and_draws_fresh_noise(name, event) -> None:
    g = given("cuda", event)
    CALLS[name](g)  # compiles, where the backend does that at the first call
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = CALLS[name](g)
    for _ in range(3):
        change(g)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(found, CALLS[name](g))


@needs_gpu
@pytest.mark.usefixtures("on_a_gpu")
@each_event
@each_gradient
def test_a_captured_graph_holds_the_backward_pass(name, event, monkeypatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)  # gradients of convolutions
    g = given("cuda", event)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # as torch asks for: its first calls initialize lazily
        for _ in range(3):
            gradients(name, g)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = gradients(name, g)
    change(g)
    graph.replay()
    torch.cuda.synchronize()
    for gradient, expected in zip(found, gradients(name, g), strict=True):
        assert torch.equal(gradient, expected)


@pytest.fixture
def waiting_is_an_error() -> Iterator[Callable[[], None]]:
    """A function from whose call on it is one, until the end of the test."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@without_waiting
@pytest.mark.usefixtures("on_a_gpu")
@each_event
@each_call
def test_calls_do_not_wait_for_the_device(name, event, waiting_is_an_error) -> None:
    g = given("cuda", event)
    CALLS[name](g)
    waiting_is_an_error()
    CALLS[name](g)


@needs_gpu
@without_waiting
@pytest.mark.usefixtures("on_a_gpu")
@each_event
@each_gradient
def test_backward_passes_do_not_wait_for_the_device(name, event, waiting_is_an_error) -> None:
    g = given("cuda", event)
    gradients(name, g)
    waiting_is_an_error()
    gradients(name, g)


class Waiting(test_graphs.Network):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x, t) * float(x[0, 0] < 1e9)


class RandomOnCpu(test_graphs.Network):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x, t) + 0 * torch.rand(1).to(x.device)


@needs_gpu
@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize("name", test_graphs.POSTERIORS)
def test_steps_of_any_network_are_a_graph(name, caplog) -> None:
    caplog.set_level(logging.DEBUG, "dpm_fast")
    model = test_graphs.gaussian().cuda()
    for seed in (3, 4):
        options = {"seed": seed, "posterior": test_graphs.POSTERIORS[name]}
        found, expected = (test_graphs.sample(model, use, **options) for use in (True, False))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert caplog.text.count("are a CUDA graph") == 4  # two seeds, two shapes


@needs_gpu
@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize("network", [Waiting, RandomOnCpu])
def test_what_no_graph_can_hold_goes_step_by_step(network, caplog) -> None:
    caplog.set_level(logging.DEBUG, "dpm_fast")
    model = test_graphs.gaussian(network()).cuda()
    found, expected = (test_graphs.sample(model, use) for use in (True, False))
    torch.testing.assert_close(found, expected)
    assert "no CUDA graph, since a step cannot be captured" in caplog.text
    assert torch.rand(1, device="cuda").isfinite().all()  # no capture is under way
    after = test_graphs.gaussian().cuda()  # and what comes after a failure can be captured
    assert test_graphs.sample(after, True).isfinite().all()
    assert "are a CUDA graph" in caplog.text


@needs_two_gpus
@pytest.mark.usefixtures("on_a_gpu")
@each_event
@each_call
def test_an_op_runs_on_the_device_of_its_tensors(name, event) -> None:
    first, second = (CALLS[name](given(device, event)) for device in ("cuda:0", "cuda:1"))
    assert second.device == torch.device("cuda:1")
    assert torch.cuda.current_device() == 0
    torch.testing.assert_close(second.cpu(), first.cpu(), rtol=1e-5, atol=1e-5)


@needs_two_gpus
@pytest.mark.usefixtures("on_a_gpu")
@each_event
@each_gradient
def test_a_gradient_is_made_on_the_device_of_its_tensors(name, event) -> None:
    first, second = (gradients(name, given(device, event)) for device in ("cuda:0", "cuda:1"))
    assert torch.cuda.current_device() == 0
    for of_first, of_second in zip(first, second, strict=True):
        assert of_second.device == torch.device("cuda:1")
        torch.testing.assert_close(of_second.cpu(), of_first.cpu(), rtol=1e-4, atol=1e-5)
