"""The README's example is run as it stands, and its commands exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.smoke

README = Path(__file__).parent.parent / "README.md"


def test_example_runs(aten):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names = {}
    exec(code, names)
    assert names["x"].grad is not None
    assert names["z"].shape == (64, 1024)


def test_every_command_named_exists():
    commands = set(re.findall(r"`fastreg (\w+)", README.read_text()))
    assert commands == {"train", "convert", "inspect", "doctor"}
    listed = subprocess.run(
        [sys.executable, "-m", "fastreg.cli", "--help"], capture_output=True, text=True, check=True
    ).stdout
    for command in commands | {"bench"}:
        assert re.search(rf"\b{command}\b", listed)
