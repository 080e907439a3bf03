"""The command itself: what it lists and answers at once, and what it leaves to the packages behind it."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("typer")

import fastreg
from fastreg.cli import COMMANDS

AT_ONCE = """
import sys
from fastreg.cli import main

try:
    main()
except SystemExit as error:
    assert not error.code
assert "torch" not in sys.modules
"""


def run(*arguments: str, code: str = "from fastreg.cli import main; main()") -> subprocess.CompletedProcess:
    wide = os.environ | {"COLUMNS": "160"}  # a summary is on one line
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=wide, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_do_not_wait_for_torch(option):
    finished = run(option, code=AT_ONCE)
    assert finished.returncode == 0, finished.stderr
    if option == "--version":
        assert finished.stdout.split() == ["fastreg", fastreg.__version__]
    for name, (_, summary) in COMMANDS.items():
        assert option == "--version" or (name in finished.stdout and summary in finished.stdout)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_its_own_help(name):
    finished = run(name, "--help")
    assert finished.returncode == 0, finished.stderr
    assert "Usage" in finished.stdout
    assert len(finished.stdout) > 500


def test_the_summary_of_bench_names_its_commands():
    from fastreg.bench.__main__ import app

    names = {
        command.name or command.callback.__name__ for command in app.registered_commands if not command.hidden
    }
    for summary in (COMMANDS["bench"][1], app.info.help):
        assert set(summary.removeprefix("Benchmarks: ").rstrip(".").split(", ")) == names


def test_unknown_commands_are_refused():
    finished = run("trian")
    assert finished.returncode == 2
    assert "No such command 'trian'" in finished.stderr


COMPILED = """
import torch, fastreg

assert {"nn", "optim", "update_bn"} <= set(dir(fastreg))

@torch.compile(fullgraph=True, backend="aot_eager")
def function(x):
    return fastreg.functional.layer_norm(fastreg.functional.dropout(x, seed=1), (4,))

function(torch.ones(3, 4))
"""


def test_names_that_are_imported_late_are_found_while_compiling():
    finished = run(code=COMPILED)
    assert finished.returncode == 0, finished.stderr


def test_every_public_name_is_found():
    assert all(getattr(fastreg, name) is not None for name in fastreg.__all__)
    with pytest.raises(AttributeError, match="no attribute 'droput'"):
        _ = fastreg.droput
