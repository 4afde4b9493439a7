"""Images a second of the detectors at batch 1 and 8, and where the time goes.

    python benchmarks/inference.py                            # 480x640, R18 and R50: some ten minutes on a CPU
    python benchmarks/inference.py --size 800 1344 --backbones resnet50
    python benchmarks/inference.py --device cuda --precision bf16 --channels-last --runs 30

What a user runs: the model's forward in inference mode, then `processor.post_process_object_detection`. Images and
weights are random. So that post-processing has as much to do as with a trained detector, the bias of the classes is
set such that about 1,000 (prior, class) pairs an image have a score above 0.05.
"""

import argparse
import contextlib
import itertools
import time

import torch
from reporting import add_output, finish, median_with_interval

from crosskd_hf.models import CONFIGS, MODELS
from crosskd_hf.models.base import DenseDetector, DenseDetectorOutput
from crosskd_hf.models.image_processing import DenseDetectorImageProcessor

PAIRS = 1000  # an image


class Inference:
    """A detector with a batch of images."""

    def __init__(self, detector: str, backbone: str, batch: int, arguments: argparse.Namespace):
        torch.manual_seed(0)
        self.arguments = arguments
        config = CONFIGS[detector](backbone=backbone, num_labels=80)
        layout = torch.channels_last if arguments.channels_last else torch.contiguous_format
        self.model: DenseDetector = MODELS[detector](config).eval().to(arguments.device, memory_format=layout)
        self.processor = DenseDetectorImageProcessor.for_model(config)
        size = tuple(arguments.size)
        pixels = torch.randn(batch, 3, *size).contiguous(memory_format=layout)
        mask = torch.ones(batch, *size, dtype=torch.bool)
        self.inputs = {"pixel_values": pixels.to(arguments.device), "pixel_mask": mask.to(arguments.device)}
        self.target_sizes = [size] * batch
        self._shift_classes()

    def run(self) -> tuple[float, float]:
        """Seconds of the network and of post-processing."""
        start = self._now()
        output = self._forward()
        middle = self._now()
        with torch.inference_mode():
            self.processor.post_process_object_detection(output, threshold=0.0, target_sizes=self.target_sizes)
        return middle - start, self._now() - middle

    def _forward(self) -> DenseDetectorOutput:
        half = torch.autocast(self.arguments.device, torch.bfloat16)
        with torch.inference_mode(), half if self.arguments.precision == "bf16" else contextlib.nullcontext():
            return self.model(**self.inputs)

    def _now(self) -> float:
        if self.arguments.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _shift_classes(self) -> None:
        logits = self._forward().logits
        threshold = torch.tensor(self.processor.score_threshold).logit()
        least = logits.flatten().topk(PAIRS * len(logits)).values[-1]
        with torch.no_grad():
            self.model.head.cls_predictor.bias += threshold.to(least.device) - least
        self.pairs = int((self._forward().logits > threshold.item()).sum())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--detectors", nargs="+", default=sorted(CONFIGS), choices=sorted(CONFIGS))
    parser.add_argument("--backbones", nargs="+", default=["resnet18", "resnet50"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--size", type=int, nargs=2, default=(480, 640), metavar=("H", "W"))
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--runs", type=int, default=3, help="timed ones, after one that isn't")
    add_output(parser)
    arguments = parser.parse_args()
    height, width = arguments.size
    layout = "channels last" if arguments.channels_last else "contiguous"
    rows = []
    for detector, backbone, batch in itertools.product(arguments.detectors, arguments.backbones, arguments.batches):
        inference = Inference(detector, backbone, batch, arguments)
        inference.run()
        times = [inference.run() for _ in range(arguments.runs)]
        rows.append(
            {
                "model": f"{detector}, {backbone}",
                "batch": batch,
                "input": f"{height}x{width}, {arguments.precision}, {layout}, {arguments.device}",
                "pairs/image": inference.pairs / batch,
                "images/s": median_with_interval([batch / (network + post) for network, post in times]),
                "network ms/image": median_with_interval([1000 * network / batch for network, _ in times]),
                "post-processing ms/image": median_with_interval([1000 * post / batch for _, post in times]),
                "post-processing share": median_with_interval([post / (network + post) for network, post in times]),
            }
        )
        print(f"{detector}, {backbone}, batch {batch}: done", flush=True)
    finish(arguments, rows, ("model", "batch", "input"))


if __name__ == "__main__":
    main()
