"""Fetching checkpoints from a server on this machine: once, checked, complete or not at all."""

import hashlib
from pathlib import Path

import pytest

from crosskd_hf.utils.files import CacheError
from crosskd_hf.weights import download
from crosskd_hf.weights.download import check_hash, fetch
from crosskd_hf.weights.mmdet import CheckpointError

CONTENT = bytes(range(250)) * 12
DIGEST = hashlib.sha256(CONTENT).hexdigest()
NAME = f"gfl-{DIGEST[:8]}.pth"


@pytest.mark.parametrize("digits", [8, 64])
def test_hash_in_the_name(tmp_path, digits):
    path = tmp_path / f"gfl_r50_fpn_1x_coco_20200629_121244-{DIGEST[:digits]}.pth"
    path.write_bytes(CONTENT)
    check_hash(path)
    path.write_bytes(b"other")
    with pytest.raises(CheckpointError, match=r"its name promises .* damaged"):
        check_hash(path)


@pytest.mark.parametrize("name", ["teacher.pth", "gfl_r50_20200629.pth", "gfl-r50.pth", "gfl-1234567.pth"])
def test_no_hash_in_the_name(tmp_path, name):
    (tmp_path / name).write_bytes(b"anything")
    check_hash(tmp_path / name)


def left(folder: Path) -> list[str]:
    """What a download leaves, without locks."""
    return [path.name for path in folder.iterdir() if not path.name.startswith(".")]


def test_fetches_once(tmp_path, server):
    server.files[f"/a/{NAME}"] = CONTENT
    folder, url = tmp_path / "new" / "cache", f"{server.url}/a/{NAME}"
    path = fetch(url, folder)
    assert path.read_bytes() == CONTENT and path.name == NAME
    assert fetch(url, folder) == path
    assert server.requests == [f"/a/{NAME}"] and left(folder) == [NAME]
    path.write_bytes(CONTENT[:100])
    with pytest.raises(CheckpointError, match="Delete it and fetch it again"):
        fetch(url, folder)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("{url}/gone.pth", r"gone\.pth can't be fetched .*404.*give its path"),
        ("{url}/gfl-00000000.pth", "its name promises 00000000"),
        ("http://127.0.0.1:1/a.pth", "can't be fetched"),
        ("nothing://host/a.pth", "can't be fetched"),
    ],
)
def test_what_cannot_be_fetched_leaves_nothing_behind(tmp_path, server, address, message):
    server.files["/gfl-00000000.pth"] = CONTENT
    with pytest.raises(CheckpointError, match=message):
        fetch(address.format(url=server.url), tmp_path)
    assert not left(tmp_path)


@pytest.mark.parametrize("name", ["gfl.pth", NAME], ids=["no hash", "hash"])
def test_a_broken_download_leaves_nothing_behind(tmp_path, server, name):
    server.files[f"/{name}"], server.promised[f"/{name}"] = CONTENT[:1000], 3000
    with pytest.raises(CheckpointError, match=r"can't be fetched .*1000 of 3000"):
        fetch(f"{server.url}/{name}", tmp_path)
    assert not left(tmp_path)
    server.files[f"/{name}"] = CONTENT
    assert fetch(f"{server.url}/{name}", tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize(
    "address",
    [
        "{url}/gone.pth?token=secret&user=secret#secret",
        "http://someone:secret@127.0.0.1/gone.pth",
        "http://someone:[secret]@127.0.0.1/gone.pth",
        "{url}/gone.pth?token=secret with a space",
        "{url}/gone.pth?token=sécret",
        "nothing://someone:secret@127.0.0.1/gone.pth",
    ],
)
def test_no_credentials_in_messages(tmp_path, server, address):
    with pytest.raises(CheckpointError, match=r"127\.0\.0\.1[:\d]*/gone\.pth can't be fetched \(.*") as raised:
        fetch(address.format(url=server.url), tmp_path)
    error: BaseException | None = raised.value
    while error:  # a traceback shows the causes, too
        assert not any(word in str(error) for word in ("secret", "sécret", "someone"))
        error = error.__cause__


def test_no_credentials_in_names(tmp_path, server, capsys):
    """The query of an address is no part of the file's name: it would be in the cache, progress and messages."""
    server.files |= {f"/{NAME}?sig=secret": CONTENT, "/a.pth?sig=secret": CONTENT, "/a.pth?sig=other": b"other"}
    assert fetch(f"{server.url}/{NAME}?sig=secret", tmp_path).name == NAME
    paths = [fetch(f"{server.url}/a.pth?sig={sig}", tmp_path) for sig in ("secret", "other")]
    assert [path.read_bytes() for path in paths] == [CONTENT, b"other"]
    assert all(path.name.endswith("_a.pth") for path in paths)
    assert not any("secret" in path.name for path in tmp_path.iterdir())
    assert "secret" not in "".join(capsys.readouterr())


@pytest.mark.parametrize("name", ["best.pth", "model-20200131.pth"], ids=["no hash", "date"])
def test_files_of_one_name_without_hash_are_kept_apart(tmp_path, server, name):
    server.files |= {f"/a/{name}": b"a", f"/b/{name}": b"b"}
    paths = [fetch(f"{server.url}/{folder}/{name}", tmp_path) for folder in "ab"]
    assert [path.read_bytes() for path in paths] == [b"a", b"b"]


def test_a_cache_that_cannot_be_written_is_no_matter_of_the_network(monkeypatch, tmp_path):
    def fill(url, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(download, "_download", fill)
    with pytest.raises(CacheError, match=rf"{tmp_path / 'cache'} .*disk is full.*HF_HOME"):
        fetch("http://127.0.0.1/a.pth", tmp_path / "cache")
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match=rf"{tmp_path / 'file'}.*HF_HOME"):
        fetch("http://127.0.0.1/a.pth", tmp_path / "file" / "cache")
