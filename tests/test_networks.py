"""The networks: the 2015 code's values and gradients, initialization, layouts, messages."""

import math
import re

import numpy as np
import pytest
import torch
from torch import nn

from dpm_fast.networks import ACTIVATIONS, MLP, ConvDenseNetwork, RBFNetwork
from dpm_fast.reference import temporal_basis
from dpm_fast.weights_2015 import load_2015_weights
from tolerances import GOLDEN_RTOL

T = 12
SMALL = {
    "conv_channels": 4,
    "conv_layers": 2,
    "dense_layers": 2,
    "dense_width": 5,
    "pixel_width": 3,
}
NETWORKS = {
    "conv_dense": lambda: ConvDenseNetwork((2, 4, 8), T, **SMALL),
    "conv_dense_3_scales": lambda: ConvDenseNetwork((2, 4, 8), T, **SMALL, num_scales=3),
    "conv_dense_paper": lambda: ConvDenseNetwork(
        (1, 6, 4), T, **SMALL, num_scales=2, kernel_size=5, activation="after_sum", num_outputs=1
    ),
    "conv_only": lambda: ConvDenseNetwork((1, 4, 4), T, **SMALL | {"dense_layers": 0}),
    "conv_shallow": lambda: ConvDenseNetwork(
        (3, 4, 4), T, conv_layers=1, dense_layers=1, pixel_layers=1, bias="per_location"
    ),
    "conv_per_timestep": lambda: ConvDenseNetwork((1, 4, 4), T, **SMALL, readout="per_timestep"),
    "rbf": lambda: RBFNetwork(2, T),
    "rbf_bumps": lambda: RBFNetwork(3, T, num_units=5, num_outputs=1, readout="bumps"),
    "mlp": lambda: MLP(2, T, hidden=(6, 5)),
    "mlp_time_input": lambda: MLP(3, T, hidden=(6,), time_input=True, num_bumps=4),
    "mlp_per_timestep": lambda: MLP(1, T, hidden=(6,), readout="per_timestep", num_outputs=1),
} | {
    f"mlp_{name}": lambda name=name: MLP(2, T, hidden=(6,), activation=name) for name in ACTIVATIONS
}


@pytest.fixture(params=NETWORKS)
def network(request):
    """Each network in float64, with a readout that is not zero."""
    torch.manual_seed(0)
    made = NETWORKS[request.param]().double()
    for parameter in made.readout.parameters():
        nn.init.normal_(parameter)
    return made


def inputs(network, num_examples=3):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(num_examples, *network.event_shape, dtype=torch.float64, generator=generator)
    return x, torch.randint(1, T + 1, (num_examples,), generator=generator)


# The 2015 code


def network_2015(arrays, case, **options):
    config = {
        name.removeprefix(f"{case}/cfg/"): arrays[name].item()
        for name in arrays
        if name.startswith(f"{case}/cfg/")
    }
    width = config["spatial_width"]
    options = {"bias": "per_location"} | options
    return ConvDenseNetwork(
        (config["n_colors"], width, width),
        config["trajectory_length"],
        conv_layers=config["n_layers_conv"],
        conv_channels=config["n_hidden_conv"],
        num_scales=config["n_scales"],
        # In the 2015 code the depth of the dense path is that of the convolutions.
        dense_layers=config["n_layers_conv"] if config["n_hidden_dense_lower"] else 0,
        dense_width=config["n_hidden_dense_lower"],
        dense_channels=config["n_hidden_dense_lower_output"],
        pixel_layers=config["n_layers_dense_upper"],
        pixel_width=config["n_hidden_dense_upper"],
        num_bumps=config["n_temporal_basis"],
        **options,
    ).double()


def params_2015(arrays, prefix):
    return {name.removeprefix(prefix): arrays[name] for name in arrays if name.startswith(prefix)}


def assert_golden(got, expected, name=""):
    expected = np.asarray(expected)
    atol = GOLDEN_RTOL * np.abs(expected).max()
    np.testing.assert_allclose(got, expected, rtol=GOLDEN_RTOL, atol=atol, err_msg=name)


@pytest.mark.parametrize("case", ["m0", "m1", "m2"])
@torch.no_grad()
def test_golden_values(golden, case):
    arrays = golden("sohldickstein_mlp")
    network = network_2015(arrays, case)
    load_2015_weights(network, params_2015(arrays, f"{case}/param/"))
    x = torch.from_numpy(arrays[f"{case}/X"])
    assert_golden(network.conv(x), arrays[f"{case}/conv_out"])
    if network.dense is not None:
        assert_golden(network.dense(x.flatten(1)), arrays[f"{case}/dense_lower_out"])

    basis, num_bumps = network.readout.basis, network.readout.bias.shape[0]
    table = basis.table
    basis.table = torch.eye(num_bumps + 1).to(table)[:, 1:]
    coefficients = [network(x, torch.tensor([j + 1])).permute(0, 2, 3, 1) for j in range(num_bumps)]
    basis.table = table
    # Ours by bump, then (mean, variance), then color; theirs the other way around.
    by_bump = torch.stack(coefficients).unflatten(-1, (2, network.event_shape[0]))
    assert_golden(by_bump.permute(1, 2, 3, 5, 4, 0).flatten(3), arrays[f"{case}/out"])

    for t in arrays[f"{case}/ts"]:
        mu_out, sigma2_out = network(x, torch.tensor([t + 1])).chunk(2, dim=1)
        beta = torch.from_numpy(golden("sohldickstein_schedule")["T40/beta"])[t]
        mu = x * (1 - beta).sqrt() + mu_out * beta.sqrt()
        sigma = torch.sigmoid(sigma2_out / math.sqrt(40) + beta.logit()).sqrt()
        assert_golden(mu, arrays[f"{case}/t{t}/mu"])
        assert_golden(sigma, arrays[f"{case}/t{t}/sigma"])


def objective_2015(network, x_0, eps, beta, t):
    """The 2015 code's objective at its (0-based) t, in bits per pixel, up to a constant."""
    alpha_bar = (1 - beta[: t + 1]).prod()
    x_t = alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * eps
    alpha_bar_prev = alpha_bar / (1 - beta[t])
    mu_q = alpha_bar_prev.sqrt() * beta[t] * x_0 + (1 - beta[t]).sqrt() * (1 - alpha_bar_prev) * x_t
    mu_q = mu_q / (1 - alpha_bar)
    sigma2_q = beta[t] * (1 - alpha_bar_prev) / (1 - alpha_bar)
    mu_out, sigma2_out = network(x_t, torch.tensor([t + 1])).chunk(2, dim=1)
    mu_p = (1 - beta[t]).sqrt() * x_t + beta[t].sqrt() * mu_out
    sigma2_p = torch.sigmoid(sigma2_out / math.sqrt(len(beta)) + beta[t].logit())
    kl = (sigma2_p / sigma2_q).log() + (sigma2_q + (mu_q - mu_p) ** 2) / sigma2_p - 1
    return kl.mean() / 2 * len(beta) * x_0.shape[1] / math.log(2)


@pytest.mark.parametrize("case", ["m0", "m1", "m2"])
def test_golden_gradients(golden, case):
    arrays = golden("sohldickstein_mlp")
    beta = torch.from_numpy(golden("sohldickstein_schedule")["T40/beta"])
    x_0, eps = (torch.from_numpy(arrays[f"{case}/{name}"]) for name in ("X0", "N"))
    (t,) = {
        int(name.split("/")[1][1:])
        for name in arrays
        if name.startswith(f"{case}/t") and "/grad/" in name
    }
    network, gradients = network_2015(arrays, case), network_2015(arrays, case)
    load_2015_weights(network, params_2015(arrays, f"{case}/param/"))
    # A conversion by permutation and cropping converts gradients as it does weights.
    load_2015_weights(gradients, params_2015(arrays, f"{case}/t{t}/grad/"))
    objective_2015(network, x_0, eps, beta, t).backward()
    expected = dict(gradients.named_parameters())
    for name, parameter in network.named_parameters():
        assert_golden(parameter.grad, expected[name].detach(), name)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (
            {"dense_upper/linear1/b": None, "extra": np.zeros(1)},
            {},
            "params must name this network's arrays, "
            "got missing=['dense_upper/linear1/b'], unknown=['extra']",
        ),
        (
            {"dense_lower/linear0/W": np.zeros((6, 64))},
            {},
            "params['dense_lower/linear0/W'] must have shape (64, 6), got (6, 64)",
        ),
        ({}, {"bias": "per_channel"}, "network must have bias 'per_location', got 'per_channel'"),
        (
            {},
            {"readout": "per_timestep"},
            "network must have readout 'bumps', got 'per_timestep'",
        ),
    ],
)
def test_2015_weights_that_do_not_fit(golden, change, options, message):
    arrays = golden("sohldickstein_mlp")
    network = network_2015(arrays, "m0", **options)
    params = params_2015(arrays, "m0/param/") | change
    params = {name: array for name, array in params.items() if array is not None}
    before = [parameter.clone() for parameter in network.parameters()]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        load_2015_weights(network, params)
    for parameter, old in zip(network.parameters(), before, strict=True):
        assert torch.equal(parameter, old)


def test_defaults_are_those_of_the_2015_code():
    network = ConvDenseNetwork((1, 28, 28), 1000)
    assert [tuple(p.shape) for p in network.conv.parameters()] == (
        [(20, 1, 3, 3), (20,)] + 3 * [(20, 20, 3, 3), (20,)]
    )
    assert [tuple(p.shape) for p in network.dense.parameters() if p.ndim > 1] == (
        [(500, 784), (500, 500), (500, 500), (1568, 500)]
    )
    assert [tuple(p.shape) for p in network.pixel.parameters()] == [(20, 22, 1, 1), (20,)]
    assert network.readout.weight.shape == (10, 2, 20)


# Every network


def test_output_shape(network):
    x, t = inputs(network)
    channels, *spatial = network.event_shape
    assert network.num_steps == T
    assert network(x, t).shape == (3, network.num_outputs * channels, *spatial)


@pytest.mark.parametrize("name", NETWORKS)
def test_starts_at_zero_and_learns_at_once(name):
    network = NETWORKS[name]()
    x, t = inputs(network)
    out = network(x.float(), t)
    assert (out == 0).all()
    (out - 1).square().mean().backward()
    assert network.readout.weight.grad.abs().sum() > 0


def test_gradcheck(network):
    x, t = inputs(network, num_examples=2)
    parameters = dict(network.named_parameters())

    def apply(x, *values):
        return torch.func.functional_call(
            network, dict(zip(parameters, values, strict=True)), (x, t)
        )

    assert torch.autograd.gradcheck(
        apply, (x.requires_grad_(), *parameters.values()), fast_mode=True
    )


def test_examples_do_not_see_each_other(network):
    x, t = inputs(network, num_examples=5)
    out = network(x, t)
    pieces = [network(x[part], t[part]) for part in (slice(0, 1), slice(1, 1), slice(1, 5))]
    torch.testing.assert_close(torch.cat(pieces), out)
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(network(x[order], t[order]), out[order])


def test_one_timestep_for_all(network):
    x, _ = inputs(network)
    t = torch.tensor([5])
    torch.testing.assert_close(network(x, t), network(x, t.expand(3)))


def test_layouts_agree_and_repeat(network):
    x, t = inputs(network)
    out = network(x, t)
    assert torch.equal(network(x, t), out)
    channels_last = x.movedim(1, -1).contiguous().movedim(-1, 1)
    torch.testing.assert_close(network(channels_last, t), out)
    torch.testing.assert_close(network(torch.stack([x, x], dim=-1)[..., 0], t), out)


def test_float32_agrees(network):
    x, t = inputs(network)
    expected = network(x, t)
    out = network.float()(x.float(), t).double()
    # Ten roundings in a row for each of up to six layers.
    assert (out - expected).abs().max() <= 60 * 2**-24 * expected.abs().max()


def test_compiles_as_one_graph():
    """All in one process: each meets the sizes that became symbolic because of those before it."""
    torch.compiler.reset()
    networks = [NETWORKS[name]().double() for name in ("conv_only", "mlp_time_input", "rbf")]
    for network in networks:
        nn.init.normal_(network.readout.weight)
    compiled = [torch.compile(each, fullgraph=True, backend="eager") for each in networks]
    for num_examples in (3, 4):
        for network, fast in zip(networks, compiled, strict=True):
            x, t = inputs(network, num_examples)
            torch.testing.assert_close(fast(x, t), network(x, t))


def test_state_dict_holds_the_parameters_only(network):
    assert network.state_dict().keys() == dict(network.named_parameters()).keys()
    assert all(tensor.is_contiguous() for tensor in network.state_dict().values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_never_waits_for_the_device(network):
    x, t = (a.cuda() for a in inputs(network))
    expected = network(x.cpu(), t.cpu())
    network.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = network(x, t)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(out.cpu(), expected)


def test_autocast():
    torch.manual_seed(0)
    network = ConvDenseNetwork((1, 4, 4), T, **SMALL)
    nn.init.normal_(network.readout.weight)
    x, t = inputs(network)
    expected = network(x.float(), t)
    with torch.autocast("cpu", torch.bfloat16):
        out = network(x.float(), t)
    # bfloat16 keeps 8 bits; the errors of six layers add up.
    assert (out - expected).abs().max() < 6 * 2**-8 * expected.abs().max()


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (
            lambda x, t: (x[:, :1], t),
            ValueError,
            "x must have shape (N, 2, 4, 8), got (3, 1, 4, 8)",
        ),
        (lambda x, t: (x[0], t), ValueError, "x must have shape (N, 2, 4, 8), got (2, 4, 8)"),
        (
            lambda x, t: (x.mT, t),
            ValueError,
            "x must have shape (N, 2, 4, 8), got (3, 2, 8, 4)",
        ),
        (
            lambda x, t: (x.double(), t),
            TypeError,
            "x must have dtype torch.float32, got torch.float64",
        ),
        (
            lambda x, t: (x.byte(), t),
            TypeError,
            "x must have dtype torch.float32, got torch.uint8",
        ),
        (lambda x, t: (x.to("meta"), t), ValueError, "x must be on cpu, got meta"),
        (lambda x, t: (x, t * 0), ValueError, "t must lie in 1..12, got 0..0"),
        (lambda x, t: (x, t + 12), ValueError, "t must lie in 1..12, got 13..24"),
        (lambda x, t: (x, t[:2]), ValueError, "t must have shape (3,) or (1,), got (2,)"),
        (
            lambda x, t: (x, t.float()),
            TypeError,
            "t must have dtype torch.int64, got torch.float32",
        ),
    ],
)
def test_input_messages(change, kind, message):
    network = ConvDenseNetwork((2, 4, 8), T, **SMALL)
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        network(*change(torch.zeros(3, 2, 4, 8), torch.tensor([1, 12, 7])))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: ConvDenseNetwork((28, 28), T),
            "shape must be (C, H, W), all positive, got (28, 28)",
        ),
        (
            lambda: ConvDenseNetwork((1, 0, 4), T),
            "shape must be (C, H, W), all positive, got (1, 0, 4)",
        ),
        (
            lambda: ConvDenseNetwork((1, 8, 6), T, num_scales=3),
            "image sides must be divisible by 4 for 3 scales, got 8 x 6",
        ),
        (lambda: ConvDenseNetwork((1, 4, 4), 0), "num_steps must be at least 1, got 0"),
        (
            lambda: ConvDenseNetwork((1, 4, 4), T, conv_layers=0),
            "conv_layers must be at least 1, got 0",
        ),
        (
            lambda: ConvDenseNetwork((1, 4, 4), T, dense_layers=-1),
            "dense_layers must be at least 1, got -1",
        ),
        (
            lambda: ConvDenseNetwork((1, 4, 4), T, dense_width=0),
            "dense_width must be at least 1, got 0",
        ),
        (
            lambda: ConvDenseNetwork((1, 4, 4), T, readout="all"),
            "readout mode must be one of 'bumps', 'per_timestep', got 'all'",
        ),
        (lambda: RBFNetwork(0, T), "dim must be at least 1, got 0"),
        (lambda: RBFNetwork(2, T, num_units=0), "num_units must be at least 1, got 0"),
        (lambda: MLP(0, T), "dim must be at least 1, got 0"),
        (lambda: MLP(2, T, num_outputs=0), "num_outputs must be at least 1, got 0"),
        (lambda: MLP(2, T, hidden=8), "hidden must be one or more positive widths, got 8"),
        (
            lambda: MLP(2, T, hidden=(8.0,)),
            "hidden must be one or more positive widths, got (8.0,)",
        ),
        (lambda: ConvDenseNetwork(28, T), "shape must be (C, H, W), all positive, got 28"),
        (lambda: MLP(2, T, hidden=()), "hidden must be one or more positive widths, got ()"),
        (
            lambda: MLP(2, T, hidden=(4, 0)),
            "hidden must be one or more positive widths, got (4, 0)",
        ),
        (
            lambda: MLP(2, T, activation="swish"),
            "activation must be one of 'tanh', 'relu', 'leaky_relu', 'silu', 'gelu', 'softplus', "
            "got 'swish'",
        ),
    ],
)
def test_constructor_messages(make, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MLP((2,), T), "dim must be an integer, got tuple"),
        (lambda: MLP(2, "12"), "num_steps must be an integer, got str"),
        (lambda: RBFNetwork(2, T, num_units=2.5), "num_units must be an integer, got float"),
        (
            lambda: ConvDenseNetwork((1, 4, 4), T, conv_channels="8"),
            "conv_channels must be an integer, got str",
        ),
    ],
)
def test_sizes_are_integers(make, message):
    with pytest.raises(TypeError, match=f"^{message}$"):
        make()


# What each computes


def test_rbf_by_hand():
    network = RBFNetwork(2, T, num_units=2).double()
    with torch.no_grad():
        network.centers.copy_(torch.tensor([[0.0, 0.0], [3.0, 4.0]]))
        network.log_widths.copy_(torch.tensor([1.0, 5.0], dtype=torch.float64).log())
        network.readout.weight.zero_()
        network.readout.weight[7, 0] = torch.tensor([1.0, 0.0])
        network.readout.weight[7, 1] = torch.tensor([0.0, 2.0])
        network.readout.bias[7, 3] = -1.0
    # From (0, 0) the second center is one of its widths away.
    second = math.exp(-0.5) / (1 + math.exp(-0.5))
    out = network(torch.zeros(1, 2, dtype=torch.float64), torch.tensor([7]))
    np.testing.assert_allclose(out.detach()[0], [1 - second, 2 * second, 0, -1], rtol=1e-14)
    assert (network(torch.zeros(1, 2, dtype=torch.float64), torch.tensor([8])) == 0).all()


def test_mlp_by_hand():
    network = MLP(2, T, hidden=(3,), activation="tanh", time_input=True, num_bumps=4).double()
    for parameter in network.readout.parameters():
        nn.init.normal_(parameter)
    x, t = inputs(network)
    rows = temporal_basis(T, 4)[t]
    hidden = torch.tanh(
        torch.cat([x, rows], 1) @ network.hidden[0].weight.T + network.hidden[0].bias
    )
    weight = torch.einsum("nj,jof->nof", rows, network.readout.weight)
    expected = torch.einsum("nof,nf->no", weight, hidden) + rows @ network.readout.bias
    torch.testing.assert_close(network(x, t), expected)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gain_keeps_the_mean_square(name):
    make_activation, gain = ACTIVATIONS[name]
    z = torch.linspace(-10, 10, 20001, dtype=torch.float64)
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    mean_square = torch.trapezoid(make_activation()(z).square() * density, z)
    assert abs(gain**2 * mean_square - 1) < 1e-3


@pytest.mark.parametrize("pixel_layers", [1, 2, 3])
@pytest.mark.parametrize("autocast", [False, True])
def test_pixel_layers_take_both_paths_scaled(pixel_layers, autocast):
    torch.manual_seed(0)
    network = ConvDenseNetwork(
        (1, 4, 4), 9, conv_channels=5, dense_channels=3, dense_width=7, pixel_layers=pixel_layers
    )
    x, t = torch.randn(2, 1, 4, 4), torch.tensor([3, 9])
    y = network.conv(x)
    dense = network.dense(x.flatten(1)).view(2, 4, 4, 3).permute(0, 3, 1, 2)
    torch.nn.init.normal_(network.readout.weight)
    features = network.pixel(torch.cat([y / 5**0.5, dense / 3**0.5], dim=1))
    expected = network.readout(features, t)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with_gradient = network(x, t)
        with torch.no_grad():
            without = network(x, t)
    tolerance = {"rtol": 0.1, "atol": 0.1} if autocast else {"rtol": 1e-5, "atol": 1e-5}
    for found in (with_gradient, without):
        torch.testing.assert_close(found.float(), expected, **tolerance)


def test_pixel_layers_of_no_examples_and_under_vmap():
    torch.manual_seed(0)
    network = ConvDenseNetwork((1, 4, 4), 9, conv_channels=5, dense_width=7)
    torch.nn.init.normal_(network.readout.weight)
    x, t = torch.randn(3, 2, 1, 4, 4), torch.tensor([3])
    with torch.no_grad():
        assert network(x[0, :0], t).shape == (0, 2, 4, 4)
        found = torch.func.vmap(lambda x: network(x, t))(x)
        expected = network(x.flatten(0, 1), t).unflatten(0, (3, 2))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
