"""``TRITON_INTERPRET=0 PYTHONPATH=tests pytest -p compile_only tests/...``: what the tests launch is compiled for an
H100 as a GPU would compile it, and not run.

The interpreter takes what the compiler refuses: a function that returns None, a method of an argument that is 1, which
to the compiler is a constant. A test then fails if a kernel of its launches is refused, whatever else it finds wrong:
nothing has been computed. Every variant goes to where threads have their elements, the first one of each kernel to
machine code.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget, Language
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend

from fastreg.bench.sass import InspectError, Kernel, _specialization, compile_for
from fastreg.ops import backend

TARGET = GPUTarget("cuda", 90, 32)
_seen, _whole = set(), set()
_refused: list[str] = []


def stages(kernel: Kernel) -> Iterator[Any]:
    """The code as the front end makes it, before a constant is folded; and after each pass of the compiler, until every
    thread has its elements. Triton 3.6 aborts in those passes, too."""
    compiler = make_backend(TARGET)
    options = compiler.parse_options({**backend.OPTIONS, "num_warps": kernel.num_warps})
    context = ir.context()
    ir.load_dialects(context)
    compiler.load_dialects(context)
    functions, modules = compiler.get_codegen_implementation(options), compiler.get_module_map()
    code = ASTSource(**_specialization(kernel)).make_ir(TARGET, options, functions, modules, context)
    yield code
    passes, metadata = {}, {}
    compiler.add_stages(passes, options, Language.TRITON)
    for stage in ("ttir", "ttgir"):
        code = passes[stage](code, metadata)
        yield code


def _compile(launch: backend.Launch, device) -> None:
    name = getattr(launch.kernel, "__name__", None) or launch.kernel.fn.__name__
    kernel = Kernel.of(name, launch, 1, 1)
    variant = (
        name,
        str(kernel.arguments),
        str(kernel.constants),
        str(kernel.divisible_by_16),
        kernel.num_warps,
    )
    if variant in _seen:
        return
    _seen.add(variant)
    try:
        list(stages(kernel))
        if name not in _whole:
            _whole.add(name)
            compile_for(kernel, TARGET.arch)
    except InspectError as error:
        _refused.append(str(error))
    except Exception as error:
        while error.__cause__ is not None:
            error = error.__cause__
        _refused.append(f"{variant}: {error}")


def pytest_configure() -> None:
    backend.Launch.run = _compile
    backend.INTERPRETED = True  # tensors of the CPU go to the kernels


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call():
    _refused.clear()
    with contextlib.suppress(
        Exception, pytest.fail.Exception
    ):  # what comes of tensors that nothing was written to
        yield
    if _refused:
        pytest.fail("\n\n".join(_refused), pytrace=False)
    return True
