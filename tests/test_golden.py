"""Equality with the reference implementation, number for number: `pytest tests/test_golden.py [--golden DIR]`."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from golden_cases import Comparison, GoldenCase, build_model, compare_detections, load_synth, synth_tensor
from PIL import Image
from safetensors.torch import load_file

from crosskd_hf.models.image_processing import BGR_CAFFE, RGB_IMAGENET, DenseDetectorImageProcessor
from crosskd_hf.models.losses import box_iou

WITH_STEPS = ("gfl_r18_crosskd",)
STYLES = {"rgb_imagenet": RGB_IMAGENET, "bgr_caffe": BGR_CAFFE}


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """The number of threads is the order of sums, and so their rounding: the same in every run of the tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="module")
def weights_of_all_cases() -> Iterator[None]:
    """Kept from case to case, given back at the end."""
    yield
    synth_tensor.cache_clear()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        folder = Path(metafunc.config.getoption("--golden"))
        names = sorted(p.stem for p in folder.glob("*.json") if p.stem != "preprocessing")
        metafunc.parametrize("case", names)


def test_case(case: str, golden: Path, golden_report: dict[str, str], request: pytest.FixtureRequest) -> None:
    """The recorded optimizer steps take four fifths of the time. Here one case takes them."""
    backend = request.config.getoption("--torch-compile")
    compare(GoldenCase(golden, case, backend), golden_report, steps=case in WITH_STEPS)


@pytest.mark.slow
def test_case_with_steps(case: str, golden: Path, golden_report: dict[str, str]) -> None:
    compare(GoldenCase(golden, case), golden_report, steps=True)


def compare(case: GoldenCase, golden_report: dict[str, str], steps: bool) -> None:
    torch._dynamo.reset()
    result = case.run(steps)
    golden_report[case.name] = result.summary()
    assert not result.failures, "\n".join(result.failures[:20])


# From pixels to boxes ------------------------------------------------------------------------------------------------


def preprocessing_record(golden: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    path = golden / "preprocessing.json"
    if not path.is_file():
        pytest.skip(f"{path} is absent")
    return json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))


def resized_png(golden: Path, data: Path, name: str) -> Image.Image:
    """The reference's resized image. It is a photograph, so that it isn't kept beside the other cases."""
    file = f"preprocessing_{Path(name).stem}_resized.png"
    for folder in (golden, data / "golden", data.parent / "golden"):
        if (folder / file).is_file():
            return Image.open(folder / file).convert("RGB")
    pytest.skip(f"{file} is absent")


def test_resized_tensors(golden: Path, coco_mini: Path, golden_report: dict[str, str]) -> None:
    """From the JPEG, every pixel is within 1.01 grey level of the reference's."""
    record, tensors = preprocessing_record(golden)
    synth, result = load_synth(golden), Comparison()
    for name, scales in record["images"].items():
        image = Image.open(coco_mini / "val2017" / name).convert("RGB")
        for scale, expected in scales.items():
            long_side, short_side = map(int, scale.split("x"))
            height, width = expected["resized"]
            factors = [width / image.width, height / image.height]
            result.equal("sizes", "original", [image.height, image.width], expected["original"])
            error = max(abs(a - b) for a, b in zip(factors, expected["scale_factor"], strict=True))
            result.add("scale factors", name, 2, error, 1e-6)
            for style, options in STYLES.items():
                size = {"shortest_edge": short_side, "longest_edge": long_side}
                batch = DenseDetectorImageProcessor(size=size, **options)(image, return_tensors="pt")
                ours, key = batch["pixel_values"], f"{name}:{scale}:{style}"
                result.equal("sizes", "tensor", list(ours.shape), expected[style]["tensor"])
                result.equal("sizes", "resized", list(batch["pixel_mask"].sum((1, 2))), [height * width])
                index = torch.from_numpy(synth.probe_index(key, ours.numel(), 512))
                channel = index // (ours.shape[2] * ours.shape[3]) % 3
                levels = (ours.flatten()[index] - tensors[key]).abs() * torch.tensor(options["image_std"])[channel]
                result.add("grey levels", key, len(index), levels.max().item(), 1.01)
                std = max(options["image_std"])
                for statistic, value in (("mean", ours.mean()), ("std", ours.std(correction=0))):
                    error = abs(value.item() - expected[style][statistic]) * std
                    result.add(f"{statistic} (grey levels)", key, 1, error, 1.01)
    golden_report["preprocessing, JPEG to tensor"] = result.summary()
    assert not result.failures, "\n".join(result.failures[:20])


@torch.no_grad()
def test_boxes_from_pixels(golden: Path, coco_mini: Path, request: pytest.FixtureRequest, golden_report) -> None:
    """From the reference's own resized image the boxes are the reference's; from the JPEG 90 of 100 are."""
    record, tensors = preprocessing_record(golden)
    case = json.loads((Path(__file__).parent / "golden" / "gfl_r50.json").read_text())
    model = build_model(case["setup"], "student", case["student_state"], 0, load_synth(golden)).eval()
    processor = DenseDetectorImageProcessor(
        size={"shortest_edge": 400, "longest_edge": 640}, nms_threshold=model.config.nms_threshold
    )
    result, least = Comparison(), 100.0
    for name in record["images"]:
        reference = {key: tensors[f"pred:{name}:{key}"] for key in ("scores", "labels", "boxes")}
        photo = Image.open(coco_mini / "val2017" / name).convert("RGB")
        target = [(photo.height, photo.width)]

        def detect(image, do_resize, target=target):
            batch = processor(image, do_resize=do_resize, return_tensors="pt")
            return processor.post_process_object_detection(model(**batch), 0.0, target)[0]

        found = detect(photo, True)
        same = found["labels"][:, None] == reference["labels"]
        ious = box_iou(found["boxes"][:, None], reference["boxes"]) * same
        share = 100 * (ious.amax(dim=0) >= 0.9).float().mean().item()
        least = min(least, share)
        result.add("boxes missed of 100 at IoU 0.9, from JPEG", name, 100, 100 - share, 10)
        png = resized_png(golden, Path(request.config.getoption("--data")), name)
        compare_detections(result, name, detect(png, False), reference, model.config.nms_threshold)
    golden_report["preprocessing, pixels to boxes"] = result.summary()
    assert not result.failures, "\n".join(result.failures[:20])


def test_what_rounding_may_change_of_detections() -> None:
    """A box that the suppression keeps or drops at its very threshold may be missing or extra; no other may."""

    def detected(right: float, *rest: float) -> dict[str, torch.Tensor]:
        boxes = torch.tensor([[0, 0, 10, 10], [0, 0, right, 10], [50, 50, 60, 60]])[: 2 + len(rest)]
        return {"scores": torch.tensor([0.9, 0.8, *rest]), "labels": torch.zeros(2 + len(rest)), "boxes": boxes}

    def without(detections: dict, index: int) -> dict[str, torch.Tensor]:
        return {key: torch.cat([value[:index], value[index + 1 :]]) for key, value in detections.items()}

    def unmatched(ours: dict, reference: dict) -> int:
        result = Comparison()
        compare_detections(result, "image", ours, reference, nms_threshold=0.5)
        return result.kinds["predictions"][1]

    tied, apart = detected(5.0, 0.7), detected(4.9, 0.7)  # IoU .5 and .49
    assert unmatched(tied, tied) == 0
    assert unmatched(without(tied, 1), tied) == 0
    assert unmatched(without(apart, 1), apart) == 1
    assert unmatched(without(tied, 2), tied) == 1
    # Ours has one more, so that the last of a list of two is pushed out.
    assert unmatched(without(tied, 2), without(tied, 1)) == 0
    assert unmatched(without(apart, 2), without(apart, 1)) == 1
