"""The default backend of torch.compile, which may lay out what an op is given as it likes."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import dpm_fast
from op_cases import LAYOUTS
from test_gpu import CALLS, DIFFERENTIABLE, Given, given

# torch's compiler uses what torch deprecates.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

# The others take no tensor that has a layout, or have no reference that is one op.
OTHERS = ("normal", "uniform", "words", "trajectory")
NAMES = [name for name in CALLS if name not in OTHERS]
SCALED = ("x_0", "mu_out", "sigma2_out", "logit_out")


@pytest.mark.parametrize("layout", ["transposed", "channels last"])
@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradients_are_those_of_the_reference(name, layout) -> None:
    event = (3, 6, 4) if name == "multiscale_conv" else (3, 6, 5)  # two scales halve the sides
    g = Given(*(LAYOUTS[layout](x) if x.dim() == 4 else x for x in given("cpu", event)))

    def work(g: Given) -> Tensor:
        # Operations before and after the op, whose results the compiler lays out as it likes.
        scaled = {key: 1.25 * getattr(g, key) for key in SCALED}
        return 0.5 * CALLS[name](g._replace(**scaled)) + 1

    def value_and_gradients(function: Callable[[Given], Tensor]) -> list[Tensor]:
        wanted = DIFFERENTIABLE.get(name, ())
        leaves = {key: getattr(g, key).detach().requires_grad_() for key in wanted}
        out = function(g._replace(**leaves))
        return [out, *(torch.autograd.grad(out.sum(), tuple(leaves.values())) if leaves else ())]

    with dpm_fast.use_backend("reference"):
        expected = value_and_gradients(work)
    torch._dynamo.reset()
    found = value_and_gradients(torch.compile(work, fullgraph=True))
    for x, wanted in zip(found, expected, strict=True):
        scale = max(1.0, wanted.abs().amax().item())
        torch.testing.assert_close(x, wanted, rtol=1e-4, atol=1e-5 * scale)
