"""The import rule, read off the syntax trees: a file imports only from its own rank and those before it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "diffattn"

RANKS = {
    "functional": 0,
    "json_text": 0,
    "file_names": 0,
    "schedules": 1,
    "noise_level": 1,
    "methods": 2,
    "processors": 3,
    "models": 3,
    "plan": 3,
    "recipe": 3,
    "report": 3,
    "run_hook": 4,
    "injection": 4,
    "patched": 4,
    "sampling": 4,
    "loading": 4,
    "training": 5,
    "evaluation": 5,
    "generation": 5,
    "demo": 5,
    "devices": 5,
    "capabilities": 5,
    "jobs": 5,
    "cli": 6,
    "webui": 6,
    "__main__": 6,
}
"""Top-level module or package of diffattn -> rank. A new one gets its line here."""

PUBLIC = 5
"""`diffattn/__init__.py` names things of every rank up to this one; importing `diffattn` itself counts as much."""

SWITCHES = ("torch.backends", "torch.set_", "torch.manual_seed", "torch.random.", "torch.use_deterministic")
"""What changes torch for the whole process."""

FILES = sorted(ROOT.rglob("*.py"))
every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))


def module_name(path: Path) -> str:
    """Dotted name of a file of the package, `diffattn` included."""
    parts = ("diffattn", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def top_level(module: str) -> str:
    """The part of `diffattn.part.rest` that has a rank; empty for `diffattn` itself."""
    return [*module.split("."), ""][1]


def rank(module: str) -> int:
    part = top_level(module)
    if not part:
        return PUBLIC
    assert part in RANKS, f"diffattn.{part} has no rank yet: add it to RANKS in tests/test_architecture.py"
    return RANKS[part]


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


def test_every_top_level_module_has_a_rank() -> None:
    found = {p.stem for p in ROOT.glob("*.py")} | {p.parent.name for p in ROOT.glob("*/__init__.py")}
    missing = found - set(RANKS) - {"__init__"}
    assert not missing, f"add {sorted(missing)} to RANKS in tests/test_architecture.py, and to the tree in the docs"


@every_file
def test_imports_only_from_its_own_rank_and_before(path: Path) -> None:
    own = PUBLIC if path == ROOT / "__init__.py" else rank(module_name(path))
    wrong = [f"line {line}: {name} ({rank(name)})" for line, name in ours(path) if rank(name) > own]
    assert not wrong, f"{module_name(path)} is of rank {own} and imports {wrong}"


@every_file
def test_no_package_is_imported_from_the_package_itself_below_the_front_ends(path: Path) -> None:
    """`from diffattn import patch` inside the package would make circles."""
    if path == ROOT / "__init__.py" or rank(module_name(path)) >= PUBLIC:
        return
    assert [x for x in ours(path) if x[1] == "diffattn"] == []


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


@pytest.mark.parametrize("path", sorted((ROOT / "processors").rglob("*.py")), ids=lambda path: path.name)
def test_processors_know_no_concrete_method(path: Path) -> None:
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
    if not path.is_relative_to(ROOT / "webui"):
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
    [path for path in FILES if "evaluation" not in path.parts],  # which undoes what rivals do to classes
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_no_class_of_a_living_object_is_changed(path: Path) -> None:
    nodes = ast.walk(ast.parse(path.read_text()))
    assert [name for node in nodes for name in touched(node) if name.endswith(".__class__")] == []


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
    assert {"diffattn.functional", "diffattn.injection", "diffattn.demo"} & found
    assert resolved("diffattn", "functional") == "diffattn.functional"
    assert resolved("diffattn.injection", "patch") == "diffattn.injection"


def test_a_module_without_a_rank_is_named_with_the_place_to_add_it() -> None:
    with pytest.raises(AssertionError, match=r"diffattn.newcomer has no rank yet: add it to RANKS in tests/test_arch"):
        rank("diffattn.newcomer.part")
