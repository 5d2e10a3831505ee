"""Named configurations for each data set: what `dpm-fast train` runs when nothing else is said."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

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
)

if TYPE_CHECKING:
    from dpm_fast.data import DataSpec


def swiss_roll(data: DataConfig) -> RunConfig:
    """About a minute on two cores, within about 0.1 bits of the true likelihood."""
    return RunConfig(
        data,
        GaussianConfig(num_steps=100, schedule="log_linear"),
        MLPConfig(hidden=(128, 128, 128), activation="gelu"),
        ModelConfig("velocity", "logit"),
        TrainConfig(
            train_steps=6000,
            learning_rate=4e-3,
            warmup_steps=100,
            max_gradient_norm=1.0,
            ema_decay=0.998,
        ),
    )


def swiss_roll_best(data: DataConfig) -> RunConfig:
    """About ten minutes on two cores: more steps of the process, and of training."""
    run = swiss_roll(data)
    return replace(
        run,
        process=GaussianConfig(num_steps=200, schedule="log_linear"),
        train=replace(run.train, train_steps=40_000, batch_size=1024, ema_decay=0.9995),
    )


def swiss_roll_paper(data: DataConfig) -> RunConfig:
    """[DPM] appendix D.1.1: T = 40, 16 normalized radial basis functions, a readout per step."""
    return RunConfig(
        data,
        GaussianConfig(num_steps=40, schedule="erase"),
        RBFConfig(num_units=16, readout="per_timestep"),
        ModelConfig("perturbation"),
        TrainConfig(train_steps=8000, learning_rate=1e-2, warmup_steps=100, max_gradient_norm=1.0),
    )


def heartbeat(data: DataConfig) -> RunConfig:
    """The network gives the data's rates, which the exact posterior turns into a step's."""
    return RunConfig(
        data,
        BinomialConfig(num_steps=2000, prior_rate=0.2),
        MLPConfig(hidden=(128, 128), activation="gelu"),
        ModelConfig("x0"),
        TrainConfig(
            train_steps=10_000,
            learning_rate=3e-3,
            warmup_steps=100,
            max_gradient_norm=1.0,
            ema_decay=0.998,
        ),
    )


def heartbeat_paper(data: DataConfig) -> RunConfig:
    """[DPM] appendix D.1.2: three hidden layers of 50 units, a readout per step, the data's rate.

    The rates are offsets from the forward step's, as the paper has it for images (equations 64 and
    65): p(x_0 | x_1), which its edge does not train, then stays the forward step (equation 44).
    tanh is the logistic sigmoid scaled and shifted, which the next layer can undo. About
    seven minutes on one free core to -2.426 ± 0.003 bits (half the steps: -2.469), where the paper
    has -2.414 and the exact rates of the data would give -2.374 ± 0.003.
    """
    return RunConfig(
        data,
        BinomialConfig(num_steps=2000, prior_rate=0.2),
        MLPConfig(hidden=(50, 50, 50), activation="tanh", readout="per_timestep", time_input=False),
        ModelConfig("perturbation"),
        TrainConfig(
            batch_size=8192,
            edge="paper",
            learning_rate=1e-2,
            warmup_steps=100,
        ),
    )


def digits(data: DataConfig) -> RunConfig:
    """8 x 8 images: the image network with few channels."""
    return RunConfig(
        data,
        GaussianConfig(num_steps=100, schedule="log_linear"),
        ConvDenseConfig(conv_layers=3, num_scales=2, dense_width=256, dense_channels=8),
        ModelConfig("velocity", "logit"),
        TrainConfig(
            train_steps=5000,
            batch_size=128,
            learning_rate=2e-3,
            warmup_steps=100,
            max_gradient_norm=1.0,
            ema_decay=0.999,
        ),
        EvaluationConfig(num_samples=64),
    )


def vectors(data: DataConfig) -> RunConfig:
    """Real vectors: the Swiss roll's configuration."""
    return swiss_roll(data)


def bits(data: DataConfig) -> RunConfig:
    """Binary vectors: the heartbeat's configuration, with noise of as many ones as zeros."""
    run = heartbeat(data)
    evaluation = EvaluationConfig(eval_examples=256, eval_timesteps=100, num_samples=64)
    return replace(run, process=BinomialConfig(num_steps=1000), evaluation=evaluation)


def binary_images(data: DataConfig) -> RunConfig:
    """Binary images: binomial diffusion, and the image network."""
    network = ConvDenseConfig(dense_channels=1)
    train = replace(images(data).train, learning_rate=1e-3)
    return replace(bits(data), network=network, train=train)


def images(data: DataConfig) -> RunConfig:
    """The 2015 network for images of other sizes, trained by Adam."""
    return RunConfig(
        data,
        GaussianConfig(num_steps=1000, schedule="erase"),
        ConvDenseConfig(),
        ModelConfig("perturbation"),
        TrainConfig(train_steps=20_000, batch_size=128, max_gradient_norm=1.0),
        EvaluationConfig(eval_examples=256, eval_timesteps=100, num_samples=64),
    )


def images_2015(data: DataConfig) -> RunConfig:
    """The 2015 code's recipe: RMSProp with a decaying rate, non-finite gradients left out."""
    run = images(data)
    train = TrainConfig(
        train_steps=20_000,
        batch_size=512,
        edge="paper",
        optimizer="rmsprop",
        learning_rate=1e-3,
        learning_rate_decay="exponential",
        max_gradient_norm=0.05,
        nonfinite="skip",
        ema_decay=None,
    )
    return replace(run, network=ConvDenseConfig(bias="per_location"), train=train)


Presets = dict[str, Callable[[DataConfig], RunConfig]]
PRESETS: dict[str, Presets] = {
    "swiss-roll": {
        "default": swiss_roll,
        "best": swiss_roll_best,
        "paper": swiss_roll_paper,
    },
    "heartbeat": {"default": heartbeat, "paper": heartbeat_paper},
    "digits": {"default": digits, "2015": images_2015},
}
# For data without presets of their own.
GENERAL: dict[str, Presets] = {
    "images": {"default": images, "2015": images_2015},
    "binary images": {"default": binary_images},
    "vectors": {"default": vectors},
    "binary vectors": {"default": bits},
}


def preset(data: DataConfig, name: str = "default", spec: "DataSpec | None" = None) -> RunConfig:
    """The configuration of that name for a data set.

    Args:
        data: the data set.
        name: of the configuration.
        spec: of data that have no presets of their own; images if None.

    Raises:
        ValueError: for a name that the data do not have.
    """
    kind = "images" if spec is None or len(spec.shape) > 1 else "vectors"
    if spec is not None and spec.kind == "binary":
        kind = f"binary {kind}"
    named = PRESETS.get(data.dataset) or GENERAL[kind]
    if name not in named:
        raise ValueError(f"preset must be one of {', '.join(named)} for this data, got {name!r}")
    return named[name](data)
