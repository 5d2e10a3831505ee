"""What only a GPU can show, in sections that are done once: `make gpu`, or one section by name.

    build       the extensions, in place, with this machine's nvcc
    selftest    every backend of every op against float64
    tests       the test suite; kernels run on the GPU
    capture     static cudart on torch's streams and in graph capture
    sanitizer   the self-test under compute-sanitizer: memory, races, uninitialized values, barriers
    benchmarks  the suite; writes benchmarks/results

Needs no network and installs nothing. A section that passed is not run again until a source
changes; --again runs it all the same.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DONE = ROOT / "build" / "gpu"
SOURCES = ("csrc/*", "dpm_fast/**/*.py", "tests/*.py", "benchmarks/*.py", "setup.py")


def run(*command: object, **environment: str) -> None:
    words = [str(word) for word in command]
    subprocess.run(words, cwd=ROOT, env=os.environ | environment, check=True)


def build() -> None:
    run(sys.executable, "setup.py", "build_ext", "--inplace", DPM_FAST_CUDA="1")


def selftest() -> None:
    run(sys.executable, "-m", "dpm_fast", "selftest")


def tests() -> None:
    run(sys.executable, "-m", "pytest", "-q", "-m", "not network and not slow")


def capture() -> None:
    """Launches of the extension on a side stream, and inside a captured graph, are torch's own."""
    run(sys.executable, "-m", "pytest", "-q", "tests/test_gpu.py")


def sanitizer() -> None:
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
        options = ["--tool", tool, "--error-exitcode", "3", "--launch-timeout", "120"]
        # torch caches memory: initcheck would see what an earlier tensor left there.
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        run(program, *options, sys.executable, "-m", "dpm_fast", "selftest", **environment)


def benchmarks() -> None:
    run(sys.executable, "-m", "benchmarks", "--device", "cuda", "--csv", "--seconds", "0.3")


SECTIONS: dict[str, Callable[[], None]] = {
    function.__name__: function
    for function in (build, selftest, tests, capture, sanitizer, benchmarks)
}


def digest() -> str:
    """Of every source, so that a section is done for these alone."""
    state = hashlib.sha256()
    for pattern in SOURCES:
        for file in sorted(ROOT.glob(pattern)):
            if file.is_file():
                state.update(str(file.relative_to(ROOT)).encode() + file.read_bytes())
    return state.hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, []], help="default: all")
    parser.add_argument("--again", action="store_true", help="also what has passed")
    arguments = parser.parse_args()
    DONE.mkdir(parents=True, exist_ok=True)
    state, outcomes = digest(), {}
    for name in arguments.sections or SECTIONS:
        stamp = DONE / name
        if not arguments.again and stamp.exists() and stamp.read_text() == state:
            outcomes[name] = "passed before"
            continue
        began = time.perf_counter()
        try:
            SECTIONS[name]()
            stamp.write_text(state)
            outcomes[name] = "passed"
        except (subprocess.CalledProcessError, OSError) as error:
            stamp.unlink(missing_ok=True)
            outcomes[name] = f"FAILED: {error}"
        outcomes[name] += f", {time.perf_counter() - began:.0f} s"
        if name == "build" and "FAILED" in outcomes[name]:
            break
    print(*(f"{name:<12}{outcome}" for name, outcome in outcomes.items()), sep="\n")
    return int(any("FAILED" in outcome for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
