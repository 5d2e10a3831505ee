"""The self-test: it passes here, and sees a kernel that is wrong."""

import subprocess
import sys

import pytest
import torch

from dpm_fast import dispatch, ops, selftest
from dpm_fast.cli import main
from dpm_fast.dispatch import BACKENDS, why_absent


@pytest.mark.parametrize("switch", ["cudnn.conv", "cudnn", ""], ids=str)
def test_convolutions_are_float32_whichever_switch_was_set(switch):
    """In a process of its own: torch tells a setting from the default that it equals."""
    program = f"""
import torch
from dpm_fast import ops, selftest
from dpm_fast.ops.common import takes_tf32
selftest.CASES = {{"one": lambda device, dtype: print(takes_tf32()) or torch.ones(1, dtype=dtype)}}
switch = torch.backends{"." if switch else ""}{switch}
switch.fp32_precision = "tf32"
assert takes_tf32()
list(selftest.selftest())
assert takes_tf32()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == {"False"}


def test_every_backend_passes(monkeypatch, capsys):
    for name in ("T", "IDS"):  # two examples: Triton's interpreter is slow for each
        monkeypatch.setattr(selftest, name, getattr(selftest, name)[[0, -1]])
    assert main(["selftest"]) == 0
    lines = capsys.readouterr().out.splitlines()
    backends = [name for name in BACKENDS if why_absent(name, "cpu") is None]
    *lines, summary = lines
    assert len(lines) >= len(backends) * len(selftest.CASES)
    assert all(line.endswith("ok") for line in lines)
    assert summary.startswith(f"{len(lines)} checks passed: reference on cpu")
    assert "the slowest was" in summary


def test_the_backend_that_is_asked_for(monkeypatch, capsys):
    monkeypatch.setattr(selftest, "CASES", {"noise": selftest.CASES["noise"]})
    monkeypatch.setattr(dispatch, "_requested", "reference")
    assert main(["selftest"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + (2 if torch.cuda.is_available() else 1)
    assert all("reference" in line for line in lines)
    monkeypatch.setattr(selftest, "why_absent", lambda backend, device: f"no {backend} here")
    monkeypatch.setattr(dispatch, "_requested", "native")
    assert main(["selftest"]) == 2
    assert "the backend 'native' cannot run here: no native here" in capsys.readouterr().err


def test_a_backend_that_there_is_not(monkeypatch, capsys):
    monkeypatch.setattr(dispatch, "_requested", "cuda")
    sentence = "DPM_FAST_BACKEND must be one of auto, reference, native, triton, got 'cuda'"
    assert main(["selftest"]) == 2
    assert sentence in capsys.readouterr().err
    assert main(["info"]) == 0
    assert f"  {sentence}\n" in capsys.readouterr().out


def test_a_wrong_result_is_seen(monkeypatch, capsys):
    right = ops.kl
    monkeypatch.setattr(selftest, "CASES", {"kl": selftest.CASES["kl perturbation"]})

    def wrong(x):
        return 1 + 1e-4 * (x.itemsize == 4)

    monkeypatch.setattr(ops, "kl", lambda *x, **options: right(*x, **options) * wrong(x[0]))
    with pytest.raises(SystemExit, match="1"):
        main(["selftest"])
    captured = capsys.readouterr()
    assert [line for line in captured.out.splitlines() if line.endswith("WRONG")]
    assert "results are wrong" in captured.err
    assert "checks passed" not in captured.out


def test_a_result_that_is_no_number_is_not_right():
    assert not selftest.Check("kl", "cpu", "native", float("nan"), 1.0).passed
