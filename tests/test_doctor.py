"""``fastreg doctor`` says what is there and never crashes, whatever is missing or broken."""

import re
import subprocess
import sys
from importlib import metadata
from types import SimpleNamespace

import pytest

from fastreg import doctor as module
from fastreg.ops import backend


@pytest.fixture
def pretend(monkeypatch):
    """Replaces what doctor finds: ``pretend(torch=..., triton=..., driver=...)``."""

    def replace(driver=None, **packages):
        real = module._imported
        monkeypatch.setattr(module, "_imported", lambda name: packages.get(name) or real(name))
        monkeypatch.setattr(module, "_driver", lambda: driver)

    return replace


def fake_torch(version="2.12.0+cu130", cuda="13.0", gpus=(), complaint=None):
    """As much of torch as doctor looks at, with ``gpus`` as (name, major, minor)."""

    def is_available():
        if complaint:
            import warnings

            warnings.warn(complaint, stacklevel=1)
        return bool(gpus)

    def properties(index):
        name, major, minor = gpus[index]
        return SimpleNamespace(name=name, major=major, minor=minor, total_memory=80 * 2**30)

    gpu_module = SimpleNamespace(
        is_available=is_available, device_count=lambda: len(gpus), get_device_properties=properties
    )
    built_for = SimpleNamespace(cuda=cuda, hip=None)
    return SimpleNamespace(__version__=version, version=built_for, cuda=gpu_module)


def fake_triton(version="3.7.0"):
    return SimpleNamespace(__version__=version)


def text() -> str:
    return "\n".join(module.examine().lines())


def test_it_runs_here_as_a_program():
    finished = subprocess.run([sys.executable, "-m", "fastreg.doctor"], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    for heading in ("Versions", "GPU", "Triton mode", "What runs where", "What to do"):
        assert heading in finished.stdout
    assert "could not be checked" not in finished.stdout
    assert "Traceback" not in finished.stderr


def test_a_good_machine_needs_nothing(pretend, monkeypatch):
    monkeypatch.setattr(module, "_version", lambda distribution: "1.0")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    pretend(torch=fake_torch(gpus=[("H100", 9, 0)]), triton=fake_triton(), driver="580.65")
    report = text()
    assert "cuda:0" in report
    assert "H100, compute capability 9.0, 80 GiB" in report
    assert report.endswith("Nothing: fastreg works here as it is.")


def test_without_triton_everything_runs_on_aten(pretend):
    pretend(torch=fake_torch(gpus=[("H100", 9, 0)]), triton="not installed", driver="580.65")
    assert "not installed; everything runs on ATen" in text()
    assert not module.examine().broken
    if sys.platform == "linux":
        assert "pip install 'triton>=3.6'" in text()


def test_old_triton_is_named(pretend):
    pretend(torch=fake_torch(), triton=fake_triton("3.5.1"))
    assert "3.5.1, too old" in text()


@pytest.mark.parametrize("torch", [fake_torch("2.10.1"), "not installed"], ids=["old", "missing"])
def test_only_a_missing_or_old_torch_is_a_failure(pretend, torch, capsys):
    pretend(torch=torch)
    with pytest.raises(SystemExit) as stopped:
        module.doctor()
    assert stopped.value.code == 1
    assert "pip install 'torch>=2.11'" in capsys.readouterr().out


def test_newer_releases_are_said_to_be_untested(pretend):
    pretend(torch=fake_torch("2.16.0"), triton=fake_triton("3.10.0"))
    assert "2.16.0, newer than what is tested (2.11 to 2.15)" in text()
    assert "3.10.0, newer than what is tested (3.6 to 3.9)" in text()
    assert "if it fails: pip install 'torch==2.15.*'" in text()
    assert "if it fails: pip install 'triton==3.9.*'" in text()
    assert not module.examine().broken


def test_what_is_tested_is_what_the_metadata_admit():
    for name, (oldest, (major, minor)) in (("torch", module.TORCH), ("triton", module.TRITON)):
        bounds = {f">={oldest[0]}.{oldest[1]}", f"<{major}.{minor + 1}"}
        (required,) = (r.split(";")[0] for r in metadata.requires("fastreg") if re.match(rf"{name}\b", r))
        assert set(required.strip().removeprefix(name).split(",")) == bounds


def test_a_driver_with_a_cpu_torch(pretend):
    pretend(torch=fake_torch(cuda=None), driver="580.65")
    assert "this torch is built for the CPU" in text()


def test_the_complaint_of_torch_about_the_driver_is_passed_on(pretend):
    pretend(torch=fake_torch(complaint="The NVIDIA driver is too old"), driver="470.1")
    assert "torch says: The NVIDIA driver is too old" in text()


def test_an_old_gpu_is_named(pretend):
    pretend(torch=fake_torch(gpus=[("T4", 7, 5)]), driver="580.65")
    assert "cuda:0 is older than compute capability 8.0" in text()


def test_the_interpreter_is_named(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "unset TRITON_INTERPRET" in text()


@pytest.mark.parametrize(("interpreted", "name"), [(True, "Triton's interpreter"), (False, "Triton kernels")])
def test_the_backend_is_what_the_dispatch_chooses(monkeypatch, interpreted, name):
    monkeypatch.setattr(backend, "INTERPRETED", interpreted)
    monkeypatch.setattr(backend, "choose", lambda tensor: "triton")
    assert f"CPU tensors: {name}; CUDA tensors" in text()
    monkeypatch.setattr(backend, "choose", lambda tensor: "aten")
    assert "CPU tensors: ATen; CUDA tensors" in text()


def test_missing_extras_come_with_their_command(monkeypatch):
    real = module._version
    monkeypatch.setattr(module, "_version", lambda name: None if name == "mlxtend" else real(name))
    monkeypatch.setattr(module, "_declared_extras", lambda: {"train": ["typer", "mlxtend"]})
    report = text()
    assert "mlxtend MISSING" in report
    assert "pip install 'fastreg[train]'" in report


def test_extras_are_read_from_the_metadata(monkeypatch):
    requirements = ["torch>=2.11", "rich>=13; extra == 'train'", 'fastreg[train]; extra == "test"']
    monkeypatch.setattr(module.metadata, "requires", lambda name: requirements)
    assert module._declared_extras() == {"train": ["rich"]}


def test_a_check_that_fails_is_a_finding(monkeypatch, pretend):
    broken = fake_torch(gpus=[("H100", 9, 0)])
    broken.cuda.get_device_properties = lambda index: 1 / 0
    pretend(torch=broken)
    assert "could not be checked" in text()


def test_nvidia_smi_may_be_broken(monkeypatch):
    monkeypatch.setattr(
        module.shutil, "which", lambda name: sys.executable
    )  # python knows none of its options
    assert module._driver().startswith("nvidia-smi failed")
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    assert module._driver() is None
