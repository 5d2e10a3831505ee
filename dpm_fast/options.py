"""What the command line can be told: a dataclass per command, and how it is read by tyro."""

import argparse
import contextlib
import dataclasses
import io
import itertools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from dpm_fast.config import DataConfig, Edge, RunConfig, load_config
from dpm_fast.presets import preset

if TYPE_CHECKING:
    from dpm_fast.data import DataSpec

Options = TypeVar("Options")

# Refusals that tyro words after its own and Python's insides.
_PLAIN_WORDS = (
    (r"^Error parsing config[.\w]*: ", ""),
    (r"^Error parsing (\S+): invalid literal for int.*: ('.*')$", r"\1 must be an integer, got \2"),
    (r"^Error parsing (\S+): could not convert .*: ('.*')$", r"\1 must be a number, got \2"),
    (r"^Error parsing (\S+): no type matching \{None\}\|(.*) could be instantiated from \[(.*)\]$",
     r"\1 must be \2 or none, got \3"),
    (r"^Error parsing (\S+): Could not find valid parse for arguments: \[(.*)\]$",
     r"\1 has values of a wrong kind, got \2"),
)  # fmt: skip


@dataclass(frozen=True)
class TrainOptions:
    """Train a model, then bound the likelihood of held-out data, draw samples and pictures."""

    config: RunConfig
    preset: str = "default"
    """Named configuration to start from; a resumed run starts from its own."""
    config_file: Path | None = None
    """A config.json to start from instead."""
    out: Path | None = None
    """Directory of the run; runs/DATASET or runs/DATASET-PRESET if none."""
    resume: str | None = None
    """auto: continue the run in that directory if there is one; or a run or checkpoint to continue
    from."""
    device: str | None = None
    """Where to compute; a GPU if there is one, else the CPU."""


@dataclass(frozen=True)
class RunOptions:
    run: "Annotated[Path, *_positional('RUN')]"
    """Directory of a run, or one of its checkpoints."""
    seed: int = 0
    """Seed of the noise."""
    device: str | None = None
    """Where to compute; a GPU if there is one, else the CPU."""


@dataclass(frozen=True)
class SampleOptions(RunOptions):
    """Draw samples of a trained model."""

    num: int = 64
    """Number of samples."""
    num_inference_steps: int | None = None
    """Steps to take, evenly spaced over the model's; all of these if none."""
    eta: float | None = None
    """Noise of a step, from 0 (DDIM) to 1; the model's own if none."""
    out: Path | None = None
    """Where sampled.npy, sampled.png and sampled.json go; the run's directory if none."""


@dataclass(frozen=True)
class BoundOptions(RunOptions):
    """Bound the likelihood of held-out data."""

    num: int | None = None
    """Number of held-out examples, from the first; all if none."""
    timesteps: int | None = None
    """Timesteps per example, one in each of as many strata; every timestep if none, or if T or
    more."""
    edge: Edge | None = None
    """Edge terms of the bound; the run's own if none."""
    draws: int = 1
    """Noise draws per example and timestep; two or more give the Monte-Carlo error."""
    max_memory: str | None = None
    """Memory of the work beyond model and data, as 2GiB: batches get smaller where they must."""
    partial: Path | None = None
    """File for the sums of an unfinished bound: the same command, interrupted, goes on from it."""


@dataclass(frozen=True)
class DenoiseOptions(RunOptions):
    """Restore held-out data from noise: approximate samples of p(x_0 | y), y = x_0 + sigma noise.

    Approximate, because y guides the model's steps as a small perturbation of their means.
    """

    sigma: float | None = None
    """Standard deviation of the noise in the model's scale, 0.5 if none; of binary data the rate of
    flips, at most 1/2, and 0.1 if none."""
    num: int = 8
    """Number of held-out examples."""
    guidance: Literal["x0", "x_t"] = "x0"
    """Where the observation acts: on x_0 as predicted, or on x_t as in the paper."""
    out: Path | None = None
    """Where denoised.npz and denoised.png go; the run's directory if none."""


@dataclass(frozen=True)
class InpaintOptions(RunOptions):
    """Complete held-out data of which only the first part is known, by approximate samples."""

    fraction: float = 0.5
    """Fraction of the last axis that is unknown."""
    num: int = 8
    """Number of held-out examples."""
    out: Path | None = None
    """Where inpainted.npz and inpainted.png go; the run's directory if none."""


def parse_train(arguments: list[str]) -> TrainOptions:
    """The options of `train`: those given, over those of a preset, a file or the resumed run."""
    if arguments and arguments[0] in ("-h", "--help"):
        print("Options for swiss-roll. Other data have others: dpm-fast train DATASET --help\n")
        arguments = ["swiss-roll", *arguments]
    if not arguments or arguments[0].startswith("-"):
        raise ValueError("train requires a DATASET first, got none; see dpm-fast --help")
    dataset, rest = arguments[0], arguments[1:]
    # What the defaults of all other options depend on.
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for option in ("--preset", "--config-file", "--out", "--resume"):
        parser.add_argument(option)
    try:
        first, _ = parser.parse_known_args(rest)
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from None
    name = first.preset or "default"
    out = Path(first.out or Path("runs", Path(dataset).stem + f"-{name}" * (name != "default")))
    resumed = None
    if first.resume is not None and first.preset is None:
        resumed = _config_file(first.resume, out)
    if first.config_file is not None:
        config = load_config(Path(first.config_file))
    elif resumed is not None:
        config = load_config(resumed)
        # A time limit is one of the day, not of the run.
        train = dataclasses.replace(config.train, max_seconds=None)
        config = dataclasses.replace(config, train=train)
    else:
        config = preset(DataConfig(dataset), name, _spec(dataset, rest))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, dataset=dataset))
    defaults = TrainOptions(config, preset=name, out=out)
    return parse(TrainOptions, rest, f"train {dataset}", defaults)


def parse(
    options: type[Options], arguments: list[str], command: str, default: Options | None = None
) -> Options:
    """Options from the command line, typed by their dataclass; refusals become one sentence."""
    return _read(options, arguments, command, default)


def _config_file(resume: str, out: Path) -> Path | None:
    """The config.json of the run that is resumed, where there is one."""
    run = out if resume == "auto" else Path(resume)
    if (run / "state.json").exists():  # one of its checkpoints
        run = run.parent
    return run / "config.json" if (run / "config.json").exists() else None


def _spec(dataset: str, arguments: list[str]) -> "DataSpec | None":
    """What the examples in a file of arrays are, which decides the preset; None for other data."""
    if Path(dataset).suffix not in (".npy", ".npz"):
        return None
    from dpm_fast.run import load_data

    rest = [argument for argument in arguments if argument not in ("-h", "--help")]
    data, _ = _read(
        DataConfig, rest, f"train {dataset}", DataConfig(dataset), return_unknown_args=True
    )
    return load_data(data).spec


def _read(options: Any, arguments: list[str], command: str, default: Any, **settings: Any) -> Any:
    tyro = _tyro()
    if default is not None:
        settings["default"] = default
    refusal = io.StringIO()
    try:
        with contextlib.redirect_stderr(refusal):
            return tyro.cli(
                tyro.conf.AvoidSubcommands[tyro.conf.OmitArgPrefixes[options]],
                args=arguments,
                prog=f"dpm-fast {command}",
                **settings,
            )
    except SystemExit as stop:
        if stop.code in (None, 0):  # --help
            raise
        problem = _in_plain_words(_first_paragraph(refusal.getvalue()).rstrip("."))
        raise ValueError(f"{problem}; see dpm-fast {command} --help") from None


def _first_paragraph(box: str) -> str:
    """What is wrong, out of the box that tyro draws around it, its title and its advice."""
    lines = [line.strip("│ ") for line in box.splitlines()[1:]]
    paragraphs = itertools.groupby(lines, key=lambda line: line.strip("╰─╯-") != "")
    return next((" ".join(words) for is_text, words in paragraphs if is_text), box)


def _in_plain_words(problem: str) -> str:
    for pattern, words in _PLAIN_WORDS:
        problem = re.sub(pattern, words, problem)
    return problem


def _tyro() -> Any:
    try:
        import tyro
    except ImportError:
        raise ImportError(
            "the command line requires tyro, got none: pip install 'dpm_fast[train]'"
        ) from None
    return tyro


def _positional(name: str) -> tuple[Any, ...]:
    conf = _tyro().conf
    return conf.Positional, conf.arg(metavar=name)
