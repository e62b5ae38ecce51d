"""All errors and warnings that a person can meet, one line each, read from the source: tests/messages.txt.

The file is for a reader who reviews the language. Tests elsewhere check codes and values, and no words.

Run: ``python -m tests.messages --write``
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILE = ROOT / "tests/messages.txt"
MAKERS = ("Problem", "setting_problem", "warn", "RowProblem")
HEAD = """\
# Errors and warnings by module, as `python -m tests.messages --write` reads them from the source.
# A line is the code, which is printed behind the text, and the text; {braces} hold what is filled in.
"""


def catalog() -> str:
    """Return the content of tests/messages.txt."""
    parts = [HEAD]
    for path in sorted([*(ROOT / "lora_dag").rglob("*.py"), *(ROOT / "stages").rglob("*.py")]):
        lines = dict.fromkeys(f"{code}: {text}" for code, text in messages(path))
        if lines:
            parts.append("\n".join([f"## {path.relative_to(ROOT)}", *lines]) + "\n")
    return "\n".join(parts)


def messages(path: Path) -> Iterator[tuple[str, str]]:
    """Yield code and text of each problem that a file's code makes with a literal code, in the order of its lines."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: dict[ast.Call, tuple[str, str]] = {}
    scopes = [tree, *(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))]
    for scope in scopes:  # outer before inner: the innermost function's variables count
        texts = [node for node in ast.walk(scope) if isinstance(node, ast.Assign) and is_text(node.value)]
        for call in ast.walk(scope):
            if isinstance(call, ast.Call) and maker(call) in MAKERS and len(call.args) >= 2:
                code = call.args[0]
                if isinstance(code, ast.Constant) and isinstance(code.value, str):
                    before = sorted((node for node in texts if node.lineno < call.lineno), key=lambda node: node.lineno)
                    variables = {ast.unparse(target): node.value for node in before for target in node.targets}
                    found[call] = (code.value, text_of(call.args[1], variables))
    for call in sorted(found, key=lambda call: call.lineno):
        yield found[call]


def maker(call: ast.Call) -> str:
    return call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")


def is_text(node: ast.expr) -> bool:
    """Return whether an expression is a string, an f-string, or a sum of them."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return is_text(node.left) and is_text(node.right)
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def text_of(node: ast.expr, variables: dict[str, ast.expr]) -> str:
    """Return a text with its f-string fields as they are written in the source.

    Args:
        variables: name -> text that was assigned to it before.
    """
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part, variables) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text_of(node.left, variables) + text_of(node.right, variables)
    value = node.value if isinstance(node, ast.FormattedValue) else node
    name = ast.unparse(value)
    if name in variables:
        others = {other: text for other, text in variables.items() if other != name}
        return text_of(variables[name], others)
    return "{" + name + "}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write tests/messages.txt")
    if parser.parse_args().write:
        FILE.write_text(catalog(), encoding="utf-8")
    else:
        print(catalog(), end="")


if __name__ == "__main__":
    main()
