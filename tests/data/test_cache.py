"""Arrow caches: whatever is wrong with one is named and mended, and one that can't be written is explained."""

import threading
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import files_of_at_most, write_tiny_coco

from crosskd_hf.data import cache
from crosskd_hf.data.coco import load_coco
from crosskd_hf.data.columns import load_columns
from crosskd_hf.data.shapes import load_shapes
from crosskd_hf.data.split import DetectionSplit
from crosskd_hf.utils.files import CacheError


@pytest.fixture
def load(tmp_path: Path):
    """Loads five images in COCO layout."""
    write_tiny_coco(tmp_path / "coco")
    return lambda: load_coco(tmp_path / "coco", "mini", cache_dir=tmp_path / "cache")


def rows(split: DetectionSplit) -> list[dict]:
    return split.dataset.remove_columns("image").to_list()


def damage(folder: Path, suffix: str, change) -> list[Path]:
    """Change the files of caches that end so; gives their folders."""
    files = list(folder.rglob(f"*{suffix}"))
    for file in files:
        file.write_bytes(change(file.read_bytes()))
    return [file.parent for file in files]


def overwrite_middle(content: bytes) -> bytes:
    middle = len(content) * 3 // 4
    return content[:middle] + bytes(255 - byte for byte in content[middle : middle + 8]) + content[middle + 8 :]


DAMAGES = {
    "truncated": (".arrow", lambda content: content[: len(content) * 6 // 10]),
    "empty": (".arrow", lambda content: b""),
    "other bytes": (".arrow", overwrite_middle),
    "half JSON": ("dataset_info.json", lambda content: content[:100]),
    "other JSON": ("dataset_info.json", lambda content: b"{}"),
    "no JSON object": ("dataset_info.json", lambda content: b"[]"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_cache_is_named_and_built_again(load, tmp_path, caplog, kind):
    before = rows(load())
    (folder,) = damage(tmp_path / "cache", *DAMAGES[kind])
    assert rows(load()) == before
    assert f"{folder} is damaged" in caplog.text
    caplog.clear()
    assert rows(load()) == before and not caplog.text


@pytest.mark.parametrize("kind", ["truncated", "half JSON"])
def test_the_caches_of_datasets_itself_are_mended_too(tmp_path, caplog, kind):
    (tmp_path / "set").mkdir()
    image = next(
        iter(load_shapes("train", 1, side=32, cache_dir=str(tmp_path / "shapes")).dataset.with_format("arrow"))
    )
    objects = {"bbox": [[1.0, 1.0, 9.0, 9.0]], "category": ["a"]}
    table = {"image": image["image"].to_pylist() * 3, "objects": [objects] * 3}
    pq.write_table(pa.table(table), tmp_path / "set" / "train.parquet")

    def load() -> list[dict]:
        return rows(load_columns(str(tmp_path / "set"), "train", cache_dir=tmp_path / "cache"))

    before = load()
    folders = damage(tmp_path / "cache", *DAMAGES[kind])
    assert len(folders) == 2  # of the Parquet file, and of the checked annotations
    assert load() == before
    assert all(caplog.text.count(f"{folder} is damaged") == 1 for folder in folders)


def test_files_of_other_programs_are_no_damage(load, tmp_path, caplog):
    before = rows(load())
    foreign = next((tmp_path / "cache").rglob("*.arrow")).with_name("cache-user.arrow")
    foreign.write_bytes(b"")
    assert rows(load()) == before and foreign.exists() and not caplog.text


def test_several_that_find_a_damage_agree(load, tmp_path, caplog):
    before = rows(load())
    damage(tmp_path / "cache", *DAMAGES["half JSON"])
    barrier, found = threading.Barrier(4), []

    def load_at_once() -> None:
        barrier.wait()
        found.append(rows(load()))

    threads = [threading.Thread(target=load_at_once) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [before] * 4
    assert caplog.text.count("is damaged") == 1


def test_a_cache_that_may_not_be_read_is_not_called_damaged(load, tmp_path, monkeypatch, caplog):
    load()
    file = next((tmp_path / "cache").rglob("*.arrow"))

    def refuse(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr(cache, "sha256", refuse)
    with pytest.raises(CacheError, match=rf"{tmp_path / 'cache'} can't be used .*{file.name}: Permission denied"):
        load()
    assert file.exists() and not caplog.text


def test_a_full_disk_is_told_with_its_folder_and_the_setting(load, tmp_path):
    with (
        files_of_at_most(1000),
        pytest.raises(CacheError, match=rf"{tmp_path / 'cache'} .*disk is full.*HF_DATASETS_CACHE"),
    ):
        load()
    assert len(rows(load())) == 5  # nothing of the first try is in the way


def test_a_cache_folder_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / ".cache" / "datasets")
    with pytest.raises(CacheError, match=rf"{tmp_path / 'file'}.*HF_HOME"):
        load_shapes("train", 1)


def test_without_a_home_directory_no_folder_of_that_name_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", Path("~/.cache/huggingface/datasets"))
    pwd = pytest.importorskip("pwd")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)  # a user that the system doesn't know, as in containers
    with pytest.raises(CacheError, match=r"no home directory .*~/\.cache.*HF_HOME"):
        load_shapes("train", 1)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_not_taken_for_a_wrong_data_set(tmp_path):
    (tmp_path / "set" / "train").mkdir(parents=True)
    (tmp_path / "set" / "train" / "metadata.jsonl").write_text('{"file_name": "1.png"}\n' * 500)
    with files_of_at_most(1000), pytest.raises(CacheError, match=rf"{tmp_path / 'cache'} .*disk is full"):
        load_columns(str(tmp_path / "set"), "train", cache_dir=tmp_path / "cache")
