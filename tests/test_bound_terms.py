"""Terms of the bound with the network in one launch, against the float64 reference."""

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from backends import BACKENDS, Backend
from dpm_fast.binomial import BinomialDiffusion
from dpm_fast.dispatch import use_backend
from dpm_fast.gaussian import GaussianDiffusion
from dpm_fast.model import DiffusionModel
from dpm_fast.networks import MLP, RBFNetwork
from dpm_fast.ops.bound_terms import BoundTermsInputs
from dpm_fast.trajectory import BoundTerms, why_not_bound

NUM_STEPS, NUM_EXAMPLES = 12, 37  # two tiles, lanes that are left over, two runs of timesteps
KERNELS = [backend for backend in BACKENDS if backend.name == "native"]
pytestmark = [
    pytest.mark.filterwarnings("error"),
    pytest.mark.skipif(not KERNELS, reason="needs native ops"),
]


device = "cpu"  # of the models, while a backend is in use


@pytest.fixture(autouse=True, params=KERNELS, ids=str)
def backend(request: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    monkeypatch.setitem(globals(), "device", request.param.device)
    with request.param.use():
        yield request.param


def _model(kind: str) -> DiffusionModel:
    dim = {"mlp": 3, "rbf": 2, "fixed": 5, "bits": 7}[kind]
    process: Any = GaussianDiffusion.from_schedule("erase", NUM_STEPS, learned=kind == "mlp")
    if kind == "mlp":
        process.schedule_weights.data = torch.linspace(-0.3, 0.3, 10)
    options: dict[str, Any] = {}
    network: nn.Module
    if kind == "rbf":
        network = RBFNetwork(dim, NUM_STEPS, num_units=16)
    elif kind == "mlp":
        network = MLP(dim, NUM_STEPS, hidden=(24, 17))
    else:
        network = MLP(dim, NUM_STEPS, hidden=(20,), num_outputs=1)
        if kind == "bits":
            process = BinomialDiffusion(NUM_STEPS, 0.3)
        else:
            options = {"parameterization": "epsilon", "variance": "fixed_small"}
    generator = torch.Generator().manual_seed(3)
    for parameter in network.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return DiffusionModel(process, network, **options).to(device)


def _examples(model: DiffusionModel) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    x_0 = torch.randn(NUM_EXAMPLES, *model.network.event_shape, generator=generator)
    x_0 = (x_0 > 0).float() if model.process.kind == "binomial" else x_0
    return x_0.to(next(model.parameters()).device)


KINDS = ["mlp", "rbf", "fixed", "bits"]


@torch.no_grad()
def assert_terms_of_reference(model: DiffusionModel, x_0: Tensor) -> None:
    """Those of the kernel are what float64 makes of the same x_t and of the network's outputs."""
    num_steps = model.process.num_steps
    ids = torch.arange(len(x_0), device=x_0.device) * 3 + 2**40
    assert why_not_bound(model, x_0, "decoder") is None
    terms = BoundTerms(model, num_steps, 5, x_0.device)(x_0, ids, num_steps, 1)
    for t, nats in zip(range(num_steps, 0, -1), terms, strict=True):
        times = torch.full((len(x_0),), t, device=x_0.device)
        x_t = model.process.sample_x_t(x_0, times, 5, ids)
        with use_backend("reference"):
            out = model.network_output(x_t, times)
            expected = model.nats_of_output(
                x_0.double(), x_t.double(), times, out.double(), "decoder"
            )
        torch.testing.assert_close(nats, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_terms_are_those_of_the_reference(kind: str) -> None:
    model = _model(kind)
    assert_terms_of_reference(model, _examples(model))


@pytest.mark.parametrize("edge", ["decoder", "paper"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_bound_takes_the_kernel_whose_bits_depend_on_no_division(
    kind: str, edge: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = _model(kind)
    x_0 = _examples(model)
    options: dict[str, Any] = {"edge": edge, "seed": 4, "draws": 2}
    whole = model.bound(x_0, **options)
    assert "1 launch, network included, of" in whole.settings["path"]
    for size in (1, 50, 74, 200):
        parts = model.bound(x_0, batch_size=size, **options)
        assert torch.equal(parts.bound_nats, whole.bound_nats)
        assert torch.equal(parts.per_timestep_nats, whole.per_timestep_nats)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(model.bound(x_0, **options).bound_nats, whole.bound_nats)
    finally:
        torch.set_num_threads(threads)
    with use_backend("reference"), caplog.at_level(logging.DEBUG, "dpm_fast"):
        reference = model.bound(x_0, **options)
    assert "the backend 'reference' was asked for" in caplog.text
    assert "network included" not in reference.settings["path"]
    torch.testing.assert_close(whole.bound_nats, reference.bound_nats, rtol=2e-5, atol=2e-4)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("edge", "no kernel has the edge 'discretized'"),
        ("double", "no kernel has terms of torch.float64"),
        ("hook", "the network has hooks"),
        ("terms", "the model has terms of its own"),
    ],
)
def test_what_the_kernel_does_not_cover_is_said(change: str, reason: str) -> None:
    model = _model("mlp")
    x_0 = _examples(model)
    if change == "double":
        x_0 = x_0.double()
    if change == "hook":
        model.network.register_forward_hook(lambda *call: None)
    if change == "terms":
        vars(model)["term_nats"] = model.term_nats
    found = why_not_bound(model, x_0, "discretized" if change == "edge" else "decoder")
    assert found is not None and found.startswith(reason)


def _op_arguments() -> tuple[Any, ...]:
    model = _model("mlp")
    with torch.no_grad():
        terms = BoundTerms(model, NUM_STEPS, 5, torch.device(device))
    ids = torch.arange(NUM_EXAMPLES, device=device)
    return _examples(model), *terms._inputs._replace(noise_ids=ids, last=3)


def test_opcheck_native() -> None:
    torch.library.opcheck(torch.ops.dpm_fast._bound_terms, _op_arguments())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("last", 0),
        ("last", NUM_STEPS + 1),
        ("first", NUM_STEPS + 1),
        ("rows", torch.zeros(NUM_STEPS, 15)),
        ("rows", torch.zeros(NUM_STEPS + 1, 14)),
        ("levels", torch.zeros(NUM_STEPS, 2)),
        ("weights", [torch.zeros(24, 3), torch.zeros(17, 23), torch.zeros(NUM_STEPS + 1, 6, 17)]),
        ("weights", [torch.zeros(24, 3), torch.zeros(17, 24), torch.zeros(NUM_STEPS, 6, 17)]),
        ("biases", [torch.zeros(24), torch.zeros(17), torch.zeros(NUM_STEPS + 1, 7)]),
        ("noise_ids", torch.arange(NUM_EXAMPLES - 1)),
    ],
)
def test_what_native_code_would_read_beyond_its_end_is_refused(name: str, value: Any) -> None:
    arguments = list(_op_arguments())
    arguments[1 + BoundTermsInputs._fields.index(name)] = value
    with pytest.raises(ValueError):
        torch.ops.dpm_fast._bound_terms(*arguments)


def test_not_finite_stays_so() -> None:
    model = _model("mlp")
    x_0 = _examples(model)
    model.network.hidden[0].bias.data[0] = torch.nan
    assert model.bound(x_0).bound_nats.isnan().all()
