"""Copy a module and the definitions that it imports from this package into one self-contained file.

An exported folder thus contains the same layers and samplers as this package, and no second version of them exists.
Definitions in `standalone` replace those that would need further packages, such as einops.
"""

import ast
import re
import sys
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

PACKAGE = "decm_lightning"
STANDALONE = f"{PACKAGE}.export.diffusers.standalone"
HEADER = '''# SPDX-License-Identifier: Apache-2.0
# Written by decm-lightning {version}. Everything below is copied from its modules, so that it runs without them.
"""{title}"""

{imports}


{definitions}
'''


def source(file: str) -> str:
    """Return a module of this package as self-contained source code."""
    root = _Module.parse(file)
    bundle = _Bundle()
    for name in root.definitions:
        bundle.add(root, name)
    return HEADER.format(
        version=version("decm-lightning"),
        title=root.title,
        imports="\n".join(bundle.import_lines()),
        definitions=re.sub("\n{4,}", "\n\n\n", "".join(bundle.texts)).strip(),
    )


@dataclass
class _Module:
    """The parts of a module.

    Attributes:
        title: its docstring.
        definitions: source code of each top-level name.
        used: names that each definition uses.
        imports: module and original name of each imported name; the original name of a module is "".
    """

    title: str
    definitions: dict[str, str] = field(default_factory=dict)
    used: dict[str, tuple[str, ...]] = field(default_factory=dict)
    imports: dict[str, tuple[str, str]] = field(default_factory=dict)

    @classmethod
    def parse(cls, file: str) -> "_Module":
        text = Path(file).read_text(encoding="utf-8")
        tree, lines = ast.parse(text), text.splitlines()
        module = cls(ast.get_docstring(tree, clean=False) or "")
        names: list[str] = []
        for node in tree.body[1:] if module.title else tree.body:
            if isinstance(node, ast.Import):
                module.imports |= {alias.asname or alias.name: (alias.name, "") for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                module.imports |= {alias.asname or alias.name: (str(node.module), alias.name) for alias in node.names}
            elif isinstance(node, ast.Expr) and names:
                # The docstring of a constant.
                module.definitions |= {name: module.definitions[name] + _text(node, lines) for name in names}
            else:
                names, text = _defined(node, file), _text(node, lines)
                if isinstance(node, ast.ClassDef | ast.FunctionDef):
                    text = f"\n\n{text}\n\n"
                module.definitions |= dict.fromkeys(names, text)
                module.used |= dict.fromkeys(names, tuple(p.id for p in ast.walk(node) if isinstance(p, ast.Name)))
        return module


def _defined(node: ast.stmt, file: str) -> list[str]:
    """Return the names that a statement defines."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    if not targets:
        raise ValueError(f"{file}, line {node.lineno}: only definitions and assignments can be copied")
    return [part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)]


def _text(node: ast.stmt, lines: list[str]) -> str:
    """Return the source of a statement, with its decorators and the comments above it."""
    first = min([node.lineno, *(part.lineno for part in getattr(node, "decorator_list", ()))])
    while lines[first - 2].startswith("#"):
        first -= 1
    return "\n".join(lines[first - 1 : node.end_lineno]) + "\n"


@cache
def _module(name: str) -> _Module:
    spec = find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    return _Module.parse(spec.origin)


class _Bundle:
    """Collects definitions, each after those that it uses."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.origins: dict[str, _Module] = {}
        self.external: dict[str, tuple[str, str]] = {}

    def add(self, module: _Module, name: str) -> None:
        """Add what a name stands for in a module. Built-ins and local variables need nothing."""
        if name in module.definitions:
            if name in self.origins:
                if self.origins[name] is not module:
                    raise ValueError(f"{name} is defined in two modules: rename one of them")
                return
            self.origins[name] = module
            for used in module.used[name]:
                self.add(module, used)
            if (text := module.definitions[name]) not in self.texts:
                self.texts.append(text)
        elif name in module.imports:
            origin, original = module.imports[name]
            if name in _module(STANDALONE).definitions:
                self.add(_module(STANDALONE), name)
            elif origin.partition(".")[0] == PACKAGE:
                self.add(_module(origin), original)
            else:
                self.external[name] = (origin, original)

    def import_lines(self) -> list[str]:
        """Return the import statements of other packages, those of the standard library first."""
        lines: dict[bool, list[str]] = {True: [], False: []}
        for origin in sorted({origin for origin, _ in self.external.values()}):
            found = sorted((original, name) for name, (place, original) in self.external.items() if place == origin)
            whole = [name for original, name in found if not original]
            parts = [original if original == name else f"{original} as {name}" for original, name in found if original]
            own = lines[origin.partition(".")[0] in sys.stdlib_module_names]
            own += [f"import {origin}" + f" as {name}" * (name != origin) for name in whole]
            own += [f"from {origin} import {', '.join(parts)}"] if parts else []
        return [*sorted(lines[True], key=_is_partial), "", *sorted(lines[False], key=_is_partial)]


def _is_partial(line: str) -> bool:
    return line.startswith("from")
