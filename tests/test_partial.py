"""Sums of an unfinished bound in a file: the same call goes on from it, another is refused."""

import copy
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dpm_fast.bound
from dpm_fast import MLP, DiffusionModel, GaussianDiffusion
from dpm_fast.bound import Bound
from dpm_fast.data import DataSpec
from dpm_fast.importance import Importance
from dpm_fast.signals import Interrupted

NUM_STEPS, DIM = 12, 3
X_0 = torch.randn(5, DIM, generator=torch.Generator().manual_seed(1))
OPTIONS: dict[str, Any] = {"batch_size": 7, "draws": 2, "seed": 4}


class Network(nn.Module):
    """Calls a function before some of its calls."""

    event_shape = (DIM,)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mlp = MLP(DIM, NUM_STEPS, hidden=(8,))
        nn.init.normal_(self.mlp.readout.weight)
        self.num_calls, self.at, self.act = 0, -1, lambda: None

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.num_calls += 1
        if self.num_calls == self.at:
            self.act()
        return self.mlp(x, t)


def make(at: int = -1, act: Any = None) -> DiffusionModel:
    network = Network()
    network.at, network.act = at, act
    return DiffusionModel(GaussianDiffusion.from_schedule("erase", NUM_STEPS), network)


def raises(error: BaseException) -> Any:
    def act() -> None:
        raise error

    return act


def assert_equal_bits(found: Bound, expected: Bound) -> None:
    for name in ("bound_nats", "null_nats", "per_timestep_nats", "prior_nats", "strata_nats"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert (ours is None and theirs is None) or torch.equal(ours, theirs), name
    assert found.mc_stderr == expected.mc_stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("timesteps", ["exact", 4])
def test_an_interrupted_bound_goes_on_with_equal_bits(
    tmp_path: Path, timesteps: str | int, number: signal.Signals
) -> None:
    file, options = tmp_path / "sums.npz", {**OPTIONS, "timesteps": timesteps}
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    model = make(at=3, act=lambda: os.kill(os.getpid(), number))
    total = 5 * 2 * (NUM_STEPS if timesteps == "exact" else 5)
    message = f"{number.name} after 21 of {total} terms; their sums are in {file}, from which"
    with pytest.raises(Interrupted, match=message) as caught:
        model.bound(X_0, partial=file, **options)
    assert caught.value.number == number
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    model, whole = make(), make()
    told: list[int] = []
    found = model.bound(X_0, partial=str(file), progress=lambda n, _: told.append(n), **options)
    expected = whole.bound(X_0, **options)
    assert_equal_bits(found, expected)
    assert told[0] == 21
    assert model.network.num_calls == whole.network.num_calls - 3
    again = make()
    assert_equal_bits(again.bound(X_0, partial=file, **options), expected)
    assert again.network.num_calls == 0


def test_an_error_in_the_network_loses_no_terms(tmp_path: Path) -> None:
    file = tmp_path / "sums.npz"
    with pytest.raises(RuntimeError, match="out of memory"):
        make(at=5, act=raises(RuntimeError("out of memory"))).bound(X_0, partial=file, **OPTIONS)
    model = make()
    smaller = {**OPTIONS, "batch_size": 4}  # what one would try next
    found = model.bound(X_0, partial=file, **smaller)
    assert model.network.num_calls == (120 - 28) // 4
    torch.testing.assert_close(found.bound_nats, make().bound(X_0, **OPTIONS).bound_nats)


def test_a_second_ctrl_c_acts_at_once_and_leaves_a_whole_file(tmp_path: Path) -> None:
    file = tmp_path / "sums.npz"

    def twice() -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as caught:
        make(at=4, act=twice).bound(X_0, partial=file, **OPTIONS)
    assert not isinstance(caught.value, Interrupted)
    assert_equal_bits(make().bound(X_0, partial=file, **OPTIONS), make().bound(X_0, **OPTIONS))


def test_sums_are_saved_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, seen = tmp_path / "sums.npz", []
    monkeypatch.setattr(dpm_fast.bound, "_SECONDS_BETWEEN_FILES", 0.0)

    def look(num_done: int, total: int) -> None:
        with np.load(file) as arrays:
            seen.append((num_done, int(arrays["num_done"])))

    make().bound(X_0, partial=file, progress=look, **OPTIONS)
    assert seen == [(n, n) for n in (*range(0, 120, 7), 120)]


def other_weights(model: DiffusionModel) -> DiffusionModel:
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.network.mlp.readout.bias[0] += 1e-6
    return other


def other_layers(model: DiffusionModel) -> DiffusionModel:
    other = copy.deepcopy(model)
    other.network.mlp.hidden[1] = nn.Tanh()
    return other


def with_data(model: DiffusionModel) -> DiffusionModel:
    spec = DataSpec("points", (DIM,), "continuous", shift=1.0, scale=1.0)
    return DiffusionModel(model.process, model.network, data=spec)


def other_schedule(model: DiffusionModel) -> DiffusionModel:
    process = GaussianDiffusion.from_schedule("log_linear", NUM_STEPS)
    return DiffusionModel(process, model.network)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 5}, "with seed 4, not 5"),
        ({"draws": 3}, "with draws 2, not 3"),
        ({"edge": "paper"}, "with edge 'decoder', not 'paper'"),
        ({"timesteps": 3}, "with timesteps 'exact', not 3"),
        ({"timesteps": 3, "importance": Importance(NUM_STEPS)}, "with timesteps 'exact', not 3"),
        ({"x_0": X_0 + 1e-6}, "with other examples"),
        ({"x_0": X_0[:4]}, "with other examples"),
        ({"example_ids": torch.arange(1, 6)}, "with other example ids"),
        ({"model": other_weights}, "with other parameters"),
        ({"model": other_layers}, "with other network"),
        ({"model": other_schedule}, "with other betas"),
        ({"model": with_data}, "with data None, not {'name': 'points'"),
    ],
)
def test_the_sums_of_another_bound_are_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    file, model = tmp_path / "sums.npz", make()
    model.bound(X_0, partial=file, **OPTIONS)
    before = file.read_bytes()
    other = change.get("model", lambda model: model)(model)
    options = {k: v for k, v in change.items() if k not in ("model", "x_0")}
    with pytest.raises(ValueError, match=f"sums.npz holds sums of another bound, {message}"):
        other.bound(change.get("x_0", X_0), partial=file, **OPTIONS | options)
    assert file.read_bytes() == before


def test_other_moments_of_importance_are_refused(tmp_path: Path) -> None:
    file, options = tmp_path / "sums.npz", {**OPTIONS, "timesteps": 3}
    importance = Importance(NUM_STEPS)
    make().bound(X_0, partial=file, importance=importance, **options)
    importance.moments[0] = 7
    for given in (importance, None):
        with pytest.raises(ValueError, match="with other importance"):
            make().bound(X_0, partial=file, importance=given, **options)


def damaged(content: bytes) -> list[bytes]:
    middle = len(content) // 2
    return [
        b"",
        b"not an archive",
        content[:middle],
        content[:middle] + bytes(9) + content[middle:],
    ]


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "sums.npz"
    make().bound(X_0, partial=file, **OPTIONS)
    for content in damaged(file.read_bytes()):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"sums.npz must hold partial sums of a bound, got"):
            make().bound(X_0, partial=file, **OPTIONS)
    np.savez(file, identity=np.array("{}"))
    with pytest.raises(ValueError, match="must hold partial sums of a bound, got another format"):
        make().bound(X_0, partial=file, **OPTIONS)
    np.save(tmp_path / "array.npy", np.zeros(3))
    with pytest.raises(ValueError, match="must hold partial sums of a bound"):
        make().bound(X_0, partial=tmp_path / "array.npy", **OPTIONS)


def test_a_directory_is_refused(tmp_path: Path) -> None:
    message = f"partial must be a file, got the directory {tmp_path}"
    with pytest.raises(ValueError, match=message):
        make().bound(X_0, partial=tmp_path, **OPTIONS)


def test_sums_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "sums.npz"
    make().bound(X_0, partial=file, **OPTIONS)
    with np.load(file) as found:
        arrays = dict(found)
    np.savez(file, **{**arrays, "nats": arrays["nats"][:4]})
    with pytest.raises(ValueError, match=r"sums.npz is damaged: nats must be torch.float64 \(5,\)"):
        make().bound(X_0, partial=file, **OPTIONS)


def test_a_place_that_cannot_be_written_is_noticed_before_the_work(tmp_path: Path) -> None:
    model = make()
    with pytest.raises(OSError, match=r"cannot write .*sums.npz: No such file or directory"):
        model.bound(X_0, partial=tmp_path / "absent" / "sums.npz", **OPTIONS)
    assert model.network.num_calls == 0
