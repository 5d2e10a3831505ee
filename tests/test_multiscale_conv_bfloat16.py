"""`multiscale_conv` where the processor multiplies pairs of bfloat16: against float64 and torch."""

import itertools
import math
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor

from backends import BFLOAT16, CPU_BACKENDS, needs_bfloat16_set
from dpm_fast import dispatch, ops
from test_image_network import CASES, call, tensors, textbook
from test_multiscale_conv_op import (
    LAYOUTS,
    STACKS,
    Layers,
    Stack,
    any_stack,
    arguments,
    by_layers,
)
from tolerances import rounding

pytestmark = needs_bfloat16_set
op = sys.modules["dpm_fast.ops.multiscale_conv"]  # the function hides its module
NARROW = torch.bfloat16
EPS = torch.finfo(NARROW).eps


def run(x: Tensor, weights: Layers, biases: Layers, **options: Any) -> Tensor:
    with BFLOAT16.use():
        return ops.multiscale_conv_stack(x, weights, biases, **options)


def widened(*layers: Layers) -> list[Layers]:
    return [[[p.double() for p in layer] for layer in kind] for kind in layers]


def rounded(x: Tensor) -> Tensor:
    return x.to(NARROW).to(x.dtype)


def with_rounding(x: Tensor, weights: Layers, biases: Layers, *, activation: str) -> Tensor:
    """In float64 but for what is stored between layers and scales; the output is not rounded."""
    for kernels, offsets in zip(weights, biases, strict=True):
        x = rounded(x)
        maps = []
        for scale, (weight, bias) in enumerate(zip(kernels, offsets, strict=True)):
            x = rounded(F.avg_pool2d(x, 2)) if scale else x
            sums = F.conv2d(x, weight, padding=weight.shape[-1] // 2)
            sums = sums + (bias if bias.dim() > 1 else bias[:, None, None])
            maps.append(F.leaky_relu(sums, 0.05) if activation == "per_scale" else sums)
        total = maps.pop()
        while maps:
            total = F.interpolate(total, scale_factor=2, mode="nearest") + maps.pop()
        x = F.softplus(total) if activation == "after_sum" else total / len(kernels)
    return x


def check(stack: Stack) -> None:
    x, weights, biases = arguments(stack, NARROW)
    expected = with_rounding(x.double(), *widened(weights, biases), activation=stack.activation)
    positive = [[[p.abs() for p in layer] for layer in k] for k in widened(weights, biases)]
    magnitude = by_layers(x.double().abs(), *positive, activation=stack.activation).max()
    found = run(x, weights, biases, activation=stack.activation)
    assert found.dtype == NARROW
    assert found.is_contiguous(memory_format=torch.channels_last)
    num_terms = max(stack.channels) * stack.kernel**2
    computed = rounding(torch.float32, num_terms, 16 * len(weights) * stack.num_scales)
    # An element of a layer may be so near a tie that it is rounded the other way.
    allowed = EPS * expected.abs() + (computed + EPS / 8) * magnitude
    assert bool(((found.double() - expected).abs() <= allowed).all())


@pytest.mark.parametrize("stack", STACKS, ids=str)
def test_value(stack) -> None:
    check(stack)


@settings(max_examples=60, deadline=None)
@given(stack=any_stack(4, 12, (5, 9), 40))
def test_any_sizes(stack) -> None:
    check(stack)


@pytest.mark.parametrize("activation", ["per_scale", "after_sum"])
@pytest.mark.parametrize("num_scales", [1, 2, 3])
def test_no_less_exact_than_torch(num_scales, activation) -> None:
    x, weights, biases = arguments(Stack((20,) * 5, num_scales, n=16, size=(12, 28)), NARROW)
    exact = by_layers(x.double(), *widened(weights, biases), activation=activation)
    by_torch = by_layers(x, weights, biases, activation=activation)
    found = run(x, weights, biases, activation=activation)
    errors = [float((y.double() - exact).square().mean().sqrt()) for y in (found, by_torch)]
    assert errors[0] <= 1.01 * errors[1]  # with one scale both round alike


def test_what_needs_no_gradient_is_multiplied_in_pairs() -> None:
    """And all else as with AVX-512 alone."""
    x, weights, biases = arguments(Stack((4, 6, 3), 2, n=20), NARROW)
    with CPU_BACKENDS[0].use():
        wide = ops.multiscale_conv_stack(x, weights, biases)
    assert not torch.equal(run(x, weights, biases), wide)
    assert torch.equal(run(x.requires_grad_(), weights, biases), wide)
    with torch.no_grad():
        assert not torch.equal(run(x, weights, biases), wide)


@pytest.mark.parametrize("activation", ["per_scale", "after_sum"])
def test_bits_do_not_depend_on_the_batch_the_run_or_the_threads(activation) -> None:
    x, *layers = arguments(Stack((2, 20, 5), 2, size=(8, 28), n=70), NARROW)
    whole = run(x, *layers, activation=activation)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(run(x, *layers, activation=activation), whole)
    finally:
        torch.set_num_threads(threads)
    ends = (0, 1, 3, 35, 70)
    parts = [run(x[i:j], *layers, activation=activation) for i, j in itertools.pairwise(ends)]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize(("num_scales", "kernel"), [(1, 3), (1, 5), (3, 3), (2, 1)])
def test_images_in_parts_have_the_bits_of_whole_ones(num_scales, kernel, monkeypatch) -> None:
    x, *layers = arguments(Stack((3, 5, 2), num_scales, kernel, (24, 8), 5), NARROW)
    found = {}
    for parts in (1, 2, 3, 6, 12):
        if 24 // parts % 2 ** (num_scales - 1) or 24 // parts < kernel // 2:
            continue
        monkeypatch.setattr(op, "_parts", lambda *_, parts=parts: (parts, 1.0))
        found[parts] = run(x, *layers)
    assert len(found) > 2
    assert all(torch.equal(result, found[1]) for result in found.values())


@pytest.mark.parametrize("channels", [1, 2, 3, 20])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, channels) -> None:
    x, *layers = arguments(Stack((channels, 4), size=(4, 9), n=18), NARROW)
    changed = LAYOUTS[layout](x)
    assert torch.equal(run(changed, *layers), run(changed.contiguous(), *layers))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_subnormal_numbers_are_zeros_in_every_layout(layout) -> None:
    """Also where their mean with a normal one is normal, and a weight makes it large."""
    x, *layers = arguments(Stack((2, 2), 2, size=(2, 2), n=16), NARROW)
    x[:] = 0.875 * 2.0**-126
    x[:, :, 1, 1] = 2.0**-125
    for weight, bias in zip(*(kind[0] for kind in layers), strict=True):
        weight[:] = 2.0**120
        bias[:] = 0
    found = run(LAYOUTS[layout](x), *layers)
    x[x < 2.0**-126] = 0
    assert found.any()
    assert torch.equal(found, run(x, *layers))


def test_pairs_that_are_not_aligned_as_floats() -> None:
    x, *layers = arguments(Stack((2, 4), size=(4, 9), n=18), NARROW)
    odd = torch.empty(x.numel() + 1, dtype=NARROW)[1:].view(18, 4, 9, 2).permute(0, 3, 1, 2)
    assert odd.copy_(x).data_ptr() % 4 == 2
    assert torch.equal(run(odd, *layers), run(x, *layers))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("num_scales", [1, 2])
def test_what_is_not_finite_stays_where_it_is(num_scales, value) -> None:
    x, *layers = arguments(Stack((3, 6, 4), num_scales, size=(12, 16), n=18), NARROW)
    finite = run(x, *layers)
    x[5, 2, 4, 5] = value
    found = run(x, *layers)
    expected = by_layers(x.double(), *widened(*layers), activation="per_scale")
    near = ~expected.isfinite()
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found[near].nan_to_num(7), expected[near].to(NARROW).nan_to_num(7))
    assert bool(near.any()) and torch.equal(found[~near], finite[~near])


def test_large_numbers_become_infinite_and_small_ones_zero() -> None:
    largest, smallest = torch.finfo(NARROW).max, torch.finfo(NARROW).smallest_normal
    x = torch.tensor([largest, -largest, smallest, smallest / 2], dtype=NARROW).view(4, 1, 1, 1)
    weight, bias = torch.full((1, 1, 1, 1), 2.0, dtype=NARROW), torch.zeros(1, dtype=NARROW)
    found = run(x, [[weight]], [[bias]], negative_slope=1.0).flatten().tolist()
    assert found == [math.inf, -math.inf, 2 * smallest, 0.0]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_image_network(case) -> None:
    """What follows the stack takes its output in float32, as elsewhere."""
    given = tensors(case, NARROW)
    with BFLOAT16.use():
        found = call(ops.image_network, case, given)
    expected = call(textbook, case, [p.double() for p in given])
    with CPU_BACKENDS[0].use():
        wide = call(ops.image_network, case, given)
    assert found.dtype == wide.dtype == NARROW
    scale = expected.abs().max()
    assert bool(((found.double() - expected).abs() <= 2 * EPS * scale).all())
    assert len(case.stack.channels) == 2 or not torch.equal(found, wide)


def test_the_route_depends_on_what_is_faster(monkeypatch) -> None:
    def route(n: int, width: int, kernel: int = 3, differentiable: bool = False) -> str:
        x = torch.empty(n, width, 28, 28, dtype=NARROW)
        shapes = [(width, width, kernel, kernel)]
        _, full = op._parts(x, shapes, 1, False, differentiable)
        return dispatch.convolution_route(x, shapes, 1, full, differentiable)

    facts = dispatch._native_cpu_facts()._replace(threads=2)
    monkeypatch.setattr(dispatch, "_native_cpu_facts", lambda: facts)
    assert facts.instruction_set == BFLOAT16.instruction_set
    assert {route(n, 20) for n in (1, 4, 14, 33, 512)} == {"native"}
    assert [route(64, width) for width in (32, 48, 64)] == ["native", "native", "reference"]
    assert [route(29, width) for width in (24, 32)] == ["native", "reference"]  # 91 % of the lanes
    assert [route(64, width, 5) for width in (20, 24, 32)] == ["native", "native", "reference"]
    assert [route(64, width, differentiable=True) for width in (20, 32)] == ["native", "reference"]
    assert route(64, 20, 5, differentiable=True) == "reference"
    facts = facts._replace(instruction_set="avx512")
    assert [route(64, width) for width in (20, 32)] == ["native", "reference"]
