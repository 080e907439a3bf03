"""Where a number comes from: device, driver, versions, commit, command. Everything here only reads."""

import datetime
import hashlib
import importlib
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parent.parent
STATE = ("pstate", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "power.limit", "temperature.gpu")


def output(*command: str) -> str | None:
    """What a command prints, or None where there is no such command or it fails."""
    try:
        return subprocess.run(
            command, cwd=REPOSITORY, capture_output=True, text=True, timeout=20, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def slug(name: str) -> str:
    """Folder name of a GPU: 'NVIDIA H100 80GB HBM3' → 'h100', 'NVIDIA GeForce RTX 4090' → 'rtx-4090'."""
    model = re.search(r"RTX (?:PRO )?A?\d+(?: Ti| SUPER| Ada)*|\b[A-Z]{1,2}\d{1,4}[A-Z]{0,2}\b", name)
    words = [model.group() if model else name.removeprefix("NVIDIA ")]
    # The same chip with other memory is another machine for everything measured here.
    words += [kind for kind in ("pcie", "nvl", "40gb") if model and kind in name.lower()]
    return re.sub(r"[^a-z0-9]+", "-", " ".join(words).lower()).strip("-")


def commit() -> tuple[str, bool | None]:
    """Short commit and whether the sources differ from it; a copy without git names it in FASTREG_COMMIT."""
    found = output("git", "rev-parse", "--short", "HEAD")
    if found is None:
        return os.environ.get("FASTREG_COMMIT", "unknown"), None
    # What the suite itself writes does not make a commit dirty.
    changed = output("git", "status", "--porcelain", "--", ".", ":!bench/results", ":!bench/RESULTS.md")
    return found, bool(changed)


def source_hash() -> str:
    """Hash of the library and the kernels that are imported: names what ran even where the commit cannot."""
    digest = hashlib.sha256()
    for name in ("fastreg", "fastreg.kernels"):
        folder = Path(importlib.import_module(name).__path__[0])
        for path in sorted([*folder.rglob("*.py"), *folder.rglob("*.c")]):
            digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def cpu_name() -> str:
    try:
        match = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        return match.group(1) if match else platform.processor()
    except OSError:
        return platform.processor()


def gpu_state() -> dict[str, str] | None:
    """Clocks, power and temperature now, as nvidia-smi tells them."""
    line = output("nvidia-smi", f"--query-gpu={','.join(STATE)}", "--format=csv,noheader", "-i", "0")
    return dict(zip(STATE, map(str.strip, line.split(",")), strict=False)) if line else None


def version(module: str) -> str | None:
    try:
        return __import__(module).__version__
    except ImportError:
        return None


def provenance(device: torch.device) -> dict:
    """Everything a reader needs to judge or repeat the numbers of one run."""
    name, dirty = commit()
    info = {
        "device": device.type,
        "slug": "cpu",
        "gpu": None,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": version("triton"),
        "fastreg": version("fastreg"),
        "commit": name,
        "dirty": dirty,
        "source": source_hash(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python -m bench", *sys.argv[1:]]),
        # Timings of the interpreter say nothing about a kernel: the report leaves such files out.
        "interpreted": os.environ.get("TRITON_INTERPRET") == "1",
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        info |= {
            "gpu": properties.name,
            "slug": slug(properties.name),
            "memory": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "l2": properties.L2_cache_size,
            "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0"),
            "before": gpu_state(),
        }
    return info
