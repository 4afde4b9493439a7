"""`recipes/your_data.yaml` on real images of three classes: one data set, three ways to hold it."""

import json
import shutil
from pathlib import Path

import datasets
import torch

from crosskd_hf.recipe.build import build_trainer
from crosskd_hf.recipe.load import load_recipe

NAMES = ["RBC", "WBC", "Platelets"]
SPLITS = {"train": "train", "validation": "val"}
SMALL = [
    *("teacher=null", "distillation=null", "model.backbone=resnet18", "model.backbone_weights=random"),
    *("model.fpn_channels=32", "model.head_channels=32", "data.short_side=96", "data.long_side=128"),
    *("data.max_val_images=6", "training.use_cpu=true", "training.dataloader_num_workers=0"),
    "training.per_device_train_batch_size=4",
]


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
            shutil.copy(file, folder / name)
            lines.append(json.dumps({"file_name": file.name, **row}))
        (folder / name / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def test_three_layouts_of_one_data_set_are_alike(bccd: Path, tmp_path: Path) -> None:
    root, names = bccd.resolve(), f"data.label_names=[{', '.join(NAMES)}]"
    write_parquet(root, tmp_path / "parquet")
    write_image_folder(root, tmp_path / "folder")
    layouts = {
        "coco": ["data.layout=coco", f"data.path={root}", "data.val_split=val", 'data.images="images"'],
        "parquet": [f"data.path={tmp_path / 'parquet'}", names],
        "folder": [f"data.path={tmp_path / 'folder'}", names],
    }
    loaded = {}
    for name, overrides in layouts.items():
        trainer = build_trainer(load_recipe("your_data", [*SMALL, f"data.cache_dir={tmp_path / 'cache'}", *overrides]))
        batch = next(iter(trainer.get_train_dataloader()))
        rows = trainer.eval_dataset.split.dataset.with_format("arrow", columns=["image_id", "objects"])[:].to_pydict()
        objects = [[row[key] for key in ("bbox", "category", "area", "iscrowd")] for row in rows["objects"]]
        loaded[name] = batch["pixel_values"], batch["labels"], len(trainer.train_dataset), rows["image_id"], objects
        assert trainer.model.config.id2label == dict(enumerate(NAMES))
    pixels, labels, images, *evaluated = loaded["coco"]
    assert images == 292 and len(evaluated[0]) == 6
    for name in ("parquet", "folder"):
        other_pixels, other_labels, *others = loaded[name]
        assert others == [images, *evaluated], name
        assert torch.equal(other_pixels, pixels), name
        assert other_labels.keys() == labels.keys()
        assert all(torch.equal(other_labels[key], labels[key]) for key in labels), name
