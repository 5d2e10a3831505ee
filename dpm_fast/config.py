"""The configuration of a run, as typed dataclasses that travel through JSON unchanged."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from dpm_fast.config_json import check_values, from_json

if TYPE_CHECKING:
    from torch import nn

    from dpm_fast.binomial import BinomialDiffusion
    from dpm_fast.data import DataSpec
    from dpm_fast.gaussian import GaussianDiffusion
    from dpm_fast.model import DiffusionModel

Edge = Literal["decoder", "discretized", "discretized_tanh", "paper"]


class _Checked:
    """Options whose values are what their annotations say, however they are made."""

    def __post_init__(self) -> None:
        check_values(self)


@dataclass(frozen=True)
class DataConfig(_Checked):
    """Which data."""

    dataset: str
    """A data set's name, a folder of images, or an .npz or .npy file."""
    data_seed: int = 0
    """Seed of synthetic data, and of the division into training and held-out data."""
    path: str | None = None
    """Where the files of mnist or cifar10 are."""
    num_train: int | None = None
    """Number of training examples of synthetic data."""
    num_test: int | None = None
    """Number of held-out examples of synthetic data."""
    test_fraction: float | None = None
    """Fraction held out of data that are not divided yet."""
    size: int | None = None
    """Side of the images of a folder, or of dead-leaves, pixels."""
    color: bool | None = None
    """Color or grey images, of a folder or of dead-leaves."""
    levels: int | None = None
    """Number of grey levels of an array; 2 for binary data."""
    data_range: tuple[float, float] | None = None
    """Values of the lowest and the highest grey level of an array."""
    channels_last: bool | None = None
    """The examples of an array have their channels last."""
    scaling: Literal["standardize", "minus_one_one", "none"] | None = None
    """How a model sees the data."""


@dataclass(frozen=True)
class GaussianConfig(_Checked):
    """Gaussian diffusion."""

    kind: ClassVar[str] = "gaussian"
    num_steps: int = 100
    """T, number of diffusion steps."""
    schedule: Literal["erase", "erase_paper", "linear", "cosine", "log_linear"] = "log_linear"
    """Schedule of the variances beta_t."""
    learned_schedule: bool = False
    """Train the schedule with the network."""


@dataclass(frozen=True)
class BinomialConfig(_Checked):
    """Binomial diffusion, for binary data."""

    kind: ClassVar[str] = "binomial"
    num_steps: int = 2000
    """T, number of diffusion steps."""
    prior_rate: float = 0.5
    """Rate of ones of the noise."""


@dataclass(frozen=True)
class MLPConfig(_Checked):
    """Multilayer perceptron, for vectors."""

    kind: ClassVar[str] = "mlp"
    hidden: tuple[int, ...] = (128, 128)
    """Units of each hidden layer."""
    activation: str = "gelu"
    readout: Literal["bumps", "per_timestep"] = "bumps"
    """Output layer: a mixture of ten by temporal bumps, or one for each timestep."""
    time_input: bool = True
    """Tell the hidden layers the time."""


@dataclass(frozen=True)
class RBFConfig(_Checked):
    """Normalized radial basis functions, for vectors."""

    kind: ClassVar[str] = "rbf"
    num_units: int = 16
    """Number of centers."""
    readout: Literal["bumps", "per_timestep"] = "per_timestep"
    """Output layer: a mixture of ten by temporal bumps, or one for each timestep."""


@dataclass(frozen=True)
class ConvDenseConfig(_Checked):
    """Multiscale convolutions beside a dense path, for images."""

    kind: ClassVar[str] = "conv_dense"
    conv_layers: int = 4
    conv_channels: int = 20
    num_scales: int = 1
    """Resolutions of each convolution; the image's sides are divisible by 2**(num_scales - 1)."""
    activation: Literal["per_scale", "after_sum"] = "per_scale"
    """Leaky ReLU at each scale (2015 code), or softplus after their sum (paper)."""
    bias: Literal["per_channel", "per_location"] = "per_channel"
    dense_layers: int = 4
    """Layers of the dense path, 0 for none."""
    dense_width: int = 500
    dense_channels: int = 2
    pixel_layers: int = 2
    """Layers of the per-pixel network, its output layer included."""
    pixel_width: int = 20
    readout: Literal["bumps", "per_timestep"] = "bumps"
    """Output layer: a mixture of ten by temporal bumps, or one for each timestep."""


@dataclass(frozen=True)
class ModelConfig(_Checked):
    """How the network's outputs make a reverse kernel."""

    parameterization: (
        Literal["perturbation", "decay", "epsilon", "x0", "velocity", "previous", "rate"] | None
    ) = None
    """Meaning of the outputs; the process's own if none."""
    variance: (
        Literal["logit_scaled", "logit", "fixed_small", "fixed_large", "learned_range", "learned"]
        | None
    ) = None
    """Variance of the reverse kernel; the parameterization's own if none."""
    clamp: tuple[float, float] | None = None
    """Range of the predicted x_0, in the model's scale."""


@dataclass(frozen=True)
class TrainConfig(_Checked):
    """How `Trainer` trains.

    Raises:
        ValueError: for values of a wrong type or out of range.
    """

    train_steps: int = 10_000
    """Optimizer steps of the whole run."""
    batch_size: int = 512
    """Examples per step, over all ranks."""
    seed: int = 0
    """Seed of the weights, the noise, the timesteps and the order of the data."""
    loss: Literal["bound", "simple", "hybrid"] = "bound"
    edge: Edge = "decoder"
    """Edge terms of the bound."""
    timesteps: Literal["even", "importance"] = "even"
    """Which timesteps the bound is estimated from: all alike, or in proportion to the size that
    their terms had lately."""
    optimizer: Literal["adam", "rmsprop"] = "adam"
    learning_rate: float = 1e-3
    learning_rate_decay: Literal["constant", "cosine", "exponential"] = "cosine"
    final_learning_rate: float = 0.01
    """Fraction of the learning rate that a decay ends with, at train_steps."""
    warmup_steps: int = 0
    """Steps over which the learning rate grows linearly."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    rmsprop_decay: float = 0.9
    max_gradient_norm: float | None = None
    """Gradients of a larger norm are scaled down to it."""
    nonfinite: Literal["skip", "raise"] = "skip"
    """What to do about a gradient that is not finite: leave the step out, or stop."""
    ema_decay: float | None = 0.999
    """Decay of the averaged weights, which samples and bounds use; none for no average."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: networks by torch's autocast. Schedules and bound terms stay in float32."""
    log_every: int = 100
    """Steps per row of metrics.jsonl."""
    checkpoint_every: int = 1000
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """Number of checkpoints kept."""
    max_seconds: float | None = None
    """Stop training, with a checkpoint, after this time; evaluation and pictures come after it."""
    tensorboard: bool = False
    """Write the metrics for TensorBoard too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("train_steps", "batch_size", "log_every", "checkpoint_every"):
            _require(self, name, "at least 1", getattr(self, name) >= 1)
        _require(
            self,
            "timesteps",
            "'even', or with the loss 'bound' 'importance'",
            self.timesteps == "even" or (self.timesteps == "importance" and self.loss == "bound"),
        )
        _require(self, "keep_checkpoints", "at least 1", self.keep_checkpoints >= 1)
        _require(self, "warmup_steps", "at least 0", self.warmup_steps >= 0)
        _require(self, "seed", "in 0 .. 2**63 - 1", 0 <= self.seed < 2**63)
        _require(
            self, "learning_rate", "positive and finite", 0 < self.learning_rate < float("inf")
        )
        _require(self, "final_learning_rate", "in (0, 1]", 0 < self.final_learning_rate <= 1)
        _require(self, "adam_betas", "two in [0, 1)", all(0 <= b < 1 for b in self.adam_betas))
        _require(self, "rmsprop_decay", "in [0, 1)", 0 <= self.rmsprop_decay < 1)
        for name in ("max_gradient_norm", "max_seconds"):
            value = getattr(self, name)
            _require(self, name, "positive or none", value is None or value > 0)
        decay = self.ema_decay
        _require(self, "ema_decay", "in [0, 1) or none", decay is None or 0 <= decay < 1)


@dataclass(frozen=True)
class EvaluationConfig(_Checked):
    """What the end of a run measures on held-out data.

    Raises:
        ValueError: for values of a wrong type or out of range.
    """

    eval_examples: int | None = None
    """Number of held-out examples, from the first; all if none."""
    eval_timesteps: int | None = None
    """Timesteps per example, one in each of as many strata; every timestep if none, or if T or
    more."""
    eval_draws: int = 1
    """Noise draws per example and timestep; two or more give the Monte-Carlo error."""
    eval_edge: Edge | None = None
    """Edge terms of the reported bound; those of the training if none."""
    num_samples: int = 1000
    eval_batch_size: int = 1024
    """Examples, or terms of the bound, in one call of the network; no result depends on it."""
    eval_seed: int = 0
    """Seed of the noise of bounds and samples."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("eval_draws", "num_samples", "eval_batch_size"):
            _require(self, name, "at least 1", getattr(self, name) >= 1)
        for name in ("eval_examples", "eval_timesteps"):
            value = getattr(self, name)
            _require(self, name, "at least 1 or none", value is None or value >= 1)


Process = GaussianConfig | BinomialConfig
Network = MLPConfig | RBFConfig | ConvDenseConfig


@dataclass(frozen=True)
class RunConfig:
    """Everything that a run follows from, besides the data's files."""

    data: DataConfig
    process: Process
    network: Network
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


def build_process(config: Process) -> "GaussianDiffusion | BinomialDiffusion":
    """The process that a configuration describes."""
    if isinstance(config, BinomialConfig):
        from dpm_fast.binomial import BinomialDiffusion

        return BinomialDiffusion(config.num_steps, config.prior_rate)
    from dpm_fast.gaussian import GaussianDiffusion

    return GaussianDiffusion.from_schedule(
        config.schedule, config.num_steps, learned=config.learned_schedule
    )


def build_network(
    config: Network, shape: tuple[int, ...], num_steps: int, num_outputs: int
) -> "nn.Module":
    """The network that a configuration describes.

    Args:
        config: its kind and options.
        shape: of one example.
        num_steps: T.
        num_outputs: outputs per element.

    Raises:
        ValueError: for examples of a shape that this kind of network does not take.
    """
    from dpm_fast import networks

    options = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    if isinstance(config, ConvDenseConfig):
        if len(shape) != 3:
            raise ValueError(f"network conv_dense requires data of shape (C, H, W), got {shape}")
        return networks.ConvDenseNetwork(shape, num_steps, num_outputs=num_outputs, **options)
    if len(shape) != 1:
        raise ValueError(f"network {config.kind} requires data of shape (D,), got {shape}")
    network = networks.MLP if isinstance(config, MLPConfig) else networks.RBFNetwork
    return network(shape[0], num_steps, num_outputs=num_outputs, **options)


def build_model(config: RunConfig, spec: "DataSpec") -> "DiffusionModel":
    """The model that a configuration describes, for data of a specification.

    The initial weights follow from ``config.train.seed``; torch's generator is left as it was.

    Raises:
        ValueError: for parts that do not fit together.
    """
    import torch

    from dpm_fast.model import DiffusionModel

    model = config.model
    process = build_process(config.process)
    reverse: Any = process.reverse(model.parameterization, model.variance, model.clamp)  # type: ignore[arg-type]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.train.seed)
        network = build_network(
            config.network, tuple(spec.shape), process.num_steps, reverse.num_outputs
        )
    return DiffusionModel(
        process,
        network,
        model.parameterization,
        variance=model.variance,
        clamp=model.clamp,
        data=spec,
    )


def load_config(path: Path) -> RunConfig:
    """The `RunConfig` in a JSON file."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"cannot read the configuration {path}: {reason}") from None
    return from_json(RunConfig, text, str(path))


def _require(config: Any, name: str, requirement: str, holds: bool) -> None:
    if not holds:
        raise ValueError(f"{name} must be {requirement}, got {getattr(config, name)!r}")
