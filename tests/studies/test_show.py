"""The page with models side by side: what it shows, and in a real browser, where there is one."""

import itertools
import json
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from paths import ROOT
from PIL import Image
from tiny import tiny_model, tiny_processor

from crosskd_hf.commands.main import main
from crosskd_hf.inference.prediction_writer import Prediction
from crosskd_hf.studies.show import (
    SHOWN_SIDE,
    Seen,
    ShowError,
    boxes_as_json,
    build_page,
    load_models,
    look,
    own_file,
    pictures,
    short_names,
)
from crosskd_hf.utils.images import ImageError

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# Without network, and as root in a container.
SWITCHES = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-sync")
SECONDS = 180


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folders = [tmp_path_factory.mktemp("models") / name for name in ("small", "large")]
    for seed, folder in enumerate(folders):
        model = tiny_model(seed=seed)
        model.save_pretrained(folder)
        tiny_processor(model).save_pretrained(folder)
    return [str(folder) for folder in folders]


def noise(path: Path, width: int, height: int, seed: int = 0) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((width, height)).save(path)
    return path


def test_pictures_and_boxes(saved: list[str], tmp_path: Path) -> None:
    models = load_models(saved, "cpu")
    seen = look(models, str(noise(tmp_path / "a.png", 96, 64)))
    assert seen.scale == 1 and all(seconds > 0 for seconds in seen.seconds)
    shown = pictures(models, seen, 0.06)
    listed = json.loads(boxes_as_json(models, seen, 0.06))
    assert list(listed) == ["small", "large"]
    for (picture, text), boxes, prediction in zip(shown, listed.values(), seen.predictions, strict=True):
        count = int((prediction.scores > 0.06).sum())
        assert len(boxes) == count and re.fullmatch(rf"{count} box(es)?, \d+ ms", text)
        assert picture.size == (6 * 96, 6 * 64), "small images are enlarged"
        assert boxes[0]["score"] == round(float(prediction.scores[0]), 4) and boxes[0]["label"] in ("cat", "dog")
    nothing = pictures(models, seen, 1.0)
    assert [text.split(",")[0] for _, text in nothing] == ["0 boxes", "0 boxes"]


def test_large_images_are_seen_whole_and_shown_smaller(saved: list[str], tmp_path: Path) -> None:
    models = load_models(saved[:1], "cpu")
    seen = look(models, str(noise(tmp_path / "a.jpg", 2 * SHOWN_SIDE, 1000)))
    assert seen.scale == 0.5 and seen.predictions[0].image.size == (SHOWN_SIDE, 500)
    box = torch.tensor([[10.0, 20.0, 30.0, 40.0]])
    by_hand = Seen(
        0.5, [Prediction(Path(), seen.predictions[0].image, torch.tensor([0.5]), torch.tensor([1]), box)], [1]
    )
    assert json.loads(boxes_as_json(models, by_hand, 0.3))["small"] == [
        {"label": "dog", "score": 0.5, "box": [20.0, 40.0, 60.0, 80.0]}
    ]


def test_what_cannot_be_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ShowError, match=r"no model to show"):
        load_models([])
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"cannot be read"):
        look([], str(tmp_path / "broken.jpg"))
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ShowError, match=r"needs gradio: pip install gradio"):
        build_page(["x"])
    with pytest.raises(SystemExit, match=r"needs gradio"):
        main(["show", str(tmp_path)])


def test_only_uploads_are_opened(tmp_path: Path) -> None:
    """Whatever a request names, and whether it is there or not."""
    folder = tmp_path / "uploads"
    folder.mkdir()
    mine, secret = noise(folder / "mine.png", 96, 64), noise(tmp_path / "secret.png", 96, 64)
    (folder / "link.png").symlink_to(secret)
    assert own_file(str(mine), folder) == str(mine)
    for path in (secret, folder / ".." / "secret.png", folder / "link.png", tmp_path / "missing.png", "/etc/passwd"):
        with pytest.raises(ImageError, match=r"^was not uploaded here$"):
            own_file(str(path), folder)


def test_names_hide_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/run", "b/run", "other"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert short_names(["~/other"]) == ["other"]
    monkeypatch.chdir(tmp_path / "a" / "run")
    assert short_names([str(tmp_path / "a" / "run"), "../../b/run", str(tmp_path / "other"), ".", "you/student"]) == [
        "run (1)",
        "run (2)",
        "other",
        "run (3)",
        "you/student",
    ]


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_the_page_in_a_browser(saved: list[str], tmp_path: Path) -> None:
    """Upload, slider, download; a broken and a large file; two visitors; nothing from elsewhere."""
    pytest.importorskip("gradio")
    sync_api = pytest.importorskip("playwright.sync_api")
    files = [noise(tmp_path / f"{seed}.png", 96, 64, seed) for seed in range(2)]
    large = noise(tmp_path / "large.jpg", 5472, 3648)
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    command = [sys.executable, "-u", "-m", "crosskd_hf", "show", *saved, "--device", "cpu"]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        url = next(match[0] for line in server.stdout if (match := re.search(r"http://127\.0\.0\.1:\d+", line)))
        with sync_api.sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=BROWSER, args=list(SWITCHES))
            page, other = (browser.new_context().new_page() for _ in range(2))
            addresses: list[str] = []
            page.on("request", lambda request: addresses.append(request.url))
            for one in (page, other):
                one.set_default_timeout(1000 * SECONDS)
                one.goto(url)
                one.wait_for_selector("text=Your image")
            first, second = upload(page, files[0]), upload(other, files[1])
            assert first != second and len(first) == 2, "each visitor sees their own image"
            page.focus("input[type=range]")
            for _ in range(14):
                page.keyboard.press("ArrowRight")
            page.wait_for_selector("text=0 boxes")
            assert counts(other) == second, "and moves their own slider"
            for _ in range(14):
                page.keyboard.press("ArrowLeft")
            page.wait_for_selector("text=0 boxes", state="detached")
            with page.expect_download() as download:
                page.click("text=Download the boxes")
            content = json.loads(Path(download.value.path()).read_text())
            assert [len(content[name]) for name in ("small", "large")] == counts(page)
            page.screenshot(path=tmp_path / "page.png")
            upload(other, large)
            page.reload()
            page.set_input_files("input[type=file]", tmp_path / "broken.jpg")
            page.wait_for_selector("text=This file cannot be read")
            assert {address.split("/")[2] for address in addresses if address.startswith("http")} == {
                url.split("/")[2]
            }
            browser.close()
        secret = noise(tmp_path / "secret.png", 96, 64)
        assert "not uploaded here" in asked_for(url, str(secret)), "gradio checks no path without meta"
        assert server.poll() is None
        folders = [Path(address.split("file=")[1]).parents[1] for address in addresses if "file=" in address]
        assert folders[0].name.startswith("crosskd-show-") and folders[0].exists()
    finally:
        server.terminate()
        server.wait(60)
    assert not folders[0].exists(), "uploads are removed when the page ends"


def asked_for(url: str, path: str) -> str:
    """What the server answers to a request that names a file of its own."""
    body = {"data": [{"path": path}, None], "fn_index": 0, "session_hash": "somebody"}
    request = urllib.request.Request(f"{url}/gradio_api/queue/join", json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    urllib.request.urlopen(request, timeout=SECONDS).read()
    answer = urllib.request.urlopen(f"{url}/gradio_api/queue/data?session_hash=somebody", timeout=SECONDS)
    return "".join(itertools.takewhile(lambda line: "process_completed" not in line, map(bytes.decode, answer)))


def counts(page) -> list[int]:
    """How many boxes each model shows."""
    return [int(text.split()[0]) for text in page.locator("p").all_inner_texts() if " box" in text]


def upload(page, file: Path) -> list[int]:
    """Give the page a file, and wait for what the models find in it."""
    before = page.locator("img").count() and page.locator("img").last.get_attribute("src")
    if page.locator("input[type=file]").count() == 0:
        page.click("[aria-label=Clear], [title=Clear]")
    page.set_input_files("input[type=file]", file)
    page.wait_for_selector("text=/[0-9]+ box/")
    end = time.monotonic() + SECONDS
    while page.locator("img").last.get_attribute("src") == before and time.monotonic() < end:
        time.sleep(0.2)
    return counts(page)
