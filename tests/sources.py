"""Signatures of other people's code, read from their sources by `ast`: nothing of theirs is imported."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from packaging.version import Version

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass
class Signature:
    """What a call may pass."""

    names: set[str] = field(default_factory=set)
    required: set[str] = field(default_factory=set)
    positional: list[str] = field(default_factory=list)
    takes_more: bool = False  # *args
    takes_any: bool = False  # **kwargs

    def faults(self, call: ast.Call) -> list[str]:
        """Return what is wrong with a call: unknown names, too many or missing arguments."""
        given = {keyword.arg for keyword in call.keywords if keyword.arg}
        is_open = any(keyword.arg is None for keyword in call.keywords)
        starred = any(isinstance(argument, ast.Starred) for argument in call.args)
        faults = [] if self.takes_any else [f"no argument {name!r}" for name in sorted(given - self.names)]
        if not starred and not self.takes_more and len(call.args) > len(self.positional):
            faults.append(f"{len(call.args)} arguments by position, at most {len(self.positional)}")
        missing = self.required - given - set(self.positional[: len(call.args)])
        return faults + [f"no value for {name!r}" for name in sorted(missing) if not is_open and not starred]


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@dataclass(frozen=True)
class Sources:
    """A package's sources: `root` holds the folder `package`."""

    root: Path

    def path(self, module: str) -> Path | None:
        base = self.root / module.replace(".", "/")
        return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)

    def find(self, module: str, name: str, seen: tuple[Any, ...] = ()) -> tuple[Definition, str] | None:
        """Return a function or a class and the module that defines it, through imports of other modules."""
        path = self.path(module)
        if path is None or (module, name) in seen:  # modules may import each other
            return None
        seen = (*seen, (module, name))
        nodes = list(_top_level(tree(path).body))
        for node in nodes:
            if isinstance(node, Definition) and node.name == name:
                return node, module
        for node in nodes:
            if isinstance(node, ast.ImportFrom):
                source = absolute(node, module, is_package=path.name == "__init__.py")
                for alias in node.names:
                    if (alias.asname or alias.name) == name or alias.name == "*":
                        found = self.find(source, name if alias.name == "*" else alias.name, seen)
                        if found is not None:
                            return found
        return None

    def methods(self, module: str, name: str) -> dict[str, tuple[ast.FunctionDef, str]]:
        """Return a class's methods and those of its bases, as far as the bases are the package's."""
        found = self.find(module, name)
        if found is None or not isinstance(found[0], ast.ClassDef):
            return {}
        node, home = found
        methods: dict[str, tuple[ast.FunctionDef, str]] = {}
        for base in node.bases:
            methods = self.methods(home, ast.unparse(base).split(".")[-1].split("[")[0]) | methods
        return methods | {each.name: (each, home) for each in node.body if isinstance(each, ast.FunctionDef)}

    def fields(self, module: str, name: str) -> dict[str, bool]:
        """Return the annotated fields of a class and its bases: name -> whether it must be given."""
        found = self.find(module, name)
        if found is None or not isinstance(found[0], ast.ClassDef):
            return {}
        node, home = found
        if not node.decorator_list and {ast.unparse(base) for base in node.bases} <= {"ABC", "object"}:
            return {}  # annotations of no dataclass
        fields: dict[str, bool] = {}
        for base in node.bases:
            fields |= self.fields(home, ast.unparse(base).split(".")[-1].split("[")[0])
        own = (each for each in node.body if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name))
        return fields | {each.target.id: each.value is None for each in own}  # type: ignore[union-attr]

    def signature(self, module: str, name: str) -> Signature | None:
        """Return what a call of the function, or of the class, may pass; None: not found."""
        found = self.find(module, name)
        if found is None:
            return None
        if not isinstance(found[0], ast.ClassDef):
            return of_function(found[0])
        init = self.methods(module, name).get("__init__")
        if init is not None:
            return of_function(init[0], is_method=True)
        fields = self.fields(module, name)
        return Signature(set(fields), {name for name, needed in fields.items() if needed}, list(fields))


def of_function(node: ast.FunctionDef | ast.AsyncFunctionDef, *, is_method: bool = False) -> Signature:
    arguments = node.args
    positional = [each.arg for each in [*arguments.posonlyargs, *arguments.args]][is_method:]
    optional = positional[len(positional) - len(arguments.defaults) :] if arguments.defaults else []
    keyword = [each.arg for each in arguments.kwonlyargs]
    needed = {k for k, value in zip(keyword, arguments.kw_defaults, strict=True) if value is None}
    required = set(positional) - set(optional) | needed
    return Signature({*positional, *keyword}, required, positional, bool(arguments.vararg), bool(arguments.kwarg))


def absolute(node: ast.ImportFrom, module: str, *, is_package: bool = False) -> str:
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    parts = parts[: len(parts) - node.level + is_package]
    return ".".join([*parts, *([node.module] if node.module else [])])


def _top_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try):
            handlers = [each for handler in getattr(node, "handlers", []) for each in handler.body]
            yield from _top_level([*node.body, *node.orelse, *handlers])


def live(body: list[ast.stmt], version: Version) -> Iterator[ast.stmt]:
    """Yield the statements that can run, those inside others too, where Megatron asks for Transformer Engine's version
    and this is `version`."""
    for node in body:
        if isinstance(node, ast.If):
            answer = _asked(node.test, version)
            yield from live([] if answer is False else node.body, version)
            yield from live([] if answer is True else node.orelse, version)
            continue
        yield node
        for name in ("body", "orelse", "finalbody"):
            if not isinstance(node, Definition):
                yield from live(getattr(node, name, []), version)


def _asked(test: ast.expr, version: Version) -> bool | None:
    """Answer a question about the version; None: it asks something else."""
    if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And):
        answers = [_asked(value, version) for value in test.values]
        return False if False in answers else (True if all(answers) else None)
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        answer = _asked(test.operand, version)
        return None if answer is None else not answer
    if isinstance(test, ast.Name) and test.id == "HAVE_TE":
        return True
    text = ast.unparse(test)
    if isinstance(test, ast.Call) and text.startswith("is_te_min_version("):
        wanted = Version(ast.literal_eval(test.args[0]))
        strict = any(
            keyword.arg == "check_equality" and not ast.literal_eval(keyword.value) for keyword in test.keywords
        )
        return version > wanted if strict else version >= wanted
    if text.startswith("get_te_version() < PkgVersion("):
        return version < Version(ast.literal_eval(test.comparators[0].args[0]))  # type: ignore[attr-defined]
    return None


def keys_of(path: Path, name: str) -> set[str]:
    """Return the string keys of all dict literals inside a function or an assignment of a module."""
    keys: set[str] = set()
    for node in tree(path).body:
        names = {node.name} if isinstance(node, Definition) else {ast.unparse(t) for t in getattr(node, "targets", [])}
        if name in names:
            for each in ast.walk(node):
                if isinstance(each, ast.Dict):
                    keys |= {key.value for key in each.keys if isinstance(key, ast.Constant)}  # type: ignore[misc]
                if isinstance(each, ast.Subscript) and isinstance(each.ctx, ast.Store):
                    keys |= {each.slice.value} if isinstance(each.slice, ast.Constant) else set()  # type: ignore[arg-type]
    return keys


def strings(paths: Any) -> set[str]:
    """Return all string constants of some files."""
    return {
        node.value
        for path in paths
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
