"""Configurations: they travel through JSON unchanged, and what is wrong in one is named."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dpm_fast.config import (
    BinomialConfig,
    ConvDenseConfig,
    DataConfig,
    EvaluationConfig,
    GaussianConfig,
    MLPConfig,
    ModelConfig,
    RBFConfig,
    RunConfig,
    TrainConfig,
    build_model,
    build_network,
    build_process,
    load_config,
)
from dpm_fast.config_json import differences, from_json, to_json
from dpm_fast.data import DataSpec
from dpm_fast.presets import GENERAL, PRESETS, preset

PLANE = DataSpec("swiss-roll", (2,), "continuous")
VECTORS = DataSpec("vectors", (3,), "continuous")
IMAGES = DataSpec("images", (1, 8, 8), "discrete", levels=17)
BITS = DataSpec("bits", (20,), "binary")
BINARY_IMAGES = DataSpec("binary images", (1, 8, 8), "binary")

CONFIG = RunConfig(
    DataConfig("swiss-roll"),
    GaussianConfig(num_steps=7),
    MLPConfig(hidden=(5, 6)),
    ModelConfig("epsilon", "fixed_small", clamp=(-1.0, 1.0)),
    TrainConfig(train_steps=3, max_gradient_norm=0.5),
)


def _document() -> dict:
    return json.loads(to_json(CONFIG))


def _changed(section: str, **values) -> dict:
    document = _document()
    document[section] |= values
    return document


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        *(
            make(DataConfig(name))
            for name, made in (PRESETS | GENERAL).items()
            for make in made.values()
        ),
    ],
)
def test_json_gives_the_configuration_back(config: RunConfig, tmp_path: Path) -> None:
    assert from_json(RunConfig, to_json(config), "text") == config
    file = tmp_path / "config.json"
    file.write_text(to_json(config))
    assert load_config(file) == config


@pytest.mark.parametrize(
    ("make", "values", "message"),
    [
        (TrainConfig, {"optimizer": "sgd"}, "optimizer must be one of adam, rmsprop, got 'sgd'"),
        (TrainConfig, {"precision": "float16"}, "precision must be one of float32, bfloat16, got"),
        (TrainConfig, {"nonfinite": "Raise"}, "nonfinite must be one of skip, raise, got 'Raise'"),
        (TrainConfig, {"loss": "foo"}, "loss must be one of bound, simple, hybrid, got 'foo'"),
        (TrainConfig, {"train_steps": "3"}, "train_steps must be an integer, got '3'"),
        (TrainConfig, {"train_steps": True}, "train_steps must be an integer, got True"),
        (TrainConfig, {"learning_rate": None}, "learning_rate must be a number, got None"),
        (TrainConfig, {"adam_betas": 0.9}, "adam_betas must be a list of 2 float, got 0.9"),
        (EvaluationConfig, {"num_samples": 1.5}, "num_samples must be an integer, got 1.5"),
        (GaussianConfig, {"schedule": "magic"}, "schedule must be one of erase, "),
        (MLPConfig, {"hidden": (3, "4")}, r"hidden\[1\] must be an integer, got '4'"),
        (ModelConfig, {"clamp": (1.0,)}, r"clamp must be a list of 2 float, got \[1.0\]"),
    ],
)
def test_options_given_in_python_are_checked_too(make, values, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**values)


def test_numbers_of_other_libraries_will_do() -> None:
    config = TrainConfig(train_steps=np.int64(3), learning_rate=np.float32(0.5), ema_decay=0)
    assert (config.train_steps, config.learning_rate, config.ema_decay) == (3, 0.5, 0.0)
    assert type(config.train_steps) is int
    assert {type(config.learning_rate), type(config.ema_decay)} == {float}
    assert MLPConfig(hidden=[5]) == MLPConfig(hidden=(5,))


def test_an_integer_will_do_for_a_number() -> None:
    text = json.dumps(_changed("train", learning_rate=1))
    found = from_json(RunConfig, text, "text").train.learning_rate
    assert (found, type(found)) == (1.0, float)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("{", "text is not JSON"),
        ("[" * 100_000, "text is not JSON"),
        ([], r"text must be an object, got \[\]"),
        (_changed("train", trian_steps=1), "text.train has no option 'trian_steps'; did you mean "),
        (_document() | {"modle": {}}, "text has no option 'modle'; did you mean model?"),
        ({"data": {}}, "text lacks process"),
        (_document() | {"data": {}}, "text.data lacks dataset"),
        (_changed("train", train_steps="1"), "text.train.train_steps must be an integer, got '1'"),
        (_changed("train", train_steps=1.5), "text.train.train_steps must be an integer, got 1.5"),
        (_changed("train", train_steps=True), "train_steps must be an integer, got True"),
        (_changed("train", learning_rate="1"), "learning_rate must be a number, got '1'"),
        (_changed("train", tensorboard=1), "tensorboard must be true or false, got 1"),
        (_changed("train", adam_betas=[0.9]), r"adam_betas must be a list of 2 float, got \[0.9\]"),
        (_changed("train", loss="vibes"), "loss must be one of bound, simple, hybrid, got 'vibes'"),
        (_changed("train", loss=[]), "loss must be one of bound, simple, hybrid"),
        (_changed("train", ema_decay="x"), "ema_decay must be a number, got 'x'"),
        (_changed("network", hidden=[5, "6"]), r"network.hidden\[1\] must be an integer, got '6'"),
        (_changed("network", hidden=5), "network.hidden must be a list of int, got 5"),
        (
            _changed("network", kind="magic"),
            "kind must be one of mlp, rbf, conv_dense, got 'magic'",
        ),
        (_changed("network", kind=[]), r"kind must be one of mlp, rbf, conv_dense, got \[\]"),
        (_document() | {"network": 3}, "kind must be one of mlp, rbf, conv_dense, got None"),
        (_changed("process", kind="rbf"), "process.kind must be one of gaussian, binomial"),
        (_changed("model", kind="x0"), "text.model has no option 'kind'"),
        (_changed("train", batch_size=0), "text.train: batch_size must be at least 1, got 0"),
    ],
)
def test_a_wrong_configuration_is_one_sentence(document, message: str) -> None:
    text = document if isinstance(document, str) else json.dumps(document)
    with pytest.raises(ValueError, match=message) as caught:
        from_json(RunConfig, text, "text")
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read the configuration .*absent: No such file"):
        load_config(tmp_path / "absent")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\0")
    with pytest.raises(ValueError, match="cannot read the configuration"):
        load_config(tmp_path / "binary")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train_steps": 0}, "train_steps must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"log_every": 0}, "log_every must be at least 1, got 0"),
        ({"checkpoint_every": 0}, "checkpoint_every must be at least 1, got 0"),
        ({"keep_checkpoints": 0}, "keep_checkpoints must be at least 1"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0"),
        ({"seed": -1}, r"seed must be in 0 .. 2\*\*63 - 1"),
        ({"seed": 2**63}, r"seed must be in 0 .. 2\*\*63 - 1"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive"),
        ({"learning_rate": float("inf")}, "learning_rate must be positive and finite, got inf"),
        ({"final_learning_rate": 0.0}, r"final_learning_rate must be in \(0, 1\]"),
        ({"adam_betas": (0.9, 1.0)}, r"adam_betas must be two in \[0, 1\)"),
        ({"rmsprop_decay": 1.0}, r"rmsprop_decay must be in \[0, 1\)"),
        ({"max_gradient_norm": 0.0}, "max_gradient_norm must be positive or none"),
        ({"max_seconds": -1.0}, "max_seconds must be positive or none"),
        ({"ema_decay": 1.0}, r"ema_decay must be in \[0, 1\) or none"),
    ],
)
def test_training_options_out_of_range_are_refused(values, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**values)


@pytest.mark.parametrize(
    "name", ["eval_examples", "eval_timesteps", "eval_draws", "eval_batch_size", "num_samples"]
)
def test_evaluation_options_out_of_range_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1"):
        EvaluationConfig(**{name: 0})


def test_differences_are_named() -> None:
    other = dataclasses.replace(CONFIG, network=RBFConfig(), process=GaussianConfig(num_steps=8))
    assert differences(CONFIG, other) == {"network": ("mlp", "rbf"), "process.num_steps": (7, 8)}
    assert differences(CONFIG, CONFIG) == {}


def test_every_option_of_a_network_reaches_it() -> None:
    rbf = build_network(RBFConfig(num_units=3, readout="bumps"), (2,), 5, 2)
    assert rbf.centers.shape == (3, 2)
    mlp = build_network(MLPConfig(hidden=(4,), activation="gelu", time_input=False), (2,), 5, 1)
    assert mlp(torch.zeros(6, 2), torch.full((6,), 5)).shape == (6, 2)
    config = ConvDenseConfig(conv_layers=1, conv_channels=4, num_scales=2, dense_layers=0)
    conv = build_network(config, (3, 4, 6), 5, 2)
    assert conv(torch.zeros(2, 3, 4, 6), torch.tensor([1, 5])).shape == (2, 6, 4, 6)
    assert conv.dense is None


@pytest.mark.parametrize(
    ("config", "shape", "message"),
    [
        (MLPConfig(), (1, 8, 8), r"network mlp requires data of shape \(D,\), got \(1, 8, 8\)"),
        (RBFConfig(), (1, 8), r"network rbf requires data of shape \(D,\), got \(1, 8\)"),
        (ConvDenseConfig(), (8,), r"conv_dense requires data of shape \(C, H, W\), got \(8,\)"),
        (ConvDenseConfig(num_scales=3), (1, 6, 6), "divisible"),
    ],
)
def test_data_that_a_network_does_not_take_are_refused(config, shape, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_network(config, shape, 5, 2)


def test_processes_are_what_they_are_called() -> None:
    gaussian = build_process(GaussianConfig(num_steps=9, schedule="cosine", learned_schedule=True))
    assert (gaussian.kind, gaussian.num_steps) == ("gaussian", 9)
    assert gaussian.schedule_weights is not None
    binomial = build_process(BinomialConfig(num_steps=9, prior_rate=0.2))
    assert (binomial.kind, binomial.num_steps, binomial.prior_rate) == ("binomial", 9, 0.2)


def test_the_weights_follow_from_the_seed_alone() -> None:
    def weights(seed: int) -> torch.Tensor:
        config = dataclasses.replace(CONFIG, train=TrainConfig(seed=seed))
        return torch.cat([p.flatten() for p in build_model(config, VECTORS).parameters()])

    torch.manual_seed(5)
    first = weights(1)
    drawn_after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), drawn_after)
    assert torch.equal(weights(1), first)
    assert not torch.equal(weights(2), first)


def test_the_number_of_outputs_follows_from_the_parameterization() -> None:
    model = build_model(CONFIG, VECTORS)
    assert model.sample(2).shape == (2, 3)
    assert model.reverse.clamp == (-1.0, 1.0)
    learned = dataclasses.replace(CONFIG, model=ModelConfig("perturbation"))
    assert build_model(learned, VECTORS).sample(2).shape == (2, 3)


@pytest.mark.parametrize(
    ("process", "parameterization", "spec", "message"),
    [
        (GaussianConfig(), "epsilon", BITS, "data of kind 'binary' do not fit a gaussian process"),
        (BinomialConfig(), "rate", VECTORS, "data of kind 'continuous' do not fit a binomial"),
        (GaussianConfig(), "rate", VECTORS, "parameterization must be one of perturbation"),
        (BinomialConfig(), "velocity", BITS, "parameterization must be"),
    ],
)
def test_parts_that_do_not_fit_are_refused(process, parameterization, spec, message) -> None:
    config = RunConfig(DataConfig("any"), process, MLPConfig(), ModelConfig(parameterization))
    with pytest.raises(ValueError, match=message):
        build_model(config, spec)


_ALL_PRESETS = PRESETS | GENERAL
_SPECS = {
    "swiss-roll": PLANE,
    "vectors": VECTORS,
    "heartbeat": BITS,
    "binary vectors": BITS,
    "binary images": BINARY_IMAGES,
}


@pytest.mark.parametrize(
    ("dataset", "name"),
    [(dataset, name) for dataset, made in _ALL_PRESETS.items() for name in made],
)
def test_every_preset_makes_a_model_that_can_be_trained(dataset: str, name: str) -> None:
    spec = _SPECS.get(dataset, IMAGES)
    config = preset(DataConfig(dataset), name, spec)
    model = build_model(config, spec)
    x_0 = spec.to_model(torch.zeros(2, *spec.shape))
    options = {"kind": config.train.loss, "edge": config.train.edge}
    assert model.loss(x_0, seed=0, example_ids=torch.arange(2), **options).isfinite()


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(ValueError, match="preset must be one of default, best, paper"):
        preset(DataConfig("swiss-roll"), "magic")
