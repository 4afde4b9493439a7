"""Videos in, videos with boxes and JSON out."""

import json
import re
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_model, tiny_processor

from crosskd_hf.commands.main import main
from crosskd_hf.inference.image_files import PredictionError
from crosskd_hf.inference.predict_videos import check_videos, split_sources

av = pytest.importorskip("av")
TIMES = (0, 1, 2, 5, 6)  # of the frames, in tenths of a second: one pause


def write_video(
    path: Path, width: int = 96, height: int = 64, times: Sequence[int] = TIMES, codec: str = "libx264"
) -> Path:
    """Frames of noise, each brighter than the one before; the upper left quarter is red."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10, options={"qp": "0", "g": "5"} if codec == "libx264" else {})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index, time in enumerate(times):
            low = 30 * index % 190
            pixels = rng.integers(low, low + 60, (height // 8, width // 8, 3), dtype=np.uint8)
            pixels[: height // 16, : width // 16] = (255, 0, 0)
            frame = av.VideoFrame.from_image(Image.fromarray(pixels).resize((width, height)))
            frame.pts, frame.time_base = time, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def frames_of(path: Path) -> list:
    with av.open(str(path)) as video:
        return list(video.decode(video=0))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    model = tiny_model()
    model.save_pretrained(folder)
    tiny_processor(model).save_pretrained(folder)
    return str(folder)


def predicted(saved: str, output: Path, *words: object) -> None:
    main(["predict", saved, *map(str, words), "--output-dir", str(output), "--device", "cpu"])


def test_a_video_has_the_predictions_of_its_frames(saved: str, tmp_path: Path, capsys) -> None:
    clip, output = write_video(tmp_path / "in" / "clip.mp4"), tmp_path / "out"
    with av.open(str(clip)) as video:
        for number, frame in enumerate(video.decode(video=0)):
            frame.to_image().save(tmp_path / f"{number}.png")
    predicted(saved, output, clip, tmp_path / "[0-9].png", "--threshold", 0.05, "--batch-size", 2)
    rows = json.loads((output / "videos" / "clip.mp4.json").read_text())
    expected = [row for row in json.loads((output / "predictions.json").read_text()) if row["score"] > 0.05]
    assert len(rows) == len(expected) > 0
    for row, image in zip(rows, expected, strict=True):
        assert row["frame"] == image["image_id"] and row["seconds"] == pytest.approx(TIMES[row["frame"]] / 10)
        assert all(row[key] == image[key] for key in ("category_id", "category"))
        assert row["bbox"] == pytest.approx(image["bbox"], abs=1e-2)
        assert row["score"] == pytest.approx(image["score"], abs=1e-5)
    told = capsys.readouterr().out
    assert f"5 frames, {len(rows)} boxes above 0.05" in told
    with av.open(str(output / "videos" / "clip.mp4")) as video:
        frames = list(video.decode(video=0))
        assert [round(10 * frame.time) for frame in frames] == list(TIMES)
        assert (frames[0].width, frames[0].height) == (6 * 96, 6 * 64), "small frames are enlarged, as pictures are"
        boxes = np.abs(
            np.asarray(frames[0].to_image().resize((96, 64))).astype(int) - np.asarray(Image.open(tmp_path / "0.png"))
        )
        assert boxes.max() > 100, "something is drawn"


def test_a_turned_video_is_seen_upright(saved: str, tmp_path: Path) -> None:
    clip = write_video(tmp_path / "clip.mp4")
    content = clip.read_bytes()
    identity = (1 << 16).to_bytes(4, "big") + bytes(12) + (1 << 16).to_bytes(4, "big") + bytes(12)
    turned = (
        bytes(4) + (1 << 16).to_bytes(4, "big") + bytes(4) + (-(1 << 16)).to_bytes(4, "big", signed=True) + bytes(16)
    )
    at = content.index(identity + (1 << 30).to_bytes(4, "big"), content.index(b"tkhd"))
    clip.write_bytes(content[:at] + turned + content[at + len(turned) :])
    before = frames_of(clip)[0]
    assert (before.width, abs(before.rotation)) == (96, 90), "as the camera stores it"
    predicted(saved, tmp_path / "out", clip, "--threshold", 1)
    frame = frames_of(tmp_path / "out" / "videos" / "clip.mp4")[0]
    assert frame.width < frame.height and frame.rotation == 0
    corners = np.asarray(frame.to_image().resize((64, 96)), int)[[10, 10, 85, 85], [10, 53, 53, 10]]
    red = (corners[:, 0] - corners[:, 1:].max(1)).argmax()
    assert red == 1, "a quarter turn clockwise brings the upper left corner to the upper right"


def test_broken_videos_are_left_out(saved: str, tmp_path: Path, capsys) -> None:
    good, broken = write_video(tmp_path / "good.mp4"), tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    with pytest.raises(SystemExit) as error:
        predicted(saved, tmp_path / "out", tmp_path / "*.mp4")
    told = capsys.readouterr().out
    assert error.value.code == 1 and "1 of 2 videos were left out" in told and "broken.mp4 can't be read" in told
    assert {path.name for path in (tmp_path / "out" / "videos").iterdir()} == {"good.mp4", "good.mp4.json"}
    with pytest.raises(SystemExit, match=r"broken.mp4 can't be read as a video"):
        predicted(saved, tmp_path / "other", broken, good, "--on-error", "stop")
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(good.read_bytes()[:-200])
    with pytest.raises(SystemExit):
        predicted(saved, tmp_path / "cut", cut)
    assert not list((tmp_path / "cut" / "videos").glob("*"))


def test_what_can_be_read_of_a_damaged_video_is_kept_and_told(saved: str, tmp_path: Path, capsys) -> None:
    clip = write_video(tmp_path / "clip.mp4", times=range(30))
    content = bytearray(clip.read_bytes())
    start = content.index(b"mdat") + 4
    sizes = [packet.size for packet in av.open(str(clip)).demux(video=0)]
    at = start + sum(sizes[:12])
    content[at : at + 8] = b"\xff" * 8  # the length of the thirteenth frame's first part
    clip.write_bytes(content)
    predicted(saved, tmp_path / "out", clip, "--no-pictures")
    told = capsys.readouterr().out
    count = int(re.search(r"(\d+) frames, .*damaged pieces were left out", told)[1])
    assert 20 <= count < 30 and not (tmp_path / "out" / "videos" / "clip.mp4").exists()
    long = write_video(tmp_path / "long.mkv", times=range(60))
    long.write_bytes(long.read_bytes()[: long.stat().st_size // 2])
    predicted(saved, tmp_path / "out", long, "--no-pictures")
    assert re.search(r"it ends after \d\.\d s of 6\.0: the file is cut off", capsys.readouterr().out)


def test_times_always_grow(saved: str, tmp_path: Path) -> None:
    """Also in a video whose pictures have none: raw MPEG-4 in a file without times."""
    clip = write_video(tmp_path / "clip.m4v", times=range(6), codec="mpeg4")
    predicted(saved, tmp_path / "out", clip)
    frames = frames_of(tmp_path / "out" / "videos" / "clip.m4v.mp4")
    times = [frame.time for frame in frames]
    assert len(frames) == 6 and times == sorted(set(times))


def test_images_need_no_pyav(saved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    Image.new("RGB", (96, 64)).save(tmp_path / "a.png")
    predicted(saved, tmp_path / "out", tmp_path / "a.png")
    with pytest.raises(SystemExit, match=r"videos need PyAV: pip install av"):
        predicted(saved, tmp_path / "out", tmp_path / "a.mp4")


def test_what_is_a_video_and_where_it_goes(tmp_path: Path) -> None:
    one, two = write_video(tmp_path / "a" / "x.mp4"), write_video(tmp_path / "b" / "x.AVI")
    (tmp_path / "folder.mov").mkdir()
    sources = [str(one), str(one), f"{tmp_path}/b/*.AVI", "photo.jpg", str(tmp_path / "folder.mov")]
    assert split_sources(sources) == (["photo.jpg", str(tmp_path / "folder.mov")], [one, two])
    output = tmp_path / "out"
    assert check_videos([one, two], output) == [
        output / "videos" / "a" / "x.mp4",
        output / "videos" / "b" / "x.AVI.mp4",
    ]
    with pytest.raises(PredictionError, match=r"there is no video .*missing.mp4"):
        check_videos([tmp_path / "missing.mp4"], output)
    foreign = write_video(output / "videos" / "x.mp4")
    with pytest.raises(PredictionError, match=r"isn't of an earlier call"):
        check_videos([one], output)
    with pytest.raises(PredictionError, match=r"is a video that is read"):
        check_videos([foreign], output)
