"""Imports point one way, heavy libraries have one home each, and configs are data."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = {"errors", "config", "workdirs", "slices"}
LEAVES = {"data", "optim", "metrics", "parallel", "hosts", "checkpoints", "plots", "watch", "launch"}
CHAIN = ["ops", "layers", "models", "train", "bench", "pods", "sweep", "cli"]  # each may import what stands left of it
ALLOWED = {
    "__init__": {"ops", "layers", "models"},
    "__main__": {"cli"},
    "errors": set(),
    "workdirs": set(),
    "slices": {"errors"},
    "config": {"errors", "workdirs"},
    **{leaf: SHARED for leaf in LEAVES},
    "ops": {"errors"},
    "layers": {"errors", "ops"},
    "models": {"errors", "ops", "layers"},
    "train": SHARED | {"ops", "layers", "models"} | LEAVES,
    "bench": SHARED | set(CHAIN[:4]) | LEAVES,
    "pods": SHARED | set(CHAIN[:5]) | LEAVES,
    "sweep": SHARED | set(CHAIN[:5]) | LEAVES,  # not pods
    "cli": SHARED | set(CHAIN) | LEAVES | {"__init__"},
}
CORE = {"__init__", "errors", "ops", "layers", "models"}
CORE_LIBRARIES = {"jax", "flax", "numpy", "aaconv", *sys.stdlib_module_names}
HOMES = {  # the only rooms that may import a library at all
    "tensorflow": {"data"},
    "tensorflow_datasets": {"data"},
    "grain": {"data"},
    "sklearn": {"data"},
    "orbax": {"checkpoints"},
    "optax": {"optim", "train"},
    "matplotlib": {"plots"},
    "tensorboardX": {"metrics"},
    "torch": {"bench"},
    "submitit": {"sweep"},
    "etils": {"workdirs", "data"},
    "pyarrow": {"sweep"},
    "wandb": {"sweep"},
}
# At the top of a file these slow every start, or are not installed; some files are themselves imported late.
LATE = set(HOMES) - {"optax"}
TOP_LEVEL_BY_RIGHT = {
    ("checkpoints", "orbax"),
    ("data", "grain"),
    ("data", "tensorflow_datasets"),
    ("data", "etils"),
    ("bench", "torch"),
}


def imports(tree: ast.Module, package: str):
    """Yields (module, whether it runs when the file is imported) for every import in a file."""

    def visit(node, runs):
        if isinstance(node, ast.Import):
            yield from ((alias.name, runs) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) + 1 - node.level]) if node.level else ""
            module = ".".join(filter(None, [base, node.module]))
            names = [alias.name for alias in node.names] if module == "aaconv" else [""]
            yield from ((f"{module}.{name}".rstrip("."), runs) for name in names)
        else:
            lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            lazy = lazy or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
            for child in ast.iter_child_nodes(node):
                yield from visit(child, runs and not lazy)

    yield from visit(tree, True)


def violations(path: str, source: str) -> list[str]:
    """Says what a file, by its path in the repository, must not import."""
    parts = Path(path).with_suffix("").parts
    found = []
    for module, runs in imports(ast.parse(source), ".".join(parts[:-1])):
        library, _, rest = module.partition(".")
        if parts[0] == "configs":
            if module not in ("ml_collections", "__future__"):
                found.append(f"{path} imports {module}: a config is data, ml_collections is all it needs")
            continue
        room = parts[1]
        if library == "aaconv":
            other = rest.partition(".")[0] or "__init__"
            if not (REPOSITORY / "aaconv" / other).is_dir() and not (REPOSITORY / f"aaconv/{other}.py").is_file():
                other = "__init__"  # a name such as aaconv.AAConv, not a module
            if other != room and other not in ALLOWED[room]:
                found.append(f"{path} imports {module}: {room} may only import {sorted(ALLOWED[room])}")
            elif room == "cli" and runs and other not in ("cli", "errors"):
                found.append(f"{path} imports {module} at the top: every command would wait for it")
        elif room in CORE and library not in CORE_LIBRARIES:
            found.append(f"{path} imports {module}: `import aaconv` needs jax and flax alone")
        elif room not in HOMES.get(library, {room}):
            found.append(f"{path} imports {module}: only {sorted(HOMES[library])} may")
        elif room == "cli" and runs and library not in sys.stdlib_module_names:
            found.append(f"{path} imports {module} at the top: every command would wait for it")
        elif runs and library in LATE:
            package_init = parts[-1] == "__init__"
            if package_init or (room, library) not in TOP_LEVEL_BY_RIGHT:
                found.append(f"{path} imports {module} at the top: import it in the function that needs it")
    return found


FILES = [path for folder in ("aaconv", "configs") for path in sorted((REPOSITORY / folder).rglob("*.py"))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_file_imports_only_what_its_room_may(path):
    assert violations(str(path.relative_to(REPOSITORY)), path.read_text()) == []


def test_every_room_is_known():
    rooms = {
        path.relative_to(REPOSITORY / "aaconv").with_suffix("").parts[0]
        for path in FILES
        if path.is_relative_to(REPOSITORY / "aaconv")
    }
    assert rooms <= set(ALLOWED), "give the new room its arrows in ALLOWED and in docs/architecture.md"


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("aaconv/ops/new.py", "from aaconv.layers import AAConv"),
        ("aaconv/ops/new.py", "from ..models import create"),
        ("aaconv/ops/new.py", "def f():\n    import aaconv.train"),
        ("aaconv/ops/new.py", "from aaconv import cli"),
        ("aaconv/models/new.py", "from aaconv import AAConv"),
        ("aaconv/layers/new.py", "import ml_collections"),
        ("aaconv/data/new.py", "from aaconv import models"),
        ("aaconv/data/new.py", "import tensorflow as tf"),
        ("aaconv/data/__init__.py", "import grain"),
        ("aaconv/train.py", "def f():\n    import orbax.checkpoint"),
        ("aaconv/plots/new.py", "import matplotlib.pyplot as plt"),
        ("aaconv/plots/new.py", "try:\n    import matplotlib\nexcept ImportError:\n    pass"),
        ("aaconv/metrics.py", "class A:\n    import tensorboardX"),
        ("aaconv/ops/new.py", "def f():\n    import torch"),
        ("aaconv/train.py", "from aaconv import bench"),
        ("aaconv/bench/new.py", "from aaconv import pods"),
        ("aaconv/train.py", "from aaconv.sweep import records"),
        ("aaconv/sweep/new.py", "from aaconv import pods"),
        ("aaconv/bench/__init__.py", "import torch"),
        ("aaconv/cli/new.py", "from aaconv import train"),
        ("aaconv/cli/__init__.py", "import jax"),
        ("configs/new.py", "from aaconv import config"),
        ("configs/new.py", "import numpy as np"),
    ],
)
def test_wrong_import_is_found(path, line):
    assert violations(path, line), line


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("aaconv/layers/new.py", "import numpy as np\nfrom aaconv.ops import relative_attention"),
        ("aaconv/layers/new.py", "from aaconv.layers.position import x"),
        ("aaconv/data/new.py", "import grain\nfrom aaconv.errors import close_matches"),
        ("aaconv/plots/new.py", "def f():\n    import matplotlib"),
        ("aaconv/metrics.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import tensorboardX"),
        ("aaconv/cli/new.py", "from aaconv.cli import train\ndef f():\n    from aaconv import train"),
        ("configs/new.py", "from __future__ import annotations\nimport ml_collections"),
    ],
)
def test_right_import_is_accepted(path, line):
    assert violations(path, line) == []
