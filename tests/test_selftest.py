"""The self-test: it passes here, and sees a kernel that is wrong."""

import pytest

from dpm_fast import ops, selftest
from dpm_fast.cli import main
from dpm_fast.dispatch import BACKENDS, why_absent


def test_every_backend_passes(capsys):
    assert main(["selftest"]) == 0
    lines = capsys.readouterr().out.splitlines()
    backends = [name for name in BACKENDS if why_absent(name, "cpu") is None]
    assert len(lines) >= len(backends) * len(selftest.CASES)
    assert all(line.endswith("ok") for line in lines)


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


def test_a_result_that_is_no_number_is_not_right():
    assert not selftest.Check("kl", "cpu", "native", float("nan"), 1.0).passed
