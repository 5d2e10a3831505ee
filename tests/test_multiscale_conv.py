"""The multiscale convolution: its definition, the 2015 code, gradients, layouts, messages."""

import contextlib
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from backends import CPU_BACKENDS, TRITON
from dpm_fast import ops
from dpm_fast.layers import MultiscaleConv
from dpm_fast.reference import multiscale_conv
from tolerances import GOLDEN_RTOL, rounding

CASES = [
    pytest.param(scales, kernel, activation, bias, id=f"{scales}-{kernel}-{activation}-{bias}")
    for scales, kernel in [(1, 3), (2, 3), (3, 3), (2, 5), (1, 1)]
    for activation in ("per_scale", "after_sum")
    for bias in ("per_channel", "per_location")
]


def layer(scales, kernel, activation, bias, size=(8, 12), dtype=torch.float64):
    torch.manual_seed(0)
    made = MultiscaleConv(
        2, 3, num_scales=scales, kernel_size=kernel, activation=activation, bias=bias, size=size
    )
    for parameter in made.biases:
        torch.nn.init.normal_(parameter)
    return made.to(dtype)


def image(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(
        dtype
    )


def by_definition(x, weights, biases, activation):
    """Sums over kernel offsets of shifted, zero-padded blocks of means, in NumPy."""
    total = 0.0
    for s, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        n, c, h, w = x.shape
        pooled = x.reshape(n, c, h >> s, 1 << s, w >> s, 1 << s).mean(axis=(3, 5))
        k = weight.shape[-1]
        padded = np.pad(pooled, [(0, 0), (0, 0), (k // 2, k // 2), (k // 2, k // 2)])
        out = bias.reshape(bias.shape[0], *(bias.shape[1:] or (1, 1)))
        for i in range(k):
            for j in range(k):
                block = padded[:, :, i : i + (h >> s), j : j + (w >> s)]
                out = out + np.einsum("nchw,fc->nfhw", block, weight[:, :, i, j])
        if activation == "per_scale":
            out = np.where(out > 0, out, 0.05 * out) / len(weights)
        total = total + out.repeat(1 << s, axis=2).repeat(1 << s, axis=3)
    return total if activation == "per_scale" else np.log1p(np.exp(total))


@pytest.mark.parametrize(("scales", "kernel", "activation", "bias"), CASES)
def test_equals_its_definition(scales, kernel, activation, bias):
    made, x = layer(scales, kernel, activation, bias), image(2, 2, 8, 12)
    expected = by_definition(
        x.numpy(),
        [p.detach().numpy() for p in made.weights],
        [p.detach().numpy() for p in made.biases],
        activation,
    )
    np.testing.assert_allclose(made(x).detach(), expected, rtol=1e-12, atol=1e-13)


def test_two_scales_by_hand():
    x = torch.tensor([[[[4.0, -4.0], [8.0, -4.0]]]])
    one = torch.ones(1, 1, 1, 1)
    out = multiscale_conv(x, [one, -one], [torch.zeros(1), torch.zeros(1)])
    # The mean is 1; the coarse kernel makes it -1, and the leaky ReLU -0.05.
    expected = (torch.tensor([[4.0, -0.2], [8.0, -0.2]]) - 0.05) / 2
    torch.testing.assert_close(out[0, 0], expected)


@pytest.mark.parametrize("bias", ["tied", "untied"])
@pytest.mark.parametrize("scales", [1, 2, 3])
@pytest.mark.parametrize("backend", [None, *CPU_BACKENDS, *TRITON], ids=str)
def test_golden_values_and_gradients(golden, backend, scales, bias):
    arrays, case = golden("sohldickstein_conv"), f"s{scales}_f3"
    # Sums over 9 kernel offsets by 3 channels, and in gradients over two images.
    rtol = GOLDEN_RTOL if backend is None else 2 * rounding(torch.float32, 2 * 16 * 16)

    def tensor(name):
        of_float64 = torch.from_numpy(arrays[f"{case}/{name}"])
        return of_float64 if backend is None else of_float64.to(backend.device, torch.float32)

    x = tensor("X").requires_grad_()
    weights, biases = [], []
    for s in range(scales):
        value = tensor(f"scale{s}/b_{bias}")
        weights.append(tensor(f"scale{s}/W").flip(2, 3).requires_grad_())
        biases.append((value[:, 1:-1, 1:-1] if bias == "untied" else value).requires_grad_())
    with backend.use() if backend else contextlib.nullcontext():
        op = ops.multiscale_conv if backend else multiscale_conv
        out = op(x, weights, biases)
        out.backward(tensor("G"))
    expected = arrays[f"{case}/{bias}/out"]
    atol = 0 if backend is None else rtol * np.abs(expected).max()
    np.testing.assert_allclose(out.detach().cpu(), expected, rtol=rtol, atol=atol)

    gradients = {"grad_X": x.grad}
    for s in range(scales):
        gradients[f"scale{s}/grad_W"] = weights[s].grad.flip(2, 3)
        grad_b = biases[s].grad
        # The 2015 code also has biases for a rim that is cut off.
        gradients[f"scale{s}/grad_b"] = F.pad(grad_b, [1] * 4) if bias == "untied" else grad_b
    for name, gradient in gradients.items():
        expected = arrays[f"{case}/{bias}/{name}"]
        atol = rtol * np.abs(expected).max()
        np.testing.assert_allclose(gradient.cpu(), expected, rtol=rtol, atol=atol, err_msg=name)


@pytest.mark.parametrize(("scales", "kernel", "activation", "bias"), CASES)
def test_gradcheck(scales, kernel, activation, bias):
    made = layer(scales, kernel, activation, bias, size=(4, 8))
    x = image(1, 2, 4, 8).requires_grad_()

    def apply(x, *parameters):
        weights, biases = parameters[:scales], parameters[scales:]
        return multiscale_conv(x, weights, biases, activation=activation)

    assert torch.autograd.gradcheck(apply, (x, *made.weights, *made.biases), fast_mode=True)


@pytest.mark.parametrize("scales", [1, 3])
def test_layouts_agree(scales):
    made, x = layer(scales, 3, "per_scale", "per_location"), image(2, 2, 8, 12)
    wide = image(2, 4, 8, 24)
    strided = wide[:, ::2, :, ::2]
    expected, expected_strided = made(x), made(strided.contiguous())
    torch.testing.assert_close(made(x.contiguous(memory_format=torch.channels_last)), expected)
    torch.testing.assert_close(made(strided), expected_strided)
    torch.testing.assert_close(made(x[:1]), expected[:1])
    assert made(x[:0]).shape == (0, 3, 8, 12)


def test_repeated_runs_give_equal_bits():
    made, x = layer(3, 3, "per_scale", "per_channel", dtype=torch.float32), image(4, 2, 8, 12)
    assert torch.equal(made(x.float()), made(x.float()))


@pytest.mark.parametrize("activation", ["per_scale", "after_sum"])
def test_float32_error(activation):
    made, x = layer(3, 3, activation, "per_channel"), image(4, 2, 8, 12)
    expected = made(x).detach()
    got = made.float()(x.float()).detach()
    magnitude = by_definition(
        x.abs().numpy(),
        [p.detach().abs().double().numpy() for p in made.weights],
        [p.detach().abs().double().numpy() for p in made.biases],
        "per_scale",
    )
    # A sum over 3 scales of 9 kernel offsets by 2 channels each, and the inputs' own rounding.
    bound = rounding(torch.float32, num_terms=3 * 18) * 3 * (torch.from_numpy(magnitude) + 1)
    assert ((got - expected).abs() <= bound).all()


@pytest.mark.parametrize(
    ("scales", "activation", "bias"),
    [(1, "per_scale", "per_channel"), (3, "after_sum", "per_location")],
)
def test_compiles_as_one_graph(scales, activation, bias):
    torch.compiler.reset()
    made = layer(scales, 3, activation, bias)
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    for num_examples in (2, 5):
        x = image(num_examples, 2, 8, 12)
        torch.testing.assert_close(compiled(x), made(x))


def test_initial_size_of_the_output():
    torch.manual_seed(0)
    x = torch.randn(8, 50, 16, 16)
    made = MultiscaleConv(50, 50)
    ratio = made(x).square().mean() / x.square().mean()
    # A leaky ReLU halves the mean square, and the zeros around the image take some more.
    assert 0.4 < ratio < 0.5


def test_unknown_activation_is_an_error():
    with pytest.raises(
        ValueError, match=r"^activation must be 'per_scale' or 'after_sum', got 'relu'$"
    ):
        multiscale_conv(image(1, 1, 2, 2), [image(1, 1, 1, 1)], [image(1)], activation="relu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_channels": 0}, "in_channels must be at least 1, got 0"),
        ({"out_channels": -2}, "out_channels must be at least 1, got -2"),
        ({"num_scales": 0}, "num_scales must be at least 1, got 0"),
        ({"kernel_size": 4}, "kernel_size must be odd and positive, got 4"),
        ({"kernel_size": 3.5}, "kernel_size must be odd and positive, got 3.5"),
        ({"kernel_size": -1}, "kernel_size must be odd and positive, got -1"),
        (
            {"activation": "relu"},
            "activation must be one of 'per_scale', 'after_sum', got 'relu'",
        ),
        ({"bias": "none"}, "bias must be one of 'per_channel', 'per_location', got 'none'"),
        ({"bias": "per_location"}, "bias 'per_location' requires size=(H, W), got None"),
        (
            {"num_scales": 3, "size": (8, 10)},
            "image sides must be divisible by 4 for 3 scales, got 8 x 10",
        ),
    ],
)
def test_constructor_messages(options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        MultiscaleConv(**{"in_channels": 2, "out_channels": 3} | options)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 3, 8, 12), "x must have shape (N, 2, H, W), got (2, 3, 8, 12)"),
        ((2, 8, 12), "x must have shape (N, 2, H, W), got (2, 8, 12)"),
        ((2, 2, 8, 6), "image sides must be divisible by 4 for 3 scales, got 8 x 6"),
    ],
)
def test_input_messages(shape, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        layer(3, 3, "per_scale", "per_channel")(image(*shape))


def test_biases_per_location_fix_the_size():
    message = "x must have sides (8, 12), one bias each, got (8, 8)"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        layer(1, 3, "per_scale", "per_location")(image(2, 2, 8, 8))
