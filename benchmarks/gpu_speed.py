"""What `gpu.py` measures: steps against the convolutions alone, and detectors against torchvision's."""

import argparse
import contextlib
import functools
import time
from collections.abc import Callable

import torch
from gpu_options import Checks, Options
from inference import PAIRS, Inference
from reporting import median_with_interval
from step import Step, count, interleaved
from torch import Tensor, nn
from torchvision.models import detection

from crosskd_hf.data.collator import padded_number
from crosskd_hf.distillation.observers.dense import DenseObserver
from crosskd_hf.models import CONFIGS, MODELS

BOXES = 8  # an image
LABELS = 80
SCORE = 0.05  # that detections must exceed, here and there
RIVALS = {"retinanet": detection.retinanet_resnet50_fpn, "fcos": detection.fcos_resnet50_fpn}


def timed_precisions(options: Options) -> list[str]:
    """fp32 (convolutions in TF32 on a GPU, as PyTorch has it by default), and bf16 with channels last."""
    return [precision for precision in ("fp32", "bf16") if precision == "fp32" or options.device == "cuda"]


def speed(options: Options) -> Checks:
    """Steps of CrossKD, without the optimizer's."""
    for precision in timed_precisions(options):
        for detector in options.detectors:
            yield f"{detector}, {precision}", functools.partial(step_and_floor, options, detector, precision)


def step_and_floor(options: Options, detector: str, precision: str) -> dict:
    """A step in turn with the same convolutions alone."""
    step = Step.build(
        detector,
        options.batch,
        BOXES,
        options.size,
        backbones=options.backbones,
        num_labels=LABELS,
        device=options.device,
        precision=precision,
        channels_last=precision == "bf16",
    )
    pairs = list(interleaved(step, options.runs + 1))[1:]  # the second run may still choose kernels
    memory, floor_memory = (peak_memory(step, part) for part in (step.full, step.floor))
    return {
        "images/s": median_with_interval([options.batch / full for full, _ in pairs]),
        "convolutions alone": median_with_interval([options.batch / floor for _, floor in pairs]),
        "ms a step": median_with_interval([1000 * full for full, _ in pairs]),
        "time / convolutions": median_with_interval([full / floor for full, floor in pairs]),
        "memory (GB)": memory / 1e9,
        "memory / convolutions": memory / floor_memory,
    }


def peak_memory(step: Step, part: Callable[[], Tensor]) -> int:
    """Bytes that a part takes beside weights and batch."""
    if step.inputs["pixel_values"].device.type == "cpu":
        return count(step, part).peak
    step.zero()
    return peak_on_gpu(part)


def peak_on_gpu(function: Callable[[], object]) -> int:
    """Bytes that it takes beside what is there."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


# torchvision --------------------------------------------------------------------------------------------------------


def rivals(options: Options) -> Checks:
    """The same detector on a ResNet-50 by torchvision, on images of the same size and as many boxes."""
    for precision in timed_precisions(options):
        for name in RIVALS:
            yield f"{name}, {precision}, training", functools.partial(training, options, name, precision)
            yield f"{name}, {precision}, inference", functools.partial(inference, options, name, precision)


def layout_of(precision: str) -> torch.memory_format:
    """bf16 with channels last."""
    return torch.channels_last if precision == "bf16" else torch.contiguous_format


def build_rival(options: Options, name: str, precision: str) -> nn.Module:
    """torchvision's detector with what ours freeze frozen: the stem, the first stage, and BatchNorm's statistics."""
    torch.manual_seed(0)
    sizes = {"min_size": min(options.size), "max_size": max(options.size), "_skip_resize": True}
    limits = {"score_thresh": SCORE, "detections_per_img": 100}
    model = RIVALS[name](weights=None, weights_backbone=None, num_classes=LABELS, **sizes, **limits)
    body = model.backbone.body
    for part in (body.conv1, body.bn1, body.layer1):
        part.requires_grad_(False)
    return model.to(options.device, memory_format=layout_of(precision))


def keep_statistics(model: nn.Module) -> nn.Module:
    """The model in training mode, its BatchNorms not."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def images_and_targets(options: Options, precision: str) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """A batch and its boxes, as torchvision takes them."""
    generator = torch.Generator().manual_seed(0)
    height, width = options.size
    pixels = torch.rand(options.batch, 3, height, width, generator=generator)
    targets = []
    for _ in range(options.batch):
        corner = torch.rand(BOXES, 2, generator=generator) * torch.tensor([width * 0.6, height * 0.6])
        shape = torch.rand(BOXES, 2, generator=generator) * torch.tensor([width * 0.4, height * 0.4]) + 4
        labels = torch.randint(0, LABELS, (BOXES,), generator=generator)
        boxes = torch.cat([corner, corner + shape], dim=-1)
        targets.append({"boxes": boxes.to(options.device), "labels": labels.to(options.device)})
    return pixels.to(options.device, memory_format=layout_of(precision)), targets


def padded(targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The same as ours are padded by the loader."""
    more = padded_number(BOXES) - BOXES
    boxes, labels = (torch.stack([target[key] for target in targets]) for key in ("boxes", "labels"))
    mask = torch.ones_like(labels, dtype=torch.bool)
    return {
        "boxes_xyxy": nn.functional.pad(boxes, (0, 0, 0, more)),
        "class_labels": nn.functional.pad(labels, (0, more)),
        "mask": nn.functional.pad(mask, (0, more)),
    }


def in_precision(options: Options, precision: str) -> contextlib.AbstractContextManager:
    """Autocast, if it is bf16."""
    return torch.autocast(options.device, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()


def training(options: Options, name: str, precision: str) -> dict:
    """Forward, losses and backward of both."""
    torch.manual_seed(0)
    config = CONFIGS[name](backbone="resnet50", num_labels=LABELS)
    model = MODELS[name](config).train().to(options.device, memory_format=layout_of(precision))
    ours = DenseObserver(model)  # decodes no boxes, as in training
    theirs = keep_statistics(build_rival(options, name, precision))
    pixels, targets = images_and_targets(options, precision)
    labels, images = padded(targets), list(pixels)

    def our_step() -> None:
        model.zero_grad(set_to_none=True)
        with in_precision(options, precision):
            loss = sum(ours(pixel_values=pixels, labels=labels).loss_dict.values())
        loss.backward()

    def their_step() -> None:
        theirs.zero_grad(set_to_none=True)
        with in_precision(options, precision):
            loss = sum(theirs(images, targets).values())
        loss.backward()

    return against(options, our_step, their_step)


def inference(options: Options, name: str, precision: str) -> dict:
    """Forward and post-processing of both, with about as many candidates."""
    arguments = argparse.Namespace(
        device=options.device, size=options.size, precision=precision, channels_last=precision == "bf16"
    )
    ours = Inference(name, "resnet50", options.batch, arguments)
    theirs = build_rival(options, name, precision).eval()
    images = list(images_and_targets(options, precision)[0])

    @torch.inference_mode()
    def their_run() -> list[dict[str, Tensor]]:
        with in_precision(options, precision):
            return theirs(images)

    make_candidates(theirs, their_run, options.batch)
    return against(options, ours.run, their_run)


def make_candidates(model: nn.Module, run: Callable[[], object], batch: int) -> None:
    """Shift the classes' bias as `Inference` does, so that suppression has something to do."""
    seen: dict[str, Tensor] = {}
    handle = model.head.register_forward_hook(lambda module, inputs, output: seen.update(output))
    run()
    handle.remove()
    least = seen["cls_logits"].float().flatten().topk(PAIRS * batch).values[-1].item()
    if "bbox_ctrness" in seen:  # a score is the root of its product with centerness, which is about a half here
        model.score_thresh = (SCORE / 2) ** 0.5
    with torch.no_grad():
        model.head.classification_head.cls_logits.bias += torch.tensor(SCORE).logit().item() - least


def against(options: Options, ours: Callable[[], object], theirs: Callable[[], object]) -> dict:
    """Both in turn, after two runs of each. What torchvision can't do is told, and is no problem of ours."""

    def seconds(function: Callable[[], object]) -> float:
        start = time.perf_counter()
        function()
        if options.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for _ in range(2):
        ours()
    try:
        for _ in range(2):
            theirs()
    except Exception as error:
        times = [seconds(ours) for _ in range(options.runs)]
        return {
            "images/s": median_with_interval([options.batch / time for time in times]),
            "torchvision": f"fails: {error!r}"[:200],
        }
    if options.device == "cuda":
        torch.cuda.synchronize()
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(options.runs)]
    memory = {}
    if options.device == "cuda":
        mine, other = (peak_on_gpu(function) for function in (ours, theirs))
        memory = {"memory (GB)": mine / 1e9, "torchvision's memory (GB)": other / 1e9}
    return {
        "images/s": median_with_interval([options.batch / mine for mine, _ in pairs]),
        "torchvision": median_with_interval([options.batch / other for _, other in pairs]),
        "times as fast": median_with_interval([other / mine for mine, other in pairs]),
        **memory,
    }
