"""Checkpoints that transformers reads by itself: in a process of its own, and where the package is missing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny_model
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.image_processing_base import ImageProcessingMixin

from crosskd_hf.models import CONFIGS, MODELS
from crosskd_hf.models.image_processing import DenseDetectorImageProcessor

SCRIPT = """
import json, sys
from transformers import AutoImageProcessor, AutoModelForObjectDetection

folder, target = sys.argv[1:]
assert "crosskd_hf" not in sys.modules
class Missing:
    def find_spec(name, path, target=None):
        if name == "crosskd_hf":
            raise ModuleNotFoundError("No module named 'crosskd_hf'")

sys.meta_path.insert(0, Missing)
try:
    AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
except ImportError as error:
    missing = str(error)
sys.meta_path.remove(Missing)
processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForObjectDetection.from_pretrained(folder, trust_remote_code=True)
model.save_pretrained(target)
processor.save_pretrained(target)
print(json.dumps([missing, type(processor).__module__, type(model).__module__]))
"""


def test_transformers_reads_it_without_an_import(tmp_path: Path) -> None:
    """And saves it so again."""
    model = tiny_model("fcos", head_blocks=1)
    model.save_pretrained(tmp_path / "model", standalone=True)
    DenseDetectorImageProcessor.for_model(model.config).save_pretrained(tmp_path / "model", standalone=True)
    again = tmp_path / "again"
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(tmp_path / "model"), str(again)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert run.returncode == 0, run.stderr
    missing, processor, detector = json.loads(run.stdout)
    assert "crosskd_hf" in missing and "pip install crosskd_hf" in missing
    assert (processor, detector) == ("crosskd_hf.models.image_processing", "crosskd_hf.models.fcos")
    files = {path.name for path in again.iterdir()}
    assert files == {"config.json", "model.safetensors", "modeling_crosskd.py", "preprocessor_config.json"}
    for name in files - {"model.safetensors"}:
        assert (again / name).read_text() == (tmp_path / "model" / name).read_text(), name
    loaded = MODELS["fcos"].from_pretrained(again)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


def test_code_in_an_auto_map_is_not_written(tmp_path: Path) -> None:
    """A configuration may come from anywhere; the module may be run."""
    model = tiny_model(head_blocks=1)
    model.config.auto_map = {"AutoConfig": "modeling_crosskd.GFLConfig;print('injected')#"}
    (tmp_path / "modeling_crosskd.py").write_text("from crosskd_hf import GFLConfig, os;print('injected')")
    model.save_pretrained(tmp_path)
    written = (tmp_path / "modeling_crosskd.py").read_text()
    assert "injected" not in written and "import GFLConfig, GFLForObjectDetection\n" in written
    assert "injected" not in (tmp_path / "config.json").read_text()


def test_classes_of_others_are_refused(tmp_path: Path) -> None:
    class Mine(MODELS["gfl"]):
        pass

    with pytest.raises(ValueError, match="Mine is no class of crosskd_hf"):
        Mine(tiny_model(head_blocks=1).config).save_pretrained(tmp_path, standalone=True)


def test_it_stays_so_until_it_is_taken_back(tmp_path: Path) -> None:
    model = tiny_model(head_blocks=1)
    for folder, standalone, expected in (
        ("a", True, True),
        ("b", None, True),
        ("c", False, False),
        ("d", None, False),
    ):
        model.save_pretrained(tmp_path / folder, standalone=standalone)
        assert (tmp_path / folder / "modeling_crosskd.py").exists() is expected
        assert ("auto_map" in json.loads((tmp_path / folder / "config.json").read_text())) is expected


@pytest.mark.parametrize("what", ["model", "processor"])
def test_the_module_is_uploaded_too(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uploaded = []

    def push(self, repo_id, **options):
        self.save_pretrained(tmp_path / "sent")
        uploaded.append((repo_id, sorted(path.name for path in (tmp_path / "sent").iterdir())))

    for one in (PreTrainedModel, ImageProcessingMixin):
        monkeypatch.setattr(one, "push_to_hub", push)
    model = tiny_model(head_blocks=1)
    one = model if what == "model" else DenseDetectorImageProcessor.for_model(model.config)
    one.save_pretrained(tmp_path / "mine", standalone=True, push_to_hub=True, repo_id="me/mine")
    one.push_to_hub("me/other", standalone=True)
    assert [name for name, _ in uploaded] == ["me/mine", "me/other"]
    assert all("modeling_crosskd.py" in files for _, files in uploaded)


def test_nothing_is_added_where_it_is_not_asked_for(tmp_path: Path) -> None:
    model = tiny_model(head_blocks=1)
    model.save_pretrained(tmp_path)
    DenseDetectorImageProcessor.for_model(model.config).save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    assert not any("auto_map" in path.read_text() for path in tmp_path.glob("*.json"))


@pytest.mark.parametrize("name", CONFIGS)
def test_auto_classes_know_the_names_that_users_try(name: str, tmp_path: Path) -> None:
    model = tiny_model(name, head_blocks=1)
    model.save_pretrained(tmp_path)
    assert type(AutoModel.from_pretrained(tmp_path)) is MODELS[name]
    assert type(AutoConfig.for_model(name, head_blocks=2)) is CONFIGS[name]
    assert type(AutoModel.from_config(model.config)) is MODELS[name]
