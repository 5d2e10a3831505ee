"""A run's directory: begun by `train`, opened again by everything that uses the trained model."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from dpm_fast import checkpoint, files
from dpm_fast.config import DataConfig, RunConfig, build_model, load_config
from dpm_fast.config_json import differences, to_json
from dpm_fast.data import Data, DataSpec, load
from dpm_fast.identity import check_identity
from dpm_fast.model import DiffusionModel

CONFIG, SPEC, RESULT = "config.json", "data.json", "result.json"


@dataclass(frozen=True)
class Run:
    """A trained model, the weights averaged where there is an average, in evaluation mode."""

    path: Path
    config: RunConfig
    model: DiffusionModel
    step: int

    @property
    def spec(self) -> DataSpec:
        """What an example is."""
        assert self.model.data is not None
        return self.model.data

    def load_data(self) -> Data:
        """The run's data set.

        Raises:
            ValueError: if it is not what the model was trained on.
        """
        data = load_data(self.config.data)
        if data.spec != self.spec:
            raise ValueError(f"{self.config.data.dataset} must be {self.spec}, got {data.spec}")
        return data


def open_run(path: str | Path, device: str | torch.device = "cpu") -> Run:
    """The model of a run's latest checkpoint, or of one of its checkpoints.

    Args:
        path: the directory of the run or of the checkpoint, as `dpm-fast train` writes it.
        device: where the model goes.

    Raises:
        ValueError, CheckpointError: for a directory from which no model can be read.
    """
    path = Path(path)
    found = checkpoint.load(path)
    directory = path if (path / CONFIG).exists() else found.path.parent
    if not (directory / CONFIG).exists() and not (directory / SPEC).exists():
        raise ValueError(
            f"{directory} was written by Trainer, not by `dpm-fast train`: "
            "make the same Trainer with resume='auto'"
        )
    config = load_config(directory / CONFIG)
    model = build_model(config, read_spec(directory))
    weights = found.parts.get("averaged", found.parts.get("weights", {}))
    check_identity(found, model, model.data)
    checkpoint.check_fits(model.state_dict(), weights, str(found.path))
    model.load_state_dict(weights)
    return Run(directory, config, model.to(device).eval(), found.step)


def load_data(config: DataConfig) -> Data:
    """The data set of a configuration."""
    options = dataclasses.asdict(config)
    return load(
        options.pop("dataset"), path=options.pop("path"), seed=options.pop("data_seed"), **options
    )


def read_spec(run: Path) -> DataSpec:
    """The specification of the data that a run was trained on."""
    try:
        return DataSpec.from_dict(json.loads((run / SPEC).read_text()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"cannot read {run / SPEC}: {error}") from None


def write_description(run: Path, config: RunConfig, spec: DataSpec) -> None:
    """Write what a run is made from beside its checkpoints."""
    files.write(run / CONFIG, to_json(config))
    files.write(run / SPEC, json.dumps(spec.to_dict(), indent=2) + "\n")


def has_result(run: Path, step: int) -> bool:
    """Whether a run's result.json is that of its model after ``step`` steps."""
    try:
        return json.loads((run / RESULT).read_text())["train_steps"] == step
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        return False


def check_same_model(resume: str, out: Path, config: RunConfig) -> None:
    """Refuse to resume a run as another model or on other data; its training may change.

    Args:
        resume: "auto" for the run in ``out``, or the path of a run or of a checkpoint.
        out: the directory that is written.
        config: of the model that goes on.

    Raises:
        ValueError: naming an option that differs.
        CheckpointError: for a path without a checkpoint.
    """
    run = out if resume == "auto" else checkpoint.find(Path(resume)).parent
    if checkpoint.pointer(run) is None or not (run / CONFIG).exists():
        return
    for name, (theirs, ours) in differences(load_config(run / CONFIG), config).items():
        if name.split(".")[0] in ("data", "process", "network", "model"):
            raise ValueError(f"{name} must be {theirs} to resume {run}, got {ours}")
