"""Noise as a function: every random number follows from (seed, stream, example, t, element).

The generator is Philox4x32-10 (Salmon et al. 2011), keyed by the 64-bit seed, with the counter
(element // 4, t | stream << 24, example low word, example high word). Four output words make four
uniforms, or four normals by two Box-Muller pairs. Nothing here has a state, so a sample does not
depend on the batch it is drawn in, on the order of drawing, or on the rank that draws it.

The arithmetic is integer operations and single IEEE additions, multiplications and square roots
in float32, written out where a library call (``torch.log``, ``torch.sin``, division by a scalar)
would round differently in the vectorized body and the tail of a tensor, or on another device.
"""

import contextlib
import enum
import math
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

MAX_TIMESTEP = 2**24 - 1
MAX_ELEMENTS = 2**34  # of an event: groups of four are counted by one word
_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
# Groups of four words computed together on a CPU: temporaries of 512 KB stay in the L2 cache.
_GROUPS_PER_CHUNK = 65536


class Stream(enum.IntEnum):
    """What a random number is for; purposes never share numbers."""

    FORWARD = 0  # eps of x_t given x_0, at t
    REVERSE = 1  # eps of the step from x_t to x_{t-1}, at t
    INITIAL = 2  # x_T of a sampling run
    TIMESTEP = 3  # which t a stochastic estimate looks at
    DEQUANTIZE = 4  # uniform noise of one grey level
    ORDER = 5  # permutation of the data in an epoch
    DATA = 6  # synthetic data sets
    RESAMPLING = 7  # of the particles of an example, by the id of the first one, at t


def philox4x32(
    counter: Sequence[Tensor | int], key: tuple[Tensor | int, Tensor | int], rounds: int = 10
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32 block cipher: four 32-bit words from a 128-bit counter and a 64-bit key.

    Args:
        counter: four words, int64 tensors (or ints) in [0, 2**32), broadcastable together.
        key: two 32-bit words, int64 tensors or ints too.
        rounds: 10 in the contract; the published vectors also give 7.

    Returns:
        Four int64 tensors with values in [0, 2**32), of the broadcast shape.
    """
    c0, c1, c2, c3 = (torch.as_tensor(word, dtype=torch.int64) for word in counter)
    k0, k1 = key
    for _ in range(rounds):
        # A product of two words wraps into int64 with the right bits; words 1 and 3 keep bits
        # above the 32nd until the end, since only the low half of them is ever used.
        product_0, product_1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = (
            ((product_1 >> 32) ^ (c1 ^ k0)) & _WORD,
            ((product_0 >> 32) ^ (c3 ^ k1)) & _WORD,
        )
        c1, c3 = product_1, product_0
        k0, k1 = (k0 + _KEY_INCREMENTS[0]) & _WORD, (k1 + _KEY_INCREMENTS[1]) & _WORD
    return c0, c1 & _WORD, c2, c3 & _WORD


def words(
    seed: int, stream: int, example_ids: Tensor, t: int | Tensor, num_elements: int
) -> Tensor:
    """Raw random words.

    Args:
        seed: any integer in [-2**63, 2**64), taken modulo 2**64.
        stream: the purpose, see `Stream`.
        example_ids: (N,) int64, global indices of the examples.
        t: timestep in 0..2**24 - 1, one for all or (N,) int64.
        num_elements: elements per example.

    Returns:
        (N, num_elements) int64 with values in [0, 2**32).

    Raises:
        TypeError, ValueError: for a seed, stream, timestep or shape outside the contract.
    """
    seed, stream, example_ids, t = check(seed, stream, example_ids, t)
    check_timesteps(t)
    num_elements = check_num_elements(num_elements)
    num_groups = -(-num_elements // 4)
    group = torch.arange(num_groups, device=example_ids.device)
    bits: int | Tensor = seed
    if torch.compiler.is_compiling():
        # Inductor takes a word of a seed that is a symbol for a real number (torch 2.13).
        bits = torch.full((), seed, dtype=torch.int64, device=example_ids.device)
    key = (bits & _WORD, (bits >> 32) & _WORD)

    def block(ids: Tensor, t: Tensor) -> Tensor:
        ids, t = ids[:, None], t[:, None]
        counter = (group, t | (stream << 24), ids & _WORD, (ids >> 32) & _WORD)
        return torch.stack(philox4x32(counter, key), dim=-1).flatten(1)[:, :num_elements]

    rows = max(1, _GROUPS_PER_CHUNK // max(1, num_groups))
    if example_ids.device.type != "cpu" or len(example_ids) <= rows:
        return block(example_ids, t)
    return torch.cat([block(*c) for c in zip(example_ids.split(rows), t.split(rows), strict=True)])


def uniform(
    seed: int,
    stream: int,
    example_ids: Tensor,
    t: int | Tensor,
    event_shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Uniform numbers in (0, 1]: float32(word) * 2**-32 + 2**-33, rounded to float32.

    Arguments as for `words`; returns (N, *event_shape) of ``dtype``: float32 values, converted.
    """
    _check_floating(dtype)
    r = words(seed, stream, example_ids, t, check_event(event_shape))
    return _to_unit_interval(r).to(dtype).view(len(example_ids), *event_shape)


def normal(
    seed: int,
    stream: int,
    example_ids: Tensor,
    t: int | Tensor,
    event_shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Unit Gaussian numbers by Box-Muller on the words (0, 1) and (2, 3) of each group of four.

    sqrt(-2 ln u_a) * (cos, sin)(2 pi u_b) in float32, within 1e-6 of the same formula in float64.
    Arguments as for `words`; returns (N, *event_shape) of ``dtype``: float32 values, converted,
    so that a float64 computation sees the same noise.
    """
    _check_floating(dtype)
    num_elements = check_event(event_shape)
    r = words(seed, stream, example_ids, t, -(-num_elements // 4) * 4)
    u = _to_unit_interval(r).unflatten(1, (-1, 2))
    radius = torch.sqrt(-2.0 * _log(u[..., 0]))
    cos, sin = _cos_sin_of_turns(u[..., 1])
    eps = torch.stack((radius * cos, radius * sin), dim=-1).flatten(1)[:, :num_elements]
    return eps.to(dtype).reshape(len(example_ids), *event_shape)


def place_in_stratum(seed: int, example_ids: Tensor, stratum: int = 0, draw: int = 0) -> Tensor:
    """Where in a stratum of timesteps each example looks, in units of 2**-32 of the stratum.

    Over seeds every place is equally likely, and the draws of a stratum are independent.
    Consecutive examples are spread by a golden-ratio (Weyl) sequence in their ids, so that any run
    of them covers the stratum evenly, whatever the batch.

    Args:
        seed: of the noise.
        example_ids: (N,) int64.
        stratum: its number, in 0..2**24 - 1.
        draw: number of the repetition, from 0.

    Returns:
        (N,) int64 in [0, 2**32).
    """
    origin = torch.full((1,), draw, dtype=torch.int64, device=example_ids.device)
    seed, _, _, t = check(seed, Stream.TIMESTEP, origin, stratum)
    first_word = _first_word_op if torch.compiler.is_compiling() else _first_word
    return spread_by_id(example_ids, first_word(seed, origin, t))


def stratum_offsets(
    seed: int, num_strata: int, draws: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Where example 0 looks in each stratum in each draw, see `place_in_stratum`.

    Returns:
        (num_strata * draws,) int64, the draws of a stratum side by side.
    """
    number = torch.arange(num_strata * draws, device=device)
    return _first_word(seed, number % draws, number // draws)


def spread_by_id(example_ids: Tensor, offset: Tensor) -> Tensor:
    """`place_in_stratum` of examples, (N,), by where example 0 looks, (N,) or (1,)."""
    # Bits 32 to 63 of the id times 2**64 / golden ratio, by products that stay in int64.
    low, high = example_ids & _WORD, (example_ids >> 32) & _WORD
    golden_low, golden_high = 0x7F4A7C15, 0x9E3779B9 - 2**32
    spread = (low * golden_low >> 32) + low * golden_high + high * golden_low
    return (spread + offset) & _WORD


def _first_word(seed: int, example_ids: Tensor, t: Tensor) -> Tensor:
    """A word of the stream of timesteps for each example, (N,)."""
    return words(seed, Stream.TIMESTEP, example_ids, t, 1)[:, 0]


# An op, so that nothing compiles what is in it: Inductor makes C++ of products that leave int64,
# which is undefined there, and got other words of a negative seed for one element (torch 2.13,
# GCC 12).
_first_word_op = torch.library.custom_op("dpm_fast::_first_word", _first_word, mutates_args=())


@_first_word_op.register_fake
def _(seed: int, example_ids: Tensor, t: Tensor) -> Tensor:
    return torch.empty_like(example_ids)


def stratified_timesteps(
    seed: int,
    example_ids: Tensor,
    first: int,
    last: int,
    stratum: int = 0,
    num_strata: int = 1,
    draw: int = 0,
) -> Tensor:
    """One timestep in first..last for each example, from one of ``num_strata`` equal strata.

    Args:
        seed, example_ids, draw: as for `place_in_stratum`.
        first, last: the range of timesteps.
        stratum: number of the stratum, in 0..num_strata - 1; the first holds the least timesteps.
        num_strata: number of strata.

    Returns:
        (N,) int64.
    """
    place = place_in_stratum(seed, example_ids, stratum, draw)
    return timestep_at(place, first, last, stratum, num_strata)


def timestep_at(
    place: Tensor, first: int, last: int, stratum: int | Tensor, num_strata: int
) -> Tensor:
    """`stratified_timesteps` at places (N,) of a stratum, or of one for each, (N,) int64."""
    # first + floor((stratum + place / 2**32) * num_terms / num_strata) without overflow
    num_terms = last - first + 1
    whole, part = stratum * num_terms // num_strata, stratum * num_terms % num_strata
    return first + whole + (((part << 32) + place * num_terms) // num_strata >> 32)


def check(
    seed: int, stream: int, example_ids: Tensor, t: int | Tensor
) -> tuple[int, int, Tensor, Tensor]:
    """The counters of noise, the seed as signed int64 and t as a tensor like ``example_ids``.

    Raises:
        TypeError, ValueError: for a seed, stream, id or timestep outside the contract, except for
            the values of a tensor t, see `check_timesteps`.
    """
    seed, stream = check_seed(seed), check_stream(stream)
    if not isinstance(example_ids, Tensor):
        raise TypeError(f"example_ids must be a tensor, got {type(example_ids).__name__}")
    if example_ids.dim() != 1 or example_ids.dtype != torch.int64:
        raise ValueError(
            f"example_ids must be a 1-d int64 tensor, got {example_ids.dtype} "
            f"of shape {tuple(example_ids.shape)}"
        )
    if not isinstance(t, Tensor):
        return seed, stream, example_ids, torch.full_like(example_ids, check_timestep(t))
    if t.shape != example_ids.shape or t.dtype != torch.int64:
        raise ValueError(
            f"t must be an int64 tensor of shape {tuple(example_ids.shape)}, got {t.dtype} "
            f"of shape {tuple(t.shape)}"
        )
    if t.device != example_ids.device:
        raise ValueError(f"t must be on {example_ids.device} like example_ids, got {t.device}")
    return seed, stream, example_ids, t


def check_integer(value: int, name: str, kind: str = "an integer") -> int:
    """An integer of any kind, NumPy's too, but no bool and no tensor, whose value may be far."""
    if type(value) is int or isinstance(value, torch.SymInt):
        return value
    if not isinstance(value, bool | Tensor):
        if isinstance(value, int):
            return int(value)
        with contextlib.suppress(TypeError):
            return operator.index(value)
    raise TypeError(f"{name} must be {kind}, got {type(value).__name__}")


def as_integer(value: object) -> int | None:
    """What `check_integer` accepts as an int, None for anything else."""
    try:
        return check_integer(value, "")  # type: ignore[arg-type]
    except TypeError:
        return None


def check_seed(seed: int) -> int:
    """A 64-bit integer, returned as the signed one that a schema takes."""
    seed = check_integer(seed, "seed")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must be a 64-bit integer, got {seed}")
    return seed if seed < 2**63 else seed - 2**64


def check_stream(stream: int) -> int:
    stream = check_integer(stream, "stream")
    if not 0 <= stream < 256:
        raise ValueError(f"stream must be in 0..255, got {stream}")
    return stream


def check_timestep(t: int, first: int = 0) -> int:
    """A timestep for all examples."""
    t = check_integer(t, "t", "an integer or a tensor")
    if not first <= t <= MAX_TIMESTEP:
        raise ValueError(f"t must be in {first}..2**24 - 1, got {t}")
    return t


def has_values() -> bool:
    """Whether tensors have values to look at: they have none while torch.compile traces, nor under
    a transform of torch.func."""
    return (
        not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is None
    )


def check_timesteps(t: Tensor, first: int = 0) -> None:
    """The values of t, where they can be looked at without waiting for a GPU."""
    if t.device.type == "cpu" and has_values():
        outside = t[(t < first) | (t > MAX_TIMESTEP)]
        if len(outside):
            raise ValueError(f"t must be in {first}..2**24 - 1, got {outside[0].item()}")


def check_event(event_shape: Sequence[int]) -> int:
    """The number of elements of an event."""
    if type(event_shape) is not torch.Size:
        if not isinstance(event_shape, Sequence) or isinstance(event_shape, str):
            given = type(event_shape).__name__
            raise TypeError(f"event_shape must be a sequence of sizes, got {given}")
        event_shape = [check_integer(size, "each size of event_shape") for size in event_shape]
        if any(size < 0 for size in event_shape):
            raise ValueError(f"event_shape must have no negative size, got {tuple(event_shape)}")
    num_elements = math.prod(event_shape)
    if num_elements > MAX_ELEMENTS:
        raise ValueError(f"event_shape must have at most 2**34 elements, got {tuple(event_shape)}")
    return num_elements


def check_num_elements(num_elements: int) -> int:
    """The number of words of an example."""
    num_elements = check_integer(num_elements, "num_elements")
    if not 0 <= num_elements <= MAX_ELEMENTS:
        raise ValueError(f"num_elements must be in 0..2**34, got {num_elements}")
    return num_elements


def _check_floating(dtype: torch.dtype) -> None:
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be a floating-point dtype, got {dtype}")


def _to_unit_interval(r: Tensor) -> Tensor:
    return r.to(torch.float32) * 2.0**-32 + 2.0**-33


def _log(u: Tensor) -> Tensor:
    """ln u of normal float32 numbers, relative error below 2e-7 (also near u = 1)."""
    bits = u.view(torch.int32)
    exponent = (bits - 0x3F3504F3) >> 23  # u = 2**exponent * m with m in [sqrt(1/2), sqrt(2))
    m = (bits - (exponent << 23)).view(torch.float32)
    s = (m - 1.0) / (m + 1.0)  # ln m = 2 artanh s, |s| <= 0.172
    z = s * s
    series = z * (z * (z * (z * (z * (1 / 11) + 1 / 9) + 1 / 7) + 1 / 5) + 1 / 3)
    return exponent * math.log(2.0) + (2.0 * s + 2.0 * s * series)


def _cos_sin_of_turns(u: Tensor) -> tuple[Tensor, Tensor]:
    """(cos, sin)(2 pi u) for u in [0, 1], absolute error below 2e-7."""
    quadrant = torch.round(4.0 * u)
    a = (4.0 * u - quadrant) * (math.pi / 2)  # the difference is exact; |a| <= pi/4
    z = a * a
    cos, sin = _taylor(z, 0), a * _taylor(z, 1)
    quadrant = quadrant.to(torch.int32)
    odd = (quadrant & 1).bool()
    cos, sin = torch.where(odd, sin, cos), torch.where(odd, cos, sin)
    cos = torch.where(((quadrant + 1) & 2).bool(), -cos, cos)
    sin = torch.where((quadrant & 2).bool(), -sin, sin)
    return cos, sin


def _taylor(z: Tensor, odd: int) -> Tensor:
    """cos(sqrt z) for odd = 0, sin(sqrt z) / sqrt z for odd = 1; z in [0, (pi/4)**2]."""
    value = torch.zeros_like(z)
    for k in (5, 4, 3, 2, 1, 0):
        value = value * z + (-1) ** k / math.factorial(2 * k + odd)
    return value
