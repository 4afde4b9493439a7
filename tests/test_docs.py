"""README and docs: every command and code block runs, links lead somewhere, and the table of keys is the code's.

A block below `<!-- takes: minutes -->` runs with `pytest -m slow`; one below `<!-- needs: ... -->` or
`<!-- takes: hours -->` isn't run: its commands are parsed, and its recipes read. CI itself runs pip, pytest and ruff.
"""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import yaml
from paths import ROOT
from PIL import Image
from tiny import tiny_batch, tiny_model, tiny_processor, tiny_split, write_tiny_coco, write_tiny_recipe

sys.path.append(str(Path(__file__).parent / "data"))
import formats

from crosskd_hf.commands.main import COMMANDS, main
from crosskd_hf.recipe.load import load_recipe, parse_recipe

PAGES = ["README.md", "CONTRIBUTING.md", *sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/*.md"))]
OF_CI = ("pip install", "pytest", "ruff", ".ci/", "mkdocs serve", "python docs/")
LAUNCH = re.compile(r"accelerate launch .*?(?:train\.py|-m crosskd_hf train) ")
RUNS = ("your_data", "mine", "alone", "crosskd", "gfl_r50", "gfl_r50_crosskd")  # that pages name


class Block(NamedTuple):
    page: str
    line: int
    language: str
    marker: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def commands(self) -> list[str]:
        """Without comments, continued lines joined."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [line for line in (re.split(r"(?:^|\s)#\s", line)[0].strip() for line in lines) if line]


def blocks() -> Iterator[Block]:
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for match in re.finditer(r"(?:^<!-- ([^\n]*) -->\n)?^```(\w*)\n(.*?)^```$", text, re.M | re.S):
            yield Block(page, text[: match.start(3)].count("\n") + 1, match[2], match[1] or "", match[3])


BLOCKS = list(blocks())


def chosen(language: str, *markers: str) -> list:
    """Blocks of a language, whose marker begins with one of these."""
    found = [block for block in BLOCKS if block.language == language and block.marker.split(" ")[0] in markers]
    return [
        pytest.param(block, id=block.name, marks=[pytest.mark.slow] if block.marker == "takes: minutes" else [])
        for block in found
        if block.marker != "takes: hours"
    ]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout in which a reader has a data set, photographs, a video, and finished runs."""
    root = tmp_path_factory.mktemp("workspace")
    for name in ("recipes", "train.py", "benchmarks", "examples"):
        (root / name).symlink_to(ROOT / name)
    formats.WRITERS["yolo"](root / "my_images")
    pixels = np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8)
    (root / "photos").mkdir()
    for name in ("photo.jpg", "a.jpg", "b.jpg", "photos/1.jpg"):
        Image.fromarray(pixels).save(root / name)
    write_tiny_coco(root / "data", 5)
    main(["train", str(write_tiny_recipe(root, output_dir=str(root / "runs" / RUNS[0])))])
    for name in RUNS[1:]:
        shutil.copytree(root / "runs" / RUNS[0], root / "runs" / name)
    if data := os.environ.get("CROSSKD_DATA"):
        (root / "data" / "coco_mini").symlink_to(Path(data) / "coco_mini")
    return root


def test_blocks_are_found():
    assert len(BLOCKS) > 30
    known = re.compile(r"|needs: [\w ]+|takes: (minutes|hours)")
    assert [block.name for block in BLOCKS if not known.fullmatch(block.marker)] == []


@pytest.mark.parametrize("block", chosen("bash", "", "takes:"))
def test_commands(block: Block, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace)
    if "clip.mov" in block.text:
        pytest.importorskip("av")
        spec = importlib.util.spec_from_file_location("videos", ROOT / "tests/inference/test_predict_videos.py")
        videos = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(videos)
        videos.write_video(workspace / "clip.mov")
    if "coco_mini" in block.text and not (workspace / "data" / "coco_mini").exists():
        pytest.skip("needs CROSSKD_DATA")
    for command in block.commands:
        if command.startswith(OF_CI):
            continue
        if command.startswith("crosskd ") and block.marker == "":
            main(shlex.split(command)[1:])
        else:
            command = re.sub("^crosskd ", f"{shlex.quote(sys.executable)} -m crosskd_hf ", command)
            scripts = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
            environment = {**os.environ, "PATH": scripts, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, shell=True, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("block", chosen("bash", "needs:", "takes:"))
def test_commands_that_need_more_are_read(block: Block, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes and overrides, flags of scripts, arguments of commands."""
    monkeypatch.chdir(workspace)
    if not Path("mine.yaml").exists():
        main(["new", "mine.yaml", "--data", "my_images"])
    for command in block.commands:
        words = shlex.split(command)
        if launch := LAUNCH.match(command):
            recipe, *overrides = [word for word in shlex.split(command[launch.end() :]) if not word.startswith("--")]
            load_recipe(recipe, overrides)
        elif command.startswith("crosskd "):
            assert words[1] in COMMANDS
            monkeypatch.setattr(COMMANDS[words[1]], "run", lambda arguments: None)
            main(words[1:])
        elif command.startswith("python benchmarks/"):
            source = Path(words[1]).read_text(encoding="utf-8")
            assert all(f'"{word}"' in source for word in words[2:] if word.startswith("--")), command
        else:
            assert command.startswith(OF_CI), command


@pytest.mark.parametrize("block", [one for one in chosen("python", "", "takes:") if "onnx" not in one.values[0].text])
def test_python(block: Block, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what the page says that there is."""
    monkeypatch.chdir(workspace)
    from crosskd_hf.distillation import PKD, CrossKD, DistillationPair

    model, split = tiny_model(), tiny_split(workspace / "data")
    names = {"model": model, "processor": tiny_processor(model), "train": split, "val": split}
    names |= {
        "student": model,
        "teacher": tiny_model(seed=1),
        "pixel_mask": None,
        **tiny_batch(),
        "PKD": PKD,
        "CrossKD": CrossKD,
    }
    exec(compile(block.text, block.name, "exec"), names | {"DistillationPair": DistillationPair})


@pytest.mark.slow
def test_exported_files_are_run_as_the_page_says(workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """One page's blocks, one after another; the second needs a detector of transformers."""
    pytest.importorskip("onnxruntime")
    from query_models import query_model
    from transformers import RTDetrImageProcessor

    monkeypatch.chdir(workspace)
    model = query_model("rt_detr")
    model.save_pretrained("runs/rt_detr")
    RTDetrImageProcessor(size={"height": 64, "width": 64}).save_pretrained("runs/rt_detr")
    for run in ("gfl_r50_crosskd", "rt_detr"):
        main(["export", f"runs/{run}"])
    names: dict = {}
    for block in BLOCKS:
        if block.language == "python" and "onnxruntime" in block.text:
            exec(compile(block.text.replace("score > 0.5", "score > 0"), block.name, "exec"), names)
            assert len(names["boxes"]) > 0 and names["boxes"].shape[1] == 4
    assert "[" in capsys.readouterr().out


@pytest.mark.parametrize("block", [pytest.param(one, id=one.name) for one in BLOCKS if one.language == "yaml"])
def test_recipes(block: Block) -> None:
    """Sections of a recipe; the others are the least that there can be."""
    content = yaml.safe_load(block.text)
    base = {"model": {"detector": "gfl"}, "data": {"path": "x"}, "training": {"output_dir": "runs/x"}}
    if "distillation" in content:
        base["teacher"] = {"checkpoint": "random"}
    parse_recipe({**base, **content}, block.name)


def test_links_lead_somewhere() -> None:
    missing = []
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", (ROOT / page).read_text(encoding="utf-8")):
            if not (ROOT / page).parent.joinpath(target).exists():
                missing.append(f"{page}: {target}")
    assert missing == []


def test_the_table_of_keys_is_the_codes() -> None:
    spec = importlib.util.spec_from_file_location("recipe_keys", ROOT / "docs" / "recipe_keys.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.page() == module.PAGE.read_text(encoding="utf-8"), "run python docs/recipe_keys.py"


def test_the_readme_is_short() -> None:
    content = (ROOT / "README.md").read_bytes()
    assert len(content.splitlines()) <= 200 and len(content) <= 12 * 1024


def test_the_site_is_built_without_warnings(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    assert (tmp_path / "site" / "repository" / "CONTRIBUTING" / "index.html").exists()
