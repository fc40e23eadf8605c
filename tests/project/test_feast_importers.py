"""Nobody imports Feast but by way of `feast_import`, or with the type checks that cost seconds."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "server" / "headrace"
WHO_FIRST = PACKAGE / "features" / "feast_import.py"

AFTER_A_REPOSITORY = {"features/feast_writer.py", "features/pinned_registry.py"} | {
    f"rpc/{name}.py" for name in ("feast_serving", "feast_writes")
}
"""Modules that import Feast as they are imported: by whoever has opened a feature repository."""


def is_feast(node):
    if isinstance(node, ast.ImportFrom):
        return (node.module or "").partition(".")[0] == "feast"
    return isinstance(node, ast.Import) and any(
        alias.name.partition(".")[0] == "feast" for alias in node.names
    )


def is_the_call(node):
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Call)
        and isinstance(node.value.func, ast.Name)
        and node.value.func.id == "import_feast"
    )


def unprepared(tree):
    """Yield whether it is in a function, and the line, of imports of Feast without the call."""

    def walk(body, *, in_function, is_prepared):
        for node in body:
            is_prepared |= is_the_call(node)
            if is_feast(node) and not is_prepared:
                yield in_function, node.lineno
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                continue
            is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            for inner in ("body", "orelse", "finalbody", "handlers"):
                yield from walk(
                    getattr(node, inner, []) if isinstance(node, ast.AST) else [],
                    in_function=in_function or is_function,
                    is_prepared=is_prepared and not is_function,
                )

    yield from walk(tree.body, in_function=False, is_prepared=False)


def found():
    for path in sorted(PACKAGE.rglob("*.py")):
        if path != WHO_FIRST and "v1" not in path.relative_to(PACKAGE).parts:
            for in_function, line in unprepared(ast.parse(path.read_text())):
                yield str(path.relative_to(PACKAGE)), in_function, line


def test_functions_call_import_feast_before_they_import_feast():
    assert [f"{path}:{line}" for path, in_function, line in found() if in_function] == []


def test_modules_that_import_feast_come_after_a_repository_was_opened():
    assert {path for path, in_function, _ in found() if not in_function} == AFTER_A_REPOSITORY


def test_an_import_that_is_forgotten_is_found():
    forgotten = """
import_feast()
def use():
    if True:
        from feast.entity import Entity
def fine():
    import_feast()
    with warnings:
        import feast
import feast.errors
"""
    assert list(unprepared(ast.parse(forgotten))) == [(True, 5)]
    assert list(unprepared(ast.parse("try:\n    import feast\nexcept E:\n    pass"))) == [
        (False, 2)
    ]
