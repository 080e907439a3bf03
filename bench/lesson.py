"""``python -m bench lesson``: dropout from the plain kernel to the tuned one, with the counts after each step."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from fastreg.kernels.plain import dropout as plain
from fastreg.kernels.plain import dropout_in_steps as steps

from .dropout import kernels as tuned_kernels
from .inspect import Report, report_on
from .provenance import REPOSITORY
from .report import markdown, replace_section
from .sass import Kernel

PAGE = REPOSITORY / "kernels/README.md"
TARGET, GPU = 90, "H100"
ROW, TILE = 1024, 4096  # elements of a program before and after step 4
TUNED = "forward bf16 plain"


class Step(NamedTuple):
    change: str
    kernel: Kernel


def step(change: str, function: Any, elements: int, last: str | None = "size") -> Step:
    """On bf16, with a last argument that divides by 16, as the size of most tensors does."""
    sizes = {} if last is None else {last: "i32"}
    return Step(
        change,
        Kernel(
            change,
            function,
            elements=elements,
            bytes_per_element=4,  # x is read and y written
            arguments={"x_ptr": "*bf16", "y_ptr": "*bf16", "threshold": "i32", **sizes},
            constants={"BLOCK": elements},
            divisible_by_16=tuple(sizes),
        ),
    )


def all_steps() -> Iterator[Step]:
    yield step(
        "the plain kernel: a program a row, a call of Philox an element", plain.forward, ROW, "columns"
    )
    yield step("the tensor is one row, indices have 32 bits", steps.tiled, ROW)
    yield step("one call of Philox for the eight elements of a 16-byte access", steps.shared_calls, ROW)
    yield step("one multiplication of 64 bits gives both halves of a product", steps.wide_products, ROW)
    yield step("four accesses a thread: what a program computes once is spread", steps.wide_products, TILE)
    yield step("a lane is compared in the upper half of its word", steps.lanes_in_place, TILE)
    yield step("x is selected in fp32, and then scaled", steps.selected_first, TILE)
    yield step("whole tiles: no element is compared with the end", steps.full_tiles, TILE, None)
    (tuned,) = (kernel for kernel in tuned_kernels() if kernel.name == TUNED)
    yield Step("the tuned kernel, which has bias, activation, residual and every layout besides", tuned)


def reports() -> list[tuple[Step, Report]]:
    found = list(all_steps())
    with ThreadPoolExecutor() as pool:
        return list(zip(found, pool.map(lambda one: report_on(one.kernel, TARGET), found), strict=True))


def table(found: list[tuple[Step, Report]]) -> str:
    """Markdown: facts of the machine code, and the time that they predict."""
    lines = []
    for number, (one, report) in enumerate(found):
        (prediction,) = (p for p in report.predictions if p.gpu == GPU)
        loads = ", ".join(f"{count} of {width} B" for width, count in report.loads.items())
        kinds = (report.instructions, report.kinds["alu"], report.kinds["imad"])
        counts = [str(report.registers), loads, *(f"{count:.1f}" for count in kinds)]
        times = [f"{prediction.memory_ps:.2f}", f"{prediction.issue_ps:.2f} ({prediction.busiest})"]
        lines.append([str(number), one.change, *counts, *times, prediction.bound])
    header = ["step", "what changes", "registers", "loads", "instructions / element", "ALU", "IMAD"]
    return markdown([*header, "memory, ps", "instructions, ps", f"bound ({GPU})"], lines, left=2)


def section() -> str:
    import triton

    origin = f"`python -m bench lesson` wrote this with Triton {triton.__version__}, for sm_{TARGET}, bf16."
    return f"{origin} Counts are facts of the machine code, times are predictions.\n\n{table(reports())}"


def write(text: str, page: Path = PAGE) -> None:
    page.write_text(replace_section(page.read_text(), text, "lesson"))
