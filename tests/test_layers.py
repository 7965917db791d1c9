"""Files import in one direction, as the table in docs/design.md says."""

import ast
import pathlib
import re

ROOT = pathlib.Path(__file__).parent.parent
SOURCE = ROOT / "src" / "distributed_metrics"
TABLE = re.findall(r"^\| (\d+) \| ([^|]*) \|", (ROOT / "docs" / "design.md").read_text(), flags=re.MULTILINE)
LAYER = {name: int(layer) for layer, names in TABLE for name in re.findall(r"`(\w+)`", names)}


def module_of(path):
    """A file of the package, or the folder in it that has the file."""
    return path.relative_to(SOURCE).with_suffix("").parts[0]


def imported(path):
    """The files and folders of the package that a file imports, wherever the import stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == SOURCE.name:
            inner = node.module.split(".")[1:]
            yield from inner[:1] or (alias.name for alias in node.names)


def test_every_file_has_its_layer():
    assert sorted(LAYER) == sorted({module_of(path) for path in SOURCE.rglob("*.py")} - {"__init__"})


def test_files_import_from_lower_layers_only():
    edges = {(module_of(path), name) for path in SOURCE.rglob("*.py") for name in imported(path)}
    inner = {(file, name) for file, name in edges if file != name and file != "__init__"}
    assert len(inner) > 50  # the imports were found
    assert [(file, name) for file, name in sorted(inner) if LAYER[name] >= LAYER[file]] == []
