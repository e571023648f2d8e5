"""The API reference: one Markdown page a package, from signatures and docstrings, read without importing anything."""

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

_SECTION = re.compile(r"(Args|Returns|Raises|Attributes|Yields):")
_ENTRY = re.compile(r"(\*{0,2}[\w, .*]+?)( \([^)]*\))?: (.*)", re.DOTALL)

Documented = ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign


def write_api_pages(package: Path, folder: Path) -> None:
    """Write a page for each package, and `index.md` that lists them; other files in the folder are removed."""
    folder.mkdir(exist_ok=True)
    pages = {}
    for path in sorted({file.parent for file in package.rglob("*.py")}):
        name = ".".join(path.relative_to(package.parent).parts)
        if modules := [text for file in sorted(path.glob("*.py")) if (text := _module(file, package.parent))]:
            pages[name] = f"# {name}\n\n" + "\n\n".join(modules) + "\n"
    names = "\n".join(pages)
    pages["index"] = (
        "# API reference\n\nThe public names are those of [`companion`](companion.md); everything else is imported\n"
        "from its module. [Architecture](../architecture.md) says what lies where.\n\n"
        f"```{{toctree}}\n:maxdepth: 1\n\n{names}\n```\n"
    )
    for old in folder.glob("*.md"):
        if old.stem not in pages:
            old.unlink()
    for name, text in pages.items():
        page = folder / f"{name}.md"
        if not page.exists() or page.read_text(encoding="utf-8") != text:
            page.write_text(text, encoding="utf-8")


def markdown(docstring: str) -> str:
    """A docstring's Markdown, with its sections of arguments, results and errors as lists."""
    lines, out, section = inspect.cleandoc(docstring).splitlines(), [], False
    entries: list[str] = []
    for line in [*lines, "end"]:
        if section and (line.startswith("    ") or not line.strip()):
            if line[4:5] not in ("", " "):
                entries.append(line.strip())
            elif line.strip() and entries:
                entries[-1] += f" {line.strip()}"
            continue
        out += [*(f"- {_ENTRY.sub(_named, entry)}" for entry in entries), ""] if section else []
        entries, section = [], bool(found := _SECTION.fullmatch(line))
        out += ["", f"**{found[1]}**", ""] if found else [line]
    return "\n".join(out[:-1]).strip()


def _named(found: re.Match[str]) -> str:
    return f"`{found[1]}`{found[2] or ''}: {found[3]}"


def _module(file: Path, root: Path) -> str:
    """A module's part of its package's page; empty where nothing in it is documented."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    parts = file.relative_to(root).with_suffix("").parts
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    about = ast.get_docstring(tree)
    entries = [_entry(node, doc) for node, doc in _public(tree.body)]
    if not about and not entries:
        return ""
    return "\n\n".join([f"## {name}", *([markdown(about)] if about else []), *entries])


def _public(body: list[ast.stmt]) -> Iterator[tuple[Documented, str]]:
    """Public functions, classes and constants that have a docstring, with it."""
    for node, following in zip(body, [*body[1:], None], strict=False):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            name, doc = node.name, ast.get_docstring(node)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            name, doc = ast.unparse(target), _string(following)
        else:
            continue
        if doc and not name.startswith("_"):
            yield node, doc


def _string(node: ast.stmt | None) -> str | None:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
        return node.value.value
    return None


def _entry(node: Documented, doc: str) -> str:
    if isinstance(node, ast.FunctionDef):
        return f"### {node.name}\n\n```python\n{_signature(node)}\n```\n\n{markdown(doc)}"
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        fields = [ast.unparse(each) for each in node.body if isinstance(each, ast.AnnAssign)]
        code = "\n    ".join([f"class {node.name}({bases}):" if bases else f"class {node.name}:", *(fields or ["..."])])
        methods = [each for each in _public(node.body) if isinstance(each[0], ast.FunctionDef)]
        shown = [f"```python\n{_signature(each)}\n```\n\n{markdown(about)}" for each, about in methods]
        return "\n\n".join([f"### {node.name}\n\n```python\n{code}\n```", markdown(doc), *shown])
    target = node.targets[0] if isinstance(node, ast.Assign) else node.target
    return f"### {ast.unparse(target)}\n\n{markdown(doc)}"


def _signature(node: ast.stmt) -> str:
    """`def name(arguments) -> result`, one argument a line where it is long."""
    assert isinstance(node, ast.FunctionDef)
    decorators = [ast.unparse(each) for each in node.decorator_list]
    marks = "".join(f"@{each}\n" for each in decorators if each in ("property", "classmethod", "staticmethod"))
    arguments, result = ast.unparse(node.args), f" -> {ast.unparse(node.returns)}" if node.returns else ""
    line = f"def {node.name}({arguments}){result}"
    if len(line) > 88:
        each = re.split(r", (?![^\[(]*[\])])", arguments)
        line = f"def {node.name}(\n" + "".join(f"    {argument},\n" for argument in each) + f"){result}"
    return marks + line
