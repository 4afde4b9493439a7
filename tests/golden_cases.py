"""Runs one golden case through the package and compares every recorded tensor and number."""

import importlib.util
import json
from dataclasses import dataclass, field
from functools import cache, cached_property, lru_cache
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import torch
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence
from transformers.initialization import no_init_weights

from crosskd_hf.distillation import PKD, CrossKD, DistillationPair
from crosskd_hf.distillation.observers.dense import DenseObserver
from crosskd_hf.models import CONFIGS, MODELS
from crosskd_hf.models.image_processing import DenseDetectorImageProcessor
from crosskd_hf.models.losses import box_iou
from crosskd_hf.models.outputs import DenseDetectorOutput
from crosskd_hf.training.optimization import parameter_groups
from crosskd_hf.weights.mmdet import load_reference_state, reference_keys, to_reference

BACKBONES = {"swin_tiny": "swin_tiny_patch4_window7_224"}
LOSS_NAMES = {
    "loss_bbox": "loss_box",
    "loss_cls_kd": "kd_cls",
    "loss_reg_kd": "kd_box",
    "losses_center_kd": "kd_centerness",
    "loss_feat_kd": "kd_feature",
}

# Processors round convolutions differently, and a ReLU that opens or closes moves a few single gradients far: by up to
# a tenth of a parameter's typical gradient, while the median stays below a thousandth. Mistakes move most of them.
GRADIENT_SAMPLE = 0.3
MEDIAN_GRADIENT_SAMPLE = 0.005


@dataclass
class Comparison:
    """Errors of one case: kind -> [numbers compared, largest error / its bar, largest error]."""

    kinds: dict[str, list] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def add(self, kind: str, name: str, count: int, error: float, bar: float | None) -> None:
        row = self.kinds.setdefault(kind, [0, 0.0, bar])
        row[0] += count
        row[1] = max(row[1], error)
        if bar is not None and not error <= bar:
            self.failures.append(f"{kind} {name}: error {error:.3g}, bar {bar:.3g}")

    def equal(self, kind: str, name: str, ours, reference) -> None:
        ours, reference = torch.as_tensor(ours).cpu(), torch.as_tensor(reference)
        same = ours.shape == reference.shape and bool((ours == reference).all())
        self.add(kind, name, reference.numel(), 0.0 if same else float("inf"), 0.0)

    @property
    def count(self) -> int:
        return sum(row[0] for row in self.kinds.values())

    def summary(self) -> str:
        cells = [
            f"{kind} {n} ({error:.1e}{'' if bar is None else f' of {bar:.1e}'})"
            for kind, (n, error, bar) in self.kinds.items()
        ]
        return f"{self.count} numbers: " + ", ".join(cells)


@cache
def load_synth(folder: Path):
    """The folder's generator of weights and images."""
    path = folder / "synth.py"
    path = path if path.is_file() else Path(__file__).parent / "golden" / "synth.py"
    spec = importlib.util.spec_from_file_location("golden_synth", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@lru_cache(maxsize=2000)  # those of four models: cases share most of theirs
def synth_tensor(synth, key: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """The synthetic weights of a recorded key, to be copied and not written to."""
    return torch.from_numpy(synth.synth_array(key, shape, seed))


def build_model(setup: dict, role: str, state: list, seed: int, synth):
    """A model from a case's `setup`, filled with the synthetic weights of the recorded keys."""
    part = setup[role]
    config = CONFIGS[setup["detector"]](
        backbone=BACKBONES.get(part["backbone"], part["backbone"]),
        backbone_style="caffe" if part["backbone_style"] == "caffe" else "pytorch",
        frozen_stages=part["frozen_stages"],
        train_batchnorm=part["trained_batchnorm"],
        fpn_extra_convs=part["fpn_extra_convs"],
        fpn_relu_before_p7=part["fpn_relu_before_p7"],
        num_labels=setup["num_labels"],
    )
    with no_init_weights():  # every parameter is filled below, or it is an error
        model = MODELS[setup["detector"]](config)
    weights = {key: synth_tensor(synth, key, tuple(shape), seed) for key, shape in state}
    load_reference_state(model, weights)
    return model


class GoldenCase:
    def __init__(self, folder: Path, name: str, backend: str | None = None, device: str = "cpu"):
        self.record = json.loads((folder / f"{name}.json").read_text())
        self.tensors = load_file(folder / f"{name}.safetensors")
        self.name, self.synth = self.record["case"], load_synth(folder)
        self.setup, self.noise = self.record["setup"], self.record["noise"]
        self.result, self.device = Comparison(), device
        self.inputs = self._inputs()
        self.forward = self._forward
        if backend:
            self.forward = torch.compile(self._forward, fullgraph=True, backend=backend)

    def build(self) -> None:
        """The models, which `run` compares."""
        seed = self.record["seed"]
        self.student = build_model(self.setup, "student", self.record["student_state"], seed, self.synth)
        self.student.to(self.device)
        self.keys = reference_keys(self.student)
        self.teacher = None
        if "teacher" in self.setup:
            state = self.record["teacher_state"]
            self.teacher = build_model(self.setup, "teacher", state, seed + 1000, self.synth)
            methods = [CrossKD(CrossKD.Settings(tap_index=self.setup["tap_index"]))]
            if weight := self.setup["pkd_weight"]:
                methods.append(PKD(PKD.Settings(weight=weight)))
            self.pair = DistillationPair(self.student, self.teacher, methods).to(self.device)
            self.pair.student_observer.ask_for_predictions()
            self.observer = self.pair.student_observer
        else:
            self.observer = DenseObserver(self.student)
            self.observer.ask_for_predictions()

    def _inputs(self) -> dict:
        batch, sizes = self.record["batch"], self.record["image_shapes"]
        images = torch.from_numpy(self.synth.synth_image(self.name, batch, self.record["seed"]))
        mask = torch.zeros(batch[0], *batch[2:], dtype=torch.long)
        for i, (height, width) in enumerate(sizes):
            mask[i, :height, :width] = 1
        names = {"class_labels": "labels", "boxes_xyxy": "boxes"}
        columns = {
            key: pad_sequence([self.tensors[f"gt.{i}.{name}"] for i in range(batch[0])], batch_first=True)
            for key, name in names.items()
        }
        counts = torch.tensor([len(self.tensors[f"gt.{i}.labels"]) for i in range(batch[0])])
        columns["mask"] = torch.arange(columns["class_labels"].shape[1]) < counts[:, None]
        labels = {key: values.to(self.device) for key, values in columns.items()}
        pixels = (images * mask[:, None]).to(self.device)
        return {"pixel_values": pixels, "pixel_mask": mask.to(self.device), "labels": labels}

    def bar(self, base: float, noise: float) -> float:
        return max(base, 10 * noise)

    def run(self, steps: bool = True) -> Comparison:
        """Compare everything: architecture, targets, probes, losses, gradients, predictions, and maybe the steps."""
        self.build()
        self.compare_architecture()
        self.student.eval()
        self.compare_predictions()
        self.student.train()
        terms, outputs, cross = self.losses()
        self.compare_targets(outputs)
        self.compare_probes(outputs, cross)
        self.compare_losses(terms)
        self.compare_gradients(terms)
        if steps:
            self.compare_steps(terms)
        return self.result

    @cached_property
    def teacher_output(self):
        """Of the case's only batch, by weights that never change."""
        with torch.no_grad():
            return self.pair.teacher_observer(self.inputs["pixel_values"], self.inputs["pixel_mask"])

    def losses(self):
        """(loss terms by level, student's observation, teacher's observation)."""
        given = self.teacher_output if self.teacher is not None and self.forward == self._forward else None
        terms, student, teacher = self.forward(given)
        sizes = student.context.priors.level_sizes
        return {name: level_sums(term, sizes) for name, term in terms.items()}, student, teacher

    def _forward(self, teacher=None):
        """Terms (N, P), and the observations."""
        student = self.observer(**self.inputs)
        terms = dict(student.context.losses.terms)
        if self.teacher is not None:
            if teacher is None:
                with torch.no_grad():
                    teacher = self.pair.teacher_observer(self.inputs["pixel_values"], self.inputs["pixel_mask"])
            for method in self.pair.methods.values():
                terms |= method.terms(student, teacher, self.observer, self.pair.teacher_observer)
        return terms, student, teacher

    def compare_architecture(self) -> None:
        recorded = [key for key, _ in self.record["student_state"]]
        same = set(recorded) == set(self.keys.values())
        self.result.equal("architecture", "state keys", [same] * len(recorded), [True] * len(recorded))
        trained = [self.keys[key] for key, p in self.student.named_parameters() if p.requires_grad]
        flags = [key in set(trained) for key in self.record["trainable"]]
        self.result.equal("architecture", "trainable", flags, [True] * len(flags))
        self.result.equal("architecture", "number of trainable", len(trained), len(self.record["trainable"]))

    def compare_targets(self, output) -> None:
        if not any(key.startswith("targets.") for key in self.tensors):
            return
        model, inputs = self.student, self.inputs
        assignment = output.context.losses.assignment
        priors = output.context.priors
        sizes = priors.level_sizes
        detector = self.setup["detector"]
        labels, values, prefix = recorded_truth(
            inputs["labels"], assignment, model.config.num_labels, detector, priors
        )
        of_levels = (v.split(sizes, 1) for v in (labels, assignment.positive, assignment.class_weights, values))
        for level, (label, positive, weight, value) in enumerate(zip(*of_levels, strict=True)):
            recorded = self.tensors[f"targets.labels.{level}"].long()
            self.result.equal("targets", f"labels.{level}", label.reshape(recorded.shape), recorded)
            key = f"targets.label_weights.{level}"
            if key in self.tensors:
                self.result.equal("targets", key, weight.to(torch.uint8), self.tensors[key])
            reference = self.tensors[f"targets.{prefix}.{level}"]
            ours = value[positive].cpu()
            same_shape = ours.shape == reference.shape
            error = float("inf") if not same_shape else (ours - reference).abs().max().item() if len(ours) else 0.0
            # Boxes are copied; deltas and distances are computed, so that their last bit may differ.
            bar = 0.0 if detector in ("gfl", "atss") else 2e-6
            self.result.add("targets", f"{prefix}.{level}", reference.numel(), error, bar)
        if "targets_avg_factor" in self.record:
            ours = output.targets.class_normalizer
            self.result.equal("targets", "avg_factor", ours.item(), self.record["targets_avg_factor"])

    def compare_probes(self, output, teacher_output) -> None:
        maps = probe_maps("student", output, bool(self.teacher))
        if teacher_output is not None:
            maps |= probe_maps("teacher", teacher_output, False)
            with torch.no_grad():
                taps = output.taps.aligned_to(teacher_output.taps)
                cross = self.teacher.head(taps.cls, taps.reg, start_block=self.setup["tap_index"])
            maps |= head_maps("cross", cross)
        recorded = {key[len("probe.") :] for key in self.tensors if key.startswith("probe.")}
        assert recorded <= set(maps), sorted(recorded - set(maps))
        for key in sorted(recorded):
            reference, ours = self.tensors[f"probe.{key}"], maps[key].detach().float().cpu()
            index = torch.from_numpy(self.synth.probe_index(f"{self.name}:{key}", ours.numel()))
            scale = reference.abs().max().clamp(min=1e-12).item()
            error = (ours.flatten()[index] - reference).abs().max().item() / scale
            self.result.add("probes", key, reference.numel(), error, 1e-4)
        for key, stats in self.record["stats"].items():
            ours = maps[key].detach().double()
            self.result.equal("architecture", f"shape of {key}", list(ours.shape), stats["shape"])
            scale = max(abs(stats["mean"]), stats["std"], 1e-12)
            errors = [abs(ours.mean().item() - stats["mean"]), abs(ours.std(correction=0).item() - stats["std"])]
            self.result.add("probes", f"stats of {key}", 2, max(errors) / scale, 1e-4)

    def compare_losses(self, terms) -> None:
        bar = self.bar(1e-4, self.noise["losses"])
        for name, values in merge_levels(self.record["losses"]).items():
            ours = terms[name].detach()
            ours = ours.sum(0, keepdim=True) if len(values) == 1 else ours
            for level, (mine, reference) in enumerate(zip(ours.tolist(), values, strict=True)):
                error = abs(mine - reference) / max(abs(reference), 1e-12) if mine != reference else 0.0
                self.result.add("losses", f"{name}.{level}", 1, error, bar)
        self.result.equal("losses", "names", len(terms), len(merge_levels(self.record["losses"])))
        total = sum(term.sum().item() for term in terms.values())
        reference = self.record["total_loss"]
        self.result.add("losses", "total", 1, abs(total - reference) / reference, bar)

    def compare_gradients(self, terms) -> None:
        torch.stack([term.sum() for term in terms.values()]).sum().backward()
        bar, sample_errors = self.bar(1e-3, self.noise["grad_norms"]), []
        for key, parameter in self.student.named_parameters():
            if not parameter.requires_grad:
                continue
            norm, samples = self.record["grads"][self.keys[key]]
            gradient = to_reference(key, parameter.grad).flatten().cpu()
            index = torch.from_numpy(self.synth.probe_index(f"{self.name}:grad:{self.keys[key]}", gradient.numel(), 4))
            ours, reference = gradient[index], torch.tensor(samples)
            error = abs(gradient.norm().item() - norm) / max(norm, 1e-12) if norm else gradient.norm().item()
            self.result.add("grad norms", key, 1, error, bar)
            # One element of many: its error is measured against the parameter's typical or its own size.
            scale = max(norm / gradient.numel() ** 0.5, reference.abs().max().item(), 1e-12)
            error = (ours - reference).abs().max().item() / scale
            sample_errors.append(error)
            self.result.add("grad samples", key, len(samples), error, GRADIENT_SAMPLE)
        self.result.add("median grad sample", self.name, 1, median(sample_errors), MEDIAN_GRADIENT_SAMPLE)

    @torch.no_grad()
    def compare_predictions(self) -> None:
        output = self.student(self.inputs["pixel_values"], self.inputs["pixel_mask"])
        counts = self.record["num_predictions"]
        for i, size in enumerate(self.record["image_shapes"]):
            ours = detections(self.student, output, i, [side / 0.8 for side in size])
            reference = {key: self.tensors[f"pred.{i}.{key}"] for key in ("scores", "labels", "boxes")}
            self.result.equal("predictions", f"number.{i}", len(ours["scores"]), counts[i])
            compare_detections(self.result, f"image {i}", ours, reference, self.student.config.nms_threshold)

    def compare_steps(self, terms) -> None:
        """From the loss terms and gradients that were just compared: the first step's."""
        recipe = self.record["trajectory"]
        fcos = self.setup["detector"] == "fcos"
        groups = parameter_groups(
            self.student,
            learning_rate=recipe["lr"],
            weight_decay=recipe["weight_decay"],
            bias_lr_factor=2.0 if fcos else 1.0,
            bias_weight_decay=not fcos,
        )
        optimizer = torch.optim.SGD(groups, lr=recipe["lr"], momentum=recipe["momentum"])
        trained = [p for p in self.student.parameters() if p.requires_grad]
        for step, (loss, norm) in enumerate(recipe["total_loss_and_grad_norm"]):
            if step > 0:
                terms, _, _ = self.losses()
            total = torch.stack([term.sum() for term in terms.values()]).sum()
            if step > 0:
                optimizer.zero_grad()
                total.backward()
            ours_norm = torch.nn.utils.clip_grad_norm_(trained, recipe["clip_grad_norm"]).item()
            optimizer.step()
            bar = self.bar(1e-3, self.noise["step_losses"][step])
            self.result.add("step losses", f"{step}", 1, abs(total.item() - loss) / abs(loss), bar)
            self.result.add("step grad norms", f"{step}", 1, abs(ours_norm - norm) / norm, None)


def level_sums(term: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """A loss of each prior (N, P), or of each level already -> (levels,)."""
    return term if term.dim() == 1 else torch.stack([part.sum() for part in term.split(sizes, dim=1)])


def recorded_truth(labels, assignment, num_labels, detector, priors):
    """Labels (N, P) with background = number of labels, targets (N, P, 4) of positives, and the record's name."""
    from crosskd_hf.models import box_coding
    from crosskd_hf.models.assigners import gather_boxes
    from crosskd_hf.models.targets import pad_ground_truth

    truth = pad_ground_truth(labels, labels["mask"])
    label = truth.labels.gather(1, assignment.box_index)
    label = torch.where(assignment.positive, label, num_labels)
    boxes = gather_boxes(truth.boxes, assignment.box_index)
    distances = box_coding.boxes_to_distances(priors.centers, boxes)
    if detector == "retinanet":
        return label, box_coding.distances_to_deltas(distances, priors.extents), "boxes"
    if detector == "fcos":
        return label, distances, "distances"
    return label, boxes, "boxes"


def head_maps(role: str, head) -> dict[str, torch.Tensor]:
    of_kinds = {"logits": head.logits, "pred_boxes_raw": head.boxes, "centerness": head.centerness}
    return {f"{role}.{name}.{i}": level for name, levels in of_kinds.items() for i, level in enumerate(levels or [])}


def unflattened(output) -> SimpleNamespace:
    """Predictions (N, P, ...) as the maps (N, anchors * channels, H, W) that the head gave."""
    sizes = [level.shape[-2:] for level in output.features]

    def maps(values: torch.Tensor | None) -> list[torch.Tensor] | None:
        if values is None:
            return None
        cells = sum(height * width for height, width in sizes)
        values = values.reshape(len(values), cells, -1).transpose(1, 2)
        parts = values.split([height * width for height, width in sizes], dim=2)
        return [part.unflatten(2, size) for part, size in zip(parts, sizes, strict=True)]

    found = output.context.predictions
    return SimpleNamespace(logits=maps(found.logits), boxes=maps(found.boxes), centerness=maps(found.centerness))


def probe_maps(role: str, output, taps: bool) -> dict[str, torch.Tensor]:
    maps = head_maps(role, unflattened(output))
    maps |= {f"{role}.fpn.{i}": level for i, level in enumerate(output.features)}
    if taps:
        maps |= {f"{role}.cls_tap.{i}": level for i, level in enumerate(output.taps.cls)}
        maps |= {f"{role}.reg_tap.{i}": level for i, level in enumerate(output.taps.reg)}
    return maps


def merge_levels(losses: dict[str, list[float]]) -> dict[str, list[float]]:
    """Recorded terms under our names; `loss_feat_kd_0..4` become one list."""
    merged: dict[str, list[float]] = {}
    for name, values in losses.items():
        base = name.rstrip("0123456789").rstrip("_") if name.startswith("loss_feat_kd_") else name
        merged.setdefault(LOSS_NAMES.get(base, base), []).extend(values)
    return merged


def detections(model, output, index: int, original_size: list[float]) -> dict[str, torch.Tensor]:
    of_image = DenseDetectorOutput(**{key: values[index : index + 1] for key, values in output.items()})
    processor = DenseDetectorImageProcessor.for_model(model.config)
    (found,) = processor.post_process_object_detection(of_image, 0.0, [original_size])
    return {key: values.cpu() for key, values in found.items()}


def compare_detections(result: Comparison, name: str, ours: dict, reference: dict, nms_threshold: float) -> None:
    """Each reference detection must be ours too, at the same place of the order but for tied scores.

    A detection whose IoU with a better one is the threshold of the suppression, to rounding, may be missing on either
    side. An extra one of ours pushes the reference's last out of its list.
    """
    matched: list[int | None] = []
    scores, boxes = 0.0, 0.0
    for i in range(len(reference["scores"])):
        free = set(range(len(ours["scores"]))) - set(matched)
        for j in sorted(free, key=lambda j, i=i: abs(j - i)):
            if ours["labels"][j] != reference["labels"][i]:
                continue
            score_error = (ours["scores"][j] - reference["scores"][i]).abs().item()
            box_error = (ours["boxes"][j] - reference["boxes"][i]).abs().max().item()
            if score_error <= 1e-4 and box_error <= 0.05:
                scores, boxes = max(scores, score_error), max(boxes, box_error)
                matched.append(j)
                break
        else:
            matched.append(None)
    count = len(matched)
    extra = set(range(len(ours["scores"]))) - set(matched)
    pushed_out = sum(on_the_edge(ours, j, nms_threshold) for j in extra)
    missing = [i for i, j in enumerate(matched) if j is None and i < count - pushed_out]
    unmatched = sum(not on_the_edge(reference, i, nms_threshold) for i in missing)
    result.add("predictions", f"{name}: {unmatched} of {count} without a match", count, float(unmatched), 0.0)
    result.add("boxes (px)", name, 4 * count, boxes, 0.05)
    result.add("scores", name, count, scores, 1e-4)


def on_the_edge(detections: dict, index: int, nms_threshold: float) -> bool:
    """Whether rounding decides that a better detection of the same class suppresses this one."""
    better = (detections["labels"] == detections["labels"][index]) & (
        detections["scores"] > detections["scores"][index]
    )
    overlaps = box_iou(detections["boxes"][index].double(), detections["boxes"][better].double())
    return bool(((overlaps - nms_threshold).abs() < 1e-5).any())
