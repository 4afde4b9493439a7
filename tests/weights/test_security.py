"""Files from strangers: nothing in them is executed, and the message names the file."""

import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fuzzing import png_header
from tiny import tiny_args, tiny_model, tiny_processor, tiny_split

from crosskd_hf.hub.upload import RECIPE_FILE, read_recipe
from crosskd_hf.recipe.load import load_recipe
from crosskd_hf.training.checkpoints import MARKER, mark_complete
from crosskd_hf.training.trainer import DetectionTrainer
from crosskd_hf.utils.images import ImageError, inspect_image, load_rgb, load_tensor
from crosskd_hf.utils.redact import without_credentials
from crosskd_hf.utils.strict_yaml import RecipeError
from crosskd_hf.weights.loading import load_detector, load_processor
from crosskd_hf.weights.mmdet import CheckpointError

TOKEN = "hf_" + "s" * 34


class Evil:
    """Unpickling it makes a folder."""

    def __init__(self, proof: Path):
        self.proof = proof

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.proof),)


@pytest.fixture
def proof(tmp_path: Path) -> Path:
    """A folder that is there if something was executed."""
    return tmp_path / "executed"


def poison(path: Path, proof: Path, legacy: bool) -> None:
    content = {"state": {"weight": torch.zeros(3)}, "more": Evil(proof)}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The folder of a model."""
    tiny_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("legacy", [False, True])
def test_pickled_weights_are_not_loaded(saved: Path, proof: Path, legacy: bool) -> None:
    for name in ("training_args.bin", "pytorch_model.bin", "optimizer.pt"):
        poison(saved / name, proof, legacy)
    assert load_detector(str(saved)).config.num_labels == 2, "model.safetensors goes before"
    (saved / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"can't be loaded as a detector .*nothing in it was executed"):
        load_detector(str(saved))
    assert not proof.exists()
    torch.load(saved / "optimizer.pt", weights_only=False)
    assert proof.exists(), "these files are dangerous"


def bring_code(folder: Path, file: str, proof: Path, **content: object) -> None:
    """Have a file of a model name code of its own, as models of the Hub do; `content` is put into that file."""
    path = folder / file
    known = json.loads(path.read_text()) if path.exists() else {}
    names = ("AutoConfig", "AutoModelForObjectDetection", "AutoImageProcessor")
    content["auto_map"] = {name: f"evil.{name}" for name in names}
    path.write_text(json.dumps(known | content))
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(proof)!r})\n")


@pytest.fixture
def yes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whoever asks on the terminal is told yes."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))


@pytest.mark.usefixtures("yes")
@pytest.mark.parametrize("model_type", ["evil", "bert", None])
def test_code_that_a_model_brings_is_not_run(saved: Path, proof: Path, model_type: str | None) -> None:
    """trust_remote_code is never needed here. "bert" is known to transformers, but as no detector."""
    bring_code(saved, "config.json", proof, model_type=model_type)
    with pytest.raises(CheckpointError, match=rf"model'.*model type, {model_type!r}, isn't one of .*crosskd_gfl"):
        load_detector(str(saved))
    assert not proof.exists()


@pytest.mark.usefixtures("yes")
def test_code_beside_a_model_of_this_package_is_not_run(saved: Path, proof: Path) -> None:
    bring_code(saved, "config.json", proof)
    assert type(load_detector(str(saved))) is type(tiny_model()) and not proof.exists()


@pytest.mark.usefixtures("yes")
def test_an_image_processor_that_a_model_brings_is_not_run(saved: Path, proof: Path) -> None:
    bring_code(saved, "preprocessor_config.json", proof, image_processor_type="EvilImageProcessor")
    with pytest.raises(CheckpointError, match=r"model' has no image processor that can be read .*code of the model's"):
        load_processor(str(saved))
    assert not proof.exists()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], DetectionTrainer]:
    """Trainers of two steps."""
    root = tmp_path_factory.mktemp("run")
    split = tiny_split(root / "data")

    def trainer(name: str) -> DetectionTrainer:
        model = tiny_model(backbone="test_resnet")
        args = tiny_args(root / name, max_steps=2, save_strategy="steps", save_steps=2)
        return DetectionTrainer(model, args, train_dataset=split, processing_class=tiny_processor(model))

    return trainer


@pytest.mark.parametrize(
    ("name", "legacy"),
    [("optimizer.pt", False), ("optimizer.pt", True), ("scheduler.pt", False), ("rng_state.pth", False)],
)
def test_pickles_of_a_checkpoint_are_not_executed(run: Callable, proof: Path, name: str, legacy: bool) -> None:
    """Of somebody else's run, with a marker that says all is well."""
    if not (checkpoint := Path(run("run").args.output_dir) / "checkpoint-2").exists():
        run("run").train()
    honest = (checkpoint / name).read_bytes()
    poison(checkpoint / name, proof, legacy)
    (checkpoint / MARKER).unlink()
    mark_complete(checkpoint)
    try:
        with pytest.raises(CheckpointError, match=rf"{name}.*refused.*[Nn]othing was executed"):
            run("other").train(resume_from_checkpoint=str(checkpoint))
    finally:
        (checkpoint / name).write_bytes(honest)
    assert not proof.exists()


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.mkdir", "!!python/name:os.system", "!!python/module:os"])
def test_recipes_make_no_objects(tmp_path: Path, proof: Path, tag: str) -> None:
    (tmp_path / "evil.yaml").write_text(f"model: {tag} [{str(proof)!r}]\n")
    with pytest.raises(RecipeError, match=r"evil\.yaml, line 1"):
        load_recipe(tmp_path / "evil.yaml")
    with pytest.raises(RecipeError):
        load_recipe("gfl_r50_crosskd", [f"model.backbone={tag} [{str(proof)!r}]"])
    assert not proof.exists()


@pytest.mark.parametrize("read", [load_rgb, load_tensor, inspect_image])
def test_image_bombs_are_refused(tmp_path: Path, read: Callable) -> None:
    """A few bytes that say they are 10 gigabytes of pixels."""
    (tmp_path / "bomb.png").write_bytes(png_header(60_000, 60_000))
    for source in (str(tmp_path / "bomb.png"), png_header(60_000, 60_000)):
        with pytest.raises(ImageError, match="decompression bomb"):
            read(source)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://a.org/b.pth?sig=x#y", "https://a.org/b.pth"),
        ("https://me:p'w\"<@a.org:80/b.pth", "https://a.org:80/b.pth"),
        ("from 'http://me@a.org/b?x=1', or s3://key:pw@c/d.", "from 'http://a.org/b', or s3://c/d."),
        ("http://a.org?x/y@z", "http://a.org"),
        ("http://[bad/x?y", "http://[bad/x"),
        (f"https://a.org/{TOKEN}/b {TOKEN}", "https://a.org/REMOVED/b REMOVED"),
        ("runs/a?b, me@a.org, C:/x://y", "runs/a?b, me@a.org, C:/x://y"),
    ],
)
def test_credentials_in_texts(text: str, shown: str) -> None:
    assert without_credentials(text) == shown


def test_recipes_hold_no_token() -> None:
    """They would be written beside the model, and uploaded."""
    with pytest.raises(RecipeError, match="hub_token would be written into") as error:
        load_recipe("gfl_r50_crosskd", [f"training.hub_token={TOKEN}"])
    assert TOKEN not in str(error.value)


def test_tokens_are_in_no_file_of_a_run(run: Callable) -> None:
    trainer = run("tokens")
    trainer.args.hub_token = TOKEN
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    files = [path for path in Path(trainer.args.output_dir).rglob("*") if path.is_file()]
    assert len(files) > 10
    assert [path.name for path in files if TOKEN.encode() in path.read_bytes()] == []
    assert trainer.args.hub_token == TOKEN, "the run itself still has it"


def test_a_recipe_beside_a_model_is_read_as_strictly(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It may come from the Hub: references of references would unfold to a billion values in a card."""
    lists = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    (tmp_path / RECIPE_FILE).write_text("\n".join(["model: {backbone: &a0 [x]}", *lists]), encoding="utf-8")
    assert read_recipe(tmp_path) is None
    assert "more than 10000 values" in caplog.text
