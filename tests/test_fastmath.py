"""Conversions and sums of pairs: the assembly is what it should be, element by element, on every target.

The interpreter takes the plain form of each operation, so values are right there by definition; whether the inline
assembly does the same can be read in the machine code. This file, run as a script, prints it (see test_inspect.py).
"""

import json
import os
import re
import subprocess
import sys
from collections import Counter

import pytest
import torch

triton = pytest.importorskip("triton")
pytest.importorskip("typer")
import triton.language as tl  # noqa: E402

from fastreg.bench.sass import Kernel, Program, compile_for  # noqa: E402
from fastreg.kernels import fastmath, ptxas  # noqa: E402

BLOCK = 1024  # of 128 threads: eight elements each


@triton.jit
def unary(x_ptr, y_ptr, n, OPERATION: tl.constexpr, BLOCK: tl.constexpr):
    element = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + element)
    y = tl.load(y_ptr + element)
    if OPERATION == "upcast":
        z = fastmath.upcast(x)
    elif OPERATION == "packed":
        z = ptxas.pack_16bit(x, y, n)
    elif OPERATION == "settled":
        z = ptxas.force_evaluated(x, n)
    elif OPERATION == "negated":
        z = fastmath.negated(x)
    elif OPERATION == "tf32":
        z = fastmath.tf32(x)
    else:
        z = ptxas.opaque(x)
    tl.store(y_ptr + element, z)


@triton.jit
def ternary(x_ptr, y_ptr, z_ptr, OPERATION: tl.constexpr, BLOCK: tl.constexpr):
    element = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + element)
    y = tl.load(y_ptr + element)
    if OPERATION == "difference":
        z = fastmath.difference(x, y)
    elif OPERATION == "total":
        z = fastmath.total(x, y)
    elif OPERATION == "add":
        z = fastmath.add(x, y)
    elif OPERATION == "mul":
        z = fastmath.mul(x, y)
    elif OPERATION == "add a number":
        z = fastmath.add(x, 1.0)
    elif OPERATION == "product, then a sum":
        z = ptxas.rounded_product(x, y) + tl.load(z_ptr + element)
    elif OPERATION == "fma of numbers":
        z = fastmath.fma(x, 0.1, 0.7)
    else:
        z = fastmath.fma(x, y, tl.load(z_ptr + element))
    tl.store(z_ptr + element, z)


UNARY = {"upcast": ("bf16", "fp32"), "packed": ("fp32", "bf16")} | dict.fromkeys(
    ("settled", "negated", "tf32"), ("fp32", "fp32")
)
TERNARY = dict.fromkeys(("add", "mul", "fma", "add a number", "product, then a sum"), ("fp32", "fp32"))
TERNARY |= dict.fromkeys(("difference", "total"), ("bf16", "fp32"))


def sample(name: str) -> Kernel:
    function, types = (unary, UNARY[name]) if name in UNARY else (ternary, TERNARY[name])
    arguments = {"x_ptr": "*" + types[0], "y_ptr": "*" + types[1]}
    arguments |= {"n": "i32"} if function is unary else {"z_ptr": "*fp32"}
    return Kernel(name, function, BLOCK, 8, arguments, {"OPERATION": name, "BLOCK": BLOCK})


@pytest.fixture(scope="module")
def code() -> dict[str, list[tuple[str, str]]]:
    """Opcodes and operands of each sample and target ("fma 100")."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    finished = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=600
    )
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


def counts(instructions) -> Counter:
    return Counter(opcode.split(".")[0] for opcode, _ in instructions)


def registers(operands: str) -> list[int]:
    return [int(number) for number in re.findall(r"\bR(\d+)", operands)]


@pytest.mark.parametrize("cc", [80, 90, 100])
def test_two_instructions_make_fp32_of_a_pair(code, cc):
    instructions = code[f"upcast {cc}"]
    assert counts(instructions)["PRMT"] == 0
    upper = [registers(operands) for _, operands in instructions if "0xffff0000" in operands]
    assert len(upper) == 4
    shifts = [
        registers(operands)
        for opcode, operands in instructions
        if opcode.startswith(("SHF.L", "IMAD.U32")) and re.search(r"0x10\b|0x10000\b", operands)
    ]
    # The lower half of a register is the first element of its pair, and goes in front of the other.
    assert sorted([to + 1, source] for to, source in shifts) == sorted(upper)


@pytest.mark.parametrize("cc", [80, 90, 100])
def test_a_pair_is_packed_by_one_instruction_and_used_at_once(code, cc):
    instructions = code[f"packed {cc}"]
    packs = [registers(operands) for opcode, operands in instructions if opcode.startswith("F2FP")]
    assert len(packs) == 4
    assert all(first + 1 == second for _, second, first in packs)  # the second element is the upper half
    (store,) = [operands for opcode, operands in instructions if opcode == "STS.128"]
    assert registers(store)[-1] == min(to for to, *_ in packs)


@pytest.mark.parametrize("cc", [80, 90, 100])
def test_what_is_settled_is_used_at_once(code, cc):
    """By two stores, behind a condition that never holds: what was loaded is stored from where it was loaded to."""
    instructions = code[f"settled {cc}"]
    used = [registers(operands)[-1] for opcode, operands in instructions if opcode == "STS.128"]
    loaded = [registers(operands)[0] for opcode, operands in instructions if opcode.startswith("LDG.E.128")]
    stored = [registers(operands)[-1] for opcode, operands in instructions if opcode.startswith("STG.E.128")]
    assert len(used) == 2
    assert sorted(used) == sorted(loaded) == sorted(stored)


@pytest.mark.parametrize(
    ("name", "single", "paired"),
    [("add", "FADD", "FADD2"), ("mul", "FMUL", "FMUL2"), ("fma", "FFMA", "FFMA2")],
)
def test_blackwell_computes_on_pairs_and_others_do_not(code, name, single, paired):
    for cc in (80, 90):
        assert (counts(code[f"{name} {cc}"])[single], counts(code[f"{name} {cc}"])[paired]) == (8, 0)
    found = counts(code[f"{name} 100"])
    assert found[single] == 0
    assert found[paired] + (found["FFMA2"] if name == "mul" else 0) == 4  # a product may be x y + 0


def test_numbers_are_in_pairs_too(code):
    assert counts(code["add a number 100"])["FADD2"] == 4


@pytest.mark.parametrize("cc", [80, 90, 100])
def test_no_sum_takes_in_a_product(code, cc):
    found = counts(code[f"product, then a sum {cc}"])
    assert found["FFMA"] == 0
    assert found["FADD"] + 2 * found["FADD2"] == 8


def test_hopper_rounds_to_tf32(code):
    for cc, instructions in ((80, 0), (90, 8), (100, 8)):
        assert sum(opcode.startswith("F2FP.TF32") for opcode, _ in code[f"tf32 {cc}"]) == instructions


@pytest.mark.parametrize(("name", "negated"), [("difference", True), ("total", False)])
def test_blackwell_adds_to_bf16(code, name, negated):
    mixed = [operands for opcode, operands in code[f"{name} 100"] if opcode.startswith("FHADD")]
    assert len(mixed) == 8
    assert sum(".H1" in operands for operands in mixed) == 4
    assert all(("-R" in operands) == negated for operands in mixed)
    assert counts(code[f"{name} 90"])["FADD"] == 8


def test_values(device):
    def run(function, *tensors, operation):
        function[(1,)](*tensors, operation, BLOCK, num_warps=4)

    x, y, z = torch.randn(3, BLOCK, device=device)
    short = x.bfloat16()
    expected = {
        "add": x + y,
        "mul": x * y,
        "fma": x * y + z,
        "add a number": x + 1.0,
        "difference": short.float() - y,
        "total": short.float() + y,
    }
    for name, value in expected.items():
        out = z.clone()
        run(ternary, short if name in ("difference", "total") else x, y, out, operation=name)
        torch.testing.assert_close(out, value)
    out = z.clone()
    run(ternary, x, y, out, operation="product, then a sum")
    assert torch.equal(out, x * y + z)
    wide, out = x.double(), x.double()
    run(ternary, wide, wide, out, operation="fma of numbers")
    torch.testing.assert_close(out, 0.1 * wide + 0.7, rtol=2.0**-52, atol=2.0**-52)
    out = torch.empty_like(x)
    run(unary, x, out, 1, operation="tf32")
    assert (out.view(torch.int32) & 8191 == 0).all()
    assert ((out - x).abs() <= 2.0**-11 * x.abs()).all()
    run(unary, short, out, 1, operation="upcast")
    assert torch.equal(out, short.float())
    run(unary, x, out, 1, operation="negated")
    assert torch.equal(out, -x)
    run(unary, x, out, 1, operation="settled")
    assert torch.equal(out, x)
    packed = torch.empty_like(short)
    run(unary, x, packed, 1, operation="packed")
    torch.testing.assert_close(packed, short)  # the interpreter rounds towards zero
    for again in (x, short, x.half()):
        out = torch.empty_like(again)
        run(unary, again, out, 1, operation="renamed")
        assert torch.equal(out, again)


if __name__ == "__main__":
    found = {}
    for name in (*UNARY, *TERNARY):
        for cc in (80, 90, 100):
            program = Program(compile_for(sample(name), cc).sass)
            found[f"{name} {cc}"] = [
                (instruction.opcode, instruction.operands)
                for block in program.successors
                for instruction in program.blocks[block]
            ]
    print(json.dumps(found))
