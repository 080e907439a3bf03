"""The documentation: examples run as they stand, the table of behaviour is true, every public name has its page."""

import re
import shutil
import subprocess
from pathlib import Path

import behaviour
import pytest
import torch
from every_layer import LAYERS

import fastreg
import fastreg.functional
import fastreg.nn
import fastreg.optim
import fastreg.penalties

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PROGRAMS = [path for path in sorted(DOCS.rglob("*.md")) if "```python" in path.read_text()]


@pytest.mark.parametrize("page", PROGRAMS, ids=lambda path: path.stem)
def test_examples_run(page, aten):
    names = {"__name__": "example"}
    for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(code, names)


def test_every_public_name_has_its_page():
    documented = {
        found
        for page in (DOCS / "api").glob("*.md")
        for found in re.findall(r"^::: (\S+)", page.read_text(), re.M)
    }
    modules = ("functional", "nn", "optim", "penalties")
    expected = {f"fastreg.{name}" for name in fastreg.__all__ if name not in modules}
    for module in modules:
        expected |= {f"fastreg.{module}.{name}" for name in getattr(fastreg, module).__all__}
    assert documented == expected


# In every run; all of them take 40 seconds.
FEW = ("Dropout", "BatchNorm2d", "DropConnectLinear", "NoisyLinear learned")


@pytest.mark.parametrize(
    "names", [FEW, pytest.param(tuple(LAYERS), marks=pytest.mark.slow)], ids=["few", "all"]
)
def test_layers_behave_as_the_table_says(names, aten, fresh_compiler):
    if torch.distributed.is_initialized():
        pytest.skip("this process is in a group already")
    lines = behaviour.PAGE.read_text().splitlines()
    for line in behaviour.table(names).splitlines():
        assert line in lines


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("mkdocs") is None, reason="needs mkdocs: pip install -e '.[docs]'")
def test_the_site_is_built_without_a_warning(tmp_path):
    command = ["mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
