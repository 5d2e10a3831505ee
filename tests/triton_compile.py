"""Compiles Triton kernels for GPUs that are not here and reads what they use.

In a process of its own: where the tests interpret kernels, they cannot compile them.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ARCHITECTURES = (80, 90, 100)


@dataclass(frozen=True)
class Specialization:
    """One set of compile-time arguments of a kernel."""

    module: str  # in dpm_fast.triton_kernels
    kernel: str
    types: dict[str, str]  # argument -> Triton type, such as "*fp32", "i64", "fp32"
    constants: dict[str, Any]
    num_warps: int = 4
    aligned: tuple[str, ...] = ()  # arguments that are multiples of 16
    architectures: tuple[int, ...] = ARCHITECTURES


@dataclass(frozen=True)
class Usage:
    kernel: str
    architecture: int
    registers: int
    stack_bytes: int  # local memory, spills among it
    shared_bytes: int


def usage(specializations: list[Specialization]) -> list[Usage]:
    """Compile each specialization for each of its architectures."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    work = json.dumps([vars(s) for s in specializations])
    command = [sys.executable, __file__]
    done = subprocess.run(command, input=work, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return [Usage(**row) for row in json.loads(done.stdout.splitlines()[-1])]


def _main() -> None:
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    rows = []
    for work in json.load(sys.stdin):
        module = importlib.import_module(f"dpm_fast.triton_kernels.{work['module']}")
        kernel = getattr(module, work["kernel"])
        names = list(kernel.arg_names)
        signature: dict[str, Any] = {}
        constants: dict[Any, Any] = {}
        attributes = {}
        for i, name in enumerate(names):
            if name in work["constants"]:
                signature[name] = "constexpr"
                constants[(i,)] = work["constants"][name]
            else:
                kind = work["types"][name]
                signature[name] = tuple(kind) if isinstance(kind, list) else kind
                if kind[0] == "*" or name in work["aligned"]:
                    attributes[(i,)] = [["tt.divisibility", 16]]
        for architecture in work["architectures"]:
            source = ASTSource(kernel, signature, constants, attributes)
            options = {"num_warps": work["num_warps"], "enable_fp_fusion": True}
            target = GPUTarget("cuda", architecture, 32)
            compiled = triton.compile(source, target=target, options=options)
            used = _resources(compiled.asm["cubin"])
            rows.append({"kernel": work["kernel"], "architecture": architecture} | used)
    print(json.dumps(rows))


def _resources(cubin: bytes) -> dict[str, int]:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tools / "cuobjdump"), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text))
    return {
        "registers": int(numbers["REG"]),
        "stack_bytes": int(numbers["STACK"]) + int(numbers.get("LOCAL", 0)),
        "shared_bytes": int(numbers["SHARED"]),
    }


if __name__ == "__main__":
    _main()
