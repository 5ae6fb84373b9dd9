"""The order of imports: each package may import only those before it."""

import ast
from pathlib import Path

import pytest

import loraretriever

ROOT = Path(loraretriever.__file__).parent
# A module of one line may import those of the lines above, and of its own line.
ORDER = (
    {"errors", "tracing", "openmp"},
    {"types", "config", "jsonl"},
    {"models"},
    {"pool"},
    {"retrieve"},
    {"compose"},
    {"batch"},
    {"engine"},
    {"pipeline"},
    {"server"},
    {"cluster"},
    {"train", "evaluate"},
    {"console"},
    {"cli"},
    {"__main__"},
)
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}


def imported_parts(file: Path) -> set[str]:
    """First parts, below the package, of what a file imports from it; imports for type checkers alone do not count."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = (
                [f"{node.module}.{alias.name}" for alias in node.names]
                if node.module == "loraretriever"
                else [node.module]
            )
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("loraretriever.")}
    return found - {"__version__", *loraretriever.__all__}


@pytest.mark.parametrize("file", sorted(ROOT.rglob("*.py")), ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_point_one_way(file: Path) -> None:
    part = file.relative_to(ROOT).parts[0].removesuffix(".py")
    if part == "__init__":
        return
    for imported in imported_parts(file):
        assert LEVEL[imported] <= LEVEL[part], f"{part} imports {imported}, which comes after it"
