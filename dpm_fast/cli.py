"""The command `dpm-fast`: train, sample, bound, denoise, inpaint, info."""

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

if TYPE_CHECKING:
    from torch import Tensor

    from dpm_fast.config import RunConfig
    from dpm_fast.run import Run

_USAGE = """usage: dpm-fast COMMAND ...

  train DATASET [--preset NAME] [--out DIR] [--resume auto] [options]
  sample RUN [--num N] [--seed S]       samples of a trained model
  bound RUN [--timesteps K]             its likelihood bound on held-out data
  denoise RUN [--sigma S]               noisy held-out data, restored
  inpaint RUN [--fraction F]            partly known held-out data, completed
  info                                  versions and what is built

`dpm-fast COMMAND --help` lists the options of a command.
DATASET: swiss-roll, heartbeat, dead-leaves, digits, mnist or cifar10 (with --path), a folder of
images, an .npy or an .npz file. RUN: the directory that train wrote.
"""


@dataclass(frozen=True)
class SampleOptions:
    """Draw samples of a trained model."""

    run: "Annotated[Path, _positional()]"
    """Directory of the run, or one of its checkpoints."""
    num: int = 64
    """Number of samples."""
    seed: int = 0
    """Seed of the noise."""
    out: Path | None = None
    """Where samples.npy and samples.png go; the run's directory if none."""


@dataclass(frozen=True)
class BoundOptions:
    """Bound the likelihood of held-out data."""

    run: "Annotated[Path, _positional()]"
    """Directory of the run, or one of its checkpoints."""
    num: int | None = None
    """Number of held-out examples; all if none."""
    timesteps: int | None = None
    """Timesteps per example, one in each of as many strata; every timestep if none."""
    edge: str | None = None
    """decoder, discretized, discretized_tanh or paper; the run's own if none."""
    draws: int = 1
    """Noise draws per example and timestep."""
    seed: int = 0
    """Seed of the noise."""


@dataclass(frozen=True)
class DenoiseOptions:
    """Restore held-out data from noise: samples of p(x_0 | y), y = x_0 + sigma noise."""

    run: "Annotated[Path, _positional()]"
    """Directory of the run, or one of its checkpoints."""
    sigma: float = 0.5
    """Standard deviation of the noise in the model's scale; for binary data a flip rate."""
    num: int = 8
    """Number of held-out examples."""
    seed: int = 0
    """Seed of the noise."""
    guidance: str = "x_0"
    """Where the observation acts: on x_0 as predicted, or on x_t as in the paper."""
    out: Path | None = None
    """Where denoised.npz and denoised.png go; the run's directory if none."""


@dataclass(frozen=True)
class InpaintOptions:
    """Complete held-out data of which only the first part is known."""

    run: "Annotated[Path, _positional()]"
    """Directory of the run, or one of its checkpoints."""
    fraction: float = 0.5
    """Fraction of the last axis that is unknown."""
    num: int = 8
    """Number of held-out examples."""
    seed: int = 0
    """Seed of the noise."""
    out: Path | None = None
    """Where inpainted.npz and inpainted.png go; the run's directory if none."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 2 for wrong input, 130 when interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_USAGE, end="")
        return 0 if arguments else 2
    command, rest = arguments[0], arguments[1:]
    if command not in _COMMANDS:
        known = ", ".join(_COMMANDS)
        print(f"dpm-fast: command must be one of {known}, got {command!r}", file=sys.stderr)
        return 2
    try:
        _COMMANDS[command](rest)
    except KeyboardInterrupt as error:
        print(f"dpm-fast: interrupted {error}".rstrip(), file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, RuntimeError, ImportError) as error:
        if not _is_users(error):
            raise
        print(f"dpm-fast: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _train(arguments: list[str]) -> None:
    config, out, resume = _train_options(arguments)
    import torch

    from dpm_fast import checkpoint, report, run
    from dpm_fast.config import build_model, to_json
    from dpm_fast.trainer import Trainer

    data = run.load_data(config)
    model = build_model(config, data.spec)
    trainer = Trainer(model, data, config.train, out=out, resume=resume)
    is_first = trainer.ranks.rank == 0
    if is_first:
        checkpoint.write_atomically(out / run.CONFIG, to_json(config))
        checkpoint.write_atomically(out / run.SPEC, json.dumps(data.spec.to_dict()) + "\n")
        print(f"{data!r}\n{out}: {sum(p.numel() for p in model.parameters())} weights", flush=True)
    outcome = trainer.fit()
    if not is_first:
        return
    averaged = trainer.averaged.eval()
    bound = run.evaluate(averaged, data, config.evaluation, config.train.edge)
    found = run.result(bound, data, config)
    with torch.no_grad():
        samples = averaged.sample(config.evaluation.num_samples, seed=config.evaluation.eval_seed)
    found |= {
        "valid_fraction": run.valid_fraction(config.data.dataset, samples),
        "train_seconds": outcome.train_seconds,
        "examples_per_second": outcome.examples_per_second,
        "train_steps": outcome.step,
        "seed": config.train.seed,
        "versions": run.versions(),
    }
    checkpoint.write_atomically(out / run.RESULT, json.dumps(found, indent=2) + "\n")
    print(run.table(found), flush=True)
    for path in report.pictures(out, averaged, data, bound, samples):
        print(path)


def _train_options(arguments: list[str]) -> "tuple[RunConfig, Path, str | None]":
    """The configuration of a preset with the options given, the run's directory, and resume."""
    import argparse

    tyro = _tyro()
    from dpm_fast.config import DataConfig
    from dpm_fast.presets import preset

    parser = argparse.ArgumentParser(prog="dpm-fast train", add_help=False, allow_abbrev=False)
    parser.add_argument("dataset", nargs="?")
    parser.add_argument("--preset", default="default")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--resume")
    known, rest = parser.parse_known_args(arguments)
    if known.dataset is None:
        if "-h" not in rest and "--help" not in rest:
            raise ValueError("train requires a DATASET, got none; see dpm-fast --help")
        known.dataset = "swiss-roll"
    defaults = preset(DataConfig(known.dataset), known.preset)
    config = tyro.cli(
        tyro.conf.AvoidSubcommands[tyro.conf.OmitArgPrefixes[type(defaults)]],
        default=defaults,
        args=rest,
        prog=f"dpm-fast train {known.dataset} [--preset NAME] [--out DIR] [--resume auto|RUN]",
    )
    name = Path(known.dataset).stem + ("" if known.preset == "default" else f"-{known.preset}")
    return config, known.out or Path("runs") / name, known.resume


def _sample(arguments: list[str]) -> None:
    options = _parse(SampleOptions, arguments)
    import numpy as np

    from dpm_fast import report

    opened = _open(options.run)
    if options.num < 1:
        raise ValueError(f"num must be at least 1, got {options.num}")
    samples = opened.model.sample(options.num, seed=options.seed)
    out = _directory(options.out, opened)
    spec = opened.model.data
    assert spec is not None  # every run has one
    np.save(out / "samples.npy", spec.to_data(samples).numpy())
    print(out / "samples.npy")
    print(report.sample_picture(out / "samples.png", opened.model, samples))


def _bound(arguments: list[str]) -> None:
    options = _parse(BoundOptions, arguments)
    from dpm_fast import run

    opened = _open(options.run)
    data = run.load_data(opened.config)
    evaluation = dataclasses.replace(
        opened.config.evaluation,
        eval_examples=options.num,
        eval_timesteps=options.timesteps,
        eval_draws=options.draws,
        eval_seed=options.seed,
    )
    edge = options.edge or evaluation.eval_edge or opened.config.train.edge
    evaluation = dataclasses.replace(evaluation, eval_edge=None)
    bound = run.evaluate(opened.model, data, evaluation, edge)
    print(run.table(run.result(bound, data, opened.config)))


def _denoise(arguments: list[str]) -> None:
    options = _parse(DenoiseOptions, arguments)
    from dpm_fast import noise, reference
    from dpm_fast.sampling import Posterior

    opened = _open(options.run)
    x_0, ids = _held_out(opened, options.num)
    model = opened.model
    event = x_0.shape[1:]
    # Noise of the data's corruption, of a timestep that no trajectory has.
    if model.process.kind == "gaussian":
        eps = noise.normal(options.seed, noise.Stream.DATA, ids, noise.MAX_TIMESTEP, event)
        y, guidance = x_0 + options.sigma * eps, options.guidance
    else:
        u = noise.uniform(options.seed, noise.Stream.DATA, ids, noise.MAX_TIMESTEP, event)
        flipped = reference.bernoulli_noise(u.new_full(u.shape, options.sigma), u)
        y, guidance = (x_0 - flipped).abs(), "x_t"
    posterior = Posterior(observed=(y, options.sigma), guidance=guidance)
    restored = model.sample(len(x_0), seed=options.seed, posterior=posterior)
    _write_comparison(opened, options.out, "denoised", x_0, y, restored)


def _inpaint(arguments: list[str]) -> None:
    options = _parse(InpaintOptions, arguments)
    import torch

    from dpm_fast.sampling import Posterior

    if not 0 < options.fraction < 1:
        raise ValueError(f"fraction must be in (0, 1), got {options.fraction}")
    opened = _open(options.run)
    x_0, _ = _held_out(opened, options.num)
    width = x_0.shape[-1]
    num_known = min(max(round(width * (1 - options.fraction)), 1), width - 1)
    mask = (torch.arange(width) < num_known).expand(x_0.shape)
    posterior = Posterior(known=(mask, x_0), known_as="forward")
    restored = opened.model.sample(len(x_0), seed=options.seed, posterior=posterior)
    corrupted = torch.where(mask, x_0, torch.zeros_like(x_0))
    _write_comparison(opened, options.out, "inpainted", x_0, corrupted, restored, mask)


def _info(arguments: list[str]) -> None:
    if arguments:
        raise ValueError(f"info takes no arguments, got {' '.join(arguments)}")
    from dpm_fast.dispatch import info

    print(info())


_COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "train": _train,
    "sample": _sample,
    "bound": _bound,
    "denoise": _denoise,
    "inpaint": _inpaint,
    "info": _info,
}


def _write_comparison(
    opened: "Run",
    out: Path | None,
    name: str,
    x_0: "Tensor",
    corrupted: "Tensor",
    restored: "Tensor",
    mask: "Tensor | None" = None,
) -> None:
    import numpy as np

    from dpm_fast import report

    directory = _directory(out, opened)
    spec = opened.model.data
    assert spec is not None
    arrays: dict[str, Any] = {
        "true": spec.to_data(x_0).numpy(),
        "corrupted_model_scale": corrupted.numpy(),
        "restored": spec.to_data(restored).numpy(),
    }
    if mask is not None:
        arrays["known"] = mask.numpy()
    np.savez(directory / f"{name}.npz", **arrays)
    print(directory / f"{name}.npz")
    path = directory / f"{name}.png"
    print(report.comparison_picture(path, opened.model, x_0, corrupted, restored, mask))


def _held_out(opened: "Run", num: int) -> "tuple[Tensor, Tensor]":
    import torch

    from dpm_fast import run

    if num < 1:
        raise ValueError(f"num must be at least 1, got {num}")
    data = run.load_data(opened.config)
    x_0 = data.spec.to_model(data.test[:num])
    return x_0, torch.arange(len(x_0))


def _open(path: Path) -> "Run":
    from dpm_fast import run

    return run.open_run(path)


def _directory(out: Path | None, opened: "Run") -> Path:
    directory = out or opened.path
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def _parse(options: type, arguments: list[str]) -> Any:
    name = options.__name__.removesuffix("Options").lower()
    return _tyro().cli(options, args=arguments, prog=f"dpm-fast {name}")


def _tyro() -> Any:
    try:
        import tyro
    except ImportError:
        raise ImportError(
            "the command line requires tyro, got none: pip install 'dpm_fast[train]'"
        ) from None
    return tyro


def _positional() -> Any:
    return _tyro().conf.Positional


def _is_users(error: Exception) -> bool:
    """Whether an error is our own sentence about an input, rather than a fault inside."""
    if os.environ.get("DPM_FAST_TRACEBACK"):
        return False
    if isinstance(error, OSError | ImportError):
        return True
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    raised_in = "" if traceback is None else traceback.tb_frame.f_globals.get("__name__", "")
    return raised_in.split(".")[0] == "dpm_fast"
