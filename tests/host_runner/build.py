"""Compiles CUDA sources as C++ that runs on the host, loads them as a module, steers the runner.

    native_cuda = build.load_native_cuda()
    for order in build.ORDERS:
        with build.order(native_cuda, blocks=order, threads=order):
            native_cuda.kl(...)  # CPU tensors, stream 0

Seen: a result that depends on the order of blocks or threads, shared memory and most variables read
before they are written, threads that wait for each other in vain, masks, misaligned or null
pointers, indices outside arrays of known size, writes just past dynamic shared memory, launches
that a GPU refuses. Under `sanitizer_environment` also accesses outside tensors. Not seen: races on
memory that every order happens to survive, more threads than __launch_bounds__, too much static
shared memory or too many registers (cuda_compile.py), and memory that a real GPU would reorder.

Kernels and runner become one shared library, the bindings a second one that is linked with it: the
runner takes every thread-local variable beside it for the shared memory of a kernel.
"""

import ctypes
import functools
import hashlib
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from filelock import FileLock  # torch requires it

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
CACHE = HERE.parents[1] / "build" / "host_runner"
INCLUDE = HERE / "include"
ORDERS = ("forward", "reverse", "shuffled")
# As in CUDA's enumeration cudaDeviceAttr.
ATTRIBUTES = {"multiprocessors": 16, "shared_bytes_per_block": 97}

CXXFLAGS = ["-std=c++17", "-fPIC", "-fopenmp", "-Wall", "-Wextra"]
CXXFLAGS += ["-DDPM_HOST_RUNNER", f"-I{INCLUDE}"]
KERNEL_FLAGS = [
    # Lines for the reports of sanitizers; variables too would take a third of the time to compile.
    *("-g1", "-Wno-unknown-pragmas", "-fno-math-errno", "-fno-trapping-math"),
    # Shared memory needs no initialization, so no function that would do it.
    "-fno-extern-tls-init",
    # Most variables that nobody wrote hold -1.7e38; some the compiler still knows to be undefined.
    # GCC 12 also overwrites a part of a temporary that is an argument: a launch is given variables.
    "-ftrivial-auto-var-init=pattern",
    # Two builds in one process keep their static variables apart.
    "-fno-gnu-unique",
    # setjmp and longjmp between stacks are not an overflow.
    "-U_FORTIFY_SOURCE",
]
# The runner itself reports what these find, as an exception of the launch.
CHECKS = ["-fsanitize=alignment,bounds,null,shift,integer-divide-by-zero"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"]


class BuildError(Exception):
    """What the compiler said."""


def lacking() -> str:
    """Why nothing can be built here; empty where it can."""
    if not shutil.which("g++"):
        return "needs g++"
    if not importlib.util.find_spec("pybind11"):
        return "needs pybind11"
    return ""


def sanitizing() -> bool:
    return os.environ.get("DPM_HOST_RUNNER_SANITIZE") == "1"


def sanitizer_environment() -> dict[str, str]:
    """Environment of a Python in which modules are built with AddressSanitizer and UBSan.

    The sanitizer must be there first, and sees only what comes from malloc: numpy's and torch's
    CPU arrays do. An error ends the process with a report; Python itself leaks on purpose.
    """
    libraries = [_run("g++", f"-print-file-name={name}.so") for name in ("libasan", "libstdc++")]
    return os.environ | {
        "DPM_HOST_RUNNER_SANITIZE": "1",
        "LD_PRELOAD": ":".join(path.strip() for path in libraries),
        "ASAN_OPTIONS": "detect_leaks=0",
    }


def build(name: str, sources: Sequence[Path], flags: Sequence[str] = ()) -> Path:
    """The module `name` from .cu files and the .cpp files that bind them, built at most once."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / "lock"):  # the tests' processes need not each compile it
        return _build(name, sources, flags)


def _build(name: str, sources: Sequence[Path], flags: Sequence[str]) -> Path:
    import pybind11

    sanitizers = SANITIZERS if sanitizing() else []
    kernel_flags = [*CXXFLAGS, *KERNEL_FLAGS, *(sanitizers or CHECKS), *flags]
    facts = {"DPM_VERSION": "host runner", "DPM_FLAGS": shlex.join(kernel_flags)}
    bind_flags = [*CXXFLAGS, *(f"-D{fact}={json.dumps(text)}" for fact, text in facts.items())]
    for path in (pybind11.get_include(), sysconfig.get_path("include")):
        bind_flags += ["-isystem", path]
    jobs = [(HERE / "runner.cpp", [*kernel_flags, "-O2"])]
    jobs += [(file, [*kernel_flags, "-O1"]) for file in sources if file.suffix == ".cu"]
    num_kernel_objects = len(jobs)
    jobs += [(file, [*bind_flags, *flags, "-O0"]) for file in sources if file.suffix != ".cu"]

    context = _run("g++", "--version") + pybind11.__version__
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda job: _compile(*job, context), jobs))
    directory = CACHE / f"{name}-{_digest(str(objects))}"
    module = directory / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not module.exists():
        link = ["g++", "-shared", "-fopenmp", *sanitizers]
        kernels = directory / f"lib{directory.name}.so"
        kernel_objects = map(str, objects[:num_kernel_objects])
        _link(kernels, [*link, "-Wl,-Bsymbolic,-z,defs", *kernel_objects])
        bind_objects = map(str, objects[num_kernel_objects:])
        _link(module, [*link, "-Wl,-rpath,$ORIGIN", *bind_objects, str(kernels)])
    return module


@functools.cache
def _load(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load(name: str, sources: Sequence[Path], flags: Sequence[str] = ()) -> ModuleType:
    return _load(build(name, sources, flags), name)


def load_native_cuda() -> ModuleType:
    """dpm_fast._native_cuda, its kernels run by the host: pointers are host addresses."""
    return load("_native_cuda", [*sorted(CSRC.glob("*.cu")), CSRC / "bind_cuda.cpp"])


def _runner(module: ModuleType) -> ctypes.CDLL:
    (library,) = Path(module.__file__).parent.glob("lib*.so")
    return ctypes.CDLL(str(library))


@contextmanager
def order(
    module: ModuleType, *, blocks: str = "forward", threads: str = "forward", seed: int = 0
) -> Iterator[None]:
    """Run blocks, and the warps and lanes of each, in these ORDERS."""
    set_order = _runner(module).host_runner_set_order
    set_order(ORDERS.index(blocks), ORDERS.index(threads), ctypes.c_uint64(seed))
    try:
        yield
    finally:
        set_order(0, 0, ctypes.c_uint64(0))


def set_attribute(module: ModuleType, name: str, value: int) -> None:
    """What cudaDeviceGetAttribute says of the device; names are those of ATTRIBUTES."""
    _runner(module).host_runner_set_attribute(ATTRIBUTES[name], value)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _run(*command: str) -> str:
    # A compiler need not be sanitized when this process is.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    result = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    if result.returncode:
        raise BuildError(f"{shlex.join(command)}\n{result.stdout}")
    return result.stdout


@contextmanager
def _scratch(directory: Path) -> Iterator[Path]:
    """A folder whose files are renamed into `directory`, where other processes may be building."""
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        yield Path(scratch)


def _link(target: Path, command: list[str]) -> None:
    with _scratch(target.parent) as scratch:
        _run(*command, "-o", str(scratch / target.name))
        (scratch / target.name).rename(target)


def _compile(source: Path, flags: list[str], context: str) -> Path:
    """An object file, named after the contents of all that it was compiled from."""
    command = ["g++", *flags, "-x", "c++", "-c", str(source)]
    name = f"{source.stem}-{_digest(f'{context} {command}')}"
    # The files read last time. To read another one, one of these must have changed.
    listing = CACHE / "objects" / f"{name}.d"

    def files() -> list[Path]:
        names = listing.read_text().partition(":")[2].replace("\\\n", " ")
        return [path for path in map(Path, shlex.split(names)) if path.exists()]

    def target() -> Path:
        contents = "".join(file.read_text() for file in files())
        return listing.with_name(f"{name}-{_digest(contents)}.o")

    if listing.exists() and target().exists():
        return target()
    for _ in range(3):
        start = time.time()
        with _scratch(listing.parent) as scratch:
            _run(*command, "-MMD", "-MF", str(scratch / "list.d"), "-o", str(scratch / "object.o"))
            (scratch / "list.d").rename(listing)
            if all(file.stat().st_mtime <= start for file in files()):
                return (scratch / "object.o").rename(target())
    raise BuildError(f"{source} or a header of it changes faster than it compiles")
