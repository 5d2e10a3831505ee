"""The command `dpm-fast`: train, sample, bound, denoise, inpaint, info."""

import dataclasses
import dis
import io
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dpm_fast.options import (
    BoundOptions,
    DenoiseOptions,
    InpaintOptions,
    RunOptions,
    SampleOptions,
    TrainOptions,
    parse,
    parse_train,
)

if TYPE_CHECKING:
    from dpm_fast.data import Data
    from dpm_fast.parallel import Ranks
    from dpm_fast.restoration import Restoration
    from dpm_fast.run import Run
    from dpm_fast.trainer import Trainer

_USAGE = """usage: dpm-fast COMMAND ...

  train DATASET [--preset NAME] [--out DIR] [--resume auto] [options]
  sample RUN [--num N] [--seed S]       samples of a trained model
  bound RUN [--timesteps K]             its likelihood bound on held-out data
  denoise RUN [--sigma S]               noisy held-out data, restored
  inpaint RUN [--fraction F]            partly known held-out data, completed
  info                                  versions and what is built

`dpm-fast COMMAND --help` lists the options of a command, `dpm-fast train DATASET --help` those of
a data set. DATASET: swiss-roll, heartbeat, dead-leaves, digits, mnist or cifar10 (with --path), a
folder of images, an .npy or an .npz file. RUN: the directory that train wrote.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit status: 0; 2 for wrong input, told in one sentence; 130 or 143 after SIGINT or
        SIGTERM. Faults inside the program are raised.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_USAGE, end="")
        return 0 if arguments else 2
    command, rest = arguments[0], arguments[1:]
    try:
        if command not in _COMMANDS:
            raise ValueError(f"command must be one of {', '.join(_COMMANDS)}, got {command!r}")
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *where: _complain(f"warning: {message}")
            _COMMANDS[command](rest)
    except KeyboardInterrupt as error:
        _complain(f"interrupted {error}".rstrip())
        return 128 + getattr(error, "number", signal.SIGINT)
    except Exception as error:
        if not _is_about_input(error):
            raise
        _complain(_sentence(error))
        return 2
    return 0


def _train(arguments: list[str]) -> None:
    options = parse_train(arguments)
    from dpm_fast import evaluation, parallel, run
    from dpm_fast.config import build_model
    from dpm_fast.trainer import Trainer

    config, out = options.config, options.out
    assert out is not None
    if options.resume is not None:
        run.check_same_model(options.resume, out, config)
    data = run.load_data(config.data)
    model, here = build_model(config, data.spec), parallel.ranks(options.device)
    # What cannot be evaluated is not worth training: one example, one timestep.
    probe = dataclasses.replace(config.evaluation, eval_examples=1, eval_timesteps=1)
    evaluation.evaluate(model.to(here.device), data, probe, config.train.edge, here)
    trainer = Trainer(
        model, data, config.train, out=out, resume=options.resume, device=options.device
    )
    ranks = trainer.ranks
    is_finished = trainer.step == config.train.train_steps and run.has_result(out, trainer.step)
    if ranks.largest(int(is_finished)):
        if ranks.rank == 0:
            print(f"{out} is finished: {trainer.step} steps, and their result.json")
        ranks.leave()
        return
    with trainer.writing():
        if ranks.rank == 0:
            # Before the first checkpoint: whatever has one can be opened.
            run.write_description(out, config, data.spec)
            num_weights = sum(p.numel() for p in model.parameters())
            print(f"{data!r}\n{out}: {num_weights} weights, on {ranks.device}", flush=True)
        _fit_and_report(trainer, data, options, out)


def _fit_and_report(trainer: "Trainer", data: "Data", options: TrainOptions, out: Path) -> None:
    from dpm_fast import checkpoint, evaluation, report

    config, ranks, model = options.config, trainer.ranks, trainer.averaged
    outcome = trainer.fit()
    bound = evaluation.evaluate(model.eval(), data, config.evaluation, config.train.edge, ranks)
    samples = evaluation.sample(model, config.evaluation.num_samples, config.evaluation, ranks)
    ranks.leave()
    if ranks.rank > 0:
        return
    result = evaluation.result(bound, data) | {
        "preset": options.preset,
        "train_steps": outcome.step,
        "train_seconds": outcome.train_seconds,
        "examples_per_second": outcome.examples_per_second,
        "skipped_steps": outcome.skipped_steps,
        "stopped_by": outcome.stopped_by,
        "valid_fraction": evaluation.valid_fraction(data, samples),
        "seed": config.train.seed,
        "versions": evaluation.versions(),
    }
    checkpoint.write_atomically(out / "result.json", evaluation.to_json(result))
    print(evaluation.table(result), flush=True)
    for path in report.pictures(out, model, data, bound, samples):
        print(path)


def _sample(arguments: list[str]) -> None:
    options = parse(SampleOptions, arguments, "sample")
    import numpy as np

    from dpm_fast import checkpoint, report

    _require_positive(num=options.num)
    opened, _ = _open(options)
    out = _directory(options.out or opened.path)
    samples = opened.model.sample(options.num, seed=options.seed)
    file = io.BytesIO()
    np.save(file, opened.spec.to_data(samples.cpu()).numpy())
    checkpoint.write_atomically(out / "samples.npy", file.getvalue())
    print(out / "samples.npy")
    if report.is_drawable(opened.spec):
        print(report.sample_picture(out / "samples.png", opened.spec, samples))


def _bound(arguments: list[str]) -> None:
    options = parse(BoundOptions, arguments, "bound")
    from dpm_fast import evaluation

    opened, ranks = _open(options)
    data = opened.load_data()
    config = dataclasses.replace(
        opened.config.evaluation,
        eval_examples=options.num,
        eval_timesteps=options.timesteps,
        eval_draws=options.draws,
        eval_seed=options.seed,
        eval_edge=options.edge or opened.config.evaluation.eval_edge,
    )
    bound = evaluation.evaluate(opened.model, data, config, opened.config.train.edge, ranks)
    ranks.leave()
    if ranks.rank == 0:
        print(evaluation.table(evaluation.result(bound, data)))


def _denoise(arguments: list[str]) -> None:
    options = parse(DenoiseOptions, arguments, "denoise")
    from dpm_fast.restoration import denoise

    _require_positive(num=options.num)
    opened, _ = _open(options)
    true = opened.load_data().test[: options.num]
    restoration = denoise(
        opened.model, true, sigma=options.sigma, seed=options.seed, guidance=options.guidance
    )
    _write(restoration, options.out or opened.path)


def _inpaint(arguments: list[str]) -> None:
    options = parse(InpaintOptions, arguments, "inpaint")
    from dpm_fast.restoration import inpaint

    _require_positive(num=options.num)
    opened, _ = _open(options)
    true = opened.load_data().test[: options.num]
    restoration = inpaint(opened.model, true, fraction=options.fraction, seed=options.seed)
    _write(restoration, options.out or opened.path)


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


def _open(options: RunOptions) -> "tuple[Run, Ranks]":
    from dpm_fast import run
    from dpm_fast.parallel import ranks

    here = ranks(options.device)
    return run.open_run(options.run, here.device), here


def _write(restoration: "Restoration", directory: Path) -> None:
    from dpm_fast import report

    print(restoration.write(_directory(directory) / f"{restoration.name}.npz"))
    if report.is_drawable(restoration.spec):
        print(report.restoration_picture(directory, restoration))


def _directory(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


def _require_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def _complain(text: str) -> None:
    print(f"dpm-fast: {' '.join(text.split())}", file=sys.stderr)


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:  # without the number that str() begins with
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def _is_about_input(error: Exception) -> bool:
    """Whether an error is a sentence about the input or the machine, and not a fault inside.

    Such are the operating system's refusals, and what a `raise` statement of this package raised;
    an exception out of torch, out of an expression, or out of an `assert` is a fault.
    DPM_FAST_TRACEBACK=1 shows the traceback of any.
    """
    if os.environ.get("DPM_FAST_TRACEBACK") or isinstance(error, AssertionError):
        return False
    if isinstance(error, OSError):
        return True
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    if traceback is None:
        return False
    frame = traceback.tb_frame
    # The instruction, not the source: that may be absent, or laid out in any way.
    instruction = frame.f_code.co_code[traceback.tb_lasti]
    is_ours = frame.f_globals.get("__name__", "").split(".")[0] == "dpm_fast"
    return is_ours and instruction == dis.opmap["RAISE_VARARGS"]
