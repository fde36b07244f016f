"""Copy definitions of this package into single files that run without it.

A saved model contains the code that transformers needs to load it. The files are made from our own
modules: each definition that an entry point uses, directly or through others, is copied as it is
written, with the imports of other packages that it needs.
"""

import ast
import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

PACKAGE = "asrllm"
Definition = tuple[str, str]  # module and name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Module:
    """A source file of this package.

    Attributes:
        name: its dotted name.
        lines: its text.
        definitions: top-level functions, classes and constants by name.
        imports: (module, name) of imported names by their local names; name is "" for a module.
    """

    name: str
    lines: list[str]
    definitions: dict[str, ast.stmt]
    imports: dict[str, Definition]


class Bundle:
    """The definitions that some entry points use."""

    def __init__(
        self,
        entries: Sequence[Definition],
        *,
        replacements: Mapping[Definition, str] | None = None,
        dropped: Sequence[str] = (),
        elsewhere: Mapping[str, str] | None = None,
    ) -> None:
        """Collect the definitions.

        Args:
            entries: modules and names of the entry points.
            replacements: definitions to write instead of those in the package.
            dropped: methods to leave out, as "Class.method".
            elsewhere: file without its suffix, beside the bundle, of names to import from it.
        """
        self.replacements = replacements or {}
        self.dropped = frozenset(dropped)
        self.elsewhere = elsewhere or {}
        self.started: set[Definition] = set()
        self.found: list[Definition] = []  # each after those that it uses
        # by local name; the name of a definition is "" for a module
        self.imports: dict[str, Definition] = {}
        for module, name in entries:
            self._add(read_module(module), name)

    def _add(self, module: Module, name: str) -> None:
        """Add what a name in a module refers to. Builtins and local variables refer to nothing."""
        if name in self.elsewhere:
            self.imports[name] = (f".{self.elsewhere[name]}", name)
        elif name in module.definitions:
            self._add_definition(module, name)
        elif name in module.imports:
            source, original = module.imports[name]
            if source.partition(".")[0] != PACKAGE:
                self.imports[name] = (source, original)
            elif original == name:
                self._add(read_module(source), name)
            else:
                raise ValueError(f"{module.name} imports {source}.{original} as {name}")

    def _add_definition(self, module: Module, name: str) -> None:
        definition = (module.name, name)
        if definition in self.started:
            return
        self.started.add(definition)
        for used in self._names_used(self._node(definition)):
            self._add(module, used)
        self.found.append(definition)

    def _node(self, definition: Definition) -> ast.stmt:
        if definition in self.replacements:
            return ast.parse(self.replacements[definition]).body[0]
        module, name = definition
        return read_module(module).definitions[name]

    def _names_used(self, node: ast.stmt) -> Iterator[str]:
        """Yield the names in a definition, those in quoted type hints included."""
        for part in self._parts(node):
            for child in ast.walk(part):
                if isinstance(child, ast.Name):
                    yield child.id
                for hint in _type_hints(child):
                    yield from re.findall(r"\w+", ast.unparse(hint))

    def _parts(self, node: ast.stmt) -> list[ast.AST]:
        """Return the parts of a definition that are written: a class without dropped methods."""
        if not isinstance(node, ast.ClassDef):
            return [node]
        kept = [child for child in node.body if not self._is_dropped(node, child)]
        return [*node.bases, *node.keywords, *node.decorator_list, *kept]

    def _is_dropped(self, node: ast.ClassDef, child: ast.stmt) -> bool:
        if not isinstance(child, ast.FunctionDef):
            return False
        return f"{node.name}.{child.name}" in self.dropped

    def text(self, title: str) -> str:
        """Return the bundle as the text of a Python file.

        Args:
            title: first line of the file's docstring.

        Raises:
            ValueError: two definitions have the same name.
        """
        origins: dict[str, str] = {}
        blocks = [f'"""{title}"""', "\n".join(self._import_lines())]
        written: set[str] = set()
        for module_name, name in self.found:
            if origins.setdefault(name, module_name) != module_name:
                raise ValueError(f"{name} is defined in {origins[name]} and in {module_name}")
            source = self._source(module_name, name)
            if source not in written:  # one statement may define several names
                blocks.append(source)
            written.add(source)
        return "\n\n\n".join(blocks) + "\n"

    def _import_lines(self) -> list[str]:
        lines: list[str] = []
        for local, (source, original) in sorted(self.imports.items(), key=lambda item: item[1]):
            if original:
                alias = "" if original == local else f" as {local}"
                lines.append(f"from {source} import {original}{alias}")
            else:
                alias = "" if source == local else f" as {local}"
                lines.append(f"import {source}{alias}")
        return lines

    def _source(self, module_name: str, name: str) -> str:
        """Return the source text of a definition, with the comments above it."""
        if (module_name, name) in self.replacements:
            return self.replacements[module_name, name]
        module = read_module(module_name)
        node = module.definitions[name]
        first, last = _line_range(node)
        while first > 0 and module.lines[first - 1].startswith("#"):
            first -= 1
        lines: list[str | None] = list(module.lines[first:last])
        if isinstance(node, ast.ClassDef):
            for child in node.body:
                if self._is_dropped(node, child):
                    start, end = _line_range(child)
                    lines[start - first : end - first] = [None] * (end - start)
        text = "\n".join(line for line in lines if line is not None)
        return re.sub(r"\n{3,}", "\n\n", text).rstrip()


def _type_hints(node: ast.AST) -> list[ast.expr]:
    """Return the type hints of an argument, a function or an annotated variable."""
    hints = [getattr(node, "annotation", None), getattr(node, "returns", None)]
    return [hint for hint in hints if isinstance(hint, ast.expr)]


def _line_range(node: ast.stmt) -> tuple[int, int]:
    """Return the first line of a definition, decorators included, and the line after it."""
    decorators = getattr(node, "decorator_list", [])
    first = min([node.lineno, *(decorator.lineno for decorator in decorators)])
    assert node.end_lineno is not None
    return first - 1, node.end_lineno


@functools.cache
def read_module(name: str) -> Module:
    """Return a module of this package, parsed."""
    spec = find_spec(name)
    assert spec is not None, name
    assert spec.origin is not None, name
    text = Path(spec.origin).read_text(encoding="utf-8")
    definitions: dict[str, ast.stmt] = {}
    imports: dict[str, Definition] = {}
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            definitions[node.name] = node
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                definitions |= {n.id: node for n in ast.walk(target) if isinstance(n, ast.Name)}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                imports[alias.asname or alias.name] = (str(node.module), alias.name)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                local = alias.asname or alias.name.partition(".")[0]
                imports[local] = (alias.name if alias.asname else local, "")
    return Module(name=name, lines=text.splitlines(), definitions=definitions, imports=imports)
