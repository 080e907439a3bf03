"""``fastreg inspect``: the counting is right on kernels whose machine code is known, and every declared
kernel of every family keeps its budget.

The kernels of the test process may be decorated for the interpreter (``TRITON_INTERPRET=1``) and can then not
be compiled, so all compiling happens in subprocesses without that variable: this very file, run as a script,
reports on the kernels below; ``python -m fastreg.bench.inspect`` reports on the families.
"""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
typer = pytest.importorskip("typer")
import triton.language as tl  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

import fastreg.bench.inspect as inspect_module  # noqa: E402
from fastreg.bench.gpus import GPUS, RATES, RESOURCES, TARGETS  # noqa: E402
from fastreg.bench.inspect import (  # noqa: E402
    Prediction,
    Report,
    declared,
    predict,
    report_on,
    to_json,
    violations,
)
from fastreg.bench.report import static_table  # noqa: E402
from fastreg.bench.sass import (  # noqa: E402
    KINDS,
    Budget,
    InspectError,
    Kernel,
    Program,
    access_bytes,
    accesses,
    kind,
)
from fastreg.kernels import ptxas  # noqa: E402

# -----------------------------------------------------------------------------------------------------------
# Kernels whose machine code is known


@triton.jit
def copy(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets, mask=offsets < n), mask=offsets < n)


@triton.jit
def scaled_copy(x_ptr, y_ptr, n, scale, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < n).to(tl.float32)
    tl.store(y_ptr + offsets, x * scale, mask=offsets < n)


@triton.jit
def rand_dropout(x_ptr, y_ptr, n, p: "fp32", seed: "i32", BLOCK: tl.constexpr):  # noqa: F821
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < n).to(tl.float32)
    keep = tl.rand(seed, offsets) > p
    tl.store(y_ptr + offsets, tl.where(keep, x * 2.0, 0.0), mask=offsets < n)


@triton.jit
def sum_of_rows(x_ptr, y_ptr, stride, rows, BLOCK: tl.constexpr):
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for row in range(rows):
        total += tl.load(x_ptr + row * stride + columns).to(tl.float32)
    tl.store(y_ptr + columns, total)


@triton.jit
def nested_loops(x_ptr, y_ptr, stride, rows, chunks, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    for chunk in range(chunks):
        total = tl.zeros([BLOCK], tl.float32)
        for row in range(rows):
            total += tl.load(x_ptr + (chunk * rows + row) * stride + columns).to(tl.float32)
        tl.store(y_ptr + chunk * BLOCK + columns, total)


@triton.jit
def spilling(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets)
    for _ in range(8):
        x += tl.load(x_ptr + tl.program_id(0) * BLOCK + offsets)
        y = tl.sum(x, axis=0)
        x = x * y
    tl.store(y_ptr + offsets, x)


@triton.jit
def row_sum(x_ptr, y_ptr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    total = tl.sum(tl.load(x_ptr + row * BLOCK + tl.arange(0, BLOCK)).to(tl.float32), axis=0)
    tl.store(y_ptr + row, total)


@triton.jit
def norms(x_ptr, y_ptr, TERMS: tl.constexpr, BLOCK: tl.constexpr):
    """Of BLOCK columns, one a thread or more."""
    x = tl.load(x_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))
    squares = ptxas.terms(x, x, 0) if TERMS else x * x
    tl.store(y_ptr + tl.program_id(0), tl.sum(squares, 0))


BF16 = {"x_ptr": "*bf16", "y_ptr": "*bf16", "n": "i32"}
STREAM = {"elements": 2048, "constants": {"BLOCK": 2048}, "divisible_by_16": ("n",)}
COPY = Kernel("copy", copy, bytes_per_element=4, arguments=BF16, **STREAM)
SUM = Kernel(
    "sum of rows",
    sum_of_rows,
    elements=2048 * 64,
    bytes_per_element=2,
    arguments={"x_ptr": "*bf16", "y_ptr": "*fp32", "stride": "i32", "rows": "i32"},
    constants={"BLOCK": 2048},
    divisible_by_16=("stride",),
    trips=64,
)
NESTED = Kernel(
    "nested loops",
    nested_loops,
    elements=2048 * 64 * 4,
    bytes_per_element=2,
    arguments={"x_ptr": "*bf16", "y_ptr": "*fp32", "stride": "i32", "rows": "i32", "chunks": "i32"},
    constants={"BLOCK": 2048},
    divisible_by_16=("stride",),
    trips=(4, 64),
)
SAMPLES = [
    COPY,
    Kernel("scaled copy", scaled_copy, bytes_per_element=4, arguments=BF16 | {"scale": "fp32"}, **STREAM),
    Kernel("rand dropout", rand_dropout, bytes_per_element=4, arguments=BF16, **STREAM),
    replace(COPY, name="unaligned copy", divisible_by_16=()),
    replace(COPY, name="narrow copy", elements=512, constants={"BLOCK": 512}),
    replace(COPY, name="overstated copy", bytes_per_element=8),
    SUM,
    replace(SUM, name="forgotten loop", trips=()),
    NESTED,
    Kernel(
        "spilling",
        spilling,
        elements=16384,
        bytes_per_element=8,
        arguments={"x_ptr": "*fp32", "y_ptr": "*fp32"},
        constants={"BLOCK": 32768},
        num_warps=4,
        trips=8,
    ),
    Kernel(
        "row sum",
        row_sum,
        elements=4096,
        bytes_per_element=2,
        arguments={"x_ptr": "*bf16", "y_ptr": "*fp32"},
        constants={"BLOCK": 4096},
        budget=Budget(narrow_stores=1),
    ),
    *(
        Kernel(
            f"norms of {block} {dtype}{', terms' * terms}",
            norms,
            block,
            8,
            {"x_ptr": f"*{dtype}", "y_ptr": f"*{dtype}"},
            {"TERMS": terms, "BLOCK": block},
        )
        for block in (128, 1024)
        for dtype in ("fp32", "fp64")
        for terms in (False, True)
    ),
    replace(COPY, name="unknown argument", arguments=BF16 | {"z_ptr": "*bf16"}),
    replace(COPY, name="untyped argument", arguments={"y_ptr": "*bf16", "n": "i32"}, constants={}),
]

# -----------------------------------------------------------------------------------------------------------
# Compiling in processes of their own

pytestmark = pytest.mark.xdist_group("inspect")  # one process compiles, once, on all cores
HOUR = 3600  # all variants of a family take minutes to compile
COMPILING = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def run(*arguments: str, **changes: str) -> subprocess.CompletedProcess:
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=COMPILING | changes, capture_output=True, text=True, timeout=HOUR)


@pytest.fixture(scope="session")
def samples(tmp_path_factory) -> dict[str, dict]:
    """The JSON reports on SAMPLES, compiled for sm_90."""
    path = tmp_path_factory.mktemp("inspect") / "samples.json"
    finished = run(__file__, str(path))
    assert finished.returncode == 0, finished.stderr
    return json.loads(path.read_text())


@pytest.fixture(scope="session")
def violations_of(tmp_path_factory):
    """Gives the violations of a kernel on a target, from one run a session for all kernels of the same options."""

    @cache
    def compiled(cc: int, options: str) -> tuple[subprocess.CompletedProcess, Path]:
        path = tmp_path_factory.mktemp("inspect") / "reports.json"
        chosen = [f"--target={cc}", options, f"--json={path}", "--no-check"]
        return run("-m", "fastreg.bench.inspect", *chosen), path

    def violations_of(family: str, name: str, cc: int, options: str) -> list[str]:
        finished, path = compiled(cc, options)
        reports = json.loads(path.read_text())["reports"] if path.exists() else []
        found = {(report["family"], report["kernel"]): report["violations"] for report in reports}
        assert (family, name) in found, finished.stderr
        return found[family, name]

    return violations_of


# -----------------------------------------------------------------------------------------------------------
# Every declared kernel of every family: the headlines by default, all on all targets with -m slow


def kernels(headline: bool) -> list:
    chosen = [(family, kernel.name) for family, kernel in declared() if kernel.headline >= headline]
    return [pytest.param(family, name, id=f"{family}: {name}") for family, name in chosen]


@pytest.mark.parametrize(("family", "name"), kernels(headline=True))
def test_headline_kernel_keeps_its_budget(violations_of, family, name):
    assert violations_of(family, name, 90, "--headline") == []


@pytest.mark.slow
@pytest.mark.timeout(HOUR)
@pytest.mark.parametrize("cc", TARGETS)
@pytest.mark.parametrize(("family", "name"), kernels(headline=False))
def test_declared_kernel_keeps_its_budget(violations_of, family, name, cc):
    assert violations_of(family, name, cc, f"--family={family}") == []


@pytest.mark.parametrize("name", ["forward bf16 flipout", "forward fp16 gaussian"])
def test_noisy_products_run_on_the_matrix_units(name):
    """Of Hopper, with the noisy weights from registers: HGMMA with a register in front of the descriptor."""
    finished = run(
        "-m", "fastreg.bench.inspect", "--family=dual_linear", f"--kernel={name}", "--target=90", "--sass"
    )
    assert finished.returncode == 0, finished.stderr
    products = re.findall(r"HGMMA\.\S+ R\d+, (R\d+, )?gdesc", finished.stdout)
    assert sum(map(bool, products)) >= 4  # a tile of 64 columns has four steps of 16, of both products
    assert len(products) >= 8
    assert not re.search(r"\bHMMA\b", finished.stdout)


def test_names_of_declared_kernels_are_distinct():
    names = [(family, kernel.name) for family, kernel in declared()]
    assert len(names) == len(set(names))


# -----------------------------------------------------------------------------------------------------------
# Counting real machine code


def test_copy_is_all_wide_and_nearly_free(samples):
    report = samples["copy"]
    assert (report["loads"], report["stores"]) == ({"16": 2}, {"16": 2})
    assert report["kinds"]["lsu"] == 4 / 16  # four accesses for the sixteen elements of a thread
    assert report["instructions"] < 2
    assert report["accessed_bytes_per_element"] == 4
    assert report["violations"] == []


def test_instructions_per_element_of_known_kernels(samples):
    # Counted by hand in the disassembly; a new assembler may move them a little.
    assert samples["scaled copy"]["instructions"] == pytest.approx(4.5, abs=0.4)
    assert samples["scaled copy"]["kinds"]["fma"] == pytest.approx(1, abs=0.1)
    assert samples["rand dropout"]["instructions"] == pytest.approx(60.5, abs=2.5)
    assert samples["rand dropout"]["kinds"]["imad"] > 20  # ten rounds, two products each


def test_rand_for_every_element_is_not_memory_bound(samples):
    prediction = samples["rand dropout"]["predictions"][0]
    assert prediction["gpu"] == "H100"
    assert prediction["bound"] != "memory"
    assert any("headroom" in line for line in samples["rand dropout"]["violations"])


def test_kinds_add_up_to_the_instructions(samples):
    for report in samples.values():
        if "error" not in report:
            kinds = report["kinds"]
            assert report["instructions"] == pytest.approx(sum(kinds.values()) - kinds["control"])


def test_missing_alignment_shows_as_narrow_accesses(samples):
    report = samples["unaligned copy"]
    assert (report["loads"], report["stores"]) == ({"2": 16}, {"2": 16})
    assert [line.split(" (")[0] for line in report["violations"]] == [
        "16 loads below 16 bytes",
        "16 stores below 16 bytes",
    ]


def test_too_small_a_block_shows_as_narrow_accesses(samples):
    assert samples["narrow copy"]["loads"] == {"8": 1}
    assert len(samples["narrow copy"]["violations"]) == 2


def test_more_bytes_declared_than_accessed(samples):
    assert any("are declared" in line for line in samples["overstated copy"]["violations"])


def test_spill(samples):
    report = samples["spilling"]
    assert report["spill_instructions"] > 0
    assert report["stack_bytes"] > 0
    assert any(line.startswith("spills") for line in report["violations"])


def test_reduction_exchanges_through_shared_memory(samples):
    report = samples["row sum"]
    assert report["shared_bytes"] > 0
    assert report["exchanges"]["SHFL"] > 0
    (line,) = report["violations"]  # the narrow store of the sum is allowed
    assert "shared memory" in line


@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
def test_a_product_before_a_sum_over_lanes(samples, dtype):
    """It is contracted where a thread has one alone; ``terms`` hides it there, and there only."""
    plain = {block: samples[f"norms of {block} {dtype}"] for block in (128, 1024)}
    hidden = {block: samples[f"norms of {block} {dtype}, terms"] for block in (128, 1024)}
    assert "sums over lanes" in plain[128]["violations"][0]
    assert [report["one_sided_sums"] for report in (plain[1024], hidden[128], hidden[1024])] == [0, 0, 0]
    assert hidden[128]["instructions"] == plain[128]["instructions"]
    assert hidden[1024]["kinds"] == plain[1024]["kinds"]


def test_loop_counts_by_its_trips(samples):
    report = samples["sum of rows"]
    (size,) = report["loops"]
    inside = 64 * size / (64 * 16)  # 64 trips for 64 rows of 16 elements a thread
    assert report["instructions"] == pytest.approx(inside, rel=0.1)
    assert report["accessed_bytes_per_element"] == pytest.approx(2 + 4 / 64)


def test_nested_loops_multiply(samples):
    report = samples["nested loops"]
    outer, inner = report["loops"]
    assert outer > inner
    assert report["accessed_bytes_per_element"] == pytest.approx(2 + 4 / 64)
    assert report["instructions"] == pytest.approx(samples["sum of rows"]["instructions"], rel=0.1)


def test_loop_without_trips_is_an_error(samples):
    assert "0 trip counts are declared, the code has 1 loop" in samples["forgotten loop"]["error"]


def test_wrong_declarations_are_named(samples):
    assert "no argument z_ptr" in samples["unknown argument"]["error"]
    assert "declare the type or value of x_ptr, BLOCK" in samples["untyped argument"]["error"]


def test_an_interpreted_kernel_can_not_be_compiled(tmp_path):
    path = tmp_path / "samples.json"
    finished = run(__file__, str(path), TRITON_INTERPRET="1")
    assert finished.returncode == 0, finished.stderr
    errors = [report["error"] for report in json.loads(path.read_text()).values()]
    assert all("unset TRITON_INTERPRET" in error for error in errors)


# -----------------------------------------------------------------------------------------------------------
# Reading a listing


def listing(*lines: str) -> Program:
    """A program from bare instructions and labels, dressed as nvdisasm prints them."""
    dressed = [line if line.endswith(":") else f"        /*0000*/    {line} ;" for line in lines]
    return Program("\n".join(dressed))


TRAP = ("EXIT", ".trap:", "BRA `(.trap)", "NOP", "NOP")


def test_trap_and_padding_do_not_count():
    program = listing("FADD R0, R1, R2", *TRAP)
    assert program.loops == []
    assert program.executed(()) == {"FADD": 1, "EXIT": 1}


def test_skipped_code_counts_once():
    program = listing("@P0 BRA `(.end)", "FMUL R0, R0, R1", ".end:", "STG.E [R2], R0", *TRAP)
    assert program.executed(())["FMUL"] == 1


def test_slow_path_behind_the_exit_is_no_loop():
    program = listing(
        "@P0 BRA `(.slow)", ".back:", "FADD R0, R1, R2", *TRAP, ".slow:", "FMUL R1, R1, R2", "BRA `(.back)"
    )
    assert program.loops == []
    assert program.executed(()) == {"BRA": 2, "FADD": 1, "EXIT": 1, "FMUL": 1}


def test_slow_path_of_a_loop_belongs_to_it():
    program = listing(
        *(".loop:", "@P1 BRA `(.slow)", ".back:", "FADD R0, R1, R2", "@P0 BRA `(.loop)"),
        *(*TRAP, ".slow:", "FMUL R1, R1, R2", "BRA `(.back)"),
    )
    assert program.executed(5)["FADD"] == 5
    assert program.executed(5)["FMUL"] == 5


def test_called_subroutine_counts():
    division = ("$div:", "MUFU.RCP R1, R2", "RET.REL.NODEC R4 `(kernel)")
    program = listing("CALL.REL.NOINC `($div)", "FADD R0, R1, R2", *TRAP, *division)
    assert program.executed(())["MUFU.RCP"] == 1
    assert program.executed(())["FADD"] == 1


def test_nested_and_consecutive_loops_in_order_of_address():
    program = listing(
        *("MOV R0, R1", ".outer:", "FADD R0, R0, R1", ".inner:", "FMUL R0, R0, R1", "@P0 BRA `(.inner)"),
        *("@!P1 BRA `(.outer)", ".last:", "FFMA R0, R0, R1, R2", "BRA.U UP0, `(.last)", *TRAP),
    )
    counts = program.executed((3, 5, 7))
    assert (counts["MOV"], counts["FADD"], counts["FMUL"], counts["FFMA"]) == (1, 3, 15, 7)
    with pytest.raises(InspectError, match=r"1 trip counts are declared, the code has 3 loops of 4, 2, 2"):
        program.executed(3)


def test_uniform_branch_with_a_predicate_operand_is_conditional():
    program = listing("BRA.U !UP0, `(.end)", "FADD R0, R1, R2", ".end:", *TRAP)
    assert program.executed(())["FADD"] == 1


@pytest.mark.parametrize(
    ("expected", "opcodes"),
    [
        ("fma", "FFMA FADD.FTZ FADD2 HFMA2.MMA HFMA2.BF16_V2 HADD2.F32"),
        ("imad", "IMAD.WIDE.U32 IMAD.HI.U32 IMAD.MOV.U32 IMAD.IADD"),
        ("alu", "LOP3.LUT IADD3.X FMNMX FSETP.GEU.AND FSEL PRMT LEA.HI.X VIADD SHF.L.U32 SEL MOV"),
        ("alu", "F2FP.BF16.F32.PACK_AB I2FP.F32.S32"),
        ("mufu", "MUFU.EX2 MUFU.RCP64H"),
        ("conversion", "F2F.F64.F32 I2F.U32.RP F2I.FTZ.U32.TRUNC.NTZ"),
        ("lsu", "LDG.E.128 STG.E.128 LDS.64 STS.128 SHFL.BFLY LDL ATOMG.E.ADD.F32"),
        ("fp64", "DFMA DSETP.GT.AND"),
        ("tensor", "HMMA.16816.F32 HGMMA.64x128x16.F32.BF16 UTCHMMA"),
        ("uniform", "UIADD3 ULDC.64 R2UR LDCU.64 USHF.L.U32"),
        ("control", "BRA.U EXIT NOP BAR.SYNC.DEFER_BLOCKING BSYNC.RECONVERGENT"),
    ],
)
def test_kind(expected, opcodes):
    assert {kind(opcode) for opcode in opcodes.split()} == {expected}


@pytest.mark.parametrize(
    ("opcode", "expected"),
    [
        ("LDG.E.128", 16),
        ("LDG.E.64.CONSTANT", 8),
        ("LDG.E.LTC128B", 4),
        ("STG.E", 4),
        ("STG.E.U16", 2),
        ("LDG.E.S8", 1),
        ("LDG.E.ENL2.256", 32),
    ],
)
def test_access_bytes(opcode, expected):
    assert access_bytes(opcode) == expected


def test_only_global_accesses_have_widths():
    assert accesses({"LDG.E.128": 3, "LDS.64": 5, "LDL": 7, "LDGSTS.E.BYPASS.128": 1}, "loads") == {16: 4}


# -----------------------------------------------------------------------------------------------------------
# Predictions and budgets


def test_every_target_has_a_rate_for_every_resource():
    assert set(RATES) == set(TARGETS) == {gpu.cc for gpu in GPUS}
    assert all(set(rates) == {"issue", *RESOURCES} for rates in RATES.values())
    assert {kind for kinds in RESOURCES.values() for kind in kinds} <= set(KINDS)


def demand(**counts: float) -> tuple[str, float]:
    """Busiest resource of an H100 and its time for these instructions per element, by opcode."""
    h100 = next(gpu for gpu in GPUS if gpu.name == "H100")
    prediction = predict(4.0, h100, {opcode.replace("_", "."): count for opcode, count in counts.items()})
    assert prediction.memory_ps == pytest.approx(4 / 3.0)
    return prediction.busiest, prediction.issue_ps * 132 * 1.70 * 1e-3  # clocks of one SM


def test_bounds_by_hand():
    assert demand(FFMA=128) == ("issue", pytest.approx(1))
    assert demand(LOP3=64, FFMA=32) == ("alu", pytest.approx(1))
    assert demand(IMAD=64, FFMA=32) == ("imad", pytest.approx(1))
    assert demand(IMAD_WIDE_U32=32) == ("imad", pytest.approx(1))
    assert demand(MUFU_EX2=8, F2F_F64_F32=8) == ("xu", pytest.approx(1))
    assert demand(SHFL_BFLY=32, UIADD3=64, BRA=32) == ("issue", pytest.approx(1))


CLEAN = Report(
    kernel="clean",
    cc=90,
    registers=32,
    stack_bytes=0,
    spill_instructions=0,
    shared_bytes=0,
    loads={16: 2},
    stores={16: 2},
    exchanges={"LDS": 0, "STS": 0, "SHFL": 0},
    atomics=0,
    loops=[],
    instructions=4.5,
    kinds=dict.fromkeys(KINDS, 0.0) | {"fma": 4.5},
    bytes_per_element=4,
    accessed_bytes_per_element=4,
    predictions=[Prediction("H100", memory_ps=1.3, issue_ps=0.2, busiest="issue")],
    budget=Budget(max_instructions=5),
)
SLOW = [Prediction("H100", memory_ps=1.3, issue_ps=2.6, busiest="alu")]


def test_a_clean_report_has_no_violations():
    assert violations(CLEAN) == []


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"stack_bytes": 8}, "spills"),
        ({"spill_instructions": 1}, "spills"),
        ({"one_sided_sums": 2}, "2 sums over lanes"),
        ({"loads": {16: 2, 8: 1}}, "1 loads below 16 bytes (8×1), 0 allowed"),
        ({"stores": {4: 2}}, "2 stores below 16 bytes (4×2), 0 allowed"),
        ({"shared_bytes": 16}, "16 bytes of shared memory"),
        ({"instructions": 5.1}, "5.1 instructions per element, 5 allowed"),
        ({"bytes_per_element": 5}, "5 bytes per element are declared"),
        ({"predictions": SLOW}, "predicted headroom 0.50 on H100 (alu"),
    ],
)
def test_each_promise_is_checked(change, line):
    (found,) = violations(replace(CLEAN, **change))
    assert found.startswith(line)


@pytest.mark.parametrize(
    ("change", "allowance"),
    [
        ({"loads": {16: 2, 8: 1}}, {"narrow_loads": 1}),
        ({"stores": {8: 2}}, {"access_bytes": 8}),
        ({"shared_bytes": 16}, {"shared_bytes": 16}),
        ({"instructions": 9.0}, {"max_instructions": None}),
        ({"instructions": 9.0, "cc": 80}, {}),  # that budget is for sm_90
        ({"predictions": SLOW}, {"min_headroom": {80: 1.0, 90: 0.5}}),
        ({"accessed_bytes_per_element": None, "bytes_per_element": 9}, {}),
    ],
)
def test_each_promise_can_be_relaxed(change, allowance):
    assert violations(replace(CLEAN, **change, budget=replace(CLEAN.budget, **allowance))) == []


# -----------------------------------------------------------------------------------------------------------
# The command


@pytest.fixture
def command(monkeypatch):
    """Runs the command on two made-up kernels, ``clean`` and ``dirty``, without compiling."""

    def fake_report(kernel: Kernel, cc: int) -> Report:
        return replace(CLEAN, kernel=kernel.name, cc=cc, stack_bytes=8 if kernel.name == "dirty" else 0)

    kernels = [("dropout", replace(COPY, name=name, headline=name == "clean")) for name in ("clean", "dirty")]
    monkeypatch.setattr(inspect_module, "declared", lambda families: kernels)
    monkeypatch.setattr(inspect_module, "report_on", fake_report)
    app = typer.Typer()
    app.command()(inspect_module.inspect)
    return lambda *arguments: CliRunner().invoke(app, arguments)


def test_command_lists_violations_and_exits_with_1(command, tmp_path):
    result = command(
        *("--target", "90", "--json", str(tmp_path / "out.json"), "--record", str(tmp_path / "record.json"))
    )
    assert result.exit_code == 1
    assert "dropout: dirty, sm_90: spills" in result.output
    assert "not measured" in result.output
    reports = json.loads((tmp_path / "out.json").read_text())["reports"]
    whole, record = (json.loads((tmp_path / name).read_text()) for name in ("out.json", "record.json"))
    assert static_table(record) == static_table(whole)  # what is recorded is what is shown
    assert [len(report["violations"]) for report in reports] == [0, 1]


def test_command_passes_without_violations(command):
    assert command("--kernel", "clean").exit_code == 0
    assert command("--no-check").exit_code == 0


def test_an_error_of_one_kernel_leaves_the_others_their_reports(command, monkeypatch, tmp_path):
    def failing(kernel: Kernel, cc: int) -> Report:
        if kernel.name == "dirty":
            raise InspectError("dirty does not compile")
        return replace(CLEAN, kernel=kernel.name, cc=cc)

    monkeypatch.setattr(inspect_module, "report_on", failing)
    result = command("--target", "90", "--json", str(tmp_path / "out.json"))
    assert result.exit_code == 2
    assert "fastreg inspect: dirty does not compile" in result.output
    (report,) = json.loads((tmp_path / "out.json").read_text())["reports"]
    assert report["kernel"] == "clean"


def test_command_can_take_headlines_only(command):
    assert command("--headline").exit_code == 0  # dirty is none
    assert "clean" in command("--headline").output


@pytest.mark.parametrize(("columns", "arguments"), [("80", []), ("80", ["--wide"]), ("200", [])])
def test_command_fits_the_terminal(command, monkeypatch, columns, arguments):
    monkeypatch.setenv("COLUMNS", columns)
    lines = command("--kernel", "clean", *arguments).output.splitlines()
    wide = columns == "200" or bool(arguments)
    assert max(map(len, lines)) <= (160 if wide else 80)
    assert any("imad" in line for line in lines) == wide
    assert any("room" in line for line in lines)


@pytest.mark.parametrize("arguments", ["--target 70", "--family cake", "--kernel cake", "--sass"])
def test_command_explains_a_wrong_choice_in_one_line(command, arguments):
    result = command(*arguments.split())
    assert result.exit_code == 2
    assert "fastreg inspect: " in result.output


def _report_on_samples(path: str) -> None:
    found = {}
    for kernel in SAMPLES:
        try:
            found[kernel.name] = to_json("samples", report_on(kernel, 90))
        except InspectError as error:
            found[kernel.name] = {"error": str(error)}
    Path(path).write_text(json.dumps(found))


if __name__ == "__main__":
    _report_on_samples(sys.argv[1])
