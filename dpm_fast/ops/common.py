"""What the ops share: their library, memory layouts, and checks of tensors."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd import Function, forward_ad
from torch.library import Library
from torch.nn import Parameter

from dpm_fast import dispatch, noise
from dpm_fast.reference import ReverseRow

LIBRARY = Library("dpm_fast", "FRAGMENT")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Network outputs may be narrower than the examples, as autocast leaves them.
_NARROW = (torch.bfloat16, torch.float16)

_SCALARS = (int, float, bool, str, tuple, type(None))  # told apart faster than by isinstance


def collapsible(x: Tensor) -> Tensor:
    """x, or a copy of it if its spatial dimensions do not collapse into one."""
    if x.dim() > 3 and not x.is_contiguous():
        expected = None
        for size, stride in zip(reversed(x.shape[2:]), reversed(x.stride()[2:]), strict=True):
            if size > 1:
                if expected is not None and stride != expected:
                    return x.contiguous()
                expected = stride * size
    return x


def check_examples(x: Tensor, name: str) -> None:
    """An op takes (N, C, *spatial) or (N, D) of a dtype in `DTYPES`."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TypeError(f"{name} must have dtype {names}, got {x.dtype}")
    if x.layout is not torch.strided:
        raise TypeError(f"{name} must be strided, got {x.layout}")
    if x.dim() < 2:
        raise ValueError(f"{name} must have shape (N, *event), got {tuple(x.shape)}")


def check_like(
    x: Tensor, like: Tensor, name: str, of: str, *, narrow: bool = False, channels: int = 1
) -> None:
    """Shape (with so many times the channels), device and dtype of ``x`` must be those of ``like``;
    or its dtype a narrower one."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    shape = like.shape
    if channels > 1:
        shape = torch.Size((shape[0], channels * shape[1], *shape[2:]))
    if x.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)} like {of}, got {tuple(x.shape)}")
    if x.device != like.device:
        raise ValueError(f"{name} must be on {like.device} like {of}, got {x.device}")
    if x.dtype != like.dtype and not (
        narrow and like.dtype == torch.float32 and x.dtype in _NARROW
    ):
        allowed = f"{like.dtype} like {of}"
        if narrow and like.dtype == torch.float32:
            allowed += ", bfloat16 or float16"
        raise TypeError(f"{name} must have dtype {allowed}, got {x.dtype}")


def check_joined(sigma2_out: Tensor | None) -> None:
    """A network's whole output holds what would come beside its first half."""
    if sigma2_out is not None:
        raise ValueError("sigma2_out must be None where mu_out holds it (joined), got a tensor")


def check_rows(rows: Tensor, x: Tensor, num_columns: int, name: str = "rows") -> None:
    """(N, columns) of float64 for float64 examples, of float32 for all others."""
    if not isinstance(rows, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(rows).__name__}")
    if rows.shape != (x.shape[0], num_columns):
        raise ValueError(
            f"{name} must have shape ({x.shape[0]}, {num_columns}), got {tuple(rows.shape)}"
        )
    if rows.device != x.device:
        raise ValueError(f"{name} must be on {x.device}, got {rows.device}")
    wanted = torch.float64 if x.dtype == torch.float64 else torch.float32
    if rows.dtype != wanted:
        raise TypeError(
            f"{name} must have dtype {wanted} for examples of {x.dtype}, got {rows.dtype}"
        )


def check_variances(rows: Tensor, sigma2_out: Tensor | None, *, zero: bool) -> None:
    """Rows (N, 15) whose variances are, or may be zero, and which need no output that is missing;
    where values can be looked at. A CPU's native launchers do so themselves, see csrc/reverse.h."""
    if not rows.is_cpu or not noise.has_values() or rows.shape[0] == 0:
        return
    base, s = rows[:, ReverseRow._fields.index("base")], rows[:, ReverseRow._fields.index("s")]
    wrong = base[~(base >= 0 if zero else base > 0)]
    if len(wrong):
        required = "a base that is not negative" if zero else "a positive base"
        raise ValueError(f"rows must have {required}, got {wrong[0].item():g}")
    if sigma2_out is None and bool((s != 0).any()):
        raise ValueError(
            "sigma2_out must be given where rows have a learned variance, "
            f"got None with s = {s[s != 0][0].item():g}"
        )


def check_noise(
    seed: int, stream: int, example_ids: Tensor, t: int | Tensor, x: Tensor, *, first: int = 0
) -> tuple[int, int, Tensor, Tensor]:
    """Counters of the noise of examples x as the schemas take them, the seed as signed int64.

    A number t must be ``first`` at least; the values of a tensor are left to the launchers.
    """
    seed, stream = noise.check_seed(seed), noise.check_stream(stream)
    noise.check_event(x.shape[1:])
    check_per_example(example_ids, x, "example_ids")
    if not isinstance(t, Tensor):
        return (
            seed,
            stream,
            example_ids,
            torch.full_like(example_ids, noise.check_timestep(t, first)),
        )
    check_per_example(t, x, "t")
    return seed, stream, example_ids, t


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether an op has to be differentiable with respect to one of its tensors.

    Raises:
        NotImplementedError: where one carries a tangent of forward-mode differentiation.
    """
    if forward_ad._current_level >= 0 and not torch.compiler.is_compiling():
        for x in tensors:
            if x is not None and forward_ad.unpack_dual(x).tangent is not None:
                raise NotImplementedError(
                    "the ops have no forward-mode derivatives: use those of dpm_fast.reference"
                )
    if torch.is_grad_enabled():
        for x in tensors:
            if x is not None and x.requires_grad:
                return True
    return False


def with_gradient(function: type[Function], *args: object) -> Any:
    """An op with the gradient that its kernels make.

    Raises:
        NotImplementedError: where torch.func differentiates, which would have to look into them.
    """
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise NotImplementedError(
            "torch.func cannot differentiate through the kernels: call the op under "
            'dpm_fast.use_backend("reference")'
        )
    return function.apply(*args)


def is_differentiated_again() -> bool:
    """Whether a backward pass is part of a graph (create_graph)."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def is_batched(grad_out: Tensor) -> bool:
    """Whether a gradient stands for many (is_grads_batched), which has no address."""
    return torch._C._functorch.is_legacy_batchedtensor(grad_out)


def differentiable_gradients(
    reference: Callable[..., Tensor],
    tensors: Sequence[Tensor | None],
    wanted: Sequence[bool],
    grad_out: Tensor,
) -> list[Tensor | None]:
    """Gradients of an op that can be differentiated again: by its reference, of the tensors."""
    leaves = [x for x, needed in zip(tensors, wanted, strict=True) if needed and x is not None]
    with torch.enable_grad():
        found = torch.autograd.grad(
            reference(*tensors), leaves, grad_out, create_graph=True, allow_unused=True
        )
    gradients = iter(found)
    return [next(gradients) if needed else None for needed in wanted]


def save_gradients(
    ctx: Any, tensors: Sequence[Tensor | None], grads: Sequence[Tensor], *, fresh: bool = True
) -> None:
    """Keep the gradients of a sum over examples until the backward pass knows its weights; and the
    tensors, should it be differentiated again.

    ``fresh``: nobody else can have seen them, as torch's dispatcher lets its modes do.
    """
    ctx.save_for_backward(*tensors, *grads)
    ctx.num_tensors = len(tensors)
    # Whoever hooks into saving may hold on to what was saved.
    ctx.owns_saved = fresh and torch._C._autograd._top_saved_tensors_default_hooks(True) is None


def weighted_gradients(ctx: Any, weights: Tensor) -> list[Tensor]:
    """What `save_gradients` kept times the weights (N,); written over what was kept, where no later
    pass can ask for it: that takes half the time."""
    in_place = ctx.owns_saved and not torch._C._autograd._get_current_graph_task_keep_graph()
    grads = ctx.saved_tensors[ctx.num_tensors :]
    return [times_per_example(weights, g, in_place=in_place) for g in grads]


def times_per_example(scale: Tensor, x: Tensor, *, in_place: bool = False) -> Tensor:
    """scale (N,) times x, rounded once to the dtype of x; ``in_place`` allows to overwrite x."""
    if dispatch.can_scale(x) and not is_batched(scale) and is_plain((scale, x)):
        module, threads = dispatch.native(x)
        x = collapsible(x)
        out = x if in_place else torch.empty_like(x)
        module.scale(x, out, scale.double().contiguous(), threads)
        if in_place:
            torch.autograd.graph.increment_version(x)  # whoever kept x learns that it is stale
        return out
    wide = torch.promote_types(x.dtype, torch.float32)
    return (scale.to(wide).view(-1, *(1 for _ in x.shape[1:])) * x).to(x.dtype)


def on_its_device(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """A launch with the GPU of its tensors as the current one, as a stream of that GPU requires."""

    @functools.wraps(implementation)
    def launch(*args: Any) -> Any:
        x = (
            args[0]
            if isinstance(args[0], Tensor)
            else next(a for a in args if isinstance(a, Tensor))
        )
        if not x.is_cuda or x.get_device() == torch.cuda.current_device():
            return implementation(*args)
        with torch.cuda.device(x.device):
            return implementation(*args)

    return launch


def takes_tf32() -> bool:
    """Whether convolutions of float32 may be rounded to TensorFloat-32, as torch's are."""
    # Unlike torch's older switches, this one is defined whichever of them was set.
    conv = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    return bool(conv.fp32_precision == "tf32")


def is_plain(args: Sequence[object]) -> bool:
    """Whether a call may skip torch's dispatcher, which takes 5 us to come to the same function:
    nobody traces, transforms or compiles, and all tensors are bare, with their values in memory (a
    view of an imaginary part may be negated)."""
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
    ):
        return False
    for x in args:
        kind = type(x)
        if kind is Tensor or kind is Parameter:
            if x.is_neg():  # type: ignore[attr-defined]
                return False
        elif kind not in _SCALARS and isinstance(x, Tensor):
            return False
    return True


class Gradient(Function):
    """An op's gradient. Its forward pass is given ``run``, which does what ``with_gradients`` does
    below autograd, and then the arguments of the op."""

    inputs: slice  # arguments of which a gradient may be wanted
    with_gradients: Callable[..., Any]  # what makes the op's output, and what backward needs


def below_autograd(op: OpOverload) -> Callable[..., Any]:
    """Calls of an op that autograd does not see."""

    def run(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    return run


class Op:
    """An op that LIBRARY defines, on every device. Without a gradient its outputs are constants.

    A call skips torch's dispatcher where that has nothing to add.
    """

    def __init__(
        self,
        name: str,
        implementation: Callable[..., Any],
        fake: Callable[..., Any],  # its outputs without their values
        *,
        gradient: type[Gradient] | None = None,
        with_gradients: OpOverload | None = None,  # as `Gradient`'s, where somebody may look on
    ) -> None:
        op = getattr(torch.ops.dpm_fast, name).default
        self.op, self.implementation, self.gradient = op, implementation, gradient
        constant = below_autograd(op)
        run = constant if with_gradients is None else below_autograd(with_gradients)

        def autograd(*args: Any) -> Any:
            if gradient is not None and needs_gradient(*args[gradient.inputs]):
                return with_gradient(gradient, run, *args)
            return constant(*args)

        for device in ("CPU", "CUDA"):
            LIBRARY.impl(name, implementation, device)
        LIBRARY.impl(name, autograd, "Autograd")
        torch.library.register_fake(f"dpm_fast::{name}", fake, lib=LIBRARY)

    def __call__(self, *args: Any) -> Any:
        if not is_plain(args):
            return self.op(*args)
        gradient = self.gradient
        if gradient is not None and needs_gradient(*args[gradient.inputs]):
            return gradient.apply(gradient.with_gradients, *args)
        return self.implementation(*args)


def check_per_example(x: Tensor, like: Tensor, name: str) -> None:
    """(N,) int64, beside the examples."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dtype != torch.int64:
        raise TypeError(f"{name} must have dtype torch.int64, got {x.dtype}")
    if x.dim() != 1 or x.shape[0] != like.shape[0]:
        raise ValueError(f"{name} must have shape ({like.shape[0]},), got {tuple(x.shape)}")
    if x.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {x.device}")


def check_shared(x: Tensor, like: Tensor, name: str, dtype: torch.dtype) -> None:
    """The shape of the examples, or (1, *event) for what all of them share."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    event = tuple(like.shape[1:])
    if x.dim() == 0 or x.shape[1:] != like.shape[1:] or x.shape[0] not in (1, like.shape[0]):
        raise ValueError(
            f"{name} must have shape {tuple(like.shape)} or {(1, *event)}, got {tuple(x.shape)}"
        )
    if x.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {x.device}")
    if x.dtype != dtype:
        raise TypeError(f"{name} must have dtype {dtype}, got {x.dtype}")


def check_pair(pair: object, name: str, of: str) -> tuple[Any, Any]:
    """Two values that an option takes together."""
    if not isinstance(pair, tuple | list):
        raise TypeError(f"{name} must be a pair {of}, got {type(pair).__name__}")
    if len(pair) != 2:
        raise ValueError(f"{name} must be a pair {of}, got {len(pair)} items")
    return pair[0], pair[1]


def check_shared_number(
    value: Tensor | float, like: Tensor, name: str, dtype: torch.dtype
) -> Tensor:
    """`check_shared` of a floating-point tensor, or of a number, which becomes an event of it so
    that kernels read it like any other tensor."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return torch.full((1, *like.shape[1:]), value, dtype=dtype, device=like.device)
    if isinstance(value, Tensor) and value.is_floating_point():
        value = value.to(dtype)
    check_shared(value, like, name, dtype)  # type: ignore[arg-type]
    return value  # type: ignore[return-value]


def room_for_pieces(native: Any, x: Tensor, num_sums: int) -> Tensor | None:
    """For so many sums over each piece of an event, as a native module cuts it; none for a whole
    event, whose sums are results."""
    num_pieces = -(-x.numel() // (x.shape[0] * native.PIECE))
    if num_pieces == 1:
        return None
    size = x.shape[0] * num_pieces * num_sums
    return torch.empty(size, dtype=torch.float64, device=x.device)


def check_writable(x: Tensor, name: str) -> None:
    """An op that works in place needs an address for each element, and nothing that depends on
    what they were."""
    if x.requires_grad:
        raise ValueError(f"{name} must not require a gradient to be changed in place")
    if _overlaps_itself(x):
        raise ValueError(
            f"{name} must have an address for each element, got strides {tuple(x.stride())} "
            f"for shape {tuple(x.shape)}"
        )


def write_in_place(op: Op, in_place: Op, x: Tensor, *args: Any) -> Tensor:
    """x changed by an op, with its version counted: what autograd kept of x is stale then."""
    if is_plain((x, *args)):
        in_place.implementation(x, *args)
        torch.autograd.graph.increment_version(x)
        return x
    if torch.compiler.is_compiling():
        in_place.op(x, *args)
        return x
    if x.is_neg():
        return x.copy_(op.op(x, *args))
    # torch resolves no negative views for an op that writes and has optional tensors.
    in_place.op(x, *(a.resolve_neg() if isinstance(a, Tensor) else a for a in args))
    torch.autograd.graph.increment_version(x)
    return x


def apart(x: Tensor | None, written: Tensor) -> Tensor | None:
    """x, or a copy of it where it may share memory with what is written."""
    if x is None or x.numel() == 0 or written.numel() == 0:
        return x
    of_x, of_written = x.untyped_storage(), written.untyped_storage()
    begin, begin_written = of_x.data_ptr(), of_written.data_ptr()
    if begin + of_x.nbytes() <= begin_written or begin_written + of_written.nbytes() <= begin:
        return x
    (first, end), (first_written, end_written) = _span(x), _span(written)
    return x.clone() if first < end_written and first_written < end else x


def _span(x: Tensor) -> tuple[int, int]:
    """The addresses of a tensor's first byte and past its last one."""
    reach = sum(s * (size - 1) for s, size in zip(x.stride(), x.shape, strict=True))
    return x.data_ptr(), x.data_ptr() + (reach + 1) * x.element_size()


def _overlaps_itself(x: Tensor) -> bool:
    """Whether two elements may have one address."""
    if x.numel() == 0:
        return False
    reach = 0
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False
