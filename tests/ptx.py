"""Pieces of PTX, run on the machine: ``evaluate`` a few instructions for many operands, ``run`` a whole kernel."""

import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fastreg.bench.machine import Launch, Options, Program, Region

VERSIONS = {"sm_90a": "8.6", "sm_100a": "8.8"}  # of the language


def header(target: str) -> str:
    return f".version {VERSIONS[target]}\n.target {target}\n.address_size 64\n"


REGISTERS = (
    ".reg .pred %p<9>; .reg .b16 %h<20>; .reg .b32 %r<40>; .reg .b64 %d<40>;\n"
    "mov.u32 %r39, %tid.x; cvt.u64.u32 %d39, %r39;\n"
)
assembled: list[tuple[str, str]] = []  # targets and kernels that ran


def kernel(body: str, pointers: int, threads: int, declared: str = "", name: str = "test") -> str:
    """A kernel of these statements. %d30, %d31, ... are its arguments; %r39 and %d39 are the thread."""
    parameters = ", ".join(f".param .u64 {name}_{i}" for i in range(pointers))
    arguments = "".join(f"ld.param.b64 %d{30 + i}, [{name}_{i}];\n" for i in range(pointers))
    head = f"{declared}\n.visible .entry {name}({parameters})\n.reqntid {threads}"
    return f"{head}\n{{\n{REGISTERS}{arguments}{body}\nret;\n}}\n"


def run(
    body: str,
    *arrays: np.ndarray,
    threads: int = 32,
    programs: int = 1,
    shared: int = 0,
    target: str = "sm_90a",
    options: Options | None = None,
    declared: str = "",
):
    """Runs a kernel on these arrays, which it may change. shared: bytes of memory at %r38, called ``memory``."""
    if shared:
        declared += f".shared .align 1024 .b8 memory[{shared}];"
        body = f"mov.u32 %r38, memory;\n{body}"
    text = kernel(body, len(arrays), threads, declared)
    assembled.append((target, text))
    program = Program(header(target) + text)
    parameters = [x.ctypes.data.to_bytes(8, "little") for x in arrays]
    regions = [Region(x.ctypes.data, x.ctypes.data + x.nbytes, f"array {i}") for i, x in enumerate(arrays)]
    launch = Launch(program, (programs, 1, 1), threads, parameters, regions, 0, options or Options())
    launch.run()
    return launch


_LETTER = {2: "h", 4: "r", 8: "d"}


def evaluate(code: str, *operands: np.ndarray, result: str, target: str = "sm_100a", **more) -> np.ndarray:
    """``code`` for every row of these operands: %0 is the result, %1, %2, ... are the operands. ``result``: a dtype of
    numpy."""
    operands = [np.ascontiguousarray(x) for x in operands]
    count = len(operands[0])
    threads = -(-count // 32) * 32
    arrays = [np.zeros(threads, result), *(np.resize(x, threads) for x in operands)]
    registers = [f"%{_LETTER[max(2, x.itemsize)]}{i}" for i, x in enumerate(arrays)]
    lines = []
    for i, (x, register) in enumerate(zip(arrays, registers, strict=True)):
        lines.append(f"mad.lo.u64 %d{20 + i}, %d39, {x.itemsize}, %d{30 + i};")
        if i:
            lines.append(f"ld.global.b{8 * x.itemsize} {register}, [%d{20 + i}];")
    lines.append(re.sub(r"%(\d)", lambda found: registers[int(found[1])], code))
    lines.append(f"st.global.b{8 * arrays[0].itemsize} [%d20], {registers[0]};")
    run("\n".join(lines), *arrays, threads=threads, target=target, **more)
    return arrays[0][:count]


def assemble(kernels: Sequence[tuple[str, str]]) -> None:
    """Triton's assembler takes them: they are PTX. Raises what it says."""
    from triton.backends.nvidia.compiler import get_ptxas

    for target in sorted({target for target, _ in kernels}):
        texts = dict.fromkeys(re.sub(r"\.reqntid \d+", "", text) for t, text in kernels if t == target)
        for declares in (False, True):  # those with variables of the same name, each by itself
            several = [text for text in texts if (".shared" in text.split(".visible")[0]) == declares]
            groups = [[text] for text in several] if declares else [several]
            for group in filter(None, groups):
                named = [re.sub(r"\btest(?=[_(])", f"test{i}", text) for i, text in enumerate(group)]
                with tempfile.TemporaryDirectory() as folder:
                    source = Path(folder) / "all.ptx"
                    source.write_text(header(target) + "\n".join(named))
                    command = [
                        get_ptxas(int(target[3:-1])).path,
                        f"--gpu-name={target}",
                        str(source),
                        "-o",
                        str(source) + ".o",
                    ]
                    done = subprocess.run(command, capture_output=True, text=True)
                    assert done.returncode == 0, done.stderr
