"""`recipes/your_data.yaml` on real images of three classes: one data set, three ways to hold it."""

import json
import os
from pathlib import Path

import datasets
import pytest
import torch

from crosskd_hf.data.split import DetectionSplit
from crosskd_hf.recipe.build import build_trainer
from crosskd_hf.recipe.load import load_recipe
from crosskd_hf.training.coco_metrics import CocoEvaluator

NAMES = ["RBC", "WBC", "Platelets"]
SPLITS = {"train": "train", "validation": "val"}


def images_with_objects(root: Path, split: str) -> list[dict]:
    """Rows of image path and objects, from the COCO layout."""
    content = json.loads((root / "annotations" / f"instances_{split}.json").read_text())
    names = {category["id"]: category["name"] for category in content["categories"]}
    rows = {
        image["id"]: {"image": str((root / "images" / image["file_name"]).resolve()), "image_id": image["id"]}
        | {"objects": {"id": [], "bbox": [], "category": [], "area": [], "iscrowd": []}}
        for image in content["images"]
    }
    for record in content["annotations"]:
        objects = rows[record["image_id"]]["objects"]
        for key in ("id", "bbox", "area"):
            objects[key].append(record[key])
        objects["iscrowd"].append(bool(record["iscrowd"]))
        objects["category"].append(names[record["category_id"]])
    return list(rows.values())


def write_parquet(root: Path, folder: Path) -> None:
    folder.mkdir()
    for name, split in SPLITS.items():
        rows = images_with_objects(root, split)
        rows = [row | {"image": {"bytes": Path(row["image"]).read_bytes(), "path": None}} for row in rows]
        data = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
        data.to_parquet(folder / f"{name}-00000-of-00001.parquet")


def write_image_folder(root: Path, folder: Path) -> None:
    for name, split in SPLITS.items():
        (folder / name).mkdir(parents=True)
        lines = []
        for row in images_with_objects(root, split):
            file = Path(row.pop("image"))
            os.link(file, folder / name / file.name) if _same_drive(file, folder) else _copy(file, folder / name)
            lines.append(json.dumps({"file_name": file.name, **row}))
        (folder / name / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def _same_drive(file: Path, folder: Path) -> bool:
    return file.stat().st_dev == folder.stat().st_dev


def _copy(file: Path, folder: Path) -> None:
    (folder / file.name).write_bytes(file.read_bytes())


def settings(tmp_path: Path, name: str) -> list[str]:
    """Overrides: a small student without a teacher, small images."""
    return [
        *("teacher=null", "distillation=null", "model.backbone=resnet18", "model.backbone_weights=random"),
        *("model.fpn_channels=32", "model.head_channels=32", "data.short_side=96", "data.long_side=128"),
        *("data.max_val_images=6", "training.use_cpu=true", "training.dataloader_num_workers=0"),
        *("training.disable_tqdm=true", "training.per_device_train_batch_size=4"),
        *(f"training.output_dir={tmp_path / name}", f"data.cache_dir={tmp_path / 'cache'}"),
    ]


@pytest.fixture
def layouts(bccd: Path, tmp_path: Path) -> dict[str, list[str]]:
    """Layout -> overrides that read it."""
    root = bccd.resolve()
    write_parquet(root, tmp_path / "parquet")
    write_image_folder(root, tmp_path / "folder")
    coco = ["data.layout=coco", f"data.path={root}", "data.val_split=val", 'data.images="images"']
    return {
        "coco": coco,
        "parquet": [f"data.path={tmp_path / 'parquet'}", f"data.label_names=[{', '.join(NAMES)}]"],
        "folder": [f"data.path={tmp_path / 'folder'}", f"data.label_names=[{', '.join(NAMES)}]"],
    }


def shifted_truth_metrics(split: DetectionSplit) -> dict[str, float]:
    """The metrics of the ground truth moved by 4 pixels: an untrained detector has none but zeros."""
    evaluator = CocoEvaluator(split)
    for image_id, objects in zip(split.dataset["image_id"][:], split.dataset["objects"][:], strict=True):
        boxes = torch.tensor(objects["bbox"]).reshape(-1, 4) + 4.0 * torch.tensor([1, 1, 0, 0])
        boxes[:, 2:] += boxes[:, :2]
        scores = torch.linspace(0.9, 0.1, len(boxes))
        evaluator.update([image_id], [{"boxes": boxes, "labels": torch.tensor(objects["category"]), "scores": scores}])
    return evaluator.compute()


def test_three_layouts_of_one_data_set_train_and_evaluate_alike(layouts, tmp_path):
    found = {}
    for name, overrides in layouts.items():
        trainer = build_trainer(load_recipe("your_data", [*settings(tmp_path, name), *overrides]))
        with torch.no_grad():  # so that there is something to count in an untrained detector's predictions
            trainer.model.head.cls_predictor.bias.fill_(0.0)
        batch = next(iter(trainer.get_train_dataloader()))
        metrics = trainer.evaluate()
        speed = ("runtime", "per_second")
        metrics = {key: value for key, value in metrics.items() if not key.endswith(speed)}
        predictions = (tmp_path / name / "evaluation" / "eval_predictions.json").read_text()
        metrics |= shifted_truth_metrics(trainer.eval_dataset.split)
        found[name] = batch, metrics, json.loads(predictions), len(trainer.train_dataset)
    batch, metrics, predictions, images = found["coco"]
    assert images == 292 and len(predictions) > 100 and 0 < metrics["AP"] < 1
    assert trainer.model.config.id2label == dict(enumerate(NAMES))
    for name in ("parquet", "folder"):
        other, other_metrics, other_predictions, other_images = found[name]
        assert other_images == images
        assert torch.equal(other["pixel_values"], batch["pixel_values"]), name
        mine, theirs = other["labels"], batch["labels"]
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine), name
        assert other_metrics == metrics, name
        # The category ids differ: COCO's file has its own, the others count from 0.
        keys = ("image_id", "bbox", "score")
        assert [[p[key] for key in keys] for p in other_predictions] == [[p[key] for key in keys] for p in predictions]
