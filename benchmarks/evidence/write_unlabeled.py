"""Writes the images of `query.yaml` whose boxes aren't used, as PNG files: `write_unlabeled.py FOLDER`."""

import sys
from pathlib import Path

import datasets
import yaml

from crosskd_hf.data.load import load_split
from crosskd_hf.data.settings import DataSection

setting = yaml.safe_load(Path(__file__).with_name("query.yaml").read_text(encoding="utf-8"))
split = load_split(DataSection(**setting["student"]["recipe"]["data"]), "train[10%:]")
folder = Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
for row in split.dataset.cast_column("image", datasets.Image(decode=False)):
    (folder / row["file_name"]).write_bytes(row["image"]["bytes"])
print(f"{len(split.dataset)} images in {folder}")
