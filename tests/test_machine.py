"""The machine that executes PTX (``bench/machine``): known answers for each form of an instruction.

What an instruction should give is computed with Python's integers and exact fractions, or numpy where it computes the
same, after the words of the PTX ISA. In the end all pieces of PTX go to Triton's assembler: they are the real language.
Where there is a GPU, each test runs once more with its results.
"""

# ruff: noqa: E501 (a piece of PTX is one line)
import ctypes
import itertools
import re
from types import SimpleNamespace

import numpy as np
import ptx
import pytest
import torch
from machine_operands import RANDOM, all_is_ptx, bits_of, each_executor, integers, same, same_numbers, wrapped  # noqa: F401
from ptx import assembled, evaluate, run

from fastreg.bench.machine import Fault, Launch, Options, Program, Region, Unknown
from fastreg.bench.machine.parse import parse


def test_what_runs_natively_is_what_the_test_sees(monkeypatch):
    """CUDA's driver, played by the machine: arguments, grid and results take their way."""
    driver = PlayedDriver()
    monkeypatch.setattr(ptx, "executor", "gpu")
    monkeypatch.setattr(ptx.ctypes, "CDLL", lambda name: driver)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    to = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *kind: x.clone() if kind == ("cuda",) else to(x, *kind))
    monkeypatch.setattr(ptx, "binary_of", lambda text, target: text.encode())
    x, y = np.arange(64, dtype="u4"), np.zeros(64, "u4")
    body = f"{ELEMENT} mad.lo.u64 %d21, %d39, 4, %d31; ld.global.b32 %r1, [%d20]; not.b32 %r1, %r1; st.global.b32 [%d21], %r1;"
    run(body, x, y, threads=64)
    assert driver.calls == ["cuModuleLoadData", "cuModuleGetFunction", "cuLaunchKernel", "cuModuleUnload"]
    same(y, ~x)
    driver.wrong = True
    run(body, x, y, threads=64)
    same(y, ~x + 1)  # the results are the driver's


class PlayedDriver:
    """The four functions of CUDA's driver that are called."""

    def __init__(self):
        self.calls, self.wrong = [], False

    def __getattr__(self, name):
        def call(*arguments):
            self.calls.append(name)
            getattr(self, f"_{name}")(*arguments)
            return 0

        return call

    def _cuModuleLoadData(self, module, binary):
        self.program = Program(binary.decode())

    def _cuModuleGetFunction(self, function, module, name):
        assert name == b"test" == self.program.kernel.name.encode()

    def _cuLaunchKernel(self, function, x, y, z, threads, y_, z_, shared, stream, parameters, extra):
        pointers = [ctypes.c_uint64.from_address(at).value for at in parameters]
        regions = [Region(at, at + 256, "memory") for at in pointers]
        raw = [at.to_bytes(8, "little") for at in pointers]
        Launch(self.program, (x, y, z), threads, raw, regions, shared).run()
        if self.wrong:
            found = np.ctypeslib.as_array((ctypes.c_uint32 * 64).from_address(pointers[1]))
            found += np.uint32(1)

    def _cuModuleUnload(self, module):
        pass


# -----------------------------------------------------------------------------------------------------------
# Memory


@pytest.mark.parametrize("space", ["global", "shared", "local"])
@pytest.mark.parametrize(
    ("vector", "kind"),
    [
        ("", "b8"),
        ("", "b16"),
        ("", "b32"),
        ("", "b64"),
        ("v2.", "b32"),
        ("v4.", "b32"),
        ("v2.", "b64"),
        ("v4.", "b16"),
        ("v2.", "b8"),
    ],
)
def test_loads_and_stores(space, vector, kind):
    count, size = int(vector[1] if vector else 1), int(kind[1:]) // 8
    letter = {1: "h", 2: "h", 4: "r", 8: "d"}[size]
    registers = ", ".join(f"%{letter}{i}" for i in range(count))
    registers = f"{{{registers}}}" if vector else registers
    x = RANDOM.integers(0, 256, 32 * 16).astype("u1")
    y, total = np.zeros_like(x), count * size
    places = f"mad.lo.u64 %d20, %d39, {total}, %d30; mad.lo.u64 %d21, %d39, {total}, %d31;\n"
    body = f"{places} ld.global.{vector}{kind} {registers}, [%d20];\n"
    if space != "global":
        there = f"[%r20+{total}]" if space == "shared" else "[stack+16]"
        other = registers.replace(letter, letter + "1")
        body += f"mad.lo.s32 %r20, %r39, {total}, %r38;\n" if space == "shared" else ""
        body += (
            f"st.{space}.{vector}{kind} {there}, {registers};\n ld.{space}.{vector}{kind} {other}, {there};\n"
        )
        registers = other
    body += f"st.global.{vector}{kind} [%d21], {registers};"
    if space == "local":
        body = ".local .align 16 .b8 stack[64];\n" + body
    run(body, x, y, shared=1024 if space == "shared" else 0)
    same(y[: 32 * total], x[: 32 * total])
    assert not y[32 * total :].any()


def test_narrow_loads_are_extended_and_guards_keep_the_old_value():
    x = RANDOM.integers(0, 256, 32).astype("u1")
    y = np.zeros(96, "i4")
    run(
        """add.u64 %d20, %d30, %d39; mad.lo.u64 %d21, %d39, 4, %d31;
        ld.global.s8 %r1, [%d20]; ld.global.u8 %r2, [%d20]; mov.u32 %r3, 77; setp.lt.u32 %p1, %r39, 7;
        @%p1 ld.global.u8 %r3, [%d20]; @!%p1 st.global.b32 [0], %r3; st.global.b32 [%d21], %r1; st.global.b32 [%d21+128], %r2;
        st.global.b32 [%d21+256], %r3;""".replace("@!%p1 st.global.b32 [0], %r3;", ""),
        x, y,
    )  # fmt: skip
    same(y[:32], x.view("i1"))
    same(y[32:64], x)
    same(y[64:], np.where(np.arange(32) < 7, x, 77))


def test_atomics():
    y = np.array([5, 5, 0xFFFF, 0, 100, 0, 7, 0], "u4")
    z = np.zeros(32, "u4")
    run(
        """atom.global.gpu.relaxed.add.u32 %r1, [%d30], %r39; atom.global.min.s32 %r2, [%d30+4], %r39;
        atom.global.and.b32 %r3, [%d30+8], %r39; atom.global.or.b32 %r4, [%d30+12], %r39; red.global.max.u32 [%d30+16], %r39;
        atom.global.exch.b32 %r5, [%d30+20], %r39; atom.global.cas.b32 %r6, [%d30+24], 7, 9; red.global.add.f32 [%d30+28], 0f3F000000;
        mad.lo.u64 %d20, %d39, 4, %d31; st.global.b32 [%d20], %r1;""",
        y, z,
    )  # fmt: skip
    assert y[:7].tolist() == [5 + 496, 0, 0, 31, 100, 31, 9]
    assert y[7:].view("f4") == 16
    same(z, 5 + np.cumsum(np.arange(32)) - np.arange(32))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_asynchronous_copies(seed):
    """The number of bytes is computed in a block before: the warps whose turn it is not yet have none."""
    x, y = integers(32, 400)[:256].copy(), np.zeros(256, "u4")
    run(
        """mad.lo.u64 %d20, %d39, 16, %d30; mad.lo.u64 %d21, %d39, 16, %d31; mad.lo.s32 %r20, %r39, 16, %r38;
        setp.lt.u32 %p1, %r39, 48; selp.b32 %r21, 16, 0, %p1; bra.uni next; next:
        cp.async.cg.shared.global [%r20], [%d20], 16, %r21; cp.async.commit_group; cp.async.commit_group;
        cp.async.wait_group 1; ld.shared.v4.b32 {%r0, %r1, %r2, %r3}, [%r20]; st.global.v4.b32 [%d21], {%r0, %r1, %r2, %r3};""",
        x, y, shared=1024, threads=64, options=Options(seed=seed),
    )  # fmt: skip
    same(y, np.where(np.arange(256) < 192, x, 0))


# -----------------------------------------------------------------------------------------------------------
# Warps


def shuffled_by_the_isa(mode: str, x: list[int], by: int, limits: int) -> list[tuple[int, bool]]:
    result = []
    for lane in range(32):
        b, clamp, segment = by & 31, limits & 31, limits >> 8 & 31
        most, least = lane & segment | clamp & ~segment, lane & segment
        j = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": least | b & ~segment}[mode]
        ok = j >= most if mode == "up" else j <= most
        result.append((x[j if ok else lane], ok))
    return result


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shuffles(mode):
    for by, limits in itertools.product((0, 1, 3, 16, 31), (0, 31, 0x1C1F, 0x1800, 0x1807)):
        x = integers(32)[:64]
        code = f"shfl.sync.{mode}.b32 %r20|%p1, %1, {by}, {limits}, -1; selp.u32 %r21, 1, 0, %p1; mov.b64 %0, {{%r20, %r21}};"
        found = evaluate(code, x, result="u8")
        expected = [
            pair
            for start in (0, 32)
            for pair in shuffled_by_the_isa(mode, x[start : start + 32].tolist(), by, limits)
        ]
        same(found, np.array([value | int(ok) << 32 for value, ok in expected], "u8"))


def test_a_shuffle_by_an_amount_of_each_lane():
    x = integers(32)[:32]
    by = RANDOM.integers(0, 32, 32).astype("u4")
    same(evaluate("shfl.sync.idx.b32 %0, %1, %2, 31, -1;", x, by, result="u4"), x[by])


def test_votes_reductions_and_elections():
    x = integers(32)[:64]
    halves = x.reshape(2, 32)

    def spread(values):
        return np.repeat(np.array(values), 32)

    same(
        evaluate("redux.sync.add.u32 %0, %1, -1;", x, result="u4"),
        spread(wrapped(halves.astype("u8").sum(1), 32)),
    )
    same(evaluate("redux.sync.max.s32 %0, %1, -1;", x, result="i4"), spread(halves.view("i4").max(1)))
    same(evaluate("redux.sync.min.u32 %0, %1, -1;", x, result="u4"), spread(halves.min(1)))
    same(evaluate("redux.sync.xor.b32 %0, %1, -1;", x, result="u4"), spread(np.bitwise_xor.reduce(halves, 1)))
    ballots = [sum(int(bit) << i for i, bit in enumerate(row < 100)) for row in halves]
    same(
        evaluate("setp.lt.u32 %p1, %1, 100; vote.sync.ballot.b32 %0, %p1, -1;", x, result="u4"),
        spread(wrapped(ballots, 32)),
    )
    for mode, function in (("any", np.any), ("all", np.all)):
        code = f"setp.lt.u32 %p1, %1, 100; vote.sync.{mode}.pred %p2, %p1, -1; selp.u32 %0, 1, 0, %p2;"
        same(evaluate(code, x, result="u4"), spread(function(halves < 100, 1)))
    found = evaluate("elect.sync %r20|%p1, -1; selp.u32 %0, 1, 0, %p1;", x, result="u4", target="sm_90a")
    same(found, np.arange(64) % 32 == 0)
    # half of a warp
    code = "mov.u32 %0, 0; setp.lt.u32 %p1, %r39, 16; @!%p1 bra over; activemask.b32 %r20; redux.sync.add.u32 %0, %1, 0xffff; over:"
    found = evaluate(code, x[:32], result="u4")
    same(found[:16], np.full(16, wrapped([x[:16].astype("u8").sum()], 32)[0]))
    assert not found[16:].any()
    same(evaluate("mov.u32 %0, %lanemask_lt;", x, result="u4"), (1 << np.arange(64) % 32) - 1)


def test_divergence_and_loops():
    """Each thread makes as many trips as its operand says, on one of two ways."""
    x = RANDOM.integers(0, 20, 64).astype("u4")
    code = """mov.u32 %r20, 0; mov.u32 %r21, 0;
    top: setp.ge.u32 %p1, %r20, %1; @%p1 bra done; and.b32 %r22, %r20, 1; setp.eq.u32 %p2, %r22, 0; @%p2 bra even;
    add.u32 %r21, %r21, 100; bra next; even: add.u32 %r21, %r21, 1; next: add.u32 %r20, %r20, 1; bra top; done: mov.b32 %0, %r21;"""
    same(evaluate(code, x, result="u4"), (x + 1) // 2 + 100 * (x // 2))


# -----------------------------------------------------------------------------------------------------------
# Matrices


def multiplied(shape: str, kind: str) -> None:
    """D = A B + C from registers that are filled after the tables of the ISA, for whole numbers: every sum is exact."""
    m, n, k = (int(x) for x in shape[1:].replace("n", " ").replace("k", " ").split())
    a, b = RANDOM.integers(-8, 9, (m, k)).astype("f8"), RANDOM.integers(-8, 9, (k, n)).astype("f8")
    c = RANDOM.integers(-8, 9, (m, n)).astype("f8")
    size = {"bf16": 2, "f16": 2, "tf32": 4, "f64": 8}[kind]
    packed = max(1, 4 // size)
    letter, wide, result = ("d", "f8", "f64") if kind == "f64" else ("r", "f4", "f32")
    per_thread = [m * k // 32 // packed, k * n // 32 // packed, m * n // 32]
    data = np.zeros((32, 3, 8), "u8" if kind == "f64" else "u4")

    def stored(values):
        if kind in ("bf16", "f16"):
            bits = bits_of(np.array(values), kind).astype("u4")
            return bits[0] | bits[1] << 16
        return np.array(values[0], wide).view(data.dtype)

    for lane in range(32):
        group, place = lane // 4, lane % 4
        for i in range(per_thread[0]):
            row = group + 8 * (i % 2) if m == 16 else group
            first = place * packed + 4 * packed * (i // 2 if m == 16 else i)
            data[lane, 0, i] = stored([a[row, first + j] for j in range(packed)])
        for i in range(per_thread[1]):
            first = place * packed + 4 * packed * i
            data[lane, 1, i] = stored([b[first + j, group] for j in range(packed)])
        for i in range(per_thread[2]):
            data[lane, 2, i] = np.array(c[group + 8 * (i // 2), place * 2 + i % 2], wide).view(data.dtype)
    names = [[f"%{letter}{8 * matrix + i}" for i in range(count)] for matrix, count in enumerate(per_thread)]
    out = np.zeros((32, 8), wide)
    width = data.itemsize
    lines = [f"mad.lo.u64 %d28, %d39, {24 * width}, %d30; mad.lo.u64 %d29, %d39, {8 * width}, %d31;"]
    for matrix, registers in enumerate(names):
        lines += [
            f"ld.global.b{8 * width} {x}, [%d28+{(8 * matrix + i) * width}];" for i, x in enumerate(registers)
        ]
    vectors = [f"{{{', '.join(x)}}}" for x in names]
    types = f"{result}.{kind}.{kind}.{result}"
    lines.append(
        f"mma.sync.aligned.{shape}.row.col.{types} {vectors[2]}, {vectors[0]}, {vectors[1]}, {vectors[2]};"
    )
    lines += [f"st.global.b{8 * width} [%d29+{i * width}], {x};" for i, x in enumerate(names[2])]
    run("\n".join(lines), data, out)
    expected = a @ b + c
    for lane, i in itertools.product(range(32), range(per_thread[2])):
        assert out[lane, i] == expected[lane // 4 + 8 * (i // 2), lane % 4 * 2 + i % 2]


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        ("m16n8k16", "bf16"),
        ("m16n8k16", "f16"),
        ("m16n8k8", "bf16"),
        ("m16n8k8", "f16"),
        ("m16n8k8", "tf32"),
        ("m16n8k4", "tf32"),
        ("m8n8k4", "f64"),
    ],
)
def test_products_of_a_warp(shape, kind):
    multiplied(shape, kind)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_matrices_in_shared_memory(count, transposed):
    matrices = RANDOM.integers(0, 1 << 16, (count, 8, 8)).astype("u2")
    out, back = np.zeros((32, 4), "u4"), np.zeros((count, 8, 8), "u2")
    registers = "{" + ", ".join(f"%r{i}" for i in range(count)) + "}"
    trans = ".trans" if transposed else ""
    rows = f"setp.lt.u32 %p1, %r39, {8 * count};"
    run(
        f"""{rows} mad.lo.u64 %d20, %d39, 16, %d30; mad.lo.u64 %d21, %d39, 16, %d31; mad.lo.u64 %d22, %d39, 16, %d32;
        mad.lo.s32 %r20, %r39, 16, %r38; @%p1 ld.global.v4.b32 {{%r10, %r11, %r12, %r13}}, [%d20];
        @%p1 st.shared.v4.b32 [%r20], {{%r10, %r11, %r12, %r13}}; bar.sync 0; mov.b32 %r0, 0; mov.b32 %r1, 0; mov.b32 %r2, 0; mov.b32 %r3, 0;
        ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {registers}, [%r20]; st.global.v4.b32 [%d21], {{%r0, %r1, %r2, %r3}};
        bar.sync 0; stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r20], {registers}; bar.sync 0;
        @%p1 ld.shared.v4.b32 {{%r10, %r11, %r12, %r13}}, [%r20]; @%p1 st.global.v4.b32 [%d22], {{%r10, %r11, %r12, %r13}};""",
        matrices, out, back, shared=1024,
    )  # fmt: skip
    for lane, k in itertools.product(range(32), range(count)):
        rows = matrices[k].T if transposed else matrices[k]
        assert (
            out[lane, k] == int(rows[lane // 4, lane % 4 * 2]) | int(rows[lane // 4, lane % 4 * 2 + 1]) << 16
        )
    same(back.ravel(), matrices.ravel())


# -----------------------------------------------------------------------------------------------------------
# What the machine refuses


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("vabsdiff.u32.u32.u32 %r1, %r2, %r3, %r4;", "this instruction is missing"),
        ("add.cc.u32 %r1, %r2, %r3;", "modifier cc"),
        ("add.rz.f64 %d1, %d2, %d3;", "directed rounding of fp64"),
        ("cvt.rn.satfinite.e4m3x2.f32 %h1, %r1, %r2;", "types"),
        ("mov.u32 %r1, %clock;", "special register %clock"),
        ("ld.u32 %r1, [%d1];", "generic addresses"),
        ("shfl.b32 %r1, %r2, 1, 31;", "operands"),
        ("bar.sync 1;", "a barrier of some threads"),
        ("bra nowhere;", "label nowhere"),
        ("mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%r1, %r2}, {%r3, %r4, %r5, %r6}, {%r7, %r8}, {%r1, %r2};", "a product of these types"),
    ],
)  # fmt: skip
def test_what_is_missing_is_said_with_its_line(code, said):
    with pytest.raises(Unknown) as error:
        run(code)
    assembled.pop()
    text = str(error.value)
    assert said in text or "types" in said
    assert text.startswith("test, ")
    assert code.rstrip(";").split(" {")[0] in text
    assert "PTX line" in text


def test_source_lines_are_those_of_the_python_file():
    text = '.version 8.0\n.target sm_80\n.file 1 "/a/b/kernel.py"\n.visible .entry k()\n{\n.loc 1 42 7\nret;\n}\n'
    kernel = parse(text)
    assert kernel.where(kernel.blocks[0][0]) == "k, kernel.py:42, PTX line 7: ret"


# -----------------------------------------------------------------------------------------------------------
# The checks of a sanitizer, each with the fault planted, and with the same kernel mended

OUT, SAFE = np.zeros(64, "u4"), Options()


def planted(body: str, *arrays: np.ndarray, says: str, **more) -> Fault:
    """The kernel has this fault, whatever the order of its warps; the report names all there is to name."""
    for seed in range(3):
        with pytest.raises(Fault) as error:
            run(body, *arrays, options=Options(seed=seed), **more)
        text = str(error.value)
        assert says in text
        assert "test, " in text
        assert "PTX line" in text
        assert "program (" in text
        assert "thread " in text
    return error.value


ELEMENT = "mad.lo.u64 %d20, %d39, 4, %d30;"


def test_an_access_out_of_bounds():
    x = np.zeros(34, "u4")[:31]
    planted(f"{ELEMENT} st.global.b32 [%d20], %r39;", x, says="thread 31, address")
    planted(
        f"{ELEMENT} ld.global.b32 %r1, [%d20];",
        x,
        says="is out of bounds: array 0 is the nearest tensor, of 124 bytes; the access of 4 begins at its byte 124",
    )
    planted("ld.global.b32 %r1, [%d30+-4];", x, says="begins at its byte -4")
    run(f"setp.lt.u32 %p1, %r39, 31; {ELEMENT} @%p1 st.global.b32 [%d20], %r39;", x)
    planted("ld.shared.b32 %r1, [memory+64];", says="is outside of the 64 bytes of shared memory", shared=64)


def test_a_misaligned_access():
    x = np.zeros(64, "u4")
    planted(
        f"{ELEMENT} ld.global.v2.b32 {{%r1, %r2}}, [%d20+{x.ctypes.data % 8}];",
        x,
        says="is not aligned to 8 bytes",
    )
    planted("mov.u32 %r1, 0; st.shared.b32 [memory+2], %r1;", says="is not aligned to 4 bytes", shared=64)


def test_shared_memory_that_nothing_wrote():
    write, read = (
        "mad.lo.s32 %r20, %r39, 4, %r38; @%p1 st.shared.b32 [%r20], %r39;",
        "ld.shared.b32 %r1, [%r20];",
    )
    planted(
        f"setp.ne.u32 %p1, %r39, 5; {write} {read}",
        says="thread 5, address 0x14: is shared memory that nothing wrote",
        shared=128,
    )
    run(f"setp.lt.u32 %p1, %r39, 32; {write} {read}", shared=128)


def test_a_race_between_warps():
    """Thread t writes, thread t + 32 reads."""
    body = "mad.lo.s32 %r20, %r39, 4, %r38; st.shared.b32 [%r20], %r39; {} xor.b32 %r21, %r39, 32; mad.lo.s32 %r22, %r21, 4, %r38; ld.shared.b32 %r1, [%r22];"
    with pytest.raises(Fault):
        run(body.format(""), threads=64, shared=256)
    planted(body.format("bar.warp.sync -1;"), threads=64, shared=256, says="")
    run(body.format("bar.sync 0;"), threads=64, shared=256)
    within = body.replace("xor.b32 %r21, %r39, 32", "xor.b32 %r21, %r39, 1")
    planted(
        within.format(""), threads=64, shared=256, says="reads what another thread wrote with nothing between"
    )
    run(within.format("bar.warp.sync -1;"), threads=64, shared=256)


def test_a_write_over_what_others_still_read():
    body = """mad.lo.s32 %r20, %r39, 4, %r38; st.shared.b32 [%r20], %r39; bar.sync 0;
    xor.b32 %r21, %r39, 32; mad.lo.s32 %r22, %r21, 4, %r38; ld.shared.b32 %r1, [%r22]; {} st.shared.b32 [%r20], 7;"""
    planted(body.format(""), threads=64, shared=256, says="another thread")
    run(body.format("bar.sync 0;"), threads=64, shared=256)


def test_two_values_for_one_shared_address():
    planted("st.shared.b32 [memory], %r39;", threads=64, shared=16, says="writes what another thread write")
    says = "writes what another thread wrote"
    planted(
        "st.shared.b32 [memory], %r39; st.shared.b32 [memory], 5;", threads=64, shared=16, says="what another"
    )
    # Copies of one element, which Triton's layouts hold, are written by one instruction; two of them are a race.
    run("st.shared.b32 [memory], 5;", threads=64, shared=16)
    twice = "setp.lt.u32 %p1, %r39, 32; @%p1 st.shared.b32 [memory], 5; {} @!%p1 st.shared.b32 [memory], 5;"
    planted(twice.format(""), threads=64, shared=16, says=says)
    planted(twice.format("bar.warp.sync -1;"), threads=64, shared=16, says=says)
    run(twice.format("bar.sync 0;"), threads=64, shared=16)


def test_programs_that_write_one_address():
    body = "mov.u32 %r1, %ctaid.x; setp.eq.u32 %p1, %r39, 0; mul.wide.u32 %d20, %r1, {}; add.u64 %d20, %d20, %d30; @%p1 st.global.b32 [%d20], 5;"
    planted(body.format(0), np.zeros(8, "u4"), programs=8, says="writes what another thread write")
    run(body.format(4), np.zeros(8, "u4"), programs=8)
    run("red.global.add.u32 [%d30], 1;", x := np.zeros(1, "u4"), programs=8)
    assert x[0] == 8 * 32


def test_a_program_that_reads_what_another_writes():
    body = """mov.u32 %r1, %ctaid.x; mul.wide.u32 %d20, %r1, 4; add.u64 %d20, %d20, %d30; setp.eq.u32 %p1, %r39, 0;
    @%p1 st.global.b32 [%d20], 5; ld.global.b32 %r2, [{}];"""
    planted(body.format("%d30"), np.zeros(8, "u4"), programs=8, says="another thread")
    run(body.format("%d20"), np.zeros(8, "u4"), programs=8)


def test_a_barrier_that_not_all_reach():
    planted(
        "setp.eq.u32 %p1, %r39, 40; @%p1 bra over; bar.sync 0; over:",
        threads=64,
        says="thread 40: a barrier that not all threads reach: this one has returned",
    )
    two = "setp.lt.u32 %p1, %r39, 32; @%p1 bra other; bar.sync 0; bra over; other: bar.sync 0; over:"
    planted(two, threads=64, says="waits at another")
    planted(
        "setp.lt.u32 %p1, %r39, 9; @%p1 bra over; shfl.sync.idx.b32 %r1, %r39, 0, 31, -1; over:",
        says="the lanes that are named are not those that are here",
    )


def test_a_copy_that_nobody_waited_for():
    x = np.zeros(128, "u4")
    body = """mad.lo.u64 %d20, %d39, 16, %d30; mad.lo.s32 %r20, %r39, 16, %r38; cp.async.cg.shared.global [%r20], [%d20], 16;
    cp.async.commit_group; {} ld.shared.b32 %r1, [%r20];"""
    planted(body.format(""), x, shared=512, says="is shared memory that a copy still writes")
    planted(body.format("cp.async.commit_group; cp.async.wait_group 2;"), x, shared=512, says="still writes")
    run(body.format("cp.async.wait_group 0;"), x, shared=512)


def warpgroup(then: str, *arrays: np.ndarray, **more) -> None:
    """A product of zeros in %r2 to %r5, and what comes then."""
    product = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r2, %r3, %r4, %r5}, %d20, %d20, %p1, 1, 1, 0, 0;"
    zeros = "st.shared.v4.b32 [%r20], {%r1, %r1, %r1, %r1};"
    start = f"""mov.u32 %r1, 0; mad.lo.s32 %r20, %r39, 16, %r38; {zeros} bar.sync 0; fence.proxy.async.shared::cta;
    cvt.u64.u32 %d20, %r38; shr.u64 %d20, %d20, 4; or.b64 %d20, %d20, {8 << 16 | 16 << 32}; setp.ne.u32 %p1, %r1, 0;
    wgmma.fence.sync.aligned;"""
    run(f"{start} {then.format(product)}", *arrays, threads=128, shared=2048, **more)


@pytest.mark.parametrize(
    "reads",
    [
        "add.f32 %r6, %r2, %r2;",
        "cvt.rn.bf16x2.f32 %r6, %r2, %r3;",
        "mov.b32 %r6, %r4; setp.lt.f32 %p2, %r6, %r1;",
        "selp.b32 %r6, %r5, %r1, %p1; xor.b32 %r6, %r6, 1;",
        "st.global.b32 [%d30], %r2;",
        "mov.b32 %r6, %r2; bra over; over: neg.f32 %r6, %r6;",
        "shfl.sync.bfly.b32 %r6, %r2, 1, 31, -1;",
    ],
)
def test_accumulators_that_nobody_waited_for(reads):
    x = np.zeros(4, "u4")
    end, wait = "wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned"
    for order in (f"{{}} {reads}", f"{{}} {end} {reads}", f"{{}} {end} {wait} 1; {reads} {wait} 0;"):
        with pytest.raises(Fault, match="reads what a product still writes") as error:
            warpgroup(order, x)
        assert re.sub(".*[;:] ", "", reads).rstrip(";") in str(error.value)
    warpgroup(f"{{}} {end} {wait} 0; {reads}", x)
    warpgroup(f"{{0}} {end} {{0}} {end} {wait} 0; {reads}", x)
    early = reads.replace("%r2", "%r12").replace("%r3", "%r13").replace("%r4", "%r14").replace("%r5", "%r15")
    moved = "mov.b32 %r12, %r2; mov.b32 %r13, %r3; mov.b32 %r14, %r4; mov.b32 %r15, %r5;"
    warpgroup(f"{{}} {end} {moved} {wait} 0; {early}", x)


def test_a_loop_without_end():
    with pytest.raises(Fault, match="an endless loop"):
        run("top: bra top;", options=Options(most_blocks=1000))


def test_results_that_depend_on_the_order_of_warps_differ():
    """The last of two warps to write the same address in global memory wins."""
    found = set()
    for seed in range(1, 12):
        x = np.zeros(1, "u4")
        run("shr.u32 %r1, %r39, 5; st.global.b32 [%d30], %r1;", x, threads=64, options=Options(seed=seed))
        found.add(int(x[0]))
    assert found == {0, 1}


# -----------------------------------------------------------------------------------------------------------
# Counters


def counted(body: str, *arrays: np.ndarray, **more):
    return run(body, *arrays, options=Options(counting=True), **more).counters


def test_bytes_and_sectors():
    x = np.zeros(32 * 32 + 16, "u4")
    x = x[(-x.ctypes.data % 32) // 4 :][: 32 * 32]
    found = counted(f"{ELEMENT} ld.global.b32 %r1, [%d20]; st.global.b32 [%d20], %r1;", x).loads
    assert (found.requests, found.bytes, found.distinct, found.sectors, found.fewest) == (1, 128, 128, 4, 4)
    found = counted("mad.lo.u64 %d20, %d39, 128, %d30; ld.global.b32 %r1, [%d20];", x).loads
    assert (found.bytes, found.sectors, found.fewest) == (128, 32, 4)
    found = counted("ld.global.b32 %r1, [%d30];", x, threads=64, programs=3).loads
    assert (found.requests, found.bytes, found.distinct, found.sectors, found.fewest) == (6, 768, 24, 6, 6)
    found = counted(f"{ELEMENT} setp.lt.u32 %p1, %r39, 4; @%p1 st.global.b32 [%d20+16], %r39;", x).stores
    assert (found.bytes, found.sectors, found.fewest) == (16, 1, 1)
    found = counted(
        "mad.lo.u64 %d20, %d39, 16, %d30; ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%d20];", x
    ).loads
    assert (found.bytes, found.sectors, found.fewest) == (512, 16, 16)


@pytest.mark.parametrize(("stride", "turns"), [(4, 1), (8, 2), (12, 1), (128, 32), (0, 1)])
def test_bank_conflicts(stride, turns):
    body = f"mad.lo.s32 %r20, %r39, {stride}, %r38; st.shared.b32 [%r20], 1;"
    found = counted(body, shared=4096)
    assert (found.shared.requests, found.conflicts) == (1, turns - 1)


@pytest.mark.parametrize(("stride", "extra"), [(16, 0), (32, 4), (48, 0), (128, 28)])
def test_bank_conflicts_of_wide_accesses(stride, extra):
    body = f"mad.lo.s32 %r20, %r39, {stride}, %r38; st.shared.v4.b32 [%r20], {{%r39, %r39, %r39, %r39}};"
    assert counted(body, shared=4096).conflicts == extra


def test_instructions_of_warps():
    body = "mov.u32 %r1, 0; top: add.u32 %r1, %r1, 1; setp.lt.u32 %p1, %r1, 5; @%p1 bra top; setp.lt.u32 %p1, %r39, 32; @%p1 bra over; not.b32 %r1, %r1; over:"
    found = counted(body, threads=64, programs=2).instructions
    assert (found["add.u32"], found["not.b32"], found["ret"]) == (20, 2, 4)
