"""One name, one class: whoever searches for a class finds one."""

import ast
from collections import defaultdict
from pathlib import Path

import alisa

PACKAGE = Path(alisa.__file__).parent


def class_names():
    """Every public class of the package, with the files that define one of that name."""
    found = defaultdict(list)
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found[node.name].append(str(path.relative_to(PACKAGE)))
    return found


def test_no_class_name_is_there_twice():
    assert {name: files for name, files in class_names().items() if len(files) > 1} == {}
