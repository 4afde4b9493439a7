"""Detections of video files: videos with boxes drawn, and a JSON file for each. Needs PyAV (`pip install av`).

Beside a video `clip.mp4` there is then `clip.mp4.json`, a list of what is drawn, one object a box: {frame, seconds,
category_id, category, bbox, score}. Frames are counted from 0, `seconds` is the frame's time in the video, `bbox` is
[x, y, width, height] in pixels of the upright frame, and category_id the model's label, counted from 0.
"""

import contextlib
import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageOps

from ..models.base import DenseDetector
from ..models.image_processing import DenseDetectorImageProcessor
from ..utils.escaping import printable
from ..utils.files import replacing
from ..utils.messages import first_line
from ..utils.progress import Progress
from .image_files import ImageEntry, PredictionError, picture_names, relative_names, words
from .predict import Sample, check_numbers, detect
from .predict_files import load_for_prediction
from .prediction_writer import coco_results, draw_prediction, results_file

if TYPE_CHECKING:
    import av

VIDEO_EXTENSIONS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")
VIDEOS_FOLDER = "videos"
KEYS = ("category_id", "category", "bbox", "score")


class VideoError(PredictionError):
    """A file that can't be read as a video."""


@dataclass(frozen=True)
class VideoWritten:
    """What was written of a video.

    Attributes:
        video, results: its file, if it was drawn, and the JSON file.
        frames, drawn: number of frames, and of boxes above the threshold.
        note: what is missing of it; empty if nothing is.
    """

    video: Path | None
    results: Path
    frames: int
    drawn: int
    note: str = ""


def split_sources(sources: Sequence[str]) -> tuple[list[str], list[Path]]:
    """What is no video, and the video files that sources and patterns name, each once. Folders stay what they are.

    Raises:
        PredictionError: a pattern of videos matches none.
    """
    others, videos = [], {}
    for source in sources:
        path = Path(source).expanduser()
        if path.suffix.lower() not in VIDEO_EXTENSIONS or path.is_dir():
            others.append(source)
            continue
        named = [path]
        if not path.exists() and glob.has_magic(source):
            named = [found for found in map(Path, glob.glob(str(path), recursive=True)) if found.is_file()]
            if not named:
                raise PredictionError(f"the pattern {source} matches no video.")
        videos |= {video.absolute(): video for video in named}
    return others, sorted(videos.values())


def check_videos(videos: Sequence[Path], output: Path) -> list[Path]:
    """Where each video is written to.

    Raises:
        PredictionError: PyAV isn't installed; a video isn't there, or would be written over; something else lies where
            one is written to.
    """
    if not videos:
        return []
    _library()
    names = picture_names(relative_names(videos), (".mp4",), ".mp4")
    targets = [output / VIDEOS_FOLDER / name for name in names]
    sources = {video.resolve() for video in videos}
    for video, target in zip(videos, targets, strict=True):
        if not video.is_file():
            raise PredictionError(f"there is no video {printable(video)}.")
        if target.resolve() in sources:
            raise PredictionError(f"{target} is a video that is read: name another folder with --output-dir.")
        if target.exists() and not results_of(target).exists():
            raise PredictionError(f"{target} isn't of an earlier call: name another folder with --output-dir.")
    return targets


def predict_videos(
    model: str,
    videos: Sequence[Path],
    targets: Sequence[Path],
    *,
    threshold: float = 0.3,
    batch_size: int = 4,
    pictures: bool = True,
    device: str | None = None,
    stop_at_errors: bool = False,
) -> tuple[list[VideoWritten], list[str]]:
    """Write a model's predictions of videos, one after another.

    Args:
        model: folder or Hub id of a saved detector.
        videos, targets: see `check_videos`.
        threshold, batch_size, pictures: see `predict_video`.
        device: to compute on; None is a GPU if there is one.
        stop_at_errors: end at the first video that can't be read, instead of leaving it out.

    Returns:
        what was written, and why others were left out.

    Raises:
        PredictionError: wrong numbers, a device that can't be used, results that can't be written.
        CheckpointError: the model or its image processor can't be loaded.
    """
    check_numbers(batch_size, 0, threshold)
    detector, processor = load_for_prediction(model, device)
    written, left_out = [], []
    for video, target in zip(videos, targets, strict=True):
        settings = {"threshold": threshold, "batch_size": batch_size, "pictures": pictures}
        try:
            done = predict_video(detector, processor, video, target, **settings)
        except VideoError as error:
            if stop_at_errors:
                raise
            left_out.append(str(error))
        else:
            written.append(done)
    return written, left_out


def predict_video(
    model: DenseDetector,
    processor: DenseDetectorImageProcessor,
    source: Path,
    target: Path,
    *,
    threshold: float = 0.3,
    batch_size: int = 4,
    pictures: bool = True,
) -> VideoWritten:
    """Write a model's predictions of a video. In memory is one batch of frames.

    The new video has the frames and times of the old one, and no sound. Small frames are enlarged, as other pictures
    are; those of another size than the first are fitted into it; odd widths and heights lose a column or row, which
    H.264 can't hold.

    Args:
        model, processor, batch_size: see `predict`.
        source: video file.
        target: of the video with boxes, MP4; the JSON file is written beside it.
        threshold: boxes with a higher score are drawn and listed.
        pictures: make the video with boxes, and not the JSON file alone.

    Raises:
        VideoError: the video can't be read.
        PredictionError: PyAV isn't installed, or the results can't be written. Earlier ones are then as they were.
    """
    names, rows = model.config.id2label, results_of(target)
    same = {label: label for label in names}
    model.eval()
    number = drawn = 0
    with _Reader(source) as video, results_file(rows) as add, _drawing(target, video, pictures) as encoder:
        with Progress(f"predict {printable(source.name)}", video.count, "frames") as bar:
            frames = iter(video)
            while batch := list(islice(frames, batch_size)):
                samples = [Sample(source, image, processor(image, return_tensors="pt")) for _, image in batch]
                for (ticks, _), prediction in zip(batch, detect(model, processor, samples, threshold), strict=True):
                    found = coco_results(prediction, ImageEntry(number, source.name), names, same, threshold)
                    time = {"frame": number, "seconds": round(float(ticks * video.time_base), 6)}
                    add([time | {key: row[key] for key in KEYS} for row in found])
                    if encoder:
                        encoder.add(draw_prediction(prediction, names, threshold), ticks)
                    number, drawn = number + 1, drawn + len(found)
                    bar.update()
        if not number:
            raise VideoError(f"{printable(source)} has no frame that can be read.")
        note = video.note()
    return VideoWritten(target if pictures else None, rows, number, drawn, note)


def results_of(video: Path) -> Path:
    """The JSON file beside a written video."""
    return video.with_name(f"{video.name}.json")


def _library() -> Any:
    try:
        import av
    except ImportError as error:
        raise PredictionError('videos need PyAV: pip install av, or pip install -e ".[video]".') from error
    return av


class _Reader:
    """Frames of a video as people see them, each with its time in units of `time_base`, which always grows.

    Raises:
        VideoError: it can't be read.
    """

    def __init__(self, source: Path) -> None:
        self.source, self.library = source, _library()
        try:
            self.container = self.library.open(str(source))
        except (self.library.FFmpegError, OSError) as error:
            raise self._error(error) from error
        if not self.container.streams.video:
            raise VideoError(f"{printable(source)} has no pictures, only sound.")
        self.stream = self.container.streams.video[0]
        self.time_base = self.stream.time_base or Fraction(1, 1000)
        self.rate = self.stream.average_rate or Fraction(25)
        self.count = self.stream.frames or None
        self.damaged, self.last = 0, -1

    def __enter__(self) -> "_Reader":
        return self

    def __exit__(self, *error: object) -> None:
        self.container.close()

    def __iter__(self) -> Iterator[tuple[int, Image.Image]]:
        step = max(1, round(1 / (self.rate * self.time_base)))
        try:
            for packet in self.container.demux(self.stream):
                try:
                    frames = packet.decode()
                except self.library.error.InvalidDataError:
                    self.damaged += 1  # as players do it
                    continue
                for frame in frames:
                    later = frame.pts is not None and frame.pts > self.last
                    self.last = frame.pts if later else self.last + step if self.last >= 0 else 0
                    image = frame.to_image()
                    yield self.last, image.rotate(frame.rotation, expand=True) if frame.rotation else image
        except self.library.FFmpegError as error:
            raise self._error(error) from error

    def note(self) -> str:
        """What is missing, once all was read."""
        notes = []
        if self.damaged:
            notes.append(f"{self.damaged} damaged pieces were left out")
        end, whole = (self.last + 1) * self.time_base + 1 / self.rate, self.container.duration
        # Sound may end later.
        if whole and end < Fraction(whole, 1_000_000) - max(2 / self.rate, min(1, Fraction(whole, 10_000_000))):
            notes.append(f"it ends after {float(end):.1f} s of {whole / 1e6:.1f}: the file is cut off")
        return "; ".join(notes)

    def _error(self, error: Exception) -> VideoError:
        return VideoError(f"{printable(self.source)} can't be read as a video ({first_line(error)}).")


@contextlib.contextmanager
def _drawing(target: Path, like: _Reader, pictures: bool) -> Iterator["_Encoder | None"]:
    """What takes the pictures; the video is in place when the block ends without an error."""
    if not pictures:
        yield None
        return
    try:
        with replacing(target) as temporary, like.library.open(str(temporary), "w", format="mp4") as container:
            encoder = _Encoder(container, like)
            yield encoder
            encoder.finish()
    except OSError as error:  # FFmpeg's errors, too
        raise PredictionError(f"{target} can't be written ({words(error)}).") from error


class _Encoder:
    """Pictures -> H.264, at the times of other frames."""

    def __init__(self, container: "av.container.OutputContainer", like: _Reader) -> None:
        self.library, self.container, self.like = like.library, container, like
        codec = "libx264" if "libx264" in self.library.codecs_available else "mpeg4"
        self.stream = container.add_stream(codec, rate=like.rate)
        self.stream.pix_fmt = "yuv420p"  # the one that every player knows
        self.started = False

    def add(self, picture: Image.Image, ticks: int) -> None:
        """Encode a picture."""
        if not self.started:
            self.stream.width, self.stream.height = (side - side % 2 for side in picture.size)
            self.stream.codec_context.time_base = self.like.time_base
            ratio = self.like.stream.sample_aspect_ratio
            if ratio:  # pixels that aren't square, as on DVDs
                self.stream.codec_context.sample_aspect_ratio = ratio
            self.started = True
        size = (self.stream.width, self.stream.height)
        if picture.size[0] // 2 * 2 != size[0] or picture.size[1] // 2 * 2 != size[1]:
            picture = ImageOps.pad(picture, size)
        new = self.library.VideoFrame.from_image(picture.crop((0, 0, *size)))
        new.pts, new.time_base = ticks, self.like.time_base
        self.container.mux(self.stream.encode(new))

    def finish(self) -> None:
        """Encode what is left."""
        if self.started:
            self.container.mux(self.stream.encode())
