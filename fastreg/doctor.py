"""``fastreg doctor``: what there is on this machine, what runs where, and what to do about what is missing.

It looks and changes nothing, and no finding makes it crash: a missing driver, GPU or package is an answer.
"""

import os
import platform
import re
import shutil
import subprocess
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from types import ModuleType
from typing import Any

# The oldest release that works, and the newest that is tested: private names of both are used, which may go.
TORCH = ((2, 11), (2, 15))
TRITON = ((3, 6), (3, 9))
COMPUTE_CAPABILITY = (8, 0)  # the oldest the kernels are inspected for


@dataclass
class Findings:
    """Lines under headings, advice, and whether fastreg can work at all."""

    sections: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    advice: list[str] = field(default_factory=list)
    broken: bool = False

    def add(self, section: str, name: str, value: object) -> None:
        self.sections.setdefault(section, []).append((name, str(value)))

    def lines(self) -> Iterator[str]:
        width = max(len(name) for rows in self.sections.values() for name, _ in rows)
        for section, rows in self.sections.items():
            yield section
            yield from (f"  {name:<{width}}  {value}".rstrip() for name, value in rows)
            yield ""
        yield "What to do"
        yield from (f"  - {line}" for line in self.advice or ["Nothing: fastreg works here as it is."])


def doctor() -> None:
    """Show what runs where on this machine, and what to install if something is missing."""
    findings = examine()
    print("\n".join(findings.lines()))
    if findings.broken:
        raise SystemExit(1)


def examine() -> Findings:
    """Run every check; one that fails is a finding too."""
    findings = Findings()
    for check in (_versions, _gpus, _triton_mode, _backends, _extras, _peers):
        try:
            check(findings)
        except Exception as error:
            section = check.__name__.strip("_").replace("_", " ").capitalize()
            findings.add(section, "could not be checked", f"{type(error).__name__}: {error}")
    return findings


# -----------------------------------------------------------------------------------------------------------
# The checks


def _versions(findings: Findings) -> None:
    section = "Versions"
    findings.add(section, "fastreg", _version("fastreg") or "not installed (running from a checkout)")
    findings.add(section, "python", f"{platform.python_version()}, {platform.system()} {platform.machine()}")

    torch = _imported("torch")
    needed = _spelled(TORCH[0])
    if isinstance(torch, str) or _numbers(torch.__version__) < TORCH[0]:
        findings.broken = True
        findings.add(section, "torch", torch if isinstance(torch, str) else f"{torch.__version__}, too old")
        findings.advice.append(f"fastreg needs torch {needed} or later: pip install 'torch>={needed}'")
    else:
        _judge(findings, "torch", torch.__version__, TORCH)

    triton = _imported("triton")
    needed = _spelled(TRITON[0])
    if isinstance(triton, str):
        findings.add(section, "triton", f"{triton}; everything runs on ATen")
        if platform.system() == "Linux":
            findings.advice.append(f"For the kernels install Triton: pip install 'triton>={needed}'")
    elif _numbers(triton.__version__) < TRITON[0]:
        findings.add(section, "triton", f"{triton.__version__}, too old")
        findings.advice.append(f"The kernels need Triton {needed} or later: pip install 'triton>={needed}'")
    else:
        _judge(findings, "triton", triton.__version__, TRITON)


def _judge(findings: Findings, name: str, version: str, bounds: tuple[tuple[int, int], ...]) -> None:
    """Says whether a version that is not too old is one of those that are tested."""
    span = " to ".join(map(_spelled, bounds))
    if _numbers(version) <= bounds[1]:
        findings.add("Versions", name, f"{version}, supported ({span})")
        return
    findings.add("Versions", name, f"{version}, newer than what is tested ({span})")
    newest = _spelled(bounds[1])
    findings.advice.append(
        f"fastreg was never run with this {name}; if it fails: pip install '{name}=={newest}.*'"
    )


def _spelled(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def _gpus(findings: Findings) -> None:
    section = "GPU"
    driver = _driver()
    findings.add(section, "driver", driver or "no NVIDIA driver found")
    torch = _imported("torch")
    if isinstance(torch, str):
        return
    cuda, rocm = torch.version.cuda, torch.version.hip
    built_for = f"CUDA {cuda}" if cuda else f"ROCm {rocm} (there everything runs on ATen)" if rocm else None
    findings.add(section, "torch is built for", built_for or "the CPU only")

    with warnings.catch_warnings(record=True) as complaints:  # of torch, for one about a driver too old
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for complaint in complaints:
        findings.advice.append(f"torch says: {' '.join(str(complaint.message).split())}")
    for index in range(count):
        properties = torch.cuda.get_device_properties(index)
        capability = (properties.major, properties.minor)
        findings.add(
            section,
            f"cuda:{index}",
            f"{properties.name}, compute capability {capability[0]}.{capability[1]}, "
            f"{properties.total_memory / 2**30:.0f} GiB",
        )
        if capability < COMPUTE_CAPABILITY:
            findings.advice.append(
                f"cuda:{index} is older than compute capability 8.0, the oldest the kernels are checked for."
            )
    if count == 0:
        findings.add(section, "usable", "none; CUDA tensors cannot be made here")
    if driver and not built_for:
        findings.advice.append(
            "There is an NVIDIA driver, but this torch is built for the CPU: "
            "pip install torch --force-reinstall --index-url https://download.pytorch.org/whl/cu130"
        )


def _triton_mode(findings: Findings) -> None:
    value = os.environ.get("TRITON_INTERPRET")
    section = "Triton mode"
    if value == "1":
        findings.add(section, "TRITON_INTERPRET", "1: kernels run in Triton's interpreter, on CPU tensors")
        findings.advice.append("The interpreter is for tests, and very slow: unset TRITON_INTERPRET")
    else:
        findings.add(section, "TRITON_INTERPRET", f"{value or 'not set'}: kernels are compiled")


def _backends(findings: Findings) -> None:
    """Ask the dispatch itself, with a tensor on each device."""
    import torch

    from fastreg.bench import FAMILIES
    from fastreg.ops import backend

    names: dict[str | None, str] = {
        "aten": "ATen",
        "triton": "Triton's interpreter" if backend.INTERPRETED else "Triton kernels",
    }
    choices = {
        "CPU tensors": backend.choose(torch.zeros(1, dtype=torch.float32, device="cpu")),
        "CUDA tensors": None,
    }
    if _cuda_available(torch):
        choices["CUDA tensors"] = backend.choose(torch.zeros(1, dtype=torch.float32, device="cuda"))
    told = "; ".join(f"{where}: {names.get(choice, 'no usable GPU')}" for where, choice in choices.items())
    for family in FAMILIES:
        findings.add("What runs where", family, told)


def _extras(findings: Findings) -> None:
    missing = set()
    for extra, packages in _declared_extras().items():
        found = {package: _version(package) for package in packages}
        listing = ", ".join(f"{package} {version or 'MISSING'}" for package, version in found.items())
        findings.add("Optional packages", extra, listing)
        if not all(found.values()):
            missing.add(extra)
    missing -= {"test", "docs", "dev"}  # only those who work on fastreg need them
    findings.advice += [f"For fastreg {extra}: pip install 'fastreg[{extra}]'" for extra in sorted(missing)]


def _peers(findings: Findings) -> None:
    from fastreg.bench.peers import select

    _, versions = select()
    for name, version in versions.items():
        findings.add("Peers the benchmarks compare with", name, "absent" if "absent" in version else version)


# -----------------------------------------------------------------------------------------------------------
# Looking without falling over


def _imported(name: str) -> Any:
    """The module, or in words why it cannot be imported."""
    try:
        return __import__(name)
    except ImportError as error:
        return "not installed" if error.name == name else f"installed, but cannot be imported: {error}"
    except Exception as error:  # a broken shared library raises whatever it likes
        return f"installed, but cannot be imported: {error}"


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None:
        raise ValueError(f"{version!r} is no version")
    return int(found[1]), int(found[2])


def _driver() -> str | None:
    """The driver's version by nvidia-smi, None where there is no driver."""
    program = shutil.which("nvidia-smi")
    if not program:
        return None
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi failed: {error}"
    first = (answer.stdout.strip() or answer.stderr.strip() or "no answer").splitlines()[0]
    return first if answer.returncode == 0 else f"nvidia-smi failed: {first}"


def _cuda_available(torch: ModuleType) -> bool:
    with warnings.catch_warnings():  # the check of the GPUs has passed them on
        warnings.simplefilter("ignore")
        return torch.cuda.is_available()


def _declared_extras() -> dict[str, list[str]]:
    """``{extra: [packages]}`` from fastreg's own metadata, so that this list is never out of date."""
    try:
        requirements = metadata.requires("fastreg") or []
    except metadata.PackageNotFoundError:
        return {}
    extras: dict[str, list[str]] = {}
    for requirement in requirements:
        found = re.match(r"([\w.-]+).*extra == ['\"]([\w-]+)['\"]", requirement)
        if found and found[1] != "fastreg":
            extras.setdefault(found[2], []).append(found[1])
    return extras


if __name__ == "__main__":
    doctor()
