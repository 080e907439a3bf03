"""The test command itself: what pytest-xdist asks of a collection, which each of its workers makes for itself."""

import functools
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import machine_option
import pytest

HERE = Path(__file__).parent


def test_bytes_are_in_no_name(pytestconfig):
    name = functools.partial(
        pytestconfig.hook.pytest_make_parametrize_id, config=pytestconfig, argname="content"
    )
    assert name(val="text") is None  # pytest names it
    with pytest.raises(TypeError, match="content is bytes"):
        name(val=b"\x1f\x8b")


def test_every_kernel_is_known_and_no_device_function_is_taken_for_one():
    found = machine_option.all_kernels()
    assert {
        "dropout.forward",
        "partial_sums.sum_partials",
        "channel_norm.whole_backward",
        "optimizers.project",
        "philox.fill_lanes",
    } <= found
    assert not {"fastmath.add", "activation.forward", "multi_tensor.write", "tiles.plus_product"} & found
    launched = {
        f"{path.stem}.{name}"
        for path in (HERE.parent / "fastreg" / "ops").rglob("*.py")
        for name in re.findall(r"\bkernels\.([a-z]\w*)", path.read_text())
    }
    assert {
        name for name in launched if name.partition(".")[0] in {x.partition(".")[0] for x in found}
    } <= found


@pytest.mark.slow
def test_all_processes_find_the_same_tests():
    """Started at other times, and with other hashes of strings."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--collect-only",
        "-qq",
        "-o",
        "addopts=",
        "-p",
        "no:cacheprovider",
    ]
    found = []
    for seed in ("1", "2"):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        done = subprocess.run(
            [*command, str(HERE)],
            env={**environment, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr
        found.append([line for line in done.stdout.splitlines() if "::" in line])
        time.sleep(1.1)  # gzip counts seconds
    assert len(found[0]) > 1000
    assert found[0] == found[1]
