"""What the compilers make of the kernels of every op: for each GPU nothing but registers."""

from typing import Any

import pytest
import torch

import cuda_compile
import triton_compile
from host_runner.build import CSRC

pytestmark = pytest.mark.slow


@pytest.mark.skipif(not cuda_compile.find_nvcc(), reason="needs nvcc")
@pytest.mark.parametrize("source", sorted(CSRC.glob("*.cu")), ids=lambda source: source.stem)
def test_nvcc_compiles_without_local_memory(source, tmp_path) -> None:
    used = cuda_compile.kernel_usage(source, tmp_path)
    assert {kernel.architecture for kernel in used} == set(cuda_compile.ARCHITECTURES)
    assert all(kernel.stays_in_registers for kernel in used), used


def flags(names: str, value: Any) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


# Arguments that several kernels have are of the same type in all of them.
TENSORS = (
    "x_0 x_t x_prev mu_out sigma2_out logit_out y sigma2_y flip drift mask values known_mask "
    "known_values grad grad_x_0 grad_x_t grad_mu_out grad_sigma2_out"
)
TYPES = (
    flags(f"{TENSORS} rows coefficients out", "*fp32")
    | {f"{name}_strides": ["i64", "i64", "i64"] for name in TENSORS.split()}
    | flags("stream S N num_elements num_blocks num_pieces", "i32")
    | flags("ids example_ids t steps", "*i64")
    | flags("half_width lowest highest", "fp64")
    | flags("sums grad_coefficients nats_of_pieces grad_rows_of_pieces pieces", "*fp64")
    | {"seed": "i64", "mask": "*i1", "known_mask": "*u8"}
)
# Examples and elements of a tile, and blocks of a piece: of large events, small ones, the smallest.
SMALL = [{"ROWS": 16, "BLOCK": 16, "NUM_BLOCKS": 1}, {"ROWS": 64, "BLOCK": 4, "NUM_BLOCKS": 1}]
TILES = [{"ROWS": 1, "BLOCK": 1024, "NUM_BLOCKS": 8}, *SMALL]
TILES_IN_BINS = [{"ROWS": 1, "BLOCK": 256, "NUM_BLOCKS": 8}, *SMALL]

_WANTED = "WANT_X_0 WANT_X_T WANT_MU WANT_SIGMA2 WANT_ROWS"
_FACTORS = "KNOWN OBSERVED DRIFT"
_KL = {"LEARNED": True, "EDGE": 0} | flags(_WANTED, True)
_STEP = {"LEARNED": True, "NOISE": True} | flags(_FACTORS, False)
_BERNOULLI_STEP = {"STREAM": 1, "DETERMINISTIC": False} | flags(_FACTORS, True)
# Module, kernel, and constants besides the tile and FLAT.
KERNELS: list[tuple[str, str, dict[str, Any]]] = [
    ("kl", "kl_pieces", _KL),
    ("kl", "kl_pieces", _KL | flags(_WANTED, False)),
    ("kl", "kl_pieces", _KL | flags("WANT_X_0 WANT_X_T WANT_ROWS", False)),
    ("kl", "kl_pieces", _KL | {"EDGE": 1}),
    ("kl", "kl_pieces", _KL | {"EDGE": 2} | flags(_WANTED, False)),
    ("step", "step_tile", _STEP),
    ("step", "step_tile", _STEP | {"LEARNED": False}),
    ("step", "step_tile", _STEP | flags(_FACTORS, True)),
    ("noise", "_noise_tile_per_program", {}),
    ("noise", "_noise_gradients_of_examples", {"PER_X_0": True, "SUMS": True}),
    ("noise", "_noise_gradients_of_examples", {"PER_X_0": True, "SUMS": False}),
    *(("noise", "_random_tile_per_program", {"RANDOM": random}) for random in range(3)),
    ("bernoulli", "noise_tile", {"STREAM": 0}),
    ("bernoulli", "step_tile", _BERNOULLI_STEP),
    ("bernoulli", "step_tile", _BERNOULLI_STEP | {"DETERMINISTIC": True}),
    ("bernoulli", "kl_pieces", {"GRADIENT": True}),
    ("bernoulli", "kl_pieces", {"GRADIENT": False}),
    ("tiles", "pieces_of_example", {"COLUMNS": 15, "PADDED": 16}),
]


@pytest.mark.parametrize("module", sorted({module for module, *_ in KERNELS}))
def test_triton_compiles_without_local_memory(module) -> None:
    """Large events for each GPU, small ones and those with gaps for one of them."""
    pytest.importorskip("triton")
    work = [
        triton_compile.Specialization(
            module,
            name,
            TYPES,
            constants | tile | {"FLAT": flat},
            num_warps=8,
            architectures=(80, 90, 100) if flat and tile not in SMALL else (90,),
        )
        for of, name, constants in KERNELS
        if of == module
        for tile in (TILES_IN_BINS if constants.get("EDGE") else TILES)
        for flat in (True, False)
    ]
    used = triton_compile.usage(work)
    assert len(used) == sum(len(specialization.architectures) for specialization in work)
    assert not [kernel for kernel in used if kernel.stack_bytes]


def convolutions(dtype: torch.dtype, C: int, F: int) -> list[triton_compile.Specialization]:
    """Every kernel of a layer of 3 x 3 with the blocks it is launched with."""
    conv = pytest.importorskip("dpm_fast.triton_kernels.multiscale_conv")
    stored = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}[dtype]
    types = (
        flags("image kernel bias out below pooled grad grad_sums", stored)
        | flags("num_rows H W num_blocks", "i32")
        | flags("slope weight", "fp32")
        | {"coarser": "*fp32", "sums": "*fp32", "signs": "*u8"}
    )
    inputs, outputs = (torch.empty(1, 1, 1, channels, dtype=dtype) for channels in (C, F))
    there = conv.product_blocks(inputs, F, 3) | {"C": C, "F": F, "K": 3}
    back = conv.product_blocks(outputs, C, 3) | {"C": F, "F": C, "K": 3}
    of_weights = conv.gradient_blocks(inputs, F, 3) | {"C": C, "F": F, "K": 3}
    finest, coarsest = {"BY_FOURS": True}, {"BY_FOURS": False, "coarser": None, "pooled": None}
    leaky = {"LEAKY": True, "SOFTPLUS": False}
    softplus = {"LEAKY": False, "SOFTPLUS": True, "signs": None}
    wide = {"out": "*fp32", "grad": "*fp32"}  # results of coarser scales
    pool = conv.pool_blocks(F) | {"F": F}
    kernels: list[tuple[str, dict[str, Any], dict[str, str]]] = [
        ("convolve_scale", there | finest | leaky | {"PER_LOCATION": False}, {}),
        ("convolve_scale", there | finest | softplus | {"PER_LOCATION": True}, {}),
        ("convolve_scale", there | coarsest | leaky | {"PER_LOCATION": True}, wide),
        ("input_gradient_of_scale", back | finest | {"below": None}, {}),
        ("input_gradient_of_scale", back | finest | {"signs": None}, {}),
        ("input_gradient_of_scale", back | coarsest | {"signs": None, "below": None}, wide),
        ("weight_gradient_of_split", of_weights, {}),
        ("pool", pool | {"signs": None, "out": None, "grad_sums": None}, {}),
        ("pool", pool | {"out": None}, {}),
        ("pool", pool | {"signs": None, "pooled": None}, {}),
    ]
    return [
        triton_compile.Specialization(
            "multiscale_conv", kernel, types | special, constants, num_warps=conv.NUM_WARPS
        )
        for kernel, constants, special in kernels
    ]


@pytest.mark.parametrize(
    ("dtype", "C", "F"),
    [
        (torch.float32, 1, 20),
        (torch.float32, 20, 20),
        (torch.bfloat16, 20, 20),
        (torch.bfloat16, 64, 128),
        (torch.float16, 64, 128),
    ],
    ids=str,
)
def test_convolutions_compile_without_local_memory(dtype, C, F) -> None:
    work = convolutions(dtype, C, F)
    used = triton_compile.usage(work)
    assert len(used) == len(work) * len(triton_compile.ARCHITECTURES)
    assert not [kernel for kernel in used if kernel.stack_bytes]
