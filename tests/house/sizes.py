"""Count lines against the guides for size: guides, not walls.  python -m tests.house.sizes"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator

from tests.house.source import ROOT, Source, part, sources

FILE, SYSTEM_FILE, FUNCTION, NESTING, ARGUMENTS, FIELDS, SPINE = 400, 300, 60, 3, 10, 20, 8000
SPINE_PARTS = {"config", "errors", "types", "plan", "run", "nn", "backbones", "objectives", "data", "engine", "weights"}
SPINE_PARTS |= {"cli", "__main__", "multiway"}
BLOCKS = ast.If | ast.For | ast.AsyncFor | ast.While | ast.With | ast.AsyncWith | ast.Try | ast.Match


def lines(module: Source) -> int:
    """Lines of a file."""
    return len(module.path.read_text(encoding="utf-8").splitlines())


def over(modules: tuple[Source, ...]) -> Iterator[tuple[str, str, int, int]]:
    """Whatever is over a guide: what, where, how much, the guide."""
    for module in modules:
        where = str(module.path.relative_to(ROOT))
        guide = SYSTEM_FILE if part(module.name) == "systems" else FILE
        yield "lines of file", where, lines(module), guide
        for node in ast.walk(module.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                place = f"{where}:{node.lineno} {node.name}"
                yield "lines of function", place, (node.end_lineno or node.lineno) - node.lineno + 1, FUNCTION
                yield "nesting", place, depth(node), NESTING
                if node.name == "__init__":
                    arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
                    yield "constructor arguments", place, len(arguments) - 1, ARGUMENTS
            elif isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(d) for d in node.decorator_list):
                fields = sum(isinstance(member, ast.AnnAssign) for member in node.body)
                yield "fields", f"{where}:{node.lineno} {node.name}", fields, FIELDS


def depth(node: ast.AST) -> int:
    """Deepest nesting of blocks below a node; ``elif`` is not deeper than its ``if``."""
    deepest = 0
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, ast.FunctionDef | ast.ClassDef):
                continue
            is_elif = isinstance(node, ast.If) and name == "orelse" and isinstance(child, ast.If) and len(value) == 1
            deepest = max(deepest, depth(child) + (isinstance(child, BLOCKS) and not is_elif))
    return deepest


def report() -> str:
    """Lines of every part, of the spine and of the tests, then everything over a guide."""
    total = Counter[str]()
    for module in sources():
        total[part(module.name)] += lines(module)
    spine = sum(count for name, count in total.items() if name in SPINE_PARTS)
    tests = sum(len(path.read_text("utf-8").splitlines()) for path in (ROOT / "tests").rglob("*.py"))
    rows = [f"{count:6d}  {name}" for name, count in total.most_common()]
    rows += [f"{sum(total.values()):6d}  in all", f"{spine:6d}  spine (guide {SPINE})", f"{tests:6d}  tests", ""]
    rows += [f"{what} {size} (guide {guide}): {where}" for what, where, size, guide in over(sources()) if size > guide]
    return "\n".join(rows)


if __name__ == "__main__":
    print(report())
