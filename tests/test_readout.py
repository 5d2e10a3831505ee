"""The temporal basis and the readout: golden values, order of contraction, modules, messages."""

import re

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dpm_fast import ops
from dpm_fast.layers import TemporalBasis, TemporalReadout
from dpm_fast.reference import affine_per_example, readout, temporal_basis
from tolerances import GOLDEN_RTOL

SPATIAL = [pytest.param((), id="vector"), (7,), (3, 5)]


def random(*shape):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def contracted_last(features, weight, bias, basis_rows):
    """Every bump's layer at every pixel, then the mixture."""
    per_bump = torch.einsum("jof,nf...->njo...", weight, features)
    per_bump = per_bump + bias.view(*bias.shape, *[1] * (features.ndim - 2))
    return torch.einsum("nj,njo...->no...", basis_rows.expand(features.shape[0], -1), per_bump)


@pytest.mark.parametrize("num_steps", [40, 1000])
def test_golden_basis(golden, num_steps):
    expected = golden("sohldickstein_schedule")[f"T{num_steps}/temporal_basis"].T
    np.testing.assert_allclose(temporal_basis(num_steps, 10)[1:], expected, rtol=GOLDEN_RTOL)


@pytest.mark.parametrize(("num_steps", "num_bumps"), [(1, 10), (2, 3), (40, 1), (37, 10)])
def test_basis_is_a_partition_of_unity(num_steps, num_bumps):
    table = temporal_basis(num_steps, num_bumps)
    assert table.shape == (num_steps + 1, num_bumps)
    assert table.dtype == torch.float64
    assert (table[0] == 0).all()
    torch.testing.assert_close(table[1:].sum(1), torch.ones(num_steps, dtype=torch.float64))


def test_basis_by_hand():
    # Centers 1, 3, 5; at t = 3 the neighbors are two widths away: exp(-2).
    side = np.exp(-2) / (1 + 2 * np.exp(-2))
    np.testing.assert_allclose(temporal_basis(5, 3)[3], [side, 1 - 2 * side, side], rtol=1e-14)


@pytest.mark.parametrize("case", ["T1000/C1", "T1000/C3", "T40/C1"])
def test_golden_readout(golden, case):
    arrays = golden("sohldickstein_step")
    features = torch.from_numpy(arrays[f"{case}/Z"]).permute(0, 3, 1, 2)
    num_steps, colors = int(case[1:].split("/")[0]), int(case[-1])
    # Feature (c, m, j) is the coefficient of bump j in output (m, c).
    weight = torch.zeros(10, 2, colors, colors, 2, 10, dtype=torch.float64)
    for j in range(10):
        for m in range(2):
            for c in range(colors):
                weight[j, m, c, c, m, j] = 1
    weight = weight.flatten(3).flatten(1, 2)
    table = temporal_basis(num_steps, 10)
    for t in arrays[f"{case}/ts"]:
        rows = table[[t + 1]]
        out = readout(features, weight, torch.zeros(10, 2 * colors, dtype=torch.float64), rows)
        for part, name in zip(out.chunk(2, dim=1), ("mu_coeff", "beta_coeff"), strict=True):
            expected = arrays[f"{case}/t{t}/readout/{name}"]
            atol = GOLDEN_RTOL * np.abs(expected).max()
            np.testing.assert_allclose(part, expected, rtol=GOLDEN_RTOL, atol=atol)


@pytest.mark.parametrize("rows", [4, 1])
@pytest.mark.parametrize("spatial", SPATIAL)
def test_order_of_contraction_does_not_matter(spatial, rows):
    features, weight, bias = random(4, 6, *spatial), random(10, 2, 6), random(10, 2)
    basis_rows = temporal_basis(40, 10)[torch.tensor([1, 40, 17, 17])[:rows]]
    out = readout(features, weight, bias, basis_rows)
    assert out.shape == (4, 2, *spatial)
    torch.testing.assert_close(out, contracted_last(features, weight, bias, basis_rows))


@pytest.mark.parametrize(("rows", "share"), [(16, 0.12), (1, 0.11)])
def test_contracting_first_is_a_tenth_of_the_work(rows, share):
    features, weight, bias = random(16, 20, 28, 28), random(10, 2, 20), random(10, 2)
    basis_rows = temporal_basis(40, 10)[1 : rows + 1]
    flops = []
    for order in (readout, contracted_last):
        with FlopCounterMode(display=False) as counter:
            order(features, weight, bias, basis_rows)
        flops.append(counter.get_total_flops())
    assert flops[0] < share * flops[1]


@pytest.mark.parametrize("rows", [3, 1])
@pytest.mark.parametrize("spatial", SPATIAL)
def test_gradcheck(spatial, rows):
    inputs = random(3, 4, *spatial), random(5, 2, 4), random(5, 2), random(rows, 5)
    assert torch.autograd.gradcheck(readout, [x.requires_grad_() for x in inputs])


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("spatial", SPATIAL)
def test_affine_per_example(spatial, shared):
    features = random(3, 4, *spatial)
    weight, bias = (p[:1] if shared else p for p in (random(3, 2, 4), random(3, 2)))
    out = affine_per_example(features, weight, bias)
    for n in range(3):
        row = 0 if shared else n
        pixels = features[n].reshape(4, -1)  # one column each
        expected = weight[row] @ pixels + bias[row][:, None]
        torch.testing.assert_close(out[n], expected.reshape(2, *spatial))


def module(mode, in_features=6, num_steps=9):
    torch.manual_seed(0)
    made = TemporalReadout(in_features, 2, num_steps, mode=mode, num_bumps=4).double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    return made


MODES = pytest.mark.parametrize("mode", ["bumps", "per_timestep"])


@MODES
def test_starts_at_zero(mode):
    made = TemporalReadout(6, 2, 9, mode=mode)
    assert (made(torch.randn(3, 6, 2), torch.tensor([1, 5, 9])) == 0).all()


@MODES
@pytest.mark.parametrize("spatial", SPATIAL)
def test_each_example_has_its_own_timestep(mode, spatial):
    made, features = module(mode), random(9, 6, *spatial)
    t = torch.arange(9, 0, -1)
    out = made(features, t)
    for n in range(9):
        if mode == "bumps":
            rows = temporal_basis(9, 4)[t[n]]
            weight = torch.einsum("j,jof->of", rows, made.weight)
            bias = rows @ made.bias
        else:
            weight, bias = made.weight[t[n]], made.bias[t[n]]
        expected = torch.einsum("of,f...->o...", weight, features[n])
        expected = expected + bias.view(2, *[1] * len(spatial))
        torch.testing.assert_close(out[n], expected)


@MODES
@pytest.mark.parametrize("spatial", SPATIAL)
def test_one_timestep_for_all(mode, spatial):
    made, features = module(mode), random(3, 6, *spatial)
    t = torch.tensor([7])
    torch.testing.assert_close(made(features, t), made(features, t.expand(3)))


@MODES
@pytest.mark.parametrize("spatial", SPATIAL)
def test_layouts_and_sizes(mode, spatial):
    made, features, t = module(mode), random(3, 6, *spatial), torch.tensor([2, 9, 1])
    expected = made(features, t)
    strided = torch.stack([features, features], dim=2)[:, :, 0]
    torch.testing.assert_close(made(strided, t), expected)
    torch.testing.assert_close(made(features.movedim(1, -1).clone().movedim(-1, 1), t), expected)
    torch.testing.assert_close(made(features[:1], t[:1]), expected[:1])
    assert made(features[:0], t[:0]).shape == (0, 2, *spatial)
    assert torch.equal(made(features, t), expected)


@pytest.mark.parametrize(("mode", "spatial"), [("bumps", (3, 5)), ("per_timestep", ())])
def test_compiles_as_one_graph(mode, spatial):
    torch.compiler.reset()
    made = module(mode)
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    for t in (torch.tensor([2, 9, 1]), torch.tensor([4, 4, 8, 5])):
        features = random(len(t), 6, *spatial)
        torch.testing.assert_close(compiled(features, t), made(features, t))


@pytest.mark.parametrize(
    "t",
    [
        pytest.param([3] * 40, id="one-timestep"),
        pytest.param([5, 2, 2, 5, 1] * 8, id="alike"),
        pytest.param([2] * 30 + [5, 1, 3] * 3 + [4], id="unlike"),
        pytest.param([1, 2, 3, 4, 5], id="few"),
    ],
)
def test_many_examples_of_a_timestep(t):
    layer = TemporalReadout(4, 3, 5, mode="per_timestep").double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    features, t = random(len(t), 4).requires_grad_(), torch.tensor(t)
    upstream, inputs = random(len(t), 3), (features, *layer.parameters())
    out = layer(features, t)
    expected = affine_per_example(features, layer.weight[t], layer.bias[t])
    torch.testing.assert_close(out, expected)
    gradients = torch.autograd.grad(out, inputs, upstream)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, inputs, upstream))


def test_row_of_no_timestep_gets_no_gradient():
    made = module("per_timestep")
    made(random(9, 6), torch.arange(1, 10)).sum().backward()
    assert (made.weight.grad[0] == 0).all()
    assert (made.weight.grad[1:] != 0).all()


def test_table_keeps_its_digits_through_casts():
    made = TemporalBasis(1000, 10).to(torch.bfloat16).double()
    t = torch.arange(1, 1001)
    assert torch.equal(made(t), temporal_basis(1000, 10)[1:])
    assert not made.state_dict()


@pytest.mark.parametrize(
    ("t", "kind", "message"),
    [
        (torch.tensor([0, 1, 2]), ValueError, "t must lie in 1..9, got 0..2"),
        (torch.tensor([3, 10, 2]), ValueError, "t must lie in 1..9, got 2..10"),
        (torch.tensor([-1]), ValueError, "t must lie in 1..9, got -1..-1"),
        (torch.tensor([1, 2]), ValueError, "t must have shape (3,) or (1,), got (2,)"),
        (torch.tensor(1), ValueError, "t must have shape (3,) or (1,), got ()"),
        (
            torch.tensor([1.0, 2.0, 3.0]),
            TypeError,
            "t must have dtype torch.int64, got torch.float32",
        ),
        (torch.ones(3, dtype=torch.int64, device="meta"), ValueError, "t must be on cpu, got meta"),
    ],
)
@MODES
def test_timestep_messages(mode, t, kind, message):
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        module(mode)(random(3, 6, 2), t)


@pytest.mark.parametrize("shape", [(3, 5, 2), (6,)])
def test_feature_message(shape):
    message = f"features must have shape (N, 6, *spatial), got {shape}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        module("bumps")(random(*shape), torch.tensor([1]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_features": 0}, "in_features must be at least 1, got 0"),
        ({"out_features": 0}, "out_features must be at least 1, got 0"),
        ({"num_steps": 0}, "num_steps must be at least 1, got 0"),
        ({"num_bumps": 0}, "num_bumps must be at least 1, got 0"),
        ({"mode": "bump"}, "readout mode must be one of 'bumps', 'per_timestep', got 'bump'"),
    ],
)
def test_constructor_messages(options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        TemporalReadout(**{"in_features": 6, "out_features": 2, "num_steps": 9} | options)


@pytest.mark.parametrize("shares_t", [False, True])
def test_gradient_of_images_keeps_their_order(shares_t):
    features = random(3, 2, 1, 3).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight, bias = random(6, 2, 2).requires_grad_(), random(6, 2).requires_grad_()
    rows = temporal_basis(9, 6)[[4] if shares_t else [2, 7, 9]]
    leaves = features, weight, bias
    out = readout(*leaves, rows)
    grad_out = random(*out.shape)
    found = torch.autograd.grad(out, leaves, grad_out)
    expected = torch.autograd.grad(contracted_last(*leaves, rows), leaves, grad_out)
    for gradient, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, wanted)
    assert found[0].is_contiguous(memory_format=torch.channels_last)

    def of_leaves(*leaves):
        return readout(leaves[0].contiguous(memory_format=torch.channels_last), *leaves[1:], rows)

    assert torch.autograd.gradcheck(of_leaves, leaves)
    assert torch.autograd.gradgradcheck(of_leaves, leaves)


def test_images_under_autocast():
    readout = TemporalReadout(4, 2, 9, mode="per_timestep")
    torch.nn.init.normal_(readout.weight)
    features = random(3, 4, 2, 5).float().contiguous(memory_format=torch.channels_last)
    features.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = readout(features, torch.tensor([2, 7, 9]))
    out.float().square().sum().backward()
    assert readout.weight.grad.dtype == features.grad.dtype == torch.float32
    torch.testing.assert_close(
        out.float(), readout(features, torch.tensor([2, 7, 9])), rtol=0.05, atol=0.05
    )


@pytest.mark.parametrize("spatial", SPATIAL)
@pytest.mark.parametrize("rows", [1, 4])
def test_op(spatial, rows):
    features, weight, bias = random(4, 5, *spatial), random(3, 2, 5), random(3, 2)
    basis_rows = random(rows, 3)
    arguments = [x.requires_grad_() for x in (features, weight, bias, basis_rows)]
    expected = contracted_last(*arguments)
    found = ops.readout(*arguments)
    torch.testing.assert_close(found, expected)
    grad_out = random(*expected.shape)
    gradients = (torch.autograd.grad(out, arguments, grad_out) for out in (found, expected))
    for gradient, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("features", torch.zeros(4), ValueError, "features must have shape (N, *event)"),
        ("features", torch.zeros(4, 5, dtype=torch.int64), TypeError, "features must have dtype"),
        ("weight", random(3, 2, 6), ValueError, "weight must have shape (J, O, 5), got (3, 2, 6)"),
        ("bias", random(3, 1), ValueError, "bias must have shape (3, 2), got (3, 1)"),
        (
            "basis_rows",
            random(2, 3),
            ValueError,
            "basis_rows must have shape (4, 3) or (1, 3), got (2, 3)",
        ),
        ("bias", random(3, 2).to("meta"), ValueError, "bias must be on cpu, got meta"),
    ],
)
def test_op_errors(name, value, error, message):
    arguments = {
        "features": random(4, 5, 6),
        "weight": random(3, 2, 5),
        "bias": random(3, 2),
        "basis_rows": random(4, 3),
    }
    with pytest.raises(error, match=re.escape(message)):
        ops.readout(**(arguments | {name: value}))
