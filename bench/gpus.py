"""What ``fastreg inspect`` assumes about GPUs: the rates that turn counted instructions into predicted times.

Everything in this file is an assumption or a published peak, not a measurement of fastreg. The counts that
inspect takes from the compiled code are facts; the times derived from them are only as good as these tables.

Sources
-------
- Results per clock and SM: the table "Throughput of Native Arithmetic Instructions" in NVIDIA's CUDA C++
  Programming Guide (compute capabilities 8.0, 9.0 and 10.0).
- Which pipe executes what: the section "Pipelines" of NVIDIA's Nsight Compute profiling guide; for FP32, FP16
  and IMAD on GA100 and GH100
  https://forums.developer.nvidia.com/t/separate-cuda-core-pipeline-for-fp16-and-fp32/302018/7.
- SM counts: NVIDIA's data sheets of the SXM boards. Clocks are what such a board is assumed to hold under
  load, copy rates what a large device-to-device copy is assumed to reach (bytes read + bytes written).
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One GPU model: its number of SMs and the assumed sustained clock and copy rate."""

    name: str
    cc: int  # compute capability × 10: the target Triton compiles for
    sms: int
    clock_ghz: float
    copy_tb_per_s: float


GPUS = (
    Gpu("A100", cc=80, sms=108, clock_ghz=1.41, copy_tb_per_s=1.75),  # copy rate: estimate
    Gpu("H100", cc=90, sms=132, clock_ghz=1.70, copy_tb_per_s=3.0),  # copy rate: about what a copy measures
    Gpu("H200", cc=90, sms=132, clock_ghz=1.70, copy_tb_per_s=4.3),  # copy rate: about what a copy measures
    Gpu("B200", cc=100, sms=148, clock_ghz=1.85, copy_tb_per_s=7.0),  # clock and copy rate: estimates
)

TARGETS = tuple(sorted({gpu.cc for gpu in GPUS}))

JUDGED = ("A100", "H100", "B200")  # a kernel's headroom is demanded on these, and shown on the others

# What instructions compete for, beside issue slots, and the kinds (sass.kind) that occupy it. The kinds
# "uniform" and "other" occupy nothing that runs short here. "tensor" is missing because its rate depends on
# shape and type: the compute bound of a matrix product is NOT predicted.
RESOURCES = {
    "fma": ("fma", "imad"),  # IMAD runs on (one half of) the FMA pipe
    "imad": ("imad",),
    "alu": ("alu",),
    "xu": ("mufu", "conversion"),  # the transcendental unit also does F2F, F2I, I2F and FRND
    "lsu": ("lsu",),
    "fp64": ("fp64",),
}

# Lanes per clock and SM. Four schedulers issue one 32-lane instruction each: 128.
_HOPPER = {
    "issue": 128,
    "fma": 128,
    "imad": 64,  # only the heavy half of the FMA pipe multiplies integers
    "alu": 64,
    "xu": 16,  # the guide's 64 for 32-bit conversions holds for I2FP and F2FP, which run on the ALU
    "lsu": 32,  # the guide's rate for shuffles; assumed for all loads and stores, whatever their width
    "fp64": 64,
}
RATES = {  # of "issue" and of every resource
    80: _HOPPER | {"fma": 64, "fp64": 32},  # one FMA pipe of 64 lanes, shared by FP32 and IMAD
    90: _HOPPER,
    100: _HOPPER,  # assumption: the guide's rows for 10.0 equal those for 9.0
}


def picoseconds(gpu: Gpu, turns_per_element: Mapping[str, float]) -> dict[str, float]:
    """The least time per element that each resource of ``gpu`` allows, all SMs together, in picoseconds."""
    clocks_per_ps = gpu.clock_ghz * 1e-3
    rate = RATES[gpu.cc]
    return {name: turns / (rate[name] * gpu.sms * clocks_per_ps) for name, turns in turns_per_element.items()}
