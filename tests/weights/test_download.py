"""Fetching checkpoints from a server on this machine: once, checked, complete or not at all."""

import hashlib
import os
from pathlib import Path

import pytest

from crosskd_hf.utils.files import CacheError
from crosskd_hf.weights import download
from crosskd_hf.weights.download import check_hash, fetch
from crosskd_hf.weights.mmdet import CheckpointError

CONTENT = bytes(range(250)) * 12


def hash_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("digits", [8, 16, 64])
def test_hash_in_the_name(tmp_path, digits):
    content = b"weights"
    good = tmp_path / f"gfl_r50_fpn_1x_coco_20200629_121244-{hash_of(content)[:digits]}.pth"
    good.write_bytes(content)
    check_hash(good)
    good.write_bytes(b"other")
    with pytest.raises(CheckpointError, match=r"its name promises .* damaged"):
        check_hash(good)


@pytest.mark.parametrize("name", ["teacher.pth", "gfl_r50_20200629.pth", "gfl-r50.pth", "gfl-1234567.pth"])
def test_no_hash_in_the_name(tmp_path, name):
    (tmp_path / name).write_bytes(b"anything")
    check_hash(tmp_path / name)


def left(folder: Path) -> list[str]:
    """What a download leaves, without locks."""
    return [path.name for path in folder.iterdir() if not path.name.startswith(".")]


def test_fetches_once(tmp_path, server):
    content = os.urandom(3000)
    name = f"gfl-{hash_of(content)[:8]}.pth"
    server.files[f"/a/{name}"] = content
    path = fetch(f"{server.url}/a/{name}", tmp_path / "new" / "cache")
    assert path.read_bytes() == content and path.name == name
    assert fetch(f"{server.url}/a/{name}", tmp_path / "new" / "cache") == path
    assert server.requests == [f"/a/{name}"]
    assert left(path.parent) == [path.name]


def test_a_cached_file_that_was_damaged_is_not_used(tmp_path, server):
    content = os.urandom(3000)
    name = f"gfl-{hash_of(content)[:8]}.pth"
    server.files[f"/{name}"] = content
    fetch(f"{server.url}/{name}", tmp_path).write_bytes(content[:100])
    with pytest.raises(CheckpointError, match="Delete it and fetch it again"):
        fetch(f"{server.url}/{name}", tmp_path)


def test_404_leaves_nothing_behind(tmp_path, server):
    with pytest.raises(CheckpointError, match=r"gone\.pth can't be fetched .*404.*give its path"):
        fetch(f"{server.url}/gone.pth", tmp_path)
    assert not left(tmp_path)


def test_no_server(tmp_path, server):
    server.http.server_close()
    with pytest.raises(CheckpointError, match="can't be fetched"):
        fetch(f"{server.url}/a.pth", tmp_path)
    assert not left(tmp_path)


def test_bad_address(tmp_path):
    with pytest.raises(CheckpointError, match="can't be fetched"):
        fetch("nothing://host/a.pth", tmp_path)


@pytest.mark.parametrize(
    "address",
    [
        "{url}/gone.pth?token=secret&user=secret#secret",
        "http://someone:secret@127.0.0.1/gone.pth",
        "http://secret@127.0.0.1:1/gone.pth",
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
    assert not left(tmp_path)


def test_no_credentials_in_names(tmp_path, server, capsys):
    """The query of an address is no part of the file's name: it would be in the cache, progress and messages."""
    name = f"gfl-{hash_of(CONTENT)[:8]}.pth"
    server.files |= {f"/{name}?sig=secret": CONTENT, "/a.pth?sig=secret": CONTENT, "/a.pth?sig=other": b"other"}
    assert fetch(f"{server.url}/{name}?sig=secret", tmp_path).name == name
    paths = [fetch(f"{server.url}/a.pth?sig={sig}", tmp_path) for sig in ("secret", "other")]
    assert [path.read_bytes() for path in paths] == [CONTENT, b"other"]
    assert all(path.name.endswith("_a.pth") for path in paths)
    assert not any("secret" in path.name for path in tmp_path.iterdir())
    assert "secret" not in "".join(capsys.readouterr())


def test_wrong_hash_leaves_nothing_behind(tmp_path, server):
    server.files["/gfl-00000000.pth"] = b"weights"
    with pytest.raises(CheckpointError, match="its name promises 00000000"):
        fetch(f"{server.url}/gfl-00000000.pth", tmp_path)
    assert not left(tmp_path)


@pytest.mark.parametrize("name", ["gfl.pth", f"gfl-{hash_of(b'w' * 3000)[:8]}.pth"], ids=["no hash", "hash"])
def test_a_broken_download_leaves_nothing_behind(tmp_path, server, name):
    server.files[f"/{name}"], server.promised[f"/{name}"] = b"w" * 1000, 3000
    with pytest.raises(CheckpointError, match=r"can't be fetched .*1000 of 3000"):
        fetch(f"{server.url}/{name}", tmp_path)
    assert not left(tmp_path)
    server.files[f"/{name}"] = b"w" * 3000
    assert fetch(f"{server.url}/{name}", tmp_path).read_bytes() == b"w" * 3000


@pytest.mark.parametrize("name", ["best.pth", "model-20200131.pth"], ids=["no hash", "date"])
def test_files_of_one_name_without_hash_are_kept_apart(tmp_path, server, name):
    server.files |= {f"/a/{name}": b"a", f"/b/{name}": b"b"}
    paths = [fetch(f"{server.url}/{folder}/{name}", tmp_path) for folder in "ab"]
    assert [path.read_bytes() for path in paths] == [b"a", b"b"]
    assert {Path(path).suffix for path in paths} == {".pth"}


def test_a_cache_that_cannot_be_written_is_no_matter_of_the_network(monkeypatch, tmp_path):
    def fill(url, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(download, "_download", fill)
    with pytest.raises(CacheError, match=rf"{tmp_path / 'cache'} .*disk is full.*HF_HOME"):
        fetch("http://127.0.0.1/a.pth", tmp_path / "cache")
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match=rf"{tmp_path / 'file'}.*HF_HOME"):
        fetch("http://127.0.0.1/a.pth", tmp_path / "file" / "cache")
