"""The benchmark harness: what it refuses, the form of its results, its statistics, its peers."""
# ruff: noqa: E402

import csv
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch.distributions import Normal

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks/ is not installed

from backends import HOST_RUNNER, needs_host_runner
from benchmarks import __main__ as command
from benchmarks import (
    bench_bound,
    bench_readout,
    bench_training,
    bench_trajectory,
    harness,
    memory,
    peers,
    roofs,
    timing,
)
from benchmarks.harness import Case, WrongResult, checked_call
from dpm_fast.gaussian import GaussianDiffusion

COLUMNS = [
    "op", "case", "mode", "provider", "dtype", "threads", "median_us", "p20_us", "p80_us", "bytes",
    "flops", "roof_gb_per_s", "roof_gflop_per_s", "share_of_roof", "torch", "device", "malloc",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _same_threads():
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)


def product(x, y):
    return x * y


def case_of(*, mode="forward", expected=product, **providers):
    x, y = torch.linspace(-1, 1, 3000), torch.linspace(1, 2, 3000)
    return Case(
        op="product",
        name="3000",
        mode=mode,
        inputs=lambda: (x.clone(), y.clone()),
        providers={"reference": product, **providers},
        expected=expected,
        bytes=36000,
        flops=3000,
        wrt=(0, 1) if mode == "forward_backward" else (),
        compiled=None,
    )


def refusal(case):
    with pytest.raises(WrongResult) as caught:
        checked_call(case, "wrong", case.inputs())
    return str(caught.value)


def once_wrong(x, y):
    result = x * y
    result[17] += 1e-4
    return result


def changes_input(x, y):
    result = x * y
    x.zero_()
    return result


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (once_wrong, "tensor 0 is off by "),
        (lambda x, y: x * y * torch.nan, "tensor 0 is off by nan"),
        (lambda x, y: (x * y)[:, None], "tensor 0 has shape (3000, 1), not (3000,)"),
        (lambda x, y: (x * y, x), "2 tensors, expected 1"),
        (changes_input, "input 0 was changed"),
    ],
)
def test_wrong_values_are_refused(wrong, message):
    assert refusal(case_of(wrong=wrong)).startswith(message)


def test_a_wrong_gradient_is_refused():
    case = case_of(mode="forward_backward", wrong=lambda x, y: x * y + 0.01 * (x - x.detach()))
    assert refusal(case).startswith("tensor 1 is off by")
    assert len(checked_call(case, "reference", case.inputs())()) == 3


def noisy(x, y):
    return x + y * torch.randn_like(x)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x, y: x + y * torch.randn_like(x) + 0.3,
        lambda x, y: 1.5 * x + y * torch.randn_like(x),
        lambda x, y: x + 1.2 * y * torch.randn_like(x),
        lambda x, y: x + 1.5 * torch.randn_like(x),
        lambda x, y: x + y * torch.randn(1500).repeat_interleave(2),
        lambda x, y: x + y,
    ],
    ids=["mean", "slope of the mean", "deviation", "constant deviation", "repeated", "no noise"],
)
def test_noise_of_a_wrong_distribution_is_refused(wrong):
    torch.manual_seed(0)
    case = case_of(expected=Normal, reference=noisy, wrong=wrong)
    assert "standard errors" in refusal(case)
    checked_call(case, "reference", case.inputs())


def test_no_time_for_what_is_wrong_or_missing():
    def absent(x, y):
        raise ModuleNotFoundError("No module named 'peer'")

    case = case_of(wrong=once_wrong, absent=absent, other=torch.mul)
    outcome = harness.measure(case, 1, seconds=0.01)
    assert [row.provider for row in outcome.rows] == ["reference", "other"]
    assert list(outcome.wrong) == ["wrong"]
    assert outcome.unavailable == {"absent": "ModuleNotFoundError: No module named 'peer'"}
    table = command.table(outcome)
    assert "absent: not measured: ModuleNotFoundError" in table
    assert "wrong: wrong, no time: tensor 0" in table


def test_rows(monkeypatch):
    monkeypatch.setattr(timing, "_seconds_waited", lambda: 0.0)
    row = harness.measure(case_of(), 1, seconds=0.01, malloc="tuned").rows[0]
    assert list(dataclasses.asdict(row)) == COLUMNS
    assert (row.op, row.case, row.mode, row.provider) == ("product", "3000", "forward", "reference")
    assert (row.dtype, row.threads, row.malloc) == ("float32", 1, "tuned")
    assert (row.bytes, row.flops, row.torch) == (36000, 3000, torch.__version__)
    assert 0 < row.p20_us <= row.median_us <= row.p80_us
    seconds = max(36000 / row.roof_gb_per_s, 3000 / row.roof_gflop_per_s) / 1e9
    assert row.share_of_roof == pytest.approx(1e6 * seconds / row.median_us, rel=0.01, abs=1e-4)


def test_calls_take_turns_and_disturbed_rounds_are_dropped(monkeypatch):
    order, waited = [], 0.0

    def time_calls(call, repeats):
        nonlocal waited
        call()
        rounds = order.count("slow")
        # The third of four rounds waits for a processor and takes ten times as long.
        if rounds % 4 == 3:
            waited += 1e-3
            return 2e-2
        return 2e-3

    monkeypatch.setattr(timing, "_seconds_waited", lambda: waited)
    calls = {"slow": lambda: order.append("slow"), "fast": lambda: order.append("fast")}
    found = timing.alternate(calls, time_calls, seconds=1e-3)
    assert order[-4:] in (["slow", "fast"] * 2, ["slow", "slow", "fast", "fast"])
    assert set(found.seconds["slow"]) == set(found.seconds["fast"]) == {2e-3}
    assert 0.2 < found.disturbed < 0.3
    assert not found.busy


def test_on_a_busy_machine_the_rounds_that_waited_least_remain(monkeypatch):
    waited, num_rounds = 0.0, 0

    def time_calls(call, repeats):
        nonlocal waited, num_rounds
        num_rounds += 1
        waited += 1e-3 * (1 + num_rounds % 20)
        return 2e-3 * (1 + num_rounds % 20)

    monkeypatch.setattr(timing, "_seconds_waited", lambda: waited)
    found = timing.alternate({"only": lambda: None}, time_calls, seconds=1.0)
    assert found.busy
    assert found.disturbed == 1
    assert len(found.seconds["only"]) == 9


def test_percentiles():
    assert timing.percentiles([float(i) for i in range(11)]) == (2.0, 5.0, 8.0)


def test_case_errors():
    with pytest.raises(ValueError, match=r"^mode must be one of forward, .* got 'backward'$"):
        case_of(mode="backward")
    with pytest.raises(ValueError, match=r"^wrt must name inputs in mode 'forward_backward' only"):
        dataclasses.replace(case_of(), wrt=(0,))


def test_roofs():
    device = torch.device("cpu")
    assert roofs.copy(10**6, device).amount == 10**6
    assert roofs.copy(10, device).amount == 2**16
    for roof in (roofs.copy(10**6, device, num_copies=2), roofs.arithmetic(device)):
        roof.call()
        assert roof.amount > 0
        assert roof.name


@pytest.fixture
def bench_product(monkeypatch):
    def install(*cases):
        module = types.ModuleType("benchmarks.bench_product")
        module.cases = lambda device: list(cases)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(command, "_known", lambda: ["product"])
        monkeypatch.setattr(timing, "_seconds_waited", lambda: 0.0)

    return install


def test_command(bench_product, tmp_path, monkeypatch, capsys):
    bench_product(case_of(other=torch.mul), case_of(mode="forward_backward"))
    monkeypatch.setattr(command, "FOLDER", tmp_path)
    arguments = ["product", "--quick", "--seconds", "0.01", "--threads", "1", "2", "--csv"]
    file = tmp_path / "rows.json"
    assert command.main([*arguments, "--json", str(file)]) == 0
    rows = json.loads(file.read_text())
    assert [(row["mode"], row["threads"], row["provider"]) for row in rows] == [
        ("forward", 1, "reference"), ("forward", 1, "other"),
        ("forward", 2, "reference"), ("forward", 2, "other"),
        ("forward_backward", 1, "reference"), ("forward_backward", 2, "reference"),
    ]  # fmt: skip
    assert all(list(row) == COLUMNS for row in rows)
    assert "x reference" in capsys.readouterr().out
    (results,) = (tmp_path / "results").glob("*.csv")
    with results.open(newline="") as lines:
        assert [record["provider"] for record in csv.DictReader(lines)] == [
            row["provider"] for row in rows
        ]


def test_command_fails_where_a_result_is_wrong(bench_product, capsys):
    bench_product(case_of(wrong=once_wrong))
    assert command.main(["--quick", "--seconds", "0.01", "--threads", "1"]) == 1
    assert "wrong: wrong, no time" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command.main(["nothing"])
    assert "NAME must be one of product; got nothing" in capsys.readouterr().err


def test_nothing_is_committed_from_a_busy_machine(bench_product, tmp_path, monkeypatch, capsys):
    bench_product(case_of(), case_of(mode="forward_backward"))
    monkeypatch.setattr(command, "FOLDER", tmp_path)
    measured = harness.measure
    busy = {"forward", "forward_backward"}

    def measure(case, *args, **options):
        return dataclasses.replace(measured(case, *args, **options), busy=case.mode in busy)

    monkeypatch.setattr(harness, "measure", measure)
    arguments = ["--csv", "--threads", "1", "--seconds", "0.01"]
    assert command.main(arguments) == 1
    assert "kept the processors busy" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    busy.remove("forward")
    assert command.main(arguments) == 1
    (results,) = (tmp_path / "results").glob("*.csv")
    assert "forward_backward" not in results.read_text()


def test_committed_rows_of_a_case_come_from_one_run(tmp_path):
    old = harness.measure(case_of(other=torch.mul), 1, seconds=0.01).rows
    elsewhere = dataclasses.replace(old[0], case="another")
    file = tmp_path / "results" / "device.csv"
    command.write_csv(file, [*old, elsewhere])
    new = dataclasses.replace(old[0], median_us=123.0)
    command.write_csv(file, [new])
    with file.open(newline="") as lines:
        records = list(csv.DictReader(lines))
    assert [(r["case"], r["provider"]) for r in records] == [
        ("another", "reference"),
        ("3000", "reference"),
    ]
    assert records[1]["median_us"] == "123.0"


def test_the_allocator_is_set_by_restarting(monkeypatch):
    started = []
    monkeypatch.setattr(os, "execve", lambda *args: started.append(args))
    monkeypatch.setattr(sys, "argv", ["__main__.py", "step"])
    monkeypatch.setattr(command.platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setenv("GLIBC_TUNABLES", command.TUNABLES)
    command._restart_with_tuned_malloc()
    assert not started
    monkeypatch.delenv("GLIBC_TUNABLES")
    command._restart_with_tuned_malloc()
    ((program, arguments, environment),) = started
    assert (program, arguments[1:]) == (sys.executable, ["-m", "benchmarks", "step"])
    assert environment["GLIBC_TUNABLES"] == command.TUNABLES


BENCH = """
import torch
from torch import mul
from benchmarks.harness import Case

def absent(x, y):
    import peer

def cases(device):
    inputs = lambda: (torch.ones(8), torch.ones(8))
    providers = {"reference": mul, "absent": absent, "wrong": torch.add}
    yield Case("product", "8", "forward", inputs, providers, mul, bytes=96, flops=8, compiled=None)

def bench_product(call, benchmark):
    benchmark(call)
"""


def test_the_same_cases_under_pytest_benchmark(tmp_path):
    (tmp_path / "bench_product.py").write_text(BENCH)
    # Where several processes test, nothing is timed.
    others = {name: text for name, text in os.environ.items() if "XDIST" not in name}
    environment = others | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-p", "benchmarks.conftest", "--benchmark-only",
            "-c", ROOT / "pyproject.toml", "--rootdir", tmp_path, "-o", "cache_dir=cache",
            "--benchmark-max-time=0.01", tmp_path / "bench_product.py",
        ],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert "1 passed, 1 skipped, 1 error" in run.stdout, run.stdout + run.stderr
    assert "wrong: tensor 0 is off by" in run.stdout
    assert "absent: ModuleNotFoundError: No module named 'peer'" in run.stdout


@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
@pytest.mark.parametrize("package", ["diffusers", "denoising_diffusion_pytorch"])
def test_peers_take_the_step_that_the_reference_takes(package, variance):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    t, num_examples, event = 500, 64, (1, 28, 28)
    process = GaussianDiffusion.from_schedule("linear", peers.NUM_STEPS)
    reverse = process.reverse("epsilon", variance, clamp=(-1.0, 1.0))

    def inputs():
        generator = torch.Generator().manual_seed(0)
        x_t = torch.randn(num_examples, *event, generator=generator)
        return x_t, torch.randn(num_examples, reverse.num_outputs, 28, 28, generator=generator)

    def expected(x_t, out):
        mu_p, sigma2_p = reverse.moments(x_t, torch.full((num_examples,), t), out)
        return Normal(mu_p, sigma2_p.sqrt().expand_as(mu_p))

    step = getattr(peers, f"{package}_step")(t, variance)
    case = Case("step", "", "forward", inputs, {package: step}, expected, bytes=0, flops=0)
    torch.manual_seed(1)  # not the inputs' seed: the noise would be x_t
    with torch.no_grad():
        checked_call(case, package, case.inputs())


@pytest.mark.parametrize("mode", ["train", "sample"])
def test_steps_of_whole_networks_are_checked(mode, monkeypatch):
    small = bench_training.Network("small", 32, (1, 8, 8), {"num_scales": 2, "dense_width": 16})
    monkeypatch.setattr(bench_training, "NETWORKS", [small])
    (case,) = (c for c in bench_training.cases(torch.device("cpu")) if c.mode == mode)
    assert case.provider_names[:2] == ["reference", "channels_last"]
    assert case.flops > 0
    with torch.set_grad_enabled(case.needs_grad):
        for name in case.providers:
            call = checked_call(case, name, case.inputs())
            assert torch.isfinite(call()[0]).all()  # again, with noise of its own
    if mode == "train":
        loss, *gradients = case.expected(*(x.double() for x in case.inputs()))
        wrong = dataclasses.replace(case, expected=lambda *tensors: (1.1 * loss, *gradients))
        with pytest.raises(WrongResult, match="tensor 0 is off"):
            checked_call(wrong, "auto", case.inputs())


@pytest.mark.parametrize(
    "setting",
    [s for s in bench_trajectory.SETTINGS if s.n > 49 and "S=3" not in s.name],
    ids=str,
)
def test_trajectories_are_checked(setting, monkeypatch):
    # Other libraries know one schedule alone.
    num_steps = peers.NUM_STEPS if setting.name.endswith("epsilon") else 6
    small = dataclasses.replace(setting, n=17, num_steps=num_steps, start=min(setting.start, 4))
    monkeypatch.setattr(bench_trajectory, "SETTINGS", [small])
    (case,) = bench_trajectory.cases(torch.device("cpu"))
    with torch.no_grad():
        for name in set(case.providers) - {"compile"}:
            if name in bench_trajectory.PEERS and importlib.util.find_spec(name) is None:
                continue
            call = checked_call(case, name, case.inputs())
            assert torch.isfinite(call()).all()  # again, with noise of its own


@pytest.mark.parametrize("setting", [*bench_bound.SETTINGS[:1], bench_bound.SETTINGS[-1]], ids=str)
def test_bounds_are_checked(setting, monkeypatch):
    small = dataclasses.replace(setting, n=3, num_steps=6)
    monkeypatch.setattr(bench_bound, "SETTINGS", [small])
    (case,) = bench_bound.cases(torch.device("cpu"))
    with torch.no_grad():
        for name in set(case.providers) - {"compile"}:
            call = checked_call(case, name, case.inputs())
            assert torch.isfinite(call()).all()  # again, with noise of its own


@needs_host_runner
@pytest.mark.parametrize("provider", ["native", "native_bf16"])
@pytest.mark.parametrize("bench", [bench_trajectory, bench_bound])
def test_what_a_gpu_takes_whole_is_checked(bench, provider, monkeypatch):
    setting = next(s for s in bench.SETTINGS_OF_GPU if bench_trajectory.CONV_ONLY in s.name)
    start = {"start": 2} if bench is bench_trajectory else {}
    small = dataclasses.replace(setting, n=2, num_steps=3, **start)
    monkeypatch.setattr(bench, "SETTINGS_OF_GPU", [small])
    (case,) = bench.cases(torch.device("cuda"))
    device, options = torch.device("cpu"), bench_trajectory.whole_on_gpu(small.name)[provider]
    make = bench_bound.Packed if bench is bench_bound else bench_trajectory.Sample
    case = dataclasses.replace(case, providers={provider: make(small, device, **options)})
    with HOST_RUNNER.use(), torch.no_grad():
        checked_call(case, provider, bench.inputs(small, device))


def test_readouts_are_checked(monkeypatch):
    sizes = [
        bench_readout.Readout(6, 4, 2, (3, 2), channels_last=True),
        bench_readout.Readout(6, 4, 2, (3, 2), shares_t=True),
        bench_readout.Readout(6, 4, 2),
    ]
    monkeypatch.setattr(bench_readout, "READOUTS", sizes)
    cases = list(bench_readout.cases(torch.device("cpu")))
    assert len({(case.name, case.mode) for case in cases}) == 6
    for case in cases:
        with torch.set_grad_enabled(case.needs_grad):
            for name in case.providers:
                checked_call(case, name, case.inputs())


def test_peak_memory_of_a_training_step(monkeypatch):
    small = bench_training.Network("small", 64, (1, 16, 16), {})
    monkeypatch.setattr(bench_training, "NETWORKS", [small])
    (case,) = memory.training_cases("small")
    assert memory.training_cases("other") == []
    assert memory.peak_bytes(case, "auto", num_steps=1) >= 0
