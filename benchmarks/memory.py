"""python -m benchmarks.memory [TEXT]: peak memory of training steps, each provider in a process.

The peak is what the process has come to hold in its third step beyond what it held with PyTorch,
this package and the data in memory: weights, the optimizer's memory, gradients and activations.
"""

import os
import resource
import subprocess
import sys

import torch

from benchmarks import bench_training
from benchmarks.harness import Case


def training_cases(text: str = "") -> list[Case]:
    cases = bench_training.cases(torch.device("cpu"))
    return [case for case in cases if case.mode == "train" and text in case.name]


def peak_bytes(case: Case, provider: str, num_steps: int = 3) -> int:
    """Of this process, which should have done nothing else."""
    tensors = case.inputs()
    before = _largest_resident_bytes()
    step = case.function(provider, torch.device("cpu"))
    for _ in range(num_steps):
        step(*tensors)
    return _largest_resident_bytes() - before


def _largest_resident_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main(text: str = "") -> None:
    for case in training_cases(text):
        print(case.name)
        for provider in case.providers:
            command = [sys.executable, "-m", "benchmarks.memory", case.name, provider]
            # The C library's own settings: those of timing keep freed memory, which counts here.
            environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
            run = subprocess.run(
                command, env=environment, check=True, stdout=subprocess.PIPE, text=True
            )
            print(f"  {provider:<24}{int(run.stdout) / 2**20:>8.0f} MiB", flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(peak_bytes(training_cases(sys.argv[1])[0], sys.argv[2]))
    else:
        main(*sys.argv[1:2])
