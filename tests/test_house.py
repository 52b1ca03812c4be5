"""The rules of the house: who may import whom, and how long a file or a function may be."""

import ast
import json
from functools import cache
from graphlib import CycleError, TopologicalSorter

import pytest

from helpers import ROOT

FOLDERS = ("models", "utils", "scripts", "benchmarks")
LIBRARIES = {"command_line", "inference", "benchmarks", "benchmarks.steps", "benchmarks.peers"}
LIBRARIES |= {
    "scripts.experiment",
    "scripts.study",
    "scripts.study_pretraining",
    "scripts.study_speed",
    "scripts.fault_checks",
    "scripts.fault_runs",
    "scripts.faults",
}
MAX_FILE, MAX_FUNCTION = 350, 60  # lines


def find_modules():
    """{dotted name: path} of every Python file but the tests."""
    paths = [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))]
    named = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sorted(paths)}
    return {name.removesuffix(".__init__"): path for name, path in named.items()}


MODULES = find_modules()
SCRIPTS = {name for name in MODULES if name.split(".")[0] not in ("models", "utils")} - LIBRARIES


@cache
def imports_of(name):
    """Names of the project's modules that a module imports, also inside functions."""
    path = MODULES[name]
    return imported_by(ast.parse(path.read_text()), folder=path.parent.name)


def imported_by(tree, folder=""):
    """Names of the project's modules that a syntax tree imports; scripts import from their own folder directly."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {known(alias.name, folder) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            # `from models import npz` imports a module, `from models import build_model` what models/__init__.py has.
            whole = known(node.module, folder)
            found |= {known(f"{node.module}.{alias.name}", folder) or whole for alias in node.names}
    return found - {None}


def known(name, folder):
    """The module of this project that `name` means in a file of `folder`, or None."""
    return next((full for full in (name, f"{folder}.{name}") if full in MODULES), None)


def test_the_modules_and_their_imports_are_found():
    """The tests below can't pass for lack of modules or imports."""
    assert {"train", "models", "models.norms", "utils.training", "utils.data.images"} <= MODULES.keys()
    assert MODULES.keys() >= LIBRARIES
    assert {"train", "evaluate", "scripts.norm_study", "benchmarks.throughput"} <= SCRIPTS
    assert {"models", "inference", "utils.errors", "scripts.experiment"} <= imports_of("scripts.norm_study")
    assert "benchmarks.steps" in imports_of("benchmarks.throughput")


def test_nobody_imports_a_script():
    """What scripts share belongs in a library."""
    found = {name: sorted(imports_of(name) & SCRIPTS - {name}) for name in MODULES}
    assert {name: scripts for name, scripts in found.items() if scripts} == {}


def test_the_notebook_imports_no_script():
    notebook = json.loads((ROOT / "visualize_attention_map.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    code = "\n".join(line for cell in cells for line in cell.splitlines() if not line.startswith(("%", "!")))
    found = imported_by(ast.parse(code))
    assert "inference" in found
    assert found & SCRIPTS == set()


def test_imports_run_downwards():
    """`models` and `utils` import neither each other nor what is above them."""
    for room in ("models", "utils"):
        found = {name: outside(imports_of(name), room) for name in MODULES if name.split(".")[0] == room}
        assert {name: imported for name, imported in found.items() if imported} == {}


def outside(imported, room):
    return sorted(name for name in imported if name.split(".")[0] != room)


def test_no_circle_of_imports():
    try:
        TopologicalSorter({name: imports_of(name) - {name} for name in MODULES}).prepare()
    except CycleError as error:
        pytest.fail(f"circle of imports: {' -> '.join(error.args[1])}")


def test_files_are_short():
    lines = {name: len(path.read_text().splitlines()) for name, path in MODULES.items()}
    assert {name: count for name, count in lines.items() if count > MAX_FILE} == {}


def test_functions_are_short():
    lines = {}
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines[f"{name}.{node.name}"] = node.end_lineno - node.lineno + 1
    assert {name: count for name, count in lines.items() if count > MAX_FUNCTION} == {}
