"""The native extension beside torch on a GPU: its own cudart, torch's context, streams, graphs."""

import pytest
import torch

import dpm_fast
from dpm_fast import dispatch, ops
from test_kl import arguments, to

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(params=["native", "triton"], autouse=True)
def _backend(request):
    if reason := dispatch.why_absent(request.param, "cuda"):
        pytest.skip(reason)
    with dpm_fast.use_backend(request.param):
        yield


def test_work_on_a_side_stream_waits_for_what_came_before_it() -> None:
    inputs = to(arguments((1, 28, 28)), "cuda")
    expected = ops.kl(*inputs)
    stream = torch.cuda.Stream()
    x_t = torch.zeros_like(inputs[1])
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x_t.copy_(inputs[1])
        found = ops.kl(inputs[0], x_t, *inputs[2:])
    stream.synchronize()
    assert torch.equal(found, expected)


def test_a_captured_graph_sees_new_inputs() -> None:
    inputs = to(arguments((1, 28, 28)), "cuda")
    ops.kl(*inputs)  # compiles, where the backend does that at the first call
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = ops.kl(*inputs)
    for scale in (1.0, 0.5):
        inputs[2].mul_(scale)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(found, ops.kl(*inputs))


def test_calls_do_not_wait_for_the_device() -> None:
    inputs = to(arguments((1, 28, 28)), "cuda")
    ops.kl(*inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        mu_out = inputs[2].requires_grad_()
        ops.kl(inputs[0], inputs[1], mu_out, *inputs[3:]).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert mu_out.grad is not None
