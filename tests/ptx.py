"""Pieces of PTX, run on the machine: ``evaluate`` a few instructions for many operands, ``run`` a whole kernel.

While ``executor`` is "gpu", what ran on the machine without a fault runs on the GPU as well, and its results are those
that a test sees.
"""

import ctypes
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from fastreg.bench.machine import Launch, Options, Program, Region

VERSIONS = {"sm_90a": "8.6", "sm_100a": "8.8"}  # of the language


def header(target: str) -> str:
    return f".version {VERSIONS[target]}\n.target {target}\n.address_size 64\n"


REGISTERS = (
    ".reg .pred %p<9>; .reg .b16 %h<20>; .reg .b32 %r<40>; .reg .b64 %d<40>;\n"
    "mov.u32 %r39, %tid.x; cvt.u64.u32 %d39, %r39;\n"
)
assembled: list[tuple[str, str]] = []  # targets and kernels that ran
executor = "machine"


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
    before = [x.copy() for x in arrays]
    launch.run()
    if executor == "gpu":
        for x, old in zip(arrays, before, strict=True):
            x[...] = old
        _run_natively(text, arrays, threads, programs)
    return launch


def _run_natively(text: str, arrays: Sequence[np.ndarray], threads: int, programs: int) -> None:
    """The same on the GPU, by CUDA's driver. A test is skipped whose instructions this GPU does not have."""
    major, minor = torch.cuda.get_device_capability()
    target = f"sm_{major}{minor}" + ("a" if major >= 9 else "")
    try:
        binary = binary_of(f".version 8.8\n.target {target}\n.address_size 64\n{text}", target)
    except AssertionError as error:
        pytest.skip(f"not for {target}: {error}")
    cuda, module, function = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p(), ctypes.c_void_p()

    def call(name: str, *arguments) -> None:
        if status := getattr(cuda, name)(*arguments):
            raise RuntimeError(f"{name}: CUDA error {status}")

    tensors = [torch.from_numpy(x).to("cuda") for x in arrays]
    addresses = [ctypes.c_uint64(x.data_ptr()) for x in tensors]
    parameters = (ctypes.c_void_p * len(addresses))(*map(ctypes.addressof, addresses))
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    call("cuModuleLoadData", ctypes.byref(module), binary)
    try:
        call("cuModuleGetFunction", ctypes.byref(function), module, b"test")
        call("cuLaunchKernel", function, programs, 1, 1, threads, 1, 1, 0, stream, parameters, None)
        torch.cuda.synchronize()
    finally:
        call("cuModuleUnload", module)
    for x, tensor in zip(arrays, tensors, strict=True):
        x[...] = tensor.cpu().numpy()


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
    for target in sorted({target for target, _ in kernels}):
        texts = dict.fromkeys(re.sub(r"\.reqntid \d+", "", text) for t, text in kernels if t == target)
        for declares in (False, True):  # those with variables of the same name, each by itself
            several = [text for text in texts if (".shared" in text.split(".visible")[0]) == declares]
            groups = [[text] for text in several] if declares else [several]
            for group in filter(None, groups):
                named = [re.sub(r"\btest(?=[_(])", f"test{i}", text) for i, text in enumerate(group)]
                binary_of(header(target) + "\n".join(named), target)


def binary_of(text: str, target: str) -> bytes:
    """The machine code that Triton's assembler makes of a module."""
    from triton.backends.nvidia.compiler import get_ptxas

    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder) / "all.ptx", Path(folder) / "all.cubin"
        source.write_text(text)
        assembler = get_ptxas(int(re.search(r"\d+", target)[0])).path
        command = [assembler, f"--gpu-name={target}", str(source), "-o", str(binary)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return binary.read_bytes()
