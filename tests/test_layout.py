"""The rooms of the package, and who may import whom."""

import ast
from pathlib import Path

import crosskd_hf

PACKAGE = Path(crosskd_hf.__file__).parent
# Each room may import rooms of lower floors and its own. `data` and `models` know each other through `utils` only.
FLOORS = (
    ("utils",),
    ("models",),
    ("data", "distillation", "weights", "hub"),
    ("training", "inference"),
    ("recipe",),
    ("studies",),
    ("commands",),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def imported_rooms(path: Path) -> set[str]:
    """Rooms of the project that a file imports, also inside functions and for type checkers."""
    depth = len(path.relative_to(PACKAGE).parts)
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            words = (node.module or "").split(".")
            if node.level == depth:  # relative to the package itself
                found |= {words[0]} if node.module else {alias.name for alias in node.names}
            elif node.level == 0 and words[0] == "crosskd_hf":
                found |= {words[1]} if len(words) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("crosskd_hf.")}
    return found & FLOOR.keys()


def test_every_file_lies_in_a_room():
    outside = {path.name for path in PACKAGE.glob("*.py")}
    assert outside == {"__init__.py", "__main__.py", "registration.py", "version.py"}
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert rooms == FLOOR.keys()


def test_imports_go_down_only():
    wrong = {}
    for room, floor in FLOOR.items():
        for path in sorted((PACKAGE / room).rglob("*.py")):
            upward = {other for other in imported_rooms(path) - {room} if FLOOR[other] >= floor}
            if room == "data":
                upward |= imported_rooms(path) & {"models"}
            if upward:
                wrong[path.relative_to(PACKAGE).as_posix()] = sorted(upward)
    assert wrong == {}
