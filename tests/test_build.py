"""The package as a user installs it: what is built, what is said where nothing can be built."""

import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import HeaderParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import dpm_fast
from dpm_fast import dispatch

ROOT = Path(__file__).parent.parent
METADATA = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
KERNEL_SOURCES = sorted(set((ROOT / "csrc").glob("*.cpp")) - set((ROOT / "csrc").glob("bind_*")))
NOT_SOURCE = shutil.ignore_patterns(".*", "build", "runs", "*.egg-info", "*.so", "*.absent")


def run(*command: object, cwd: Path = ROOT, **environment: str) -> str:
    """Standard output and error of a command that must succeed."""
    result = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        # What nvcc makes of csrc is tested kernel by kernel; here it would take minutes.
        env=os.environ | {"DPM_FAST_CUDA": "0"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


def info_of_installed(wheel: Path, site: Path) -> str:
    """What `info()` prints where only this wheel is installed, beside the torch of the tests."""
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", site, wheel)
    program = "import dpm_fast; print(dpm_fast.__file__, flush=True); print(dpm_fast.info())"
    path = f"{site}{os.pathsep}{Path(torch.__file__).parents[1]}"
    # Without -S an editable installation of this tree would supply what the wheel lacks.
    output = run(sys.executable, "-S", "-c", program, cwd=site.parent, PYTHONPATH=path)
    file, _, text = output.partition("\n")
    assert file.startswith(str(site))
    return text


def test_info_states_every_version_once():
    lines = str(dpm_fast.info()).splitlines()
    facts = dict(line.split(maxsplit=1) for line in lines)
    assert len(facts) == len(lines)
    assert facts["dpm_fast"] == dpm_fast.__version__
    assert facts["torch"] == torch.__version__
    assert platform.python_version() in facts["python"]
    assert facts["cuda"].startswith("CUDA" if torch.cuda.is_available() else "none: ")


def test_the_extension_is_built_without_unsafe_or_unportable_flags():
    if reason := dispatch.why_absent("native", "cpu"):
        pytest.skip(reason)
    module, _ = dispatch.native(torch.empty(0))
    facts = module.build_info()
    assert facts["version"] == METADATA["version"]
    assert facts["cxx_standard"] >= 201703
    assert facts["openmp"] >= 201511
    assert {"-O3", "-fopenmp", "-fvisibility=hidden"} <= set(facts["flags"].split())
    assert facts["compiler"] in dpm_fast.info().native_cpu


@pytest.mark.parametrize(
    ("recorded", "stated"),
    [
        ("no C++ compiler was found\n", "no C++ compiler was found"),
        (None, "start Python outside of its source"),
    ],
)
def test_info_says_why_the_extension_is_absent(monkeypatch, tmp_path, recorded, stated):
    monkeypatch.setitem(sys.modules, "dpm_fast._native_cpu", None)
    monkeypatch.setattr(dispatch, "__file__", str(tmp_path / "dispatch.py"))
    monkeypatch.setattr(dispatch, "_load", dispatch._load.__wrapped__)
    if recorded:
        (tmp_path / "_native_cpu.absent").write_text(recorded)
    assert re.fullmatch(f"not built: .*{re.escape(stated)}.*", dpm_fast.info().native_cpu)


def test_info_survives_a_broken_machine(monkeypatch):
    def broken() -> bool:
        raise RuntimeError("driver is too old")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", broken)
    assert dpm_fast.info().cuda == "unknown (RuntimeError: driver is too old)"


def test_every_public_name_exists():
    public = [name for name in dir(dpm_fast) if not name.startswith("_")]
    assert public == sorted(dpm_fast.__all__)
    assert {"__version__", "__doc__"} <= set(dir(dpm_fast))
    for name in dpm_fast.__all__:
        assert getattr(dpm_fast, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Difusion'"):
        _ = dpm_fast.Difusion


def test_importing_the_package_imports_nothing_heavy():
    program = "import sys, dpm_fast; print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    assert run(sys.executable, "-c", program).strip() == "[]"


def test_models_need_none_of_the_optional_packages():
    optional = ["tqdm", "safetensors", "tensorboard", "tyro", "matplotlib", "sklearn", "PIL"]
    program = f"""
import sys
sys.modules.update(dict.fromkeys({optional}))
import dpm_fast
for name in set(dpm_fast.__all__) - {{"Trainer", "TrainConfig"}}:
    getattr(dpm_fast, name)
"""
    run(sys.executable, "-c", program)


@pytest.fixture(scope="module")
def setup_py():
    """What setup.py defines."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("setuptools.setup", lambda **_: None)
        return SimpleNamespace(**runpy.run_path(str(ROOT / "setup.py")))


@pytest.fixture
def nvcc(tmp_path):
    """An nvcc of CUDA 12.8, as far as it lists architectures."""
    program = tmp_path / "nvcc"
    known = (50, 52, 60, 61, 70, 75, 80, 86, 87, 89, 90, 100, 120)
    program.write_text("#!/bin/sh\n" + "".join(f"echo compute_{n}\n" for n in known))
    program.chmod(0o755)
    return str(program)


def gencode(*codes: str) -> list[str]:
    """Flags for code such as sm_90, or compute_90, which is PTX."""
    return [f"-gencode=arch=compute_{code.partition('_')[2]},code={code}" for code in codes]


@pytest.mark.parametrize(
    ("requested", "codes"),
    [
        ("", ["sm_80", "sm_90", "sm_100", "compute_100"]),
        (" ; ", ["sm_80", "sm_90", "sm_100", "compute_100"]),
        ("8.0", ["sm_80"]),
        ("8.0;9.0+PTX", ["sm_80", "sm_90", "compute_90"]),
        ("8.0+PTX 8.6, 9.0", ["sm_80", "compute_80", "sm_86", "sm_90"]),
        ("9.0a", ["sm_90a"]),
        ("9.0a+PTX", ["sm_90a", "compute_90a"]),
        ("10.0f", ["sm_100f"]),
        ("Ampere", ["sm_80", "sm_86", "compute_86"]),
        ("Ampere+Tegra", ["sm_87"]),
        ("Ampere;Hopper", ["sm_80", "sm_86", "compute_86", "sm_90", "compute_90"]),
        ("8.0;Ampere", ["sm_80", "sm_86", "compute_86"]),
        ("Hopper+PTX", ["sm_90", "compute_90"]),
        ("Blackwell", ["sm_100", "sm_120", "compute_120"]),
        ("7.5+PTX Volta+Tegra 8.0", ["sm_80"]),
    ],
)
def test_architectures_that_are_asked_for(monkeypatch, setup_py, nvcc, requested, codes):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", requested)
    assert setup_py.cuda_code_flags(nvcc) == gencode(*codes)


@pytest.mark.parametrize(
    ("requested", "message"),
    [
        ("native", "must hold architectures like '8.0;9.0\\+PTX' or names .* got 'native'"),
        ("sm_90", "must hold architectures like .* got 'sm_90'"),
        ("8.0;hopper", "must hold architectures like .*Hopper.* got '8.0;hopper'"),
        ("9", "must hold architectures like .* got '9'"),
        ("8.0;13.0", "nvcc does not know the architecture '13.0'"),
        ("7.5;Volta", "no architecture from 8.0 on: '7.5;Volta'"),
    ],
)
def test_architectures_that_nvcc_has_not(monkeypatch, setup_py, nvcc, requested, message):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", requested)
    with pytest.raises(setup_py.BuildError, match=message):
        setup_py.cuda_code_flags(nvcc)


def test_an_nvcc_that_lists_nothing_is_too_old(setup_py):
    with pytest.raises(setup_py.BuildError, match="lists no GPU architectures"):
        setup_py.cuda_code_flags("true")


@pytest.fixture
def source(tmp_path):
    """A copy of the source tree, as a fresh clone has it."""
    return shutil.copytree(ROOT, tmp_path / "source", ignore=NOT_SOURCE)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"PATH": "/nonexistent"}, "no C++ compiler was found (looked for c++, g++, clang++)"),
        ({"CXX": "icpx-2015"}, "no C++ compiler was found (looked for icpx-2015)"),
        ({"CXXFLAGS": "-ffast-math"}, "compilation failed"),
    ],
    ids=["no compiler", "compiler asked for is absent", "compiler refuses"],
)
def test_a_build_that_cannot_succeed_installs_and_says_why(source, tmp_path, environment, reason):
    if "CXXFLAGS" in environment and not shutil.which("c++"):
        pytest.skip("needs a C++ compiler")
    wheels = tmp_path / "wheels"
    pip = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation"]
    output = run(*pip, "-w", wheels, source, **({"CXX": ""} | environment))
    assert f"dpm_fast: installing without _native_cpu: {reason}" in output
    (wheel,) = wheels.iterdir()
    assert f"not built: {reason}" in info_of_installed(wheel, tmp_path / "site")


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="one instruction set")
@pytest.mark.skipif(not (shutil.which("c++") and shutil.which("nm")), reason="needs a compiler")
@pytest.mark.parametrize("file", KERNEL_SOURCES, ids=lambda file: file.stem)
def test_no_function_of_one_instruction_set_can_stand_for_that_of_another(setup_py, tmp_path, file):
    """The linker keeps one of equally named weak functions, whatever it was compiled for."""
    for isa in ("avx512", "avx512_bf16"):
        if file.stem not in setup_py.SOURCES_OF_SET.get(isa, (file.stem,)):
            continue
        flags = [f"-DDPM_ISA={isa}", *setup_py.X86_64[isa].split()]
        run("c++", *setup_py.CXXFLAGS, *flags, "-c", file, "-o", tmp_path / "object.o")
        listed = run("nm", "--defined-only", tmp_path / "object.o")
        symbols = [line.split() for line in listed.splitlines()]
        assert not [name for *_, kind, name in symbols if kind in "WVwv" and "DW.ref" not in name]


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="a flag of this processor")
@pytest.mark.skipif(not shutil.which("c++"), reason="needs a compiler")
def test_flags_may_give_every_set_the_instructions_of_the_best(setup_py, tmp_path):
    """As CXXFLAGS=-march=native does."""
    flags = [*setup_py.CXXFLAGS, "-DDPM_ISA=baseline", "-march=sapphirerapids", "-O0"]
    run("c++", *flags, "-c", ROOT / "csrc" / "multiscale_conv.cpp", "-o", tmp_path / "object.o")
    symbols = run("nm", "--defined-only", tmp_path / "object.o")
    assert "8baseline24multiscale_conv_gradient" in symbols


@pytest.mark.slow
def test_an_editable_install_extends_the_path(source, tmp_path):
    wheels = tmp_path / "wheels"
    program = "import sys; from setuptools.build_meta import build_editable as b; b(sys.argv[1])"
    run(sys.executable, "-c", program, wheels, cwd=source, CXX="icpx-2015")
    (wheel,) = wheels.iterdir()
    with zipfile.ZipFile(wheel) as archive:
        (path,) = (name for name in archive.namelist() if name.endswith(".pth"))
        assert Path(archive.read(path).decode().strip()).samefile(source)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler")
def test_a_rebuild_compiles_what_changed_and_leaves_nothing_stale(source):
    for file in KERNEL_SOURCES:  # one op stands for all: a shared object links without the others
        if file.stem != "scale":
            (source / "csrc" / file.name).unlink()

    def build(**environment: str) -> str:
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        return run(*command, cwd=source, CXXFLAGS="-O0", **environment)  # a quarter of the time

    whole = r"\[(\d+)/\1\] "  # ninja's last step, of as many as there are sources
    first = re.search(whole, build())
    assert first is not None
    (module,) = (source / "dpm_fast").glob("_native_cpu*.so")
    assert "no work to do" in build()
    (source / "csrc" / "unused.h").write_text("#error never included\n")
    assert "no work to do" in build()
    with (source / "csrc" / "common.h").open("a") as header:
        header.write("// changed\n")
    assert re.search(whole, build()).group() == first.group()
    build(CXX="absent-compiler")
    assert not module.exists()
    build()
    assert module.exists()
    assert not (source / "dpm_fast" / "_native_cpu.absent").exists()


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """The sdist, and the wheel built from it, each in an environment of pyproject's alone.

    That environment holds no torch, so a build that imported torch would fail here.
    """
    folder = tmp_path_factory.mktemp("distributions")
    source = shutil.copytree(ROOT, folder / "source", ignore=NOT_SOURCE)
    command = [sys.executable, "-m", "build", "--outdir", folder / "dist", source]
    run(*command, CXXFLAGS="-O0")  # a quarter of the time
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    (wheel,) = (folder / "dist").glob("*.whl")
    return sdist, wheel


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.xdist_group("distributions")
def test_sdist_holds_what_building_and_testing_need(distributions):
    sdist, _ = distributions
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for folder, pattern in [("csrc", "*"), ("dpm_fast", "*.py"), ("tests", "**/*.*")]:
        kept = (ROOT / folder).glob(pattern)
        files = {str(file.relative_to(ROOT)) for file in kept if "__pycache__" not in file.parts}
        assert files
        assert files <= names
    assert {"LICENSE", "pyproject.toml", "setup.py", "constraints.txt", "Makefile"} <= names


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.xdist_group("distributions")
def test_wheel_holds_the_package_and_nothing_else(distributions):
    _, wheel = distributions
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.partition("/")[0] for name in names} == {
        "dpm_fast",
        f"dpm_fast-{METADATA['version']}.dist-info",
    }
    assert "dpm_fast/py.typed" in names
    assert not [name for name in names if name.endswith((".cpp", ".h", ".pyc"))]
    built = [name for name in names if name.startswith("dpm_fast/_native_cpu.")]
    assert [Path(name).suffix for name in built] == [".so" if shutil.which("c++") else ".absent"]


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.xdist_group("distributions")
def test_wheel_metadata_is_static(distributions):
    _, wheel = distributions
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(f"dpm_fast-{METADATA['version']}.dist-info/METADATA").decode()
    header = HeaderParser().parsestr(text)
    # setuptools marks the license file as found, not declared, whatever pyproject.toml says.
    assert set(header.get_all("Dynamic", [])) <= {"license-file"}
    assert header["Version"] == METADATA["version"]
    assert header["License-Expression"] == METADATA["license"]
    assert set(header.get_all("Provides-Extra")) == set(METADATA["optional-dependencies"])
    required = [line for line in header.get_all("Requires-Dist") if "extra ==" not in line]
    names = [re.match(r"\w+", line).group() for line in required]
    assert names == ["torch", "numpy", "triton"]


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.xdist_group("distributions")
def test_wheel_runs_away_from_its_source(distributions, tmp_path):
    _, wheel = distributions
    text = info_of_installed(wheel, tmp_path / "site")
    facts = dict(line.split(maxsplit=1) for line in text.splitlines())
    assert facts["dpm_fast"] == METADATA["version"]
    if shutil.which("c++"):
        assert facts["native_cpu"].startswith(f"version {METADATA['version']}; compiler")
