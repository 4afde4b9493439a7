"""The pipeline against `predict`, and what it takes as an image."""

import base64
import io
import os
import time
from pathlib import Path

import pytest
from file_server import FileServer
from PIL import EpsImagePlugin, Image
from tiny import tiny_model, tiny_processor
from transformers import ObjectDetectionPipeline, pipeline

from crosskd_hf.inference.pipeline import DenseDetectionPipeline
from crosskd_hf.inference.predict import predict
from crosskd_hf.utils.images import ImageError, load_rgb

SIZES = [(120, 80), (80, 120), (90, 90), (300, 60), (120, 80)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved detector and five images of four sizes."""
    root = tmp_path_factory.mktemp("pipeline")
    model = tiny_model("atss")
    model.save_pretrained(root / "model")
    tiny_processor(model).save_pretrained(root / "model")
    for number, size in enumerate(SIZES):
        Image.effect_noise(size, 90 + number).convert("RGB").save(root / f"{number}.png")
    return root


def paths(folder: Path) -> list[str]:
    return [str(folder / f"{number}.png") for number in range(len(SIZES))]


@pytest.fixture(scope="module")
def reader(folder: Path) -> DenseDetectionPipeline:
    return pipeline("object-detection", model=str(folder / "model"))


def rows(labels, scores, boxes) -> list[dict]:
    corners = [dict(zip(("xmin", "ymin", "xmax", "ymax"), box.int().tolist(), strict=True)) for box in boxes]
    entries = zip(scores.tolist(), labels.tolist(), corners, strict=True)
    return [{"score": score, "label": ("cat", "dog")[label], "box": box} for score, label, box in entries]


def same(found: list[dict], expected: list[dict]) -> None:
    assert [row["label"] for row in found] == [row["label"] for row in expected]
    for one, other in zip(found, expected, strict=True):
        # Whole pixels: what is 70 alone may be 69.99999 in a batch, and is cut to 69.
        assert one["box"].keys() == other["box"].keys()
        assert all(abs(one["box"][side] - other["box"][side]) <= 1 for side in one["box"])
    assert [row["score"] for row in found] == pytest.approx([row["score"] for row in expected], abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 5])
def test_equal_to_predict(folder: Path, reader, batch_size: int) -> None:
    found = reader(paths(folder), batch_size=batch_size, threshold=0.1)
    assert isinstance(reader, DenseDetectionPipeline) and len(found) == len(SIZES)
    predictions = predict(reader.model, reader.image_processor, paths(folder), threshold=0.1, batch_size=batch_size)
    for result, prediction in zip(found, predictions, strict=True):
        assert len(result) > 3
        same(result, rows(prediction.labels, prediction.scores, prediction.boxes))


def test_images_paths_lists_and_generators(folder: Path, reader) -> None:
    expected = reader(paths(folder)[0])
    image = Image.open(paths(folder)[0])
    assert reader(image) == expected
    assert reader([image, paths(folder)[0]]) == [expected, expected]
    assert next(iter(reader((path for path in paths(folder)[:2]), batch_size=2))) == pytest.approx(expected)


def test_files_are_read_as_in_training(folder: Path, reader, tmp_path: Path) -> None:
    """A turned JPEG, and 16 bits, which Pillow alone would cut off to white."""
    turned = Image.open(paths(folder)[0]).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    grey = Image.effect_noise((96, 64), 90)
    deep = Image.frombytes("I;16", grey.size, b"".join(bytes((v, v)) for v in grey.tobytes()))
    deep.save(tmp_path / "deep.png")
    for name in ("turned.jpg", "deep.png"):
        expected = reader(load_rgb(tmp_path / name), threshold=0.0)
        assert expected and reader(str(tmp_path / name), threshold=0.0) == expected
        with Image.open(tmp_path / name) as image:
            assert reader(image, threshold=0.0) == expected


def in_base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def test_addresses_and_base64(
    folder: Path, tmp_path: Path, server: FileServer, reader: DenseDetectionPipeline
) -> None:
    """Their content is read as that of a file: 16 bits aren't cut off to white."""
    Image.frombytes("I;16", (96, 64), os.urandom(2 * 96 * 64)).save(tmp_path / "deep.png")
    server.moved["/a.png?size=1"] = "/b.png"
    for path in (Path(paths(folder)[0]), tmp_path / "deep.png"):
        server.files["/b.png"] = content = path.read_bytes()
        url, encoded = f"{server.url}/a.png?size=1", in_base64(content)
        # The last: with line breaks, as `base64` of a shell and MIME write it.
        sources = [url, encoded, f"data:image/png;base64,{encoded}", base64.encodebytes(content).decode()]
        expected = reader(str(path), threshold=0.0)
        assert expected and reader(sources, threshold=0.0, timeout=10) == [expected] * 4
    assert server.requests == ["/a.png?size=1", "/b.png"] * 2


@pytest.fixture
def ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that is there once Pillow has started a `gs`."""
    started = tmp_path / "started"
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "gs"
    program.write_text(f"#!/bin/sh\necho gs >> {started}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # what Pillow found earlier
    return started


def eps() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "eps")
    return file.getvalue()


def test_no_program_is_started_for_an_image(
    tmp_path: Path, server: FileServer, reader: DenseDetectionPipeline, ghostscript: Path
) -> None:
    (tmp_path / "a.png").write_bytes(eps())
    server.files["/a.png"] = eps()
    for source in (str(tmp_path / "a.png"), f"{server.url}/a.png", in_base64(eps())):
        with pytest.raises(ImageError, match="it is no image: AVIF, BMP"):
            reader(source)
    assert not ghostscript.exists()
    with pytest.raises(OSError), Image.open(io.BytesIO(eps())) as image:
        image.load()
    assert ghostscript.exists(), "Pillow alone starts it"


def test_addresses_that_give_no_image(server: FileServer, reader: DenseDetectionPipeline) -> None:
    server.files["/page.png"] = b"<html></html>"
    with pytest.raises(ImageError, match="it is no image: AVIF, BMP"):
        reader(f"{server.url}/page.png")
    with pytest.raises(ImageError, match=r"^http.* can't be fetched \(status 404\)$"):
        reader(f"{server.url}/gone.png?token=secret")
    server.http.server_close()
    for url in (f"{server.url}/a.png?token=secret", "http://[someone:secret@/a.png", "https://"):
        with pytest.raises(ImageError, match=r" can't be fetched \(") as error:
            reader(url)
        assert "secret" not in str(error.value)


@pytest.mark.parametrize("source", ["images/mistyped.png", "", "data:image/png", "data:image/png;base64,%%", "é"])
def test_what_is_no_image_at_all(reader: DenseDetectionPipeline, source: str) -> None:
    with pytest.raises(ImageError, match="is no file, no URL, and no image in base64"):
        reader(source)
    with pytest.raises(TypeError, match="path, a URL, base64 or a PIL image, got a int"):
        reader.preprocess(3)


def test_large_downloads_are_refused(
    folder: Path, server: FileServer, reader: DenseDetectionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = Path(paths(folder)[0]).read_bytes()
    server.files["/a.png"] = content
    monkeypatch.setattr("crosskd_hf.inference.pipeline.LARGEST_FILE", len(content))
    assert reader(f"{server.url}/a.png") == reader(in_base64(content)) == reader(paths(folder)[0])
    monkeypatch.setattr("crosskd_hf.inference.pipeline.LARGEST_FILE", len(content) - 1)
    with pytest.raises(ImageError, match=rf"has more than {len(content) - 1:,} bytes"):
        reader(f"{server.url}/a.png")
    with pytest.raises(ImageError, match=rf"has more than {len(content) - 1:,} bytes"):
        reader(in_base64(content))


def test_a_timeout(server: FileServer, reader: DenseDetectionPipeline) -> None:
    server.delay = 5
    begin = time.monotonic()
    with pytest.raises(ImageError, match=r"can't be fetched .*timed out"):
        reader(f"{server.url}/a.png", timeout=0.2)
    assert time.monotonic() - begin < 4


def test_detectors_of_transformers_get_its_own_pipeline() -> None:
    from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessor

    config = YolosConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=[32, 32],
        patch_size=16,
        num_detection_tokens=4,
        use_mid_position_embeddings=False,
    )
    processor = YolosImageProcessor(size={"shortest_edge": 32, "longest_edge": 32})
    detector = pipeline("object-detection", model=YolosForObjectDetection(config), image_processor=processor)
    assert type(detector) is ObjectDetectionPipeline
    assert detector(Image.new("RGB", (32, 32)), threshold=0.0)
