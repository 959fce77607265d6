"""The package graph, read off the syntax trees: each package imports only what the table allows, without a circle."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ROOT = TESTS.parent / "diffattn"

MAY_IMPORT = {
    "functional": "",
    "files": "",
    "machine": "",
    "schedules": "",
    "tables": "",
    "noise_level": "",
    "methods": "files functional schedules",
    "models": "functional",
    "architectures": "methods models noise_level schedules",
    "patching": "architectures files machine methods noise_level schedules tables",
    "sampling": "models patching",
    "drawing": "architectures files machine patching sampling",
    "data": "files",
    "measure": "machine models",
    "metrics": "drawing files",
    "evaluation": "architectures data drawing files machine methods metrics patching sampling tables",
    "training": "data evaluation files measure metrics models sampling",
    "preflight": "architectures drawing machine measure patching schedules tables",
    "tuning": "architectures drawing files machine measure methods noise_level patching sampling schedules",
    "benchmarks": "architectures files functional machine measure methods models patching schedules tables",
    "demo": "drawing files machine measure metrics patching",
    "app.jobs": "architectures drawing evaluation files machine measure methods metrics models patching schedules",
    "app.page": "app.jobs",
    "capabilities": "architectures drawing files machine methods models patching",
    "cli": "app.jobs app.page benchmarks capabilities demo drawing evaluation files machine methods metrics models"
    " patching preflight training tuning",
    "__main__": "cli",
    "__init__": "drawing functional methods patching schedules tuning",
}
"""Package or top-level module of diffattn -> those it may import. A new one gets its line here, and in the docs."""

SWITCHES = ("torch.backends", "torch.set_", "torch.manual_seed", "torch.random.", "torch.use_deterministic")
"""What changes torch for the whole process."""

FILES = sorted(ROOT.rglob("*.py"))
every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))


def module_name(path: Path) -> str:
    """Dotted name of a file of the package, `diffattn` included."""
    parts = ("diffattn", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def unit(module: str) -> str:
    """The part of `diffattn.part.rest` that has a line in the table; `__init__` for `diffattn` itself."""
    parts = module.split(".")[1:] or ["__init__"]
    return ".".join(parts[:2]) if parts[0] == "app" else parts[0]


def allowed(part: str) -> list[str]:
    assert part in MAY_IMPORT, f"diffattn.{part} has no line in MAY_IMPORT of tests/test_architecture.py yet"
    return MAY_IMPORT[part].split()


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything a file imports, inside functions too."""
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, resolved(source, alias.name)


def resolved(source: str, name: str) -> str:
    """`from source import name`: the submodule if there is one, else the module it is taken from."""
    inside = ROOT.parent.joinpath(*source.split("."))
    is_submodule = (inside / name).is_dir() or (inside / f"{name}.py").is_file()
    return f"{source}.{name}" if is_submodule else source


def ours(path: Path) -> list[tuple[int, str]]:
    return [(line, name) for line, name in imports(path) if name.split(".")[0] == "diffattn"]


def test_every_package_has_a_line_and_every_line_a_package() -> None:
    found = {unit(module_name(path)) for path in FILES} - {"app"}  # the folder alone: nothing but a docstring
    assert found == set(MAY_IMPORT)


@every_file
def test_a_package_imports_only_what_the_table_allows(path: Path) -> None:
    own = unit(module_name(path))
    wrong = [f"line {line}: {name}" for line, name in ours(path) if unit(name) not in (own, *allowed(own))]
    assert not wrong, f"{own} may import {allowed(own)}; {module_name(path)} imports {wrong}"


@pytest.mark.slow
def test_the_table_allows_nothing_that_no_file_needs() -> None:
    used = {(unit(module_name(path)), unit(name)) for path in FILES for _, name in ours(path)}
    unused = [f"{part} -> {other}" for part in MAY_IMPORT for other in allowed(part) if (part, other) not in used]
    assert unused == []


def circles(graph: dict[str, list[str]]) -> list[str]:
    """Packages that import each other, directly or not."""
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        return error.args[1]
    return []


def test_the_package_graph_has_no_circle() -> None:
    assert circles({part: allowed(part) for part in MAY_IMPORT}) == []


MOST_LINES, MOST_ARGUMENTS = 80, 8
INTERFACES = {
    "evaluation/evaluate.py:evaluate",
    "evaluation/quality.py:of",
    "models/dit.py:__init__",
    "preflight/run.py:preflight",
    "sampling/pipeline.py:__call__",
}
"""Public functions, constructors and pipeline calls, whose argument names are an interface and may be more."""
OF_ENDPOINTS = ("cli/", "app/page/", "app/jobs/limits.py")
"""Where the functions of commands and endpoints are, whose arguments are an interface, too."""


def arguments(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """Named arguments, without those that only methods have."""
    names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    return [name for name in names if name not in ("self", "cls")]


@every_file
def test_functions_are_short_and_take_few_arguments(path: Path) -> None:
    where = path.relative_to(ROOT).as_posix()
    nodes = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert [n.name for n in nodes if n.end_lineno - n.lineno >= MOST_LINES] == []  # type: ignore[operator]
    if not where.startswith(OF_ENDPOINTS):
        many = {f"{where}:{n.name}" for n in nodes if len(arguments(n)) > MOST_ARGUMENTS}
        assert many == {name for name in INTERFACES if name.startswith(f"{where}:")}


STDLIB_AND_TORCH = {
    "torch",
    "diffattn",
    "contextlib",
    "math",
    "dataclasses",
    "typing",
    "collections",
    "itertools",
    "functools",
}


@pytest.mark.parametrize("path", sorted((ROOT / "functional").rglob("*.py")), ids=lambda path: path.name)
def test_functional_knows_torch_and_nothing_else(path: Path) -> None:
    foreign = [x for x in imports(path) if x[1].split(".")[0] not in STDLIB_AND_TORCH]
    assert foreign == []
    assert [x for x in ours(path) if not x[1].startswith("diffattn.functional")] == []


@pytest.mark.parametrize("path", sorted((ROOT / "architectures").rglob("*.py")), ids=lambda path: path.name)
def test_architectures_know_no_concrete_method(path: Path) -> None:
    methods = {name for _, name in ours(path) if name.startswith("diffattn.methods")}
    assert methods <= {"diffattn.methods.base"}


@pytest.mark.parametrize("path", sorted((ROOT / "methods").rglob("*.py")), ids=lambda path: path.name)
def test_methods_know_no_architecture(path: Path) -> None:
    assert [x for x in imports(path) if x[1].split(".")[0] in ("diffusers", "transformers")] == []


def test_schedules_are_pure_python() -> None:
    names = {name.split(".")[0] for _, name in imports(ROOT / "schedules.py")}
    assert names.isdisjoint({"torch", "numpy", "diffusers"})


@every_file
def test_gradio_is_imported_by_the_web_page_only(path: Path) -> None:
    if not path.is_relative_to(ROOT / "app" / "page"):
        assert [x for x in imports(path) if x[1].split(".")[0] == "gradio"] == []


def at_import(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when a module is imported: all but the bodies of functions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for outside in (*node.decorator_list, *node.args.defaults, *filter(None, node.args.kw_defaults)):
                yield outside
                yield from at_import(outside)
        elif not isinstance(node, ast.Lambda):
            yield node
            yield from at_import(node)


def touched(node: ast.AST) -> list[str]:
    """Dotted names that a node calls or assigns to."""
    if isinstance(node, ast.Call):
        return [ast.unparse(node.func)]
    if isinstance(node, ast.Assign):
        return [ast.unparse(target) for target in node.targets]
    if isinstance(node, ast.AugAssign | ast.AnnAssign):
        return [ast.unparse(node.target)]
    return []


def switches(source: str) -> list[str]:
    return [name for node in at_import(ast.parse(source)) for name in touched(node) if name.startswith(SWITCHES)]


@every_file
def test_importing_changes_nothing_in_torch(path: Path) -> None:
    assert switches(path.read_text()) == []


@pytest.mark.parametrize(
    "path",
    [path for path in FILES if "benchmarks" not in path.parts],  # which undo what rivals do to classes
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_no_class_of_a_living_object_is_changed(path: Path) -> None:
    nodes = ast.walk(ast.parse(path.read_text()))
    assert [name for node in nodes for name in touched(node) if name.endswith(".__class__")] == []


def slow_files() -> set[str]:
    """The test files that `make test-fast` leaves out: `SLOW` in conftest.py."""
    tree = ast.parse((TESTS / "conftest.py").read_text())
    values = [n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "SLOW"]
    return set(ast.literal_eval(values[0]))


@pytest.mark.parametrize("part", [part for part in MAY_IMPORT if (ROOT / part.replace(".", "/")).is_dir()])
def test_every_package_has_fast_tests(part: str) -> None:
    files = (path for path in (TESTS / part.replace(".", "/")).rglob("test_*.py") if "browser" not in path.name)
    assert {path.relative_to(TESTS).as_posix() for path in files} - slow_files()


def test_slow_files_exist() -> None:
    assert [name for name in slow_files() if not (TESTS / name).is_file()] == []


# The checks themselves.


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("torch.backends.cudnn.benchmark = True", ["torch.backends.cudnn.benchmark"]),
        ("import torch\ntorch.set_num_threads(2)", ["torch.set_num_threads"]),
        ("class A:\n    x = torch.manual_seed(0)", ["torch.manual_seed"]),
        ("def f(x=torch.manual_seed(0)): ...", ["torch.manual_seed"]),
        ("if True:\n    torch.set_grad_enabled(False)", ["torch.set_grad_enabled"]),
        ("def f():\n    torch.manual_seed(0)", []),
        ("x = torch.backends.cuda.is_built", []),
    ],
)
def test_switches_are_seen_at_import_and_not_in_functions(source: str, found: list[str]) -> None:
    assert switches(source) == found


def test_imports_are_resolved_to_the_module_they_come_from() -> None:
    found = {name for _, name in imports(ROOT / "__init__.py")}
    assert {"diffattn.functional", "diffattn.patching.patch"} <= found
    assert resolved("diffattn", "functional") == "diffattn.functional"
    assert resolved("diffattn.patching.patch", "unpatch") == "diffattn.patching.patch"


def test_circles_are_found() -> None:
    assert set(circles({"a": ["b"], "b": ["c"], "c": ["a"]})) == {"a", "b", "c"}
    assert circles({"a": ["b", "c"], "b": ["c"]}) == []


def test_a_package_without_a_line_is_named_with_the_place_to_add_it() -> None:
    with pytest.raises(AssertionError, match=r"diffattn.newcomer has no line in MAY_IMPORT of tests/test_arch"):
        allowed(unit("diffattn.newcomer.part"))
