"""A student distilled in a loop of one's own: `accelerate launch examples/accelerate_loop.py [TEACHER]`.

TEACHER is the folder or Hub id of a trained detector. Without one the teacher has random weights, from which nothing
can be learnt: the loop then only shows what goes where. Images are generated; any `DetectionDataset` does.
"""

import sys

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForObjectDetection

from crosskd_hf import DenseDetectorImageProcessor, DetectionDataset, GFLConfig, GFLForObjectDetection, load_shapes
from crosskd_hf.data.collator import DetectionCollator
from crosskd_hf.data.sampler import OrientationBatchSampler
from crosskd_hf.distillation import PKD, CrossKD, DistillationPair


def main(teacher: str | None = None, steps: int = 20, output: str = "runs/by_hand") -> list[float]:
    accelerator = Accelerator()
    split = load_shapes("train", images=64, side=96)
    dataset = DetectionDataset(split, train=True, short_side=96, long_side=96)
    student = GFLForObjectDetection(GFLConfig(backbone="resnet18", head_channels=64, id2label=split.id2label))
    if teacher is None:
        teacher_model = GFLForObjectDetection(GFLConfig(backbone="resnet34", id2label=split.id2label))
    else:
        teacher_model = AutoModelForObjectDetection.from_pretrained(teacher)
    processor = DenseDetectorImageProcessor.for_model(student.config)
    sampler = OrientationBatchSampler(dataset.orientations(), 4, seed=0)  # tells the data set the epoch, to augment
    loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=DetectionCollator(processor))

    pair = DistillationPair(student, teacher_model, [CrossKD(), PKD()])
    optimizer = torch.optim.SGD(pair.parameters(), lr=0.005, momentum=0.9)  # adapters too
    pair, optimizer, loader = accelerator.prepare(pair, optimizer, loader)
    losses: list[float] = []
    while len(losses) < steps:
        for batch in loader:
            result = pair(**batch)  # .loss, and .loss_dict with every term
            accelerator.backward(result.loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(result.loss.item())
            accelerator.print(len(losses), {name: round(term.item(), 3) for name, term in result.loss_dict.items()})
            if len(losses) == steps:
                break
    if accelerator.is_main_process:
        accelerator.unwrap_model(pair).student.save_pretrained(output)  # without a trace of the pair
        processor.save_pretrained(output)
    return losses


if __name__ == "__main__":
    main(*sys.argv[1:2])
