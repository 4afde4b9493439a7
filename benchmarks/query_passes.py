"""CrossKD's passes between query-based detectors on generated images: is the loss learnt, by what, and at what cost?

    python benchmarks/query_passes.py --steps 100 --output passes.json

Tiny detectors of random weights, each pair in each pass, on the same batches. A row has: the KD loss of the first and
the last tenth of the steps; the student's parts that the KD terms alone give a gradient; whether the teacher's weights
are bit for bit what they were; time and peak memory of a step with the teacher and the cross pass, over those of the
student alone.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from reporting import add_output, finish

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from query_models import query_model
from step import Counts

from crosskd_hf.data.dataset import DetectionDataset
from crosskd_hf.data.processor_size import ProcessorCollator
from crosskd_hf.data.shapes import load_shapes
from crosskd_hf.distillation import DistillationPair, QueryCrossKD
from crosskd_hf.models.transformers_detectors import detection_losses, processor_of

PAIRS = (
    ("rt_detr_v2", "rt_detr_v2"),
    ("d_fine", "d_fine"),
    ("rt_detr_v2", "d_fine"),
    ("d_fine", "rt_detr_v2"),
    ("deformable_detr two-stage", "deformable_detr two-stage"),
    ("lw_detr", "lw_detr"),
)
PASSES = ("teacher", "student", "memory")


def batches(count: int, images: int, side: int) -> tuple[list[dict], dict[int, str]]:
    """Batches of generated images, and the names of their labels."""
    split = load_shapes("train", count * images, side=side)
    processor = processor_of(query_model("rt_detr").config)
    processor.size = {"height": side, "width": side}
    dataset = DetectionDataset(split, train=True)
    dataset.use_processor(processor)
    collate = ProcessorCollator(processor)
    made = [collate([dataset[i * images + j] for j in range(images)]) for i in range(count)]
    return made, dict(enumerate(split.label_names))


def parts_with_gradient(pair: DistillationPair, batch: dict) -> list[str]:
    """Parts of the student that the KD terms alone train."""
    pair.zero_grad()
    terms = pair(**batch).loss_dict
    torch.stack([term for name, term in terms.items() if name.startswith("kd_")]).sum().backward()
    parts = set()
    for name, parameter in pair.student.named_parameters():
        if parameter.grad is not None and parameter.grad.any():
            pieces = name.removeprefix("model.").split(".")
            parts.add(".".join(pieces[:3]) if pieces[:2] == ["decoder", "layers"] else pieces[0])
    pair.zero_grad()
    return sorted(parts)


def cost(step, repeats: int) -> tuple[float, float]:
    """Median seconds and peak bytes of a step."""
    with Counts() as counts:
        step()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), counts.peak


def measure(student_name: str, teacher_name: str, queries: str, options: argparse.Namespace, data, labels) -> dict:
    student, teacher = query_model(student_name, 0, labels), query_model(teacher_name, 1, labels)
    pair = DistillationPair(student, teacher, [QueryCrossKD(QueryCrossKD.Settings(queries=queries))])
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    parts = parts_with_gradient(pair, data[0])

    def alone() -> None:
        outputs = student(**data[0])
        torch.stack(list(detection_losses(student, outputs, data[0]["labels"]).values())).sum().backward()
        pair.zero_grad()

    def distilled() -> None:
        pair(**data[0]).loss.backward()
        pair.zero_grad()

    (own_time, own_memory), (seconds, memory) = cost(alone, options.repeats), cost(distilled, options.repeats)
    optimizer = torch.optim.AdamW(pair.parameters(), lr=options.learning_rate)
    losses = []
    for index in range(options.steps):
        output = pair(**data[index % len(data)])
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(pair.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(sum(term.item() for name, term in output.loss_dict.items() if name.startswith("kd_")))
    tenth = max(1, len(losses) // 10)
    same = all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    return {
        "student": student_name,
        "teacher": teacher_name,
        "queries": queries,
        "first tenth": statistics.mean(losses[:tenth]),
        "last tenth": statistics.mean(losses[-tenth:]),
        "gradients": ", ".join(parts),
        "teacher unchanged": same,
        "time": seconds / own_time,
        "memory": memory / own_memory,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batches", type=int, default=10, help="different ones, gone through again and again")
    parser.add_argument("--images", type=int, default=4, help="per batch")
    parser.add_argument("--side", type=int, default=96, help="pixels")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--repeats", type=int, default=5, help="timed steps")
    add_output(parser)
    options = parser.parse_args()
    data, labels = batches(options.batches, options.images, options.side)
    rows = []
    for student, teacher in PAIRS:
        for queries in PASSES:
            row = measure(student, teacher, queries, options, data, labels)
            rows.append(row)
            print(teacher, "->", student, queries, f"{row['first tenth']:.3f} -> {row['last tenth']:.3f}", flush=True)
    finish(options, rows, key=("student", "teacher", "queries"))


if __name__ == "__main__":
    main()
