"""An editable install, a wheel, and a wheel of an sdist hold all of the checkout, also beside a folder of our name."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import fastreg

pytest.importorskip("setuptools")

ROOT = Path(__file__).parent.parent
BUILD = (
    "import sys; from setuptools import build_meta; getattr(build_meta, 'build_' + sys.argv[1])(sys.argv[2])"
)

# Only what is installed is seen: not the checkout that these tests run in.
IMPORT = """
import os, site, sys
from pathlib import Path

installed, checkout, *names = sys.argv[1:]
sys.path = ["", *(path for path in sys.path if path and Path(path).resolve() != Path(checkout))]
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]
site.addsitedir(installed)
import fastreg

root = Path(fastreg.__file__).parent
print(root)
from importlib import import_module

for name in names:
    import_module(name)
for folder, _, files in os.walk(root, followlinks=True):
    for file in files:
        if file.endswith((".py", ".c", ".typed")):
            print(os.path.relpath(os.path.join(folder, file), root))
"""


def run(*arguments: str, cwd: Path) -> list[str]:
    finished = subprocess.run(arguments, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.splitlines()


def build(kind: str, source: Path, target: Path) -> Path:
    target.mkdir()
    run(sys.executable, "-c", BUILD, kind, str(target), cwd=source)
    (built,) = target.iterdir()
    return built


@pytest.fixture
def clone(tmp_path) -> Path:
    """A copy of the checkout, in a folder that is called like the package."""
    kept = ("fastreg", "kernels", "bench", "pyproject.toml", "README.md", "LICENSE")
    for name in kept:
        source, copy = ROOT / name, tmp_path / "fastreg" / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "results")
            shutil.copytree(source, copy, symlinks=True, ignore=ignored)
        else:
            shutil.copy(source, copy)
    return tmp_path / "fastreg"


@pytest.mark.parametrize("way", ["editable", "wheel", "sdist"])
def test_all_of_the_checkout_is_installed(way, tmp_path, clone):
    source = clone
    if way == "sdist":
        with tarfile.open(build("sdist", clone, tmp_path / "sdist")) as archive:
            archive.extractall(tmp_path / "unpacked", filter="data")
        (source,) = (tmp_path / "unpacked").iterdir()
    wheel = build("editable" if way == "editable" else "wheel", source, tmp_path / "built")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")

    modules = ["fastreg.kernels.philox", "fastreg.bench.gpus", "fastreg.training.seeds", "fastreg.nn"]
    command = [sys.executable, "-c", IMPORT, str(tmp_path / "site"), str(ROOT), *modules]
    place, *found = run(*command, cwd=tmp_path)  # beside the clone
    expected = {
        os.path.relpath(os.path.join(folder, file), ROOT / "fastreg")
        for folder, _, files in os.walk(ROOT / "fastreg", followlinks=True)
        for file in files
        if file.endswith((".py", ".c", ".typed"))
    }
    assert Path(place) == (clone if way == "editable" else tmp_path / "site") / "fastreg"
    assert set(found) == expected


def test_the_changelog_begins_with_the_version_and_its_date():
    first = next(line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## "))
    assert re.fullmatch(rf"## {re.escape(fastreg.__version__)} \(\d{{4}}-\d\d-\d\d\)", first)
