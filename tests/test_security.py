"""SECURITY.md: every sentence and every row names tests, and the tests exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent
_TEST = re.compile(r"`(test_\w+\.py)::(test_\w+)`")


def blocks(text: str) -> list[str]:
    """Rows of tables without their heads, and sentences of paragraphs."""
    found = []
    lines = text.splitlines()
    for place, line in enumerate(lines):
        after = lines[place + 1] if place + 1 < len(lines) else ""
        if not line or line.startswith(("#", "| ---")) or after.startswith("| ---"):
            continue
        found += [line] if line.startswith("|") else re.split(r"(?<=\.) (?=[A-Z])", line)
    return found


def test_every_promise_names_its_tests():
    known = {
        (path.name, node.name)
        for path in TESTS.rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    text = (TESTS.parent / "SECURITY.md").read_text()
    found = blocks(text)
    assert len(found) > 20
    for block in found:
        named = _TEST.findall(block)
        assert named, f"names no test: {block}"
        for test in named:
            assert test in known, f"there is no {'::'.join(test)}"
        cells = [cell.strip() for cell in block.split("|")[1:-1]]
        assert not cells or _TEST.search(cells[-1]), f"its last cell names no test: {block}"
    assert len(text.splitlines()) < 70, "one page"
