"""What the compiler makes of the kernels, read without a GPU: fp64 stays fp64, and sums are the same in all lanes.

The kernels of the test process may be decorated for the interpreter, so compiling happens in a subprocess: this file,
run as a script, calls the public functions, compiles what they would launch, and prints what it reads in the code.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton")

from compile_only import stages

import fastreg.functional as F
from fastreg import ops, optim, penalties
from fastreg.averages import ExponentialMovingAverage
from fastreg.bench.sass import Kernel, Program, compile_for, one_sided_sums
from fastreg.ops import backend
from fastreg.ops.fused import ACTIVATIONS

pytestmark = pytest.mark.xdist_group("compiled")  # one process compiles, once, on all cores

# -----------------------------------------------------------------------------------------------------------
# What is launched


def differentiated(function: Callable[..., Tensor], *tensors: Tensor | None) -> None:
    y = function(*(None if t is None else t.requires_grad_() for t in tensors))
    y.backward(torch.ones_like(y))


Operation = Callable[[], None]


def _calls(dtype: torch.dtype) -> Callable[..., Operation]:
    def call(function: Callable[..., Tensor], *shapes, last: bool = False, **options) -> Operation:
        def run():
            tensors = [None if shape is None else torch.zeros(shape, dtype=dtype) for shape in shapes]
            if last:
                tensors = [t.to(memory_format=torch.channels_last) if t.dim() == 4 else t for t in tensors]
            differentiated(lambda *t: function(*t, **options), *tensors)

        return run

    return call


def dropout(x, bias=None, residual=None, **options):
    return F.dropout(x, 0.5, bias=bias, residual=residual, **options)


def layer_norm(x, weight, bias, **options):
    return F.layer_norm(x, x.shape[1:], weight, bias, **options)


def dropout_add_layer_norm(x, skip, weight, bias, **options):
    return F.dropout_add_layer_norm(x, skip, x.shape[1:], weight, bias, prenorm=True, **options)[0]


def batch_norm(x, weight, bias, residual=None, training=True, **options):
    mean, var = torch.zeros_like(weight.detach()), torch.ones_like(weight.detach())
    return F.batch_norm(x, mean, var, weight, bias, training, residual=residual, **options)


def operations(dtype: torch.dtype) -> Iterator[Operation]:
    """Every kernel that computes in ``dtype``, with what may be fused into it."""
    call = _calls(dtype)
    for activation in (None, *ACTIVATIONS):
        yield call(dropout, (40, 64), activation=activation)
    yield call(dropout, (40, 64), (64,), (40, 64), activation="gelu")
    yield call(dropout, (3, 5, 7, 7), (5, 1, 1), (3, 5, 7, 7), activation="gelu")
    yield call(F.alpha_dropout, (40, 64))
    yield call(F.feature_alpha_dropout, (4, 6, 7))
    for columns in (48, 768, 20_000):
        yield call(layer_norm, (9, columns), (columns,), (columns,), activation="gelu")
        yield call(dropout_add_layer_norm, (9, columns), (9, columns), (columns,), (columns,), p=0.5)
    for last in (False, True):
        for shape in ((4, 8, 6, 6), (64, 32, 28, 28)):
            parameters = (shape[1],), (shape[1],)
            for activation in (None, "relu", "gelu"):
                yield call(batch_norm, shape, *parameters, shape, last=last, activation=activation)
                yield call(
                    lambda x, w, b, **o: F.group_norm(x, 4, w, b, **o),
                    shape, *parameters, last=last, activation=activation,
                )  # fmt: skip
            yield call(batch_norm, shape, *parameters, last=last, training=False)
            yield call(lambda x, w, b: F.instance_norm(x, weight=w, bias=b), shape, *parameters, last=last)
        for beta in (0.5, 0.75):
            yield call(F.local_response_norm, (2, 8, 6, 6), last=last, size=5, beta=beta)
    yield call(F.gaussian_noise, (40, 64), std=0.1)
    yield call(F.gaussian_noise, (40, 64), std=0.1, mode="multiplicative")
    yield from optimizing(dtype)


def narrow(dtype: torch.dtype) -> Iterator[Operation]:
    """Sums over lanes of which a thread has one term alone: of rows and columns that are few, or nothing divides."""
    call = _calls(dtype)
    yield call(dropout, (24, 133), (24, 1))
    yield call(dropout, (39, 14), (14,))
    for columns in (13, 128, 20_001):
        yield call(layer_norm, (40, columns), (columns,), (columns,))
    yield call(layer_norm, (40, 37), None, None, activation="silu")
    yield call(dropout_add_layer_norm, (40, 37), None, (37,), (37,))
    yield call(batch_norm, (3, 5, 7, 7), (5,), (5,), activation="silu")
    yield call(batch_norm, (64, 3, 28, 28), (3,), (3,), last=True, activation="silu")
    for dim in (None, 0):
        options = {"max_grad_norm": 1.0, "max_norm": 1.0, "max_norm_dim": dim}
        yield lambda: optim.SGD(_parameters(dtype, (9, 13), (3, 5001)), lr=0.1, **options).step()  # noqa: B023
        yield lambda: penalties.max_norm_(_parameters(dtype, (9, 13)), 1.0, dim)  # noqa: B023
    yield lambda: penalties.l2(_parameters(dtype, (9, 13)), 0.1).backward()
    yield call(lambda x, w, s: F.noisy_linear(x, w, None, s, mode="multiplicative"), (5, 12), (7, 12), ())
    yield call(lambda x, w: F.drop_connect_linear(x, w), (5, 12), (7, 12))


def _parameters(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[nn.Parameter]:
    found = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]
    for p in found:
        p.grad = torch.zeros_like(p)
    return found


def optimizing(dtype: torch.dtype) -> Iterator[Operation]:
    def parameters() -> list[nn.Parameter]:
        return _parameters(dtype, (48, 64), (5, 5000), (7,))

    options = {"l1": 0.1, "max_norm": 1.0, "max_grad_norm": 1.0, "ema_decay": 0.9}
    for rule, own in (
        (optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
        (optim.AdamW, {"amsgrad": True, "cautious": True, "decouple_lr": True}),
    ):
        for further in ({}, options, options | {"max_norm_dim": 0, "l1_mode": "subgradient"}):
            yield lambda: rule(parameters(), lr=0.1, **own, **further).step()  # noqa: B023
    yield lambda: penalties.elastic_net(parameters(), 0.1, 0.1).backward()
    yield lambda: penalties.elastic_net(parameters(), 0.1, 0.1, accumulate=True)
    yield lambda: penalties.LaplacePrior(2.0, mean=0.1)(parameters()).backward()
    yield lambda: penalties.max_norm_(parameters(), 1.0)
    yield lambda: penalties.max_norm_(parameters(), 1.0, dim=0)
    yield lambda: ExponentialMovingAverage(nn.ParameterList(parameters()), 0.9).update()


def launched(operations: Iterable[Operation]) -> dict[str, Kernel]:
    """The variants that they launch, each once. Nothing runs."""
    found: dict[str, Kernel] = {}

    def record(launch: backend.Launch, device: torch.device) -> None:
        function = launch.kernel.fn
        family = function.__module__.split(".")[2]  # fastreg.kernels.FAMILY
        name = f"{family}.{function.__name__}"
        kernel = Kernel.of(name, launch, 1, 1)
        found.setdefault(f"{name} {kernel.arguments} {kernel.constants} {kernel.divisible_by_16}", kernel)

    backend.Launch.run = record
    backend.INTERPRETED = True  # tensors of the CPU go to the kernels
    for operation in operations:
        operation()
    return found


# -----------------------------------------------------------------------------------------------------------
# fp64


def front_end(kernel: Kernel) -> str:
    return str(next(stages(kernel)))


_FUNCTION = re.compile(r'(?:private|public) @"?(?:fastreg\.kernels\.)?([\w.]+?)(?:__|\(|")')
_CONSTANT = re.compile(r"(%[\w#]+) = arith\.constant (?:dense<)?([-+.\w]+)>? : (?:tensor<[\dx]+x)?f32")
_EXTENDED = re.compile(r"arith\.extf (%[\w#]+) : (?:tensor<[\dx]+x)?f32.* to ")


def extended(code: str) -> list[str]:
    """What is fp32 on its way to fp64: functions, each with a constant or "computed". Not those constants that fp16
    holds, which have lost nothing."""
    found = []
    for function in code.split("tt.func ")[1:]:
        name = _FUNCTION.match(function)[1]
        constants = dict(_CONSTANT.findall(function))
        values = [constants.get(operand, "computed") for operand in _EXTENDED.findall(function)]
        found += [f"{name}: {value}" for value in values if not _is_short(value)]
    return found


def _is_short(value: str) -> bool:
    if value == "computed":
        return False
    infinite_or_nan = value.startswith("0x")
    return infinite_or_nan or torch.tensor(float(value)).half().float() == torch.tensor(float(value))


# Random numbers are fp32, and step counters, as torch has them; signs are 1 and -1.
MEANT = {f"{name}: computed" for name in ("noise._tile", "advance", "channel_norm.signs.load_signs")}


# -----------------------------------------------------------------------------------------------------------
# Sums over lanes


def sums_over_lanes(kernel: Kernel) -> tuple[int, list[str]]:
    """How many additions there are of a lane's value and another's, and which take in a product of one side."""
    program = Program(compile_for(kernel, 90).sass)
    exchanges = [opcode for opcode in program.written.elements() if opcode.startswith("SHFL.BFLY")]
    return len(exchanges), one_sided_sums(program)


# -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def read() -> dict[str, dict[str, list[str]]]:
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    finished = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=600
    )
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


def kernels() -> set[str]:
    """Those that ``fastreg.ops`` launches, as file.function."""
    found = set()
    for file in Path(ops.__file__).parent.rglob("*.py"):
        names = re.findall(r"kernels\.(\w+)", file.read_text())
        kernels = re.search(r"from fastreg\.kernels import (\w+) as kernels", file.read_text())
        module = import_module(f"fastreg.kernels.{kernels[1]}") if kernels else None
        found |= {f"{kernels[1]}.{name}" for name in names if hasattr(getattr(module, name), "fn")}
    return found


# They leave fp64 to ATen, or move bytes.
NOT_FP64 = ("drop_connect", "dual_linear", "expectation", "noisy_linear", "averages.copy_if")


def test_every_kernel_is_read(read):
    assert {name.split()[0] for name in read["fp64"]} == {k for k in kernels() if not k.startswith(NOT_FP64)}


def test_fp64_stays_fp64(read):
    """``tl.fma`` and others of Triton make fp32 of a number that is written in the source, and only then fp64."""
    found = {value: name for name, values in read["fp64"].items() for value in values if value not in MEANT}
    assert not found


SUMMING = {
    *("dropout.backward", "dropout.backward_bias_columns", "layer_norm.forward", "layer_norm.forward_long"),
    *("layer_norm.backward", "channel_norm.merge_statistics", "channel_norm.whole_backward"),
    *("optimizers.squares", "optimizers.step", "penalties.penalize", "penalties.project_rows"),
    *("dual_linear.second_input", "drop_connect.product"),
}


def test_all_lanes_hold_the_same_sums(read):
    """``tl.sum(a * b)`` may become fma(a, b, the other lane's), see ``ptxas.terms``."""
    seen = {name.split()[0] for name, (exchanges, _) in read["sums"].items() if exchanges}
    assert seen >= SUMMING
    assert {name: sums for name, (_, sums) in read["sums"].items() if sums} == {}


if __name__ == "__main__":
    doubles, narrows = launched(operations(torch.float64)), launched(narrow(torch.float32))
    summing = [name for name, kernel in narrows.items() if "tt.reduce" in front_end(kernel)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        sums = pool.map(sums_over_lanes, (narrows[name] for name in summing))
        found = {
            "fp64": {name: extended(front_end(kernel)) for name, kernel in doubles.items()},
            "sums": dict(zip(summing, sums, strict=True)),
        }
    print(json.dumps(found))
