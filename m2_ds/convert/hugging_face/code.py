"""The files of code that are published with a model, made from the package's own: there is no second network.

transformers copies a model's code into one flat folder and follows imports of the form `from .file import name`. So
`m2_ds.model.config` becomes model_config.py, and imports of it become relative.
"""

import ast
from importlib.util import find_spec
from pathlib import Path

from m2_ds import __version__

# What a folder's JSON files name; everything else follows from their imports.
ENTRIES = ("configuration_m2_encoder", "modeling_m2_encoder", "processing_m2_encoder")
_PACKAGE = __name__.partition(".")[0]
_HERE = __name__.rpartition(".")[0]


def published_code() -> dict[str, str]:
    """File name -> content."""
    found: dict[str, str] = {}
    waiting = [f"{_HERE}.{name}" for name in ENTRIES]
    while waiting:
        module = waiting.pop()
        if (file := f"{_flat(module)}.py") not in found:
            spec = find_spec(module)
            assert spec is not None and spec.origin and spec.submodule_search_locations is None, f"{module} is no file"
            text, needed = relative_imports(Path(spec.origin).read_text(encoding="utf-8"))
            found[file] = f"# From {module} of m2_ds {__version__} (Apache-2.0), which is where to change it.\n{text}"
            waiting += needed
    return dict(sorted(found.items()))


def relative_imports(source: str) -> tuple[str, list[str]]:
    """A file's source with imports of this package made relative to one flat folder, and the modules they name."""
    lines, needed = source.splitlines(keepends=True), []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            assert not any(_ours(alias.name) for alias in node.names), f"import {node.names[0].name}: name what is used"
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports inside the package are absolute"
            if node.module and _ours(node.module):
                before = f"from {node.module} import"
                assert before in lines[node.lineno - 1]
                lines[node.lineno - 1] = lines[node.lineno - 1].replace(before, f"from .{_flat(node.module)} import")
                needed.append(node.module)
    return "".join(lines), needed


def _ours(module: str) -> bool:
    return module.partition(".")[0] == _PACKAGE


def _flat(module: str) -> str:
    inside = module.removeprefix(f"{_HERE}.")
    return inside if inside != module else module.removeprefix(f"{_PACKAGE}.").replace(".", "_")
