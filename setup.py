"""Builds the native extension with ninja; everything else about the package is in pyproject.toml.

The build needs a C++17 compiler with OpenMP and no torch. Where it cannot succeed, one line says
why, the same line goes beside the package for `dpm_fast.info()`, and the installation goes on:
the reference implementation needs no extension. CXX, CXXFLAGS, LDFLAGS and MAX_JOBS are honored.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CSRC = Path("csrc")
COMPILERS = ("c++", "g++", "clang++")
# No -march=native: a wheel must run elsewhere. No -ffast-math: infinities and NaN carry meaning.
CXXFLAGS = ["-O3", "-std=c++17", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wextra"]


class BuildError(Exception):
    """Why an extension cannot be built, in one sentence."""


def find_compiler() -> list[str]:
    requested = shlex.split(os.environ.get("CXX", ""))
    candidates = [requested] if requested else [[name] for name in COMPILERS]
    for command in candidates:
        if shutil.which(command[0]):
            return command
    names = ", ".join(command[0] for command in candidates)
    raise BuildError(f"no C++ compiler was found (looked for {names})")


def ninja_text(compiler: list[str], sources: list[str], module: Path, version: str) -> str:
    """A build.ninja that compiles in parallel and knows which headers each source includes."""
    try:
        import pybind11
    except ImportError as error:
        raise BuildError("the Python package pybind11 is absent") from error
    python_include = sysconfig.get_path("include")
    if not Path(python_include, "Python.h").exists():
        raise BuildError("Python.h is absent (on Debian: apt install python3-dev)")

    def path(file: object) -> str:
        return str(file).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    def command(words: list[str]) -> str:
        return shlex.join(words).replace("$", "$$")

    cxxflags = [*CXXFLAGS, *shlex.split(os.environ.get("CXXFLAGS", ""))]
    includes = [f"-I{pybind11.get_include()}", f"-I{python_include}"]
    facts = [
        f"-DDPM_VERSION={json.dumps(version)}",
        f"-DDPM_CXXFLAGS={json.dumps(shlex.join(cxxflags))}",
    ]
    compile_flags = command([*cxxflags, *includes, *facts])
    link_flags = command(["-shared", "-fopenmp", *shlex.split(os.environ.get("LDFLAGS", ""))])
    objects = {f"{Path(source).stem}.o": Path(source).absolute() for source in sources}
    return "\n".join(
        [
            f"cxx = {command(compiler)}",
            "rule compile",
            f"  command = $cxx {compile_flags} -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = $cxx $in {link_flags} -o $out",
            *(f"build {path(object_)}: compile {path(src)}" for object_, src in objects.items()),
            f"build {path(module)}: link {' '.join(map(path, objects))}",
            "",
        ]
    )


def run_ninja(directory: Path) -> None:
    try:
        import ninja

        program = str(Path(ninja.BIN_DIR) / "ninja")
    except ImportError:
        program = shutil.which("ninja") or ""
    if not program:
        raise BuildError("ninja is absent")
    jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
    if subprocess.run([program, "-C", str(directory), *jobs]).returncode:
        raise BuildError("compilation failed (pip install -v shows the compiler's words)")


class NinjaBuild(build_ext):
    def run(self) -> None:
        for extension in self.extensions:
            module = Path(self.get_ext_fullpath(extension.name)).absolute()
            name = extension.name.rpartition(".")[2]
            reason = module.with_name(f"{name}.absent")
            scratch = Path(self.build_temp) / name
            for directory in (module.parent, scratch):
                directory.mkdir(parents=True, exist_ok=True)
            reason.unlink(missing_ok=True)
            try:
                compiler = find_compiler()
                version = self.distribution.get_version()
                text = ninja_text(compiler, extension.sources, module, version)
                (scratch / "build.ninja").write_text(text)
                run_ninja(scratch)
            except BuildError as error:
                module.unlink(missing_ok=True)
                reason.write_text(f"{error}\n")
                print(f"dpm_fast: installing without {name}: {error}", file=sys.stderr)


setup(
    ext_modules=[
        Extension(
            "dpm_fast._native_cpu",
            sources=sorted(map(str, CSRC.glob("*.cpp"))),
            depends=sorted(map(str, CSRC.glob("*.h"))),
        )
    ],
    cmdclass={"build_ext": NinjaBuild},
)
