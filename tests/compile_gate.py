"""What Triton kernels compile to on GPUs that are not here: ptxas and cuobjdump come with triton.

    [compiled] = compile_in_subprocess([Request(path, "sort_kernel", {"p_x": "*i64:16"}, {"BLOCK": 128})])
    assert_fits(compiled)

The compiler and the interpreter cannot share a process, so tests ask a child process for all their kernels at
once. A gate says that a configuration compiles and fits; how fast it is, only a GPU says.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# A block may use this much on sm_90 and sm_100 (CUDA programming guide, technical specifications).
SHARED_LIMIT_BYTES = 227 * 1024


@dataclass(frozen=True)
class Request:
    """One kernel in one configuration for one architecture.

    Attributes:
        path: the kernel's file; imported in the child.
        function: the kernel's name in it.
        signature: type of each argument that is no constexpr, as in `*i64` or `i32`. A suffix `:16` promises
            a multiple of 16, which Triton sees by itself at a launch: every torch allocation is one.
        constexprs: value of each constexpr; numbers, strings, bools and None.
        num_warps: as at the launch.
        capability: 90 for H100 and H200, 100 for B200.
        num_stages: as at the launch.
    """

    path: str | Path
    function: str
    signature: Mapping[str, str]
    constexprs: Mapping[str, object]
    num_warps: int = 4
    capability: int = 90
    num_stages: int = 3


@dataclass(frozen=True)
class Compiled:
    """What ptxas made of it.

    Attributes:
        name: kernel, architecture and constexprs.
        registers: of one thread.
        spill_bytes: stored to and loaded from local memory for want of registers.
        stack_bytes: local memory of one thread, spills included.
        shared_bytes: of one block.
        sass: the instructions.
    """

    name: str
    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int
    sass: str

    def count(self, instruction: str) -> int:
        """Times that an instruction occurs, as in `HGMMA`, `LDG` or `LDG.E.128`; modifiers may follow."""
        if instruction not in self.sass:  # megabytes, and most are not in it: found so without an expression
            return 0
        return len(re.findall(rf"\b{re.escape(instruction)}\b", self.sass))


def gate(
    kernel: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, object],
    *,
    num_warps: int,
    capability: int,
    num_stages: int = 3,
) -> Compiled:
    """Compile a @triton.jit function; TRITON_INTERPRET must be unset. Arguments as in `Request`."""
    from triton import compile as triton_compile
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {name: signature[name].removesuffix(":16") for name in signature}
    types = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    divisible = {
        (position,): [["tt.divisibility", 16]]
        for position, name in enumerate(kernel.arg_names)
        if signature.get(name, "").endswith(":16")
    }
    source = ASTSource(kernel, types, dict(constexprs), divisible)
    log = io.StringIO()
    with knobs.compilation.scope(), knobs.nvidia.scope(), redirect_stdout(log):
        knobs.compilation.always_compile = True  # a cached kernel comes without ptxas's log
        knobs.nvidia.dump_ptxas_log = True
        compiled = triton_compile(
            source,
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": num_warps, "num_stages": num_stages},
        )
    return Compiled(
        name=f"{kernel.__name__} sm_{capability} {dict(constexprs)}",
        registers=_number(r"Used (\d+) registers", log),
        spill_bytes=_number(r"(\d+) bytes spill stores", log) + _number(r"(\d+) bytes spill loads", log),
        stack_bytes=_number(r"(\d+) bytes stack frame", log),
        shared_bytes=compiled.metadata.shared,
        sass=_disassemble(compiled.asm["cubin"], Path(knobs.nvidia.cuobjdump.path)),
    )


def compile_in_subprocess(requests: Sequence[Request]) -> list[Compiled]:
    """Compile all requests in one child process, in order.

    Raises:
        AssertionError: one of them does not compile; the text names it and ends with the compiler's words.
    """
    argv = [sys.executable, __file__]
    asked = json.dumps([asdict(request) | {"path": str(request.path)} for request in requests])
    with tempfile.TemporaryDirectory(prefix="compile_gate_") as cache:
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        environment["TRITON_CACHE_DIR"] = cache
        done = subprocess.run(
            argv, input=asked, env=environment, capture_output=True, text=True, timeout=500, check=False
        )
    assert done.returncode == 0, done.stderr[-4000:]
    return [Compiled(**fields) for fields in json.loads(done.stdout)]


def assert_fits(compiled: Compiled, *, max_registers: int = 255, instructions: Sequence[str] = ()) -> None:
    """Nothing in local memory, shared memory within a block's, and each named instruction present."""
    assert compiled.spill_bytes == 0, f"{compiled.name}: {compiled.spill_bytes} spilled bytes"
    assert compiled.stack_bytes == 0, f"{compiled.name}: {compiled.stack_bytes} bytes of local memory"
    assert not compiled.count("LDL") and not compiled.count("STL"), f"{compiled.name}: local memory is used"
    assert compiled.registers <= max_registers, f"{compiled.name}: {compiled.registers} registers"
    assert compiled.shared_bytes <= SHARED_LIMIT_BYTES, f"{compiled.name}: {compiled.shared_bytes} B shared"
    for instruction in instructions:
        assert compiled.count(instruction), f"{compiled.name}: no {instruction}"


def _number(pattern: str, log: io.StringIO) -> int:
    found = re.search(pattern, log.getvalue())
    assert found, f"ptxas said nothing like {pattern!r}: {log.getvalue()[-2000:]}"
    return int(found[1])


def _disassemble(cubin: bytes, cuobjdump: Path) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        path = f"{cuobjdump.parent}{os.pathsep}{os.environ['PATH']}"  # it calls nvdisasm
        return subprocess.run(
            [cuobjdump, "-sass", file.name],
            env=os.environ | {"PATH": path},
            capture_output=True,
            text=True,
            check=True,
        ).stdout


def _load_kernel(path: str, function: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"gated_{Path(path).parent.name}_{Path(path).stem}", path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, function)


def _main() -> None:
    """The child: requests on stdin, results on stdout, both JSON."""
    results = []
    for request in json.load(sys.stdin):
        kernel = _load_kernel(request.pop("path"), request.pop("function"))
        try:
            results.append(asdict(gate(kernel, **request)))
        except Exception as error:
            asked = f"{kernel.__name__} sm_{request['capability']} {request['constexprs']}"
            raise RuntimeError(f"{asked} does not compile") from error
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    _main()
