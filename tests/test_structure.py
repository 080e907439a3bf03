"""How the source hangs together, read from it: which way imports run, what stays in its file, where a family is found.

``CONTRIBUTING.md`` promises all of it.
"""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from fastreg.bench import FAMILIES

ROOT = Path(__file__).parent.parent

# The parts of fastreg, each with those it may import. "" is fastreg itself: its version, and the names it hands on.
LOWER = {
    "kernels": set(),
    "random": {"ops"},  # what every kernel draws; it needs ops.backend and ops.arguments alone
    "ops": {"random", "kernels"},
    "functional": {"ops"},
    "nn": {"functional", "ops"},
    "optim": {"ops"},
    "averages": {"optim", "ops"},
    "penalties": {"optim", "ops"},
    "population": {"ops"},
    "folding": {"nn", "population", "ops"},
    "blocks": {"functional", "nn", "folding", "ops"},
    "conversion": {"blocks", "nn", "optim"},
    "integrations": {"conversion"},
    "": {
        "functional",
        "nn",
        "optim",
        "averages",
        "penalties",
        "population",
        "folding",
        "conversion",
        "random",
    },
    "training": {"", "nn", "optim", "conversion"},
    "bench": {
        "",
        "functional",
        "nn",
        "optim",
        "averages",
        "penalties",
        "conversion",
        "random",
        "ops",
        "kernels",
        "training",
    },
    "doctor": {"", "bench", "ops"},
    "cli": {"", "training", "conversion", "bench", "doctor"},
}

# Families that are no layers, and where they are.
ELSEWHERE = {
    "dual_linear": "fastreg/functional.py",  # two dense products, for drop_connect_linear and noisy_linear
    "optimizers": "fastreg/optim/__init__.py",
    "penalties": "fastreg/penalties.py",
    "averages": "fastreg/averages.py",
}

SHARED_FILES = {
    "batch_norm": "channel_norm",
    "group_norm": "channel_norm",
}  # families of one kernel and one test

OF_NAMED_TUPLES = {"_replace", "_fields", "_asdict", "_make"}


class Import(NamedTuple):
    module: str
    name: str | None  # what is taken out of it; None: the module itself
    alias: str  # by what it is known then
    late: bool  # not while the module is imported


@cache
def sources() -> dict[str, Path]:
    """All modules that are installed, by name. (fastreg/kernels and fastreg/bench are links.)"""
    found = {}
    for folder in ("fastreg", "kernels", "bench"):
        for path in (ROOT / folder).rglob("*.py"):
            place = path.relative_to(ROOT)
            if place.parts[:2] not in (("fastreg", "kernels"), ("fastreg", "bench")):
                parts = [*([] if folder == "fastreg" else ["fastreg"]), *place.with_suffix("").parts]
                found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(sources()[module].read_text(encoding="utf-8"))


def runs_later(node: ast.AST) -> bool:
    """Functions, and what is for a type checker alone."""
    if isinstance(node, ast.If):
        return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    return isinstance(node, ast.FunctionDef)


@cache
def imports(module: str) -> list[Import]:
    """What it imports of fastreg and of others, anywhere in it."""
    late = {id(node) for block in ast.walk(tree(module)) if runs_later(block) for node in ast.walk(block)}
    package = module if sources()[module].name == "__init__.py" else module.rpartition(".")[0]
    found = []
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            for name in node.names:
                alias = name.asname or name.name.partition(".")[0]
                found.append(Import(name.name, None, alias, id(node) in late))
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".") if node.level else []
            base = ".".join([*parts[: len(parts) + 1 - node.level], *([node.module] if node.module else [])])
            for name in node.names:
                alias, whole = name.asname or name.name, f"{base}.{name.name}"
                is_module = whole in sources()
                found.append(
                    Import(whole, None, alias, id(node) in late)
                    if is_module
                    else Import(base, name.name, alias, id(node) in late)
                )
    return found


def of_fastreg(module: str) -> list[Import]:
    return [found for found in imports(module) if found.module.partition(".")[0] == "fastreg"]


def part_of(module: str) -> str:
    return module.partition(".")[2].partition(".")[0]


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in OF_NAMED_TUPLES


def private_names(module: str) -> Iterator[str]:
    """Private names of other modules that it uses."""
    others = [found for found in of_fastreg(module) if found.module != module]
    for found in others:
        if any(map(is_private, (*found.module.split("."), found.name or ""))):
            yield f"{found.module}.{found.name}"
    known = {found.alias for found in others}
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            owner = node.value
            while isinstance(owner, ast.Attribute):
                owner = owner.value
            if isinstance(owner, ast.Name) and owner.id in known:
                yield ast.unparse(node)


def test_every_part_has_its_place():
    assert {part_of(module) for module in sources()} == set(LOWER)


def test_imports_run_one_way():
    wrong = [
        f"{module} imports {found.module}"
        for module in sources()
        for found in of_fastreg(module)
        if part_of(found.module) not in {part_of(module), *LOWER[part_of(module)]}
    ]
    assert wrong == []


def test_parts_stand_in_an_order():
    """All but random and ops, which need each other; the next test shows that their modules do not."""
    order = list(LOWER)
    upwards = [
        (part, other) for part in order for other in LOWER[part] if order.index(other) > order.index(part)
    ]
    assert upwards == [("random", "ops")]


def test_no_modules_need_each_other():
    needs = {
        module: {found.module for found in of_fastreg(module) if not found.late} - {module, "fastreg"}
        for module in sources()
    }
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " imports ".join((*way[way.index(module) :], module))
        if module not in done:
            for other in needs[module]:
                visit(other, (*way, module))
            done.add(module)

    for module in needs:
        visit(module, ())


def kernel_functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    """Each function of ``kernels/`` but the plain ones, which take their arguments one by one."""
    for path in sorted((ROOT / "kernels").rglob("*.py")):
        if path.parent.name != "plain":
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.FunctionDef):
                    yield f"{path.stem}.{node.name}", node


def test_no_function_of_a_kernel_takes_more_than_12_arguments():
    assert {name: n for name, node in kernel_functions() if (n := len(node.args.args)) > 12} == {}


def test_no_tuple_of_a_kernel_is_taken_apart_by_position():
    """A place that is not wanted shows that the rest should have names."""
    names = [
        (name, target.id)
        for name, function in kernel_functions()
        for node in ast.walk(function)
        if isinstance(node, ast.Assign)
        for tuple_ in node.targets
        if isinstance(tuple_, ast.Tuple)
        for target in tuple_.elts
        if isinstance(target, ast.Name)
    ]
    assert names
    assert [name for name, target in names if target == "_"] == []


def test_kernels_import_nothing_but_triton():
    found = {
        other.module.partition(".")[0]
        for module in sources()
        if part_of(module) == "kernels"
        for other in imports(module)
    }
    # The last three are Python's, for constants, a setting and named tuples.
    assert found == {"fastreg", "triton", "math", "os", "typing"}


def test_private_names_stay_in_their_file():
    found = {module: list(private_names(module)) for module in sources()}
    assert {module: names for module, names in found.items() if names} == {}


def test_optimizers_set_attributes_of_their_own():
    """What an object keeps is set in its class."""
    elsewhere = [
        f"{module}: {ast.unparse(node)}"
        for module in sources()
        if part_of(module) == "optim"
        for node in ast.walk(tree(module))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
        if ast.unparse(node.value) != "self" and not isinstance(node.value, ast.Call)
    ]
    assert elsewhere == []


def test_a_family_is_one_stem():
    missing = []
    for family in FAMILIES:
        places = (
            f"kernels/{family}.py",
            f"fastreg/ops/**/{family}.py",
            ELSEWHERE.get(family, f"fastreg/nn/{family}.py"),
            f"tests/test_{family}.py",
            f"bench/{family}.py",
        )
        missing += [place for place in places if len(list(ROOT.glob(place))) != 1]
    assert missing == []


def test_a_family_has_a_plain_kernel():
    twins = {SHARED_FILES.get(family, family) for family in FAMILIES} - {"dual_linear", "noisy_linear"}
    assert {path.stem for path in (ROOT / "kernels/plain").glob("*.py")} == twins | {
        "__init__",
        "draw",  # random numbers, for all of them
        "dropout_in_steps",
    }


# --- the tests --------------------------------------------------------------------------------------------

TESTS = ROOT / "tests"


@cache
def functions_of(path: Path) -> dict[str, ast.FunctionDef | ast.ClassDef]:
    found = ast.parse(path.read_text(encoding="utf-8")).body
    return {node.name: node for node in found if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def test_the_smoke_test_meets_every_family_on_both_backends():
    """A smoke test takes the fixture ``path``, which is both of them."""
    met = set()
    for family in FAMILIES:
        functions = functions_of(TESTS / f"test_{SHARED_FILES.get(family, family)}.py").values()
        smoke = [f for f in functions if "pytest.mark.smoke" in map(ast.unparse, f.decorator_list)]
        met |= {family for f in smoke if "path" in [argument.arg for argument in f.args.args]}
    assert met == {*FAMILIES}


def test_shared_helpers_are_written_once():
    shared = {*functions_of(TESTS / "shared.py"), "needs_gpu", "needs_triton"}
    found = set()
    for path in TESTS.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assigned = {target.id for node in tree.body if isinstance(node, ast.Assign)
                    for target in node.targets if isinstance(target, ast.Name)}  # fmt: skip
        if path.name != "shared.py":
            again = shared & {*functions_of(path), *assigned}
            found |= {f"{path.relative_to(TESTS).as_posix()}: {name}" for name in again}
    assert found == set()


def test_no_test_file_is_longer_than_800_lines():
    lengths = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in TESTS.rglob("*.py")}
    assert {name: length for name, length in lengths.items() if length > 800} == {}


# --- plain words ------------------------------------------------------------------------------------------

OPENING = re.compile(r'(?:"""|^\s*#\s|^- |[.:;] )Of [a-z]', re.MULTILINE)


def test_no_sentence_opens_with_of():
    """ "Of a tile: the first row" hides its subject: "The first row of a tile". (kernels/ has its turn.)"""
    files = [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(p for m, p in sources().items() if part_of(m) != "kernels"),
    ]
    files += [path for path in TESTS.rglob("*.py") if path.name != "test_structure.py"]
    found = {path.name: OPENING.findall(path.read_text(encoding="utf-8")) for path in files}
    assert {name: openings for name, openings in found.items() if openings} == {}
