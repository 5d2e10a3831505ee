"""Builds the native extensions with ninja; everything else about the package is in pyproject.toml.

`_native_cpu` needs a C++17 compiler with OpenMP, `_native_cuda` needs nvcc too; neither needs torch
or a GPU. Where one cannot be built, one line says why, the same line goes beside the package for
`dpm_fast.info()`, and the installation goes on: the reference implementation needs no extension.

Environment: CXX, CXXFLAGS, LDFLAGS, MAX_JOBS; CUDA_HOME; TORCH_CUDA_ARCH_LIST (such as
"8.0;9.0+PTX" or "Ampere;Hopper"); DPM_FAST_CUDA = auto, 0, or 1, where a CUDA build that fails is
an error.
"""

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CSRC = Path("csrc")
COMPILERS = ("c++", "g++", "clang++")
LAUNCHERS = ("ccache", "sccache", "distcc")
# No -march=native: a wheel must run elsewhere. No -ffast-math: infinities and NaN carry meaning;
# the three -f flags are the parts of it that change no result but let loops become vector code.
CXXFLAGS = [
    *("-O3", "-std=c++17", "-fPIC", "-fopenmp", "-fvisibility=hidden"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wall", "-Wextra"),
]
# Kernels are compiled once for each; the module chooses when it is loaded.
BASELINE = {"baseline": ""}
X86_64 = BASELINE | {
    "avx2": "-march=x86-64-v3",
    "avx512": "-march=x86-64-v4 -mprefer-vector-width=512",
    # Told by a name of ours: CXXFLAGS may give every set the instructions.
    "avx512_bf16": "-march=x86-64-v4 -mprefer-vector-width=512 -mavx512bf16 -DDPM_PAIRS",
}
# The only sources that have anything for a set; others are then those of the next one.
SOURCES_OF_SET = {"avx512_bf16": ("multiscale_conv",)}
# The newest gets PTX, which later GPUs compile for themselves.
CUDA_ARCHITECTURES = "8.0;9.0;10.0+PTX"
# The names that torch takes too, for what it takes them.
CUDA_NAMES = {
    "Ampere": "8.0;8.6+PTX",
    "Ampere+Tegra": "8.7",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
    "Blackwell+Tegra": "11.0",
}
# Lists that serve torch too may begin with these, which can neither copy to shared memory on the
# side nor multiply bfloat16.
TOO_OLD = re.compile(r"(Kepler|Maxwell|Pascal|Volta|Turing|[1-7]\.\d)\b.*")
NVCCFLAGS = [
    "-O3",
    "-std=c++17",
    "--expt-relaxed-constexpr",
    "-Xcompiler",
    "-fPIC,-fvisibility=hidden",
]


class BuildError(Exception):
    """Why an extension cannot be built, in one sentence."""


@dataclass
class Objects:
    """Object files of one module: name, rule of ninja, source, and flags of its own."""

    rows: list[tuple[str, str, Path, str]] = field(default_factory=list)

    def add(self, rule: str, source: Path, flags: str = "", suffix: str = "") -> None:
        self.rows.append((f"{source.stem}{suffix}.o", rule, source.absolute(), flags))

    def ninja(self) -> list[str]:
        return [
            f"build {name}: {rule} {_ninja_path(source)}\n  flags = {flags}"
            for name, rule, source, flags in self.rows
        ]

    @property
    def names(self) -> str:
        return " ".join(name for name, *_ in self.rows)


def find_compiler() -> list[str]:
    requested = shlex.split(os.environ.get("CXX", ""))
    candidates = [requested] if requested else [[name] for name in COMPILERS]
    for command in candidates:
        if shutil.which(command[0]):
            return command
    names = ", ".join(command[0] for command in candidates)
    raise BuildError(f"no C++ compiler was found (looked for {names})")


def host_compiler(command: list[str]) -> str:
    """What nvcc takes: the compiler itself, without a cache before it."""
    words = [word for word in command if Path(word).stem not in LAUNCHERS]
    return (words or command)[0]


def find_nvcc() -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        nvcc = str(Path(home) / "bin" / "nvcc")
        if not shutil.which(nvcc):
            raise BuildError(f"no nvcc was found (looked for {nvcc})")
        return nvcc
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc") or ""
    if not nvcc:
        raise BuildError("no nvcc was found (set CUDA_HOME, or put it on PATH)")
    return nvcc


def cuda_code_flags(nvcc: str) -> list[str]:
    """-gencode flags: those asked for, or those of the fixed list that this nvcc knows."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True)
    known = set(re.findall(r"compute_(\d+)\b", listed.stdout))
    if not known:
        raise BuildError(f"{nvcc} lists no GPU architectures (CUDA 11.5 or newer is needed)")
    requested = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    entries: list[str] = []
    for entry in filter(None, re.split(r"[;, ]+", requested)):
        if TOO_OLD.fullmatch(entry):
            print(f"dpm_fast: there are no kernels for {entry}, only from 8.0 on", file=sys.stderr)
            continue
        family = CUDA_NAMES.get(entry.removesuffix("+PTX"))
        entries += [entry] if family is None else known_of(family, known, nvcc)
    flags = []
    if requested.strip(" ;,") and not entries:
        raise BuildError(f"TORCH_CUDA_ARCH_LIST has no architecture from 8.0 on: {requested!r}")
    for entry in entries or known_of(CUDA_ARCHITECTURES, known, nvcc):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if not match:
            # "native", which torch takes, would make a build depend on the machine it runs on.
            raise BuildError(
                "TORCH_CUDA_ARCH_LIST must hold architectures like '8.0;9.0+PTX' or names of "
                f"them ({', '.join(CUDA_NAMES)}), got {requested!r}"
            )
        if match[1] + match[2] not in known:
            raise BuildError(f"{nvcc} does not know the architecture {entry!r}")
        number = match[1] + match[2] + match[3]
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match[4]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return list(dict.fromkeys(flags))


def known_of(family: str, known: set[str], nvcc: str) -> list[str]:
    """Those of a list that nvcc knows: of several generations the newest may be beyond it. The
    last one gets PTX where the list asks for that."""
    numbers = family.removesuffix("+PTX").split(";")
    found = [number for number in numbers if number.replace(".", "") in known]
    if not found:
        raise BuildError(f"{nvcc} knows none of the architectures {family}")
    if family.endswith("+PTX"):
        found[-1] += "+PTX"
    return found


def python_includes() -> list[str]:
    try:
        import pybind11
    except ImportError as error:
        raise BuildError("the Python package pybind11 is absent") from error
    python_include = sysconfig.get_path("include")
    if not Path(python_include, "Python.h").exists():
        raise BuildError("Python.h is absent (on Debian: apt install python3-dev)")
    return [f"-I{pybind11.get_include()}", f"-I{python_include}"]


def instruction_sets() -> dict[str, str]:
    return X86_64 if platform.machine() in ("x86_64", "AMD64") else BASELINE


def ninja_text(sources: list[str], module: Path, version: str) -> str:
    """A build.ninja that compiles in parallel and knows which headers each source includes."""
    compiler = find_compiler()
    files = [Path(source) for source in sources]
    on_cuda = any(file.suffix == ".cu" for file in files)
    nvcc = find_nvcc() if on_cuda else ""
    nvcc_flags = [*NVCCFLAGS, *cuda_code_flags(nvcc)] if on_cuda else []
    host = host_compiler(compiler)
    cxxflags = [*CXXFLAGS, *shlex.split(os.environ.get("CXXFLAGS", ""))]
    objects = Objects()
    for file in files:
        if file.suffix == ".cu":
            objects.add("nvcc", file)
        elif file.stem.startswith("bind_"):
            facts = {
                "DPM_VERSION": version,
                "DPM_FLAGS": shlex.join(nvcc_flags if on_cuda else cxxflags),
            }
            defines = [f"-D{name}={json.dumps(value)}" for name, value in facts.items()]
            chosen = [f"-DDPM_HAS_{name.upper()}" for name in instruction_sets()]
            objects.add("cxx", file, _ninja_words([*python_includes(), *defines, *chosen]))
        else:
            for name, flags in instruction_sets().items():
                if file.stem in SOURCES_OF_SET.get(name, (file.stem,)):
                    objects.add("cxx", file, f"-DDPM_ISA={name} {flags}", suffix=f".{name}")
    link_flags = ["-shared", *shlex.split(os.environ.get("LDFLAGS", ""))]
    if on_cuda:
        linker = [nvcc, "-ccbin", host, "-cudart", "static"]
    else:
        linker, link_flags = compiler, ["-fopenmp", *link_flags]
    return "\n".join(
        [
            f"rule cxx\n  command = {_ninja_words([*compiler, *cxxflags])} $flags -MMD -MF $out.d "
            "-c $in -o $out\n  depfile = $out.d\n  deps = gcc",
            f"rule nvcc\n  command = {_ninja_words([nvcc, '-ccbin', host, *nvcc_flags])} "
            "-MMD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
            f"rule link\n  command = {_ninja_words(linker)} $in {_ninja_words(link_flags)} -o $out",
            *objects.ninja(),
            f"build {_ninja_path(module)}: link {objects.names}",
            "",
        ]
    )


def _ninja_path(file: Path) -> str:
    return str(file).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _ninja_words(words: list[str]) -> str:
    return shlex.join(words).replace("$", "$$")


def run_ninja(directory: Path) -> None:
    try:
        import ninja

        program = str(Path(ninja.BIN_DIR) / "ninja")
    except ImportError:
        program = shutil.which("ninja") or ""
    if not program:
        raise BuildError("ninja is absent")
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
    if subprocess.run([program, "-C", str(directory), *jobs]).returncode:
        raise BuildError("compilation failed (pip install -v shows the compiler's words)")


class NinjaBuild(build_ext):
    def run(self) -> None:
        cuda = os.environ.get("DPM_FAST_CUDA", "auto")
        if cuda not in ("auto", "0", "1"):
            sys.exit(f"DPM_FAST_CUDA must be auto, 0 or 1, got {cuda!r}")
        for extension in self.extensions:
            module = Path(self.get_ext_fullpath(extension.name)).absolute()
            name = extension.name.rpartition(".")[2]
            reason = module.with_name(f"{name}.absent")
            scratch = Path(self.build_temp) / name
            for directory in (module.parent, scratch):
                directory.mkdir(parents=True, exist_ok=True)
            reason.unlink(missing_ok=True)
            try:
                if name == "_native_cuda" and cuda == "0":
                    raise BuildError("DPM_FAST_CUDA is 0")
                text = ninja_text(extension.sources, module, self.distribution.get_version())
                (scratch / "build.ninja").write_text(text)
                run_ninja(scratch)
            except BuildError as error:
                module.unlink(missing_ok=True)
                if name == "_native_cuda" and cuda == "1":
                    sys.exit(f"dpm_fast: DPM_FAST_CUDA is 1, but {name} cannot be built: {error}")
                reason.write_text(f"{error}\n")
                print(f"dpm_fast: installing without {name}: {error}", file=sys.stderr)


def extension(name: str, *patterns: str, without: str) -> Extension:
    sources = sorted(
        str(file) for pattern in patterns for file in CSRC.glob(pattern) if file.stem != without
    )
    headers = sorted(str(file) for pattern in ("*.h", "*.cuh") for file in CSRC.glob(pattern))
    return Extension(f"dpm_fast.{name}", sources=sources, depends=headers)


setup(
    ext_modules=[
        extension("_native_cpu", "*.cpp", without="bind_cuda"),
        extension("_native_cuda", "*.cu", "bind_cuda.cpp", without=""),
    ],
    cmdclass={"build_ext": NinjaBuild},
)
