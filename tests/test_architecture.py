"""Holds the source to its design by reading it: import order, banned calls, sizes.

Every rule is a function from source text to problem lines; each has a planted fault below that it
must report, so a rule that stops looking turns red.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CODE = sorted(p for room in ("peftkit", "benchmarks") for p in (ROOT / room).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))

# From the bottom up; rooms in one line are peers. A room imports itself and lower lines only.
ORDER = (
    ("__init__",),
    ("errors", "importing"),
    ("schema", "nested"),
    ("staging",),
    ("yaml_source",),
    ("contracts", "plugins", "recipe_problems"),
    ("data",),
    ("modeling",),
    ("methods", "tasks", "training", "memory", "registry", "reporting", "serving"),
    ("merging",),
    ("scoring",),
    ("recipe",),
    ("planning",),
    ("run_facts", "run_folder"),
    ("experiment",),
    ("cli",),
    ("run",),
    ("__main__",),
)
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}

UNSAFE_CALLS = {
    "yaml.load": "use a loader over yaml.SafeLoader: yaml.safe_load, yaml.compose",
    "yaml.load_all": "use yaml.safe_load_all",
    "yaml.full_load": "use yaml.safe_load",
    "yaml.full_load_all": "use yaml.safe_load_all",
    "yaml.unsafe_load": "use yaml.safe_load",
    "yaml.unsafe_load_all": "use yaml.safe_load_all",
    "pickle.load": "it runs code; use safetensors or JSON",
    "pickle.loads": "it runs code; use safetensors or JSON",
    "pickle.Unpickler": "it runs code; use safetensors or JSON",
    "joblib.load": "it unpickles; use safetensors or JSON",
    "pandas.read_pickle": "it unpickles; use parquet",
}
UNSAFE_LOADERS = {
    f"yaml.{name}" for name in ("Loader", "UnsafeLoader", "FullLoader", "CLoader", "CFullLoader")
}
MAX_FILE_LINES = 299
MAX_BODY_LINES = 60


def is_type_checking(node: ast.AST) -> bool:
    names = ("TYPE_CHECKING", "typing.TYPE_CHECKING")
    return isinstance(node, ast.If) and ast.unparse(node.test) in names


def runtime_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node that can run: all but the bodies of `if TYPE_CHECKING:`."""
    waiting = [tree]
    while waiting:
        node = waiting.pop(0)
        yield node
        children = node.orelse if is_type_checking(node) else ast.iter_child_nodes(node)
        waiting.extend(children)


def aliases(tree: ast.AST) -> dict[str, str]:
    """Local name → what it was imported as: `from yaml import load as read` → yaml.load."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.split(".")[0]
                names[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return names


def dotted(node: ast.AST, names: dict[str, str]) -> str:
    """`t.load` → torch.load after `import torch as t`; an empty string for other expressions."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute) and (left := dotted(node.value, names)):
        return f"{left}.{node.attr}"
    return ""


def imported(node: ast.AST, package: list[str], names: dict[str, str]) -> list[str]:
    """Full names that one node imports; `package` holds the parts of the importer's package."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        above = package[: len(package) + 1 - node.level] if node.level else []
        base = ".".join([*above, node.module] if node.module else above)
        return [f"{base}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Call) and dotted(node.func, names) in (
        "importlib.import_module",
        "__import__",
    ):
        return [a.value for a in node.args[:1] if isinstance(a, ast.Constant)]
    return []


def import_problems(source: str, path: str) -> list[str]:
    """`path` is relative to the root: peftkit/data/sources.py."""
    parts = path.removesuffix(".py").split("/")
    room = parts[1]
    if room not in RANK:
        return [f"{path}: room '{room}' has no place in ORDER"]
    tree = ast.parse(source)
    names = aliases(tree)
    problems = []
    for node in runtime_nodes(tree):
        for target in imported(node, parts[:-1], names):
            other = target.split(".")[1] if target.startswith("peftkit.") else ""
            if other != room and RANK.get(other, -1) >= RANK[room]:
                problems.append(f"{path}:{node.lineno}: {room} may not import {target}")
    return problems


def call_problem(node: ast.Call, names: dict[str, str]) -> str | None:
    name = dotted(node.func, names)
    keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
    if name == "torch.load" and keywords.get("weights_only") != "True":
        return "torch.load without weights_only=True"
    if name == "numpy.load" and keywords.get("allow_pickle", "False") != "False":
        return "numpy.load with allow_pickle"
    if name in UNSAFE_CALLS:
        return f"{name}: {UNSAFE_CALLS[name]}"
    if keywords.get("trust_remote_code", "False") != "False":
        return "trust_remote_code"
    return None


def trusts_remote_code(node: ast.Dict) -> bool:
    """`{"trust_remote_code": True}`, on its way into a call."""
    return any(
        isinstance(key, ast.Constant)
        and key.value == "trust_remote_code"
        and ast.unparse(value) != "False"
        for key, value in zip(node.keys, node.values, strict=True)
    )


def banned_problems(source: str, path: str) -> list[str]:
    """Ways to run code from a file; a dict counts as much as a keyword."""
    tree = ast.parse(source)
    names = aliases(tree)
    problems = []
    for node in ast.walk(tree):
        found = None
        if isinstance(node, ast.Call):
            found = call_problem(node, names)
        elif isinstance(node, ast.Dict) and trusts_remote_code(node):
            found = "trust_remote_code"
        elif isinstance(node, ast.Name | ast.Attribute) and dotted(node, names) in UNSAFE_LOADERS:
            found = f"{dotted(node, names)}: derive from yaml.SafeLoader"
        if found:
            problems.append(f"{path}:{node.lineno}: {found}")
    return problems


def length_problems(source: str, path: str) -> list[str]:
    lines = len(source.splitlines())
    return [f"{path}: {lines} lines, at most {MAX_FILE_LINES}"] if lines > MAX_FILE_LINES else []


def body_problems(source: str, path: str) -> list[str]:
    """Function bodies that are too long, their docstrings left out."""
    problems = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            size = node.end_lineno - body[0].lineno + 1 if body else 0
            if size > MAX_BODY_LINES:
                problem = f"{node.name} has {size} lines, at most {MAX_BODY_LINES}"
                problems.append(f"{path}:{node.lineno}: {problem}")
    return problems


def over(files: list[Path], rule) -> str:
    """All problems that `rule` finds in `files`, one a line."""
    assert files, "no source found: the rule would pass by looking at nothing"
    texts = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in files}
    return "\n".join(problem for path, text in texts.items() for problem in rule(text, path))


def test_imports_go_down_only():
    assert over([p for p in CODE if p.is_relative_to(ROOT / "peftkit")], import_problems) == ""


def test_no_source_can_run_code_from_a_file():
    assert over(CODE, banned_problems) == ""


def test_files_stay_short():
    assert over(CODE, length_problems) == ""


def test_functions_stay_short():
    assert over([*CODE, *TESTS], body_problems) == ""


@pytest.mark.parametrize(
    ("path", "source", "target"),
    [
        ("peftkit/data/x.py", "import peftkit.methods.lora", "peftkit.methods.lora"),
        ("peftkit/data/x.py", "from peftkit import registry", "peftkit.registry"),
        ("peftkit/data/x.py", "from ..recipe import Recipe", "peftkit.recipe.Recipe"),
        ("peftkit/data/x.py", "from .. import cli", "peftkit.cli"),
        ("peftkit/errors.py", "from . import schema", "peftkit.schema"),
        ("peftkit/methods/x.py", "from peftkit.tasks.y import z", "peftkit.tasks.y.z"),
        ("peftkit/plugins.py", "def f():\n    from peftkit.recipe import R", "peftkit.recipe.R"),
        ("peftkit/tasks/x.py", "async def f():\n    import peftkit.run", "peftkit.run"),
        ("peftkit/__init__.py", "import peftkit.errors", "peftkit.errors"),
        (
            "peftkit/data/x.py",
            "from importlib import import_module as load\nload('peftkit.cli')",
            "peftkit.cli",
        ),
        ("peftkit/data/x.py", "if TYPE_CHECKING:\n  1\nelse:\n  import peftkit.cli", "peftkit.cli"),
    ],
)
def test_an_upward_import_is_reported(path, source, target):
    room = path.removesuffix(".py").split("/")[1]
    line = next(i for i, text in enumerate(source.splitlines(), 1) if target.split(".")[1] in text)
    assert import_problems(source, path) == [f"{path}:{line}: {room} may not import {target}"]


def test_an_unplaced_room_is_reported():
    assert import_problems("", "peftkit/common.py") == [
        "peftkit/common.py: room 'common' has no place in ORDER"
    ]


@pytest.mark.parametrize(
    "source",
    [
        "from peftkit.errors import DataError",
        "from peftkit import __version__",
        "from .splits import row_identity",
        "if TYPE_CHECKING:\n    from peftkit.recipe import Recipe",
        "import typing\nif typing.TYPE_CHECKING:\n    from peftkit.recipe import Recipe",
    ],
)
def test_a_downward_or_typing_import_is_allowed(source):
    assert import_problems(source, "peftkit/data/x.py") == []


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("import torch\ntorch.load(p)", "torch.load without weights_only=True"),
        ("import torch as t\nt.load(p, weights_only=w)", "torch.load without weights_only=True"),
        ("from torch import load\nload(p)", "torch.load without weights_only=True"),
        ("import numpy as np\nnp.load(p, allow_pickle=True)", "numpy.load with allow_pickle"),
        ("\nAutoModel.from_pretrained(n, trust_remote_code=True)", "trust_remote_code"),
        ("\noptions = {'trust_remote_code': flag}", "trust_remote_code"),
        ("import yaml\nyaml.CFullLoader", "yaml.CFullLoader: derive from yaml.SafeLoader"),
        *((f"import {n.split('.')[0]}\n{n}(p)", f"{n}: {why}") for n, why in UNSAFE_CALLS.items()),
        *(
            (f"import yaml\nclass Mine({name}): ...", f"{name}: derive from yaml.SafeLoader")
            for name in sorted(UNSAFE_LOADERS)
        ),
    ],
)
def test_a_call_that_runs_code_is_reported(source, problem):
    assert banned_problems(source, "peftkit/x.py") == [f"peftkit/x.py:2: {problem}"]


def test_safe_counterparts_are_allowed():
    source = (
        "import torch, yaml\ntorch.load(p, weights_only=True)\nyaml.safe_load(p)\n"
        "yaml.compose(p, Loader=yaml.SafeLoader)\njson.load(p)\nf(trust_remote_code=False)"
    )
    assert banned_problems(source, "peftkit/x.py") == []


def test_a_long_file_is_reported():
    assert length_problems("\n" * 299, "peftkit/x.py") == []
    assert length_problems("\n" * 300, "peftkit/x.py") == ["peftkit/x.py: 300 lines, at most 299"]


def test_a_long_body_is_reported():
    head = 'async def f():\n    """Doc."""\n'
    assert body_problems(head + "    x = 1\n" * 60, "peftkit/x.py") == []
    assert body_problems(head + "    x = 1\n" * 61, "peftkit/x.py") == [
        "peftkit/x.py:1: f has 61 lines, at most 60"
    ]
