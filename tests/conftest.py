"""Where the tests find real data and golden cases, and a writer of tiny data sets."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported: several workers share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads of tests that ask for two sleep, and don't spin

import pytest
from file_server import FileServer
from PIL import Image


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--data",
        default=os.environ.get("CROSSKD_DATA", "data"),
        help="folder that holds coco_mini/ and bccd/ (default: $CROSSKD_DATA, else ./data)",
    )
    parser.addoption(
        "--kd-golden",
        default=str(Path(__file__).parent / "kd_golden"),
        help="folder that holds the golden cases of other methods (default: tests/kd_golden)",
    )
    parser.addoption(
        "--golden",
        default=str(Path(__file__).parent / "golden"),
        help="folder that holds the golden cases (default: tests/golden)",
    )
    text = "golden cases by compiled models and losses; with a backend of torch.compile: by that one"
    parser.addoption("--torch-compile", nargs="?", const="inductor", metavar="BACKEND", help=text)


def _folder(path: Path) -> Path:
    if not path.is_dir():
        pytest.skip(f"{path} is absent")
    return path


@pytest.fixture(scope="session")
def coco_mini(request: pytest.FixtureRequest) -> Path:
    """159 images of COCO 2017 in the official layout."""
    return _folder(Path(request.config.getoption("--data")) / "coco_mini")


@pytest.fixture(scope="session")
def bccd(request: pytest.FixtureRequest) -> Path:
    """364 images of blood cells, 3 classes."""
    return _folder(Path(request.config.getoption("--data")) / "bccd")


@pytest.fixture(scope="session")
def golden(request: pytest.FixtureRequest) -> Path:
    """The golden cases."""
    return _folder(Path(request.config.getoption("--golden")))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Maps of small models gain nothing from threads, and lose much where other processes hold the cores."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    """A server of files on this machine."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with FileServer() as served:
        yield served


@pytest.fixture
def write_coco(tmp_path: Path) -> Callable[..., Path]:
    """Writes a data set with the split "mini", black images included, and returns its folder.

    `images` are (id, width, height), `annotations` (id, image_id, category_id, bbox) and maybe a dict of more keys.
    """

    def write(images: list[tuple], annotations: list[tuple] = (), categories: dict[int, str] | None = None) -> Path:
        root = tmp_path / "set"
        (root / "annotations").mkdir(parents=True, exist_ok=True)
        (root / "mini").mkdir(exist_ok=True)
        content: dict[str, list[Any]] = {"images": [], "annotations": [], "categories": []}
        for image_id, width, height in images:
            name = f"{image_id}.png"
            Image.new("RGB", (width, height)).save(root / "mini" / name)
            content["images"].append({"id": image_id, "file_name": name, "width": width, "height": height})
        for annotation_id, image_id, category_id, bbox, *more in annotations:
            record = {"id": annotation_id, "image_id": image_id, "category_id": category_id, "bbox": bbox}
            defaults = {"area": bbox[2] * bbox[3], "iscrowd": 0}
            content["annotations"].append(record | defaults | (more[0] if more else {}))
        for category_id, name in (categories or {7: "cat", 3: "dog"}).items():
            content["categories"].append({"id": category_id, "name": name})
        (root / "annotations" / "instances_mini.json").write_text(json.dumps(content))
        return root

    return write


GOLDEN_REPORT: dict[str, str] = {}


@pytest.fixture(scope="session")
def golden_report() -> dict[str, str]:
    """Case -> what was compared; printed when the tests are over."""
    return GOLDEN_REPORT


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of pytest-xdist hands its part of the report over."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["golden_report"] = GOLDEN_REPORT


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """The main process takes it."""
    GOLDEN_REPORT.update(getattr(node, "workeroutput", {}).get("golden_report", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if GOLDEN_REPORT:
        terminalreporter.section("golden cases: numbers compared (largest error of bar)")
        for case, line in GOLDEN_REPORT.items():
            terminalreporter.write_line(f"{case}: {line}")
