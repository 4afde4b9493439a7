"""Model cards: metadata and text by hand, and what must not be in them."""

import math
import re
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from tiny import LABELS, tiny_args, tiny_model, tiny_processor, tiny_split

from crosskd_hf import PKD, DetectionTrainer, DistillationTrainer
from crosskd_hf.data.settings import DataSection
from crosskd_hf.hub.model_card import (
    MARKER,
    CardFacts,
    DataFacts,
    DetectorFacts,
    TeacherFacts,
    model_card,
    write_model_card,
)
from crosskd_hf.hub.upload import files_to_upload, public_recipe
from crosskd_hf.recipe.load import load_recipe, parse_recipe
from crosskd_hf.recipe.sections import Recipe
from crosskd_hf.training.publishing import data_facts, measured, trainer_facts

METRICS = {"AP": 0.4023, "AP50": 0.58, "AP75": 0.433, "APs": -1.0, "APm": math.nan, "APl": 0.5, "AP/cat": 0.3}
COCO = DataFacts("detection-datasets/coco", "detection-datasets/coco", None, "val", 5000)
SECRET = "hf_" + "A1b2C3d4" * 4


GFL = DetectorFacts("GFL", "crosskd_gfl", "resnet18")
ATSS = DetectorFacts("ATSS", "crosskd_atss", "resnet101.tv_in1k")


def facts(**options) -> CardFacts:
    teacher = TeacherFacts(ATSS, "user/teacher", "user/teacher")
    known = {
        "name": "small",
        "detector": GFL,
        "repo_id": "user/small",
        "teacher": teacher,
        "methods": ["crosskd"],
        "data": COCO,
        "label_names": list(LABELS.values()),
    }
    return CardFacts(**{**known, "metrics": METRICS, **options})


def parsed(**options) -> tuple[dict, str]:
    """Metadata and text, read again from what is written."""
    card = ModelCard(str(model_card(facts(**options))))
    return yaml.safe_load(card.content.split("---\n")[1]), card.text


def secretive_recipe(folder: Path) -> Recipe:
    """A recipe with whatever must not be read by everybody."""
    return parse_recipe(
        {
            "model": {"checkpoint": rf"C:\Users\someone\{SECRET}\detector"},
            "teacher": {"checkpoint": f"https://someone:pw@example.org/a/teacher.pth?signature={SECRET}"},
            "distillation": {},
            "data": {"path": f"{folder}/private/cats", "cache_dir": "~/secret/cache"},
            "training": {"output_dir": f"{folder}/run", "run_name": SECRET, "max_steps": 5, "warmup_steps": 0},
        }
    )


def test_metadata_of_a_student() -> None:
    data, _ = parsed()
    index = data.pop("model-index")
    assert data == {
        "library_name": "transformers",
        "pipeline_tag": "object-detection",
        "license": "apache-2.0",
        "tags": ["crosskd_hf", "knowledge-distillation", "crosskd", "object-detection", "gfl", "crosskd_gfl"],
        "base_model": ["user/teacher"],
        "datasets": ["detection-datasets/coco"],
    }
    (model,) = index
    (result,) = model["results"]
    assert model["name"] == "small"
    assert result["task"] == {"type": "object-detection", "name": "Object Detection"}
    assert result["dataset"] == {"name": COCO.name, "type": COCO.hub_id, "split": "val"}
    values = {metric["type"]: metric["value"] for metric in result["metrics"]}
    assert values == {"AP": 0.4023, "AP50": 0.58, "AP75": 0.433, "APl": 0.5}, "-1 and NaN weren't measured"
    assert all("COCO" in metric["config"] for metric in result["metrics"])


def test_text_of_a_student() -> None:
    _, text = parsed(training={"Seed": "3"})
    assert "The method is cross-head knowledge distillation" in text
    assert text.lstrip().startswith(f"# small\n\n{MARKER}")
    assert "`resnet18`" in text and "[user/teacher](https://huggingface.co/user/teacher), an ATSS detector" in text
    assert "`cat`, `dog`" in text and "- Seed: 3" in text
    assert "detection-datasets/coco val (5000 images)" in text
    assert "| AP | AP50 | AP75 | APl |\n|---|---|---|---|\n| 40.2 | 58.0 | 43.3 | 50.0 |" in text
    assert "import crosskd_hf" in text and 'pipeline("object-detection", model="user/small")' in text
    assert "@inproceedings{wang2024crosskd," in text and "2306.11369" in text and "somebody's data" in text


def test_a_detector_trained_alone() -> None:
    data, text = parsed(teacher=None, started_from="user/start", tags=["mine"], language="en", license="mit")
    assert (data["base_model"], data["base_model_relation"]) == (["user/start"], "finetune")
    assert data["tags"] == ["crosskd_hf", "object-detection", "gfl", "crosskd_gfl", "mine"]
    assert data["language"] == "en" and data["license"] == "mit"
    assert "alone: without a teacher" in text
    data, text = parsed(teacher=None, metrics={"AP": -1.0, "AP50": math.nan})
    assert "base_model" not in data and "base_model_relation" not in data
    assert "model-index" not in data and "## Results" not in text and "NaN" not in text, "nothing was measured"


def test_a_local_data_set_and_teacher_have_only_names() -> None:
    teacher = TeacherFacts(GFL, "teacher.pth")
    data, text = parsed(teacher=teacher, data=DataFacts("My Cats", split="val", images=7))
    assert "base_model" not in data and "datasets" not in data
    dataset = data["model-index"][0]["results"][0]["dataset"]
    assert dataset == {"name": "My Cats", "type": "my-cats", "split": "val"}
    assert "as the student of `teacher.pth`, a GFL" in text


def test_data_of_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = DataSection(layout="datasets", path="user/cats", config="small", val_split="test")
    assert data_facts(asdict(hub), 4) == DataFacts("user/cats", "user/cats", "small", "test", 4)
    local = DataSection(path=str(tmp_path / "cats"))
    assert data_facts(asdict(local), 4) == DataFacts("cats", None, None, "val2017", 4)
    assert data_facts(asdict(DataSection(layout="shapes")), None).name == "generated shapes"
    (tmp_path / "user" / "cats").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert data_facts(asdict(hub), 4).hub_id is None, "a folder of this name is one"


def test_secrets_and_folders_stay_here(tmp_path: Path) -> None:
    recipe = secretive_recipe(tmp_path)
    public = public_recipe(recipe.to_dict())
    known = {"recipe": public, "data": data_facts(asdict(recipe.data), 5), "name": f"model-{SECRET}"}
    for text in (public, str(model_card(facts(**known)))):
        for secret in (str(tmp_path), "someone", "pw@", "signature", SECRET, "~/", "private"):
            assert secret not in text, secret
        assert "https://example.org/a/teacher.pth" in text and "path: cats" in text
    path = tmp_path / "recipe.yaml"
    path.write_text(public)
    assert load_recipe(path).teacher.checkpoint == "https://example.org/a/teacher.pth", "still a recipe"


def test_a_card_written_by_hand_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "run" / "README.md"
    assert write_model_card(path.parent, facts(name="first"))
    assert write_model_card(path.parent, facts(name="second")) and "# second" in path.read_text()
    path.write_text(path.read_text().replace(MARKER, "").replace("# second", "# Mine"))
    assert not write_model_card(path.parent, facts(name="third"))
    assert "# Mine" in path.read_text() and "left as it is" in caplog.text


def test_only_what_belongs_there_is_uploaded(tmp_path: Path) -> None:
    sent = ["README.md", "config.json", "preprocessor_config.json", "model.safetensors"]
    sent += ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "evaluation/eval_metrics.json"]
    kept = [
        "_lock",
        "training_args.bin",
        "trainer_state.json",
        "evaluation/eval_predictions.json",
        "checkpoint-1/model.safetensors",
        ".env",
    ]
    for name in (*sent, *kept):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    secretive_recipe(tmp_path).save(tmp_path / "recipe.yaml")
    files = files_to_upload(tmp_path)
    assert set(files) == {*sent, "recipe.yaml"}
    assert SECRET.encode() not in files["recipe.yaml"]
    for content in ("model: [1", "- servings", "model: 4\n", "\ud800"):  # what can't be made public stays here
        (tmp_path / "recipe.yaml").write_bytes(content.encode("utf-8", "surrogatepass"))
        assert set(files_to_upload(tmp_path)) == set(sent)


def test_names_from_outside_are_no_markup() -> None:
    hostile = '<img src=x>"\n## Results | `x` [a](http://b)'
    data = DataFacts(hostile, None, None, "val", 5)
    teacher = TeacherFacts(GFL, hostile)
    names = [hostile, "a`b\nc", *map(str, range(78))]
    _, text = parsed(name=hostile, repo_id=None, data=data, teacher=teacher, label_names=names)
    assert "<summary>80 labels</summary>" in text and r"`a'b\nc`" in text and "`77`" in text
    outside_code = re.sub(r"(?s)```.*?```|`[^`\n]*`", "", text.replace(r"\`", ""))
    assert "<img" not in outside_code and "[a](" not in outside_code
    assert text.count("\n## Results") == 1
    code = next(line for line in text.splitlines() if line.startswith("model = "))
    assert code.endswith(r"""("<img src=x>\"\n## Results | `x` [a](http://b)")""")


# Of trainers ----------------------------------------------------------------------------------------------------


def trained(folder: Path, teacher=None, **options) -> DetectionTrainer:
    model = tiny_model(seed=1)
    split = tiny_split(folder / "data")
    args = tiny_args(folder / "run", **{"max_steps": 1, **options})
    parts = {"train_dataset": split, "eval_dataset": split, "processing_class": tiny_processor(model)}
    if teacher is None:
        trainer = DetectionTrainer(model, args, **parts)
    else:
        trainer = DistillationTrainer(model, teacher, args, methods=[PKD()], **parts)
    trainer.forward_images = lambda _, batch: nothing_found(len(batch["pixel_values"]))  # fast
    return trainer


def nothing_found(images: int) -> SimpleNamespace:
    return SimpleNamespace(logits=torch.full((images, 1, 2), -9.0), pred_boxes=torch.zeros(images, 1, 4))


def test_the_card_of_a_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    teacher = tiny_model(seed=2)
    teacher.save_pretrained(tmp_path / "big-teacher")
    trainer = trained(tmp_path, str(tmp_path / "big-teacher"))
    trainer.train()
    card = tmp_path / "run" / "README.md"
    trainer.create_model_card()
    assert "model-index" not in card.read_text(), "it wasn't evaluated"
    metrics = trainer.evaluate()
    trainer.create_model_card(model_name="tiny", tags="mine", dataset="noise", dataset_tags="user/noise")
    loaded = ModelCard.load(card)
    found = {result.metric_name: result.metric_value for result in loaded.data.eval_results}
    assert found == {name: metrics[f"eval_{name}"] for name in ("AP", "AP50", "AP75", "APs")}
    assert loaded.data.datasets == ["user/noise"] and "mine" in loaded.data.tags
    assert "as the student of `big-teacher`" in loaded.text and "# tiny" in loaded.text
    assert "Precision: bf16" in loaded.text and "Distillation: pkd (weight 6.0)" in loaded.text
    assert "pkd" in loaded.data.tags and "crosskd" not in loaded.data.tags and "The method is cross" not in loaded.text
    for line in ("Steps: 1\n", "Training images: 5", "Processes: 1", "Global batch: 2 images", "Seed: 42", "torch "):
        assert line in loaded.text
    assert str(tmp_path) not in loaded.content
    card.write_text("Mine.")
    trainer.create_model_card()
    assert card.read_text() == "Mine."


def test_metrics_of_other_weights_or_data_are_not_the_models(tmp_path: Path) -> None:
    trainer = trained(tmp_path)
    assert measured(trainer) == {}
    trainer.train()
    trainer.evaluate()
    assert "AP" in measured(trainer)
    trainer.evaluate(tiny_split(tmp_path / "other", 2))
    assert measured(trainer) == {}, "of other data"
    trainer.evaluate()
    trainer.predict(trainer.eval_dataset)
    assert "AP" in measured(trainer), "a prediction changes nothing"
    trainer.state.global_step += 1
    assert measured(trainer) == {}, "of another step"


def test_metrics_of_the_last_step_are_not_those_of_the_best(tmp_path: Path) -> None:
    steps = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = trained(tmp_path, max_steps=2, load_best_model_at_end=True, **steps)
    scores = iter([0.5, 0.25, 0.5])
    trainer._metrics = lambda *_: {"AP": next(scores)}
    trainer.train()
    assert trainer.state.best_global_step == 1
    assert measured(trainer) == {}, "the last evaluation was of step 2"
    trainer.evaluate()
    assert measured(trainer) == {"AP": 0.5}


def test_a_student_that_was_started_from_a_detector(tmp_path: Path) -> None:
    trainer = trained(tmp_path)
    assert trainer_facts(trainer, None, "x").started_from is None
    for name, expected in (("user/start", "user/start"), (str(tmp_path), None), ("start", None)):
        trainer.model.config.name_or_path = name
        assert trainer_facts(trainer, None, "x").started_from == expected
