"""Which layout a data set has, by what lies in its folder."""

from dataclasses import replace
from pathlib import Path

from .errors import DataError
from .settings import DataSection
from .split import split_and_part
from .voc import LISTS, XML

ROBOFLOW_COCO = "{split}/_annotations.coco.json"


def with_layout(data: DataSection) -> DataSection:
    """The section with the layout that its folder has, where `layout` is `auto`.

    Raises:
        DataError: it is a file, and not YOLO's.
    """
    if data.layout != "auto":
        return data
    root = Path(data.path).expanduser()
    split = split_and_part(data.train_split)[0]
    if (root / data.annotations.format(split=split)).is_file() or any(root.glob("annotations/*.json")):
        shared = not (root / data.images.format(split=split)).is_dir() and (root / "images").is_dir()
        return replace(data, layout="coco", images="images" if shared and data.images == "{split}" else data.images)
    if any(root.glob(ROBOFLOW_COCO.format(split="*"))):
        return replace(data, layout="coco", annotations=ROBOFLOW_COCO, images="{split}")
    if root.is_file() and root.suffix.lower() not in (".yaml", ".yml"):
        raise DataError(
            f"{data.path} is a file: data.path must be the folder of the data set, or YOLO's data.yaml in it"
        )
    if root.is_file() or any(root.glob("data.y*ml")) or (any(root.glob("*.y*ml")) and any(root.glob("labels"))):
        return replace(data, layout="yolo")
    if (root / LISTS).is_dir() or (root / XML).is_dir() or any(root.glob("*/*.xml")):
        return replace(data, layout="voc")
    return replace(data, layout="datasets")
