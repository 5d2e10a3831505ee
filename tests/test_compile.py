"""A training step under `torch.compile(fullgraph=True)` does what it does without."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dpm_fast import noise, use_backend
from dpm_fast.binomial import BinomialDiffusion
from dpm_fast.data import DataSpec
from dpm_fast.gaussian import GaussianDiffusion
from dpm_fast.importance import Importance
from dpm_fast.model import DiffusionModel
from dpm_fast.networks import MLP, ConvDenseNetwork

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's

T = 20
GREY = DataSpec("grey", (1, 8, 8), "discrete", shift=8.0, scale=0.25, levels=17)
LEVELS = noise.words(1, noise.Stream.DATA, torch.arange(12), 0, 64).view(-1, 1, 8, 8) % 17


def process(learned: bool = False) -> GaussianDiffusion:
    return GaussianDiffusion.from_schedule("log_linear", T, learned=learned)


def vectors(learned: bool = False) -> tuple[DiffusionModel, Tensor]:
    network = MLP(3, T, hidden=(8,), time_input=True)
    model = DiffusionModel(process(learned), network, "velocity", variance="logit")
    return model, noise.normal(1, noise.Stream.DATA, torch.arange(12), 0, (3,))


def images() -> tuple[DiffusionModel, Tensor]:
    network = ConvDenseNetwork((1, 8, 8), T, dense_width=16)
    model = DiffusionModel(process(), network, "velocity", variance="logit", data=GREY)
    return model, GREY.to_model(LEVELS)


def bits() -> tuple[DiffusionModel, Tensor]:
    network = MLP(3, T, hidden=(8,), num_outputs=1, time_input=True)
    return DiffusionModel(BinomialDiffusion(T), network, "x0"), (vectors()[1] > 0).float()


def losses_and_weights(
    model: DiffusionModel, x_0: Tensor, backend: str | None, **options: object
) -> tuple[list[float], list[Tensor]]:
    """Of three steps, each with other noise and of fewer examples.

    What differs becomes a symbol in the second one, and the third one compiles nothing.
    """
    model, importance = copy.deepcopy(model), None
    if options.pop("importance", False):
        importance = Importance(T)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def loss(x_0: Tensor, seed: int, example_ids: Tensor) -> Tensor:
        return model.loss(x_0, seed=seed, example_ids=example_ids, importance=importance, **options)  # type: ignore[arg-type]

    torch._dynamo.reset()
    compiled = loss if backend is None else torch.compile(loss, fullgraph=True, backend=backend)
    values = []
    for seed, first, size in ((3, 0, 5), (-4, 5, 4), (2**63 - 1, 9, 3)):
        ids = torch.arange(first, first + size)
        value = compiled(x_0[first : first + size], seed, ids)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        if importance is not None:
            importance.update()
        values.append(value.item())
    return values, [p.detach() for p in model.parameters()]


def check(
    make: Callable[[], tuple[DiffusionModel, Tensor]], backend: str, **options: object
) -> None:
    torch.manual_seed(0)
    model, x_0 = make()
    values, weights = losses_and_weights(model, x_0, None, **options)
    found_values, found_weights = losses_and_weights(model, x_0, backend, **options)
    assert found_values == pytest.approx(values, rel=1e-5)
    for found, expected, before in zip(found_weights, weights, model.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
        assert not torch.equal(found, before)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kind": "simple"},
        {"kind": "hybrid"},
        {"edge": "paper"},
        {"importance": True},
        {"check_values": True},
    ],
    ids=str,
)
def test_vectors(options: dict[str, object]) -> None:
    check(vectors, "eager", **options)


def test_a_learned_schedule() -> None:
    check(lambda: vectors(learned=True), "aot_eager")


def test_bits() -> None:
    check(bits, "aot_eager")


@pytest.mark.parametrize("edge", ["decoder", "discretized"])
def test_images(edge: str) -> None:
    check(images, "eager", edge=edge)


def test_the_reference() -> None:
    with use_backend("reference"):
        check(vectors, "eager")


@pytest.mark.slow
@pytest.mark.parametrize("make", [vectors, images, bits])
def test_by_inductor(make: Callable[[], tuple[DiffusionModel, Tensor]]) -> None:
    check(make, "inductor")


@pytest.mark.slow
def test_words_of_seeds_that_are_symbols_by_inductor() -> None:
    ids = torch.tensor([0, 1, 2**40])
    compiled = torch.compile(noise.words, fullgraph=True, dynamic=True)
    for seed in (3, -4, 2**63 - 1):  # Inductor's symbols are of int64
        assert torch.equal(compiled(seed, 5, ids, 7, 6), noise.words(seed, 5, ids, 7, 6))
