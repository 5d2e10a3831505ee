"""The command `dpm-fast`: train, sample, bound, denoise, inpaint, info, selftest."""

import contextlib
import dataclasses
import dis
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import dpm_fast
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
    from torch import Tensor

    from dpm_fast.data import Data
    from dpm_fast.model import DiffusionModel
    from dpm_fast.parallel import Ranks
    from dpm_fast.restoration import Restoration
    from dpm_fast.run import Run
    from dpm_fast.trainer import Trainer

_LARGE_SIGMA = 10.0
_SELFTEST_SUMMARY = """Every op against float64, on all backends here or that of DPM_FAST_BACKEND.

Exit status 1 where a result is wrong."""

_USAGE = """usage: dpm-fast COMMAND ...

  train DATASET [--preset NAME] [--out DIR] [--resume auto] [options]
  sample RUN [--num N] [--seed S] [--num-inference-steps K]   samples of a trained model
  bound RUN [--timesteps K]             its likelihood bound on held-out data
  denoise RUN [--sigma S]               noisy held-out data, restored
  inpaint RUN [--fraction F]            partly known held-out data, completed
  info, --version                       versions and what is built
  selftest                              every op on every backend against float64

`dpm-fast COMMAND --help` lists the options of a command, `dpm-fast train DATASET --help` those of
a data set. DATASET: swiss-roll, heartbeat, dead-leaves, digits, mnist or cifar10 (with --path), a
folder of images, an .npy or an .npz file. RUN: the directory that train wrote.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit status: 0; 1 where a self-test fails; 2 for wrong input, told in one sentence; 130
        or 143 after SIGINT or SIGTERM; 141 when nobody reads the output any more. Faults inside
        the program are raised.
    """
    try:
        try:
            return _main(list(sys.argv[1:] if arguments is None else arguments))
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # As `dpm-fast info | head -1`. What is still to be flushed at exit goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_USAGE, end="")
        return 0 if arguments else 2
    if arguments == ["--version"]:
        print(f"dpm-fast {dpm_fast.__version__}")
        return 0
    command, rest = arguments[0], arguments[1:]
    try:
        if command not in _COMMANDS:
            raise ValueError(f"command must be one of {', '.join(_COMMANDS)}, got {command!r}")
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *where: _warn(str(message))
            _COMMANDS[command](rest)
    except KeyboardInterrupt as error:
        _complain(f"interrupted {error}".rstrip())
        return 128 + getattr(error, "number", signal.SIGINT)
    except BrokenPipeError:
        raise
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
    if out.is_dir() and any(out.iterdir()) and not (out / run.CONFIG).exists():
        _warn(f"{out} holds files that are not of a run; those of the run are written among them")
    data = run.load_data(config.data)
    if config.train.batch_size > len(data.train):
        _warn(
            f"batch_size {config.train.batch_size} is more than the {len(data.train)} training "
            "examples: a step sees some of them several times"
        )
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
    from dpm_fast import evaluation, files, report

    config, ranks, model = options.config, trainer.ranks, trainer.averaged
    outcome = trainer.fit()
    trained = f"after the training, which is in {out}; --resume auto finishes the evaluation"
    with _interrupted(trained):
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
    files.write(out / "result.json", evaluation.to_json(result))
    print(evaluation.table(result), flush=True)
    with _interrupted(f"while drawing, after {out / 'result.json'} was written"):
        for path in report.pictures(out, model, data, bound, samples, config.train, outcome.step):
            print(path, flush=True)


def _sample(arguments: list[str]) -> None:
    options = parse(SampleOptions, arguments, "sample")
    from dpm_fast import evaluation, files, report

    _require_positive(num=options.num, num_inference_steps=options.num_inference_steps)
    opened, ranks = _open(options)
    out = files.make_directory(options.out or opened.path)
    config = dataclasses.replace(opened.config.evaluation, eval_seed=options.seed)
    with _interrupted(f"before {out / 'sampled.npy'} was written"):
        samples = evaluation.sample(
            opened.model, options.num, config, ranks, options.num_inference_steps, options.eta
        )
    ranks.leave()
    if ranks.rank > 0:
        return
    print(files.write_array(out / "sampled.npy", opened.spec.to_data(samples.cpu()).numpy()))
    record: dict[str, object] = {
        "num": options.num,
        "seed": options.seed,
        "num_inference_steps": options.num_inference_steps or opened.model.process.num_steps,
        "eta": options.eta,
        "train_steps": opened.step,
        "versions": evaluation.versions(),
    }
    files.write(out / "sampled.json", evaluation.to_json(record))
    if report.is_drawable(opened.spec):
        print(report.sample_picture(out / "sampled.png", opened.spec, samples, opened.step))


def _bound(arguments: list[str]) -> None:
    options = parse(BoundOptions, arguments, "bound")
    from dpm_fast import evaluation

    _require_positive(num=options.num, timesteps=options.timesteps, draws=options.draws)
    opened, ranks = _open(options)
    data = opened.load_data()
    _warn_of_fewer(data, options.num)
    num_steps = opened.model.process.num_steps
    if options.timesteps is not None and options.timesteps > num_steps:
        _warn(f"timesteps {options.timesteps} of T = {num_steps}: every timestep is evaluated")
    config = dataclasses.replace(
        opened.config.evaluation,
        eval_examples=options.num,
        eval_timesteps=options.timesteps,
        eval_draws=options.draws,
        eval_seed=options.seed,
        eval_edge=options.edge or opened.config.evaluation.eval_edge,
    )
    lost = _interrupted("with nothing kept of the bound; --partial FILE keeps its sums")
    with lost if options.partial is None else contextlib.nullcontext():
        bound = evaluation.evaluate(
            opened.model,
            data,
            config,
            opened.config.train.edge,
            ranks,
            max_memory=options.max_memory,
            partial=options.partial,
        )
    ranks.leave()
    if ranks.rank == 0:
        print(evaluation.table(evaluation.result(bound, data)))


def _denoise(arguments: list[str]) -> None:
    options = parse(DenoiseOptions, arguments, "denoise")
    from dpm_fast.restoration import denoise

    def restore(model: "DiffusionModel", true: "Tensor") -> "Restoration":
        return denoise(
            model, true, sigma=options.sigma, seed=options.seed, guidance=options.guidance
        )

    if options.sigma is not None and options.sigma > _LARGE_SIGMA:
        _warn(
            f"sigma {options.sigma:g} is in the model's scale, in which data vary by about 1: "
            "almost nothing is left of them"
        )
    _restore(options, restore)


def _inpaint(arguments: list[str]) -> None:
    options = parse(InpaintOptions, arguments, "inpaint")
    from dpm_fast.restoration import inpaint

    def restore(model: "DiffusionModel", true: "Tensor") -> "Restoration":
        return inpaint(model, true, fraction=options.fraction, seed=options.seed)

    _restore(options, restore)


def _info(arguments: list[str]) -> None:
    if _takes_nothing("info", arguments, "Versions, devices, and what is built of the kernels."):
        from dpm_fast.dispatch import info

        print(info())


def _selftest(arguments: list[str]) -> None:
    if _takes_nothing("selftest", arguments, _SELFTEST_SUMMARY):
        from dpm_fast.selftest import selftest

        checks = []
        for check in selftest():
            print(check, flush=True)
            checks.append(check)
        wrong = sum(not check.passed for check in checks)
        if not wrong:
            names = ", ".join(dict.fromkeys(f"{c.backend} on {c.device}" for c in checks))
            slowest = max(checks, key=lambda check: check.milliseconds)
            print(
                f"{len(checks)} checks passed: {names}; the slowest was {slowest.op}, "
                f"{slowest.backend} on {slowest.device}, {slowest.milliseconds:.0f} ms"
            )
        else:
            _complain(
                f"{wrong} of {len(checks)} results are wrong; please report them with "
                "`dpm-fast info`"
            )
            raise SystemExit(1)


def _takes_nothing(command: str, arguments: list[str], summary: str) -> bool:
    """Whether to run a command that has no arguments: its help is the summary."""
    if arguments in (["-h"], ["--help"]):
        print(f"usage: dpm-fast {command}\n\n{summary}")
        return False
    if arguments:
        raise ValueError(f"{command} takes no arguments, got {' '.join(arguments)}")
    return True


_COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "train": _train,
    "sample": _sample,
    "bound": _bound,
    "denoise": _denoise,
    "inpaint": _inpaint,
    "info": _info,
    "selftest": _selftest,
}


def _open(options: RunOptions) -> "tuple[Run, Ranks]":
    from dpm_fast import run
    from dpm_fast.parallel import ranks

    here = ranks(options.device)
    return run.open_run(options.run, here.device), here


def _restore(
    options: DenoiseOptions | InpaintOptions,
    restore: "Callable[[DiffusionModel, Tensor], Restoration]",
) -> None:
    """Held-out examples, corrupted and restored by the function given, and a picture of them."""
    from dpm_fast import files, progress, report

    _require_positive(num=options.num)
    opened, ranks = _open(options)
    ranks.leave()
    if ranks.rank > 0:  # a few examples are no work to share
        return
    data = opened.load_data()
    out = files.make_directory(options.out or opened.path)
    true = data.test[: options.num]
    with progress.of_samples(opened.model, len(true)):
        restoration = restore(opened.model, true)
    _warn_of_fewer(data, options.num)
    print(restoration.write(out / f"{restoration.name}.npz"))
    if report.is_drawable(restoration.spec):
        print(report.restoration_picture(out, restoration))


@contextlib.contextmanager
def _interrupted(when: str) -> Iterator[None]:
    """Tell whoever interrupts what is not lost."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(when) from None


def _require_positive(**values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def _warn_of_fewer(data: "Data", num: int | None) -> None:
    if num is not None and num > len(data.test):
        _warn(f"num {num} is more than the {len(data.test)} held-out examples: all are used")


def _warn(text: str) -> None:
    _complain(f"warning: {text}")


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
