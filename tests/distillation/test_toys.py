"""A detector and a distillation method of a user's own: a class each, in this file, and nothing else is edited."""

from dataclasses import dataclass

import pytest
import torch
from tiny import LABELS, tiny_batch, tiny_model
from torch import Tensor, nn

from crosskd_hf.distillation import PKD, CrossKD, DistillationPair, KDMethod, Mimic, Observation, Observer
from crosskd_hf.models import DenseDetector, DenseDetectorConfig
from crosskd_hf.models.anchors import cell_centers
from crosskd_hf.models.assigners import Assignment
from crosskd_hf.models.head import HeadSpec
from crosskd_hf.models.losses import distance_overlaps, focal_loss
from crosskd_hf.models.outputs import DetectionLosses, GroundTruth, HeadPredictions, Priors
from crosskd_hf.models.targets import class_targets, matched_distances, positives_per_image
from crosskd_hf.utils.recipe_fields import setting

# A detector ---------------------------------------------------------------------------------------------------------


class ToyConfig(DenseDetectorConfig):
    """Of points, and a number more than the other detectors have."""

    model_type = "toy"
    topk: int = 9


class ToyDetector(DenseDetector):
    """The `topk` points in a box with the best score of its class and IoU with it learn it, as in TOOD."""

    config_class = ToyConfig

    @staticmethod
    def head_spec(config: ToyConfig) -> HeadSpec:
        return HeadSpec.of(config, exp_boxes=True)

    def cell_priors(self, corners: Tensor, strides: Tensor) -> Tensor:
        return cell_centers(corners, strides)

    def distances(self, boxes: Tensor, priors: Priors) -> Tensor:
        return boxes * priors.strides

    def assign(self, priors: Priors, valid: Tensor, truth: GroundTruth, predictions: HeadPredictions) -> Assignment:
        points, boxes = priors.centers[None, :, None], truth.boxes[:, None]  # (N, P, G)
        inside = ((points > boxes[..., :2]) & (points < boxes[..., 2:])).all(-1) & truth.mask[:, None]
        targets = torch.cat([points - boxes[..., :2], boxes[..., 2:] - points], dim=-1)
        iou, _ = distance_overlaps(self.distances(predictions.boxes, priors).unsqueeze(2).expand_as(targets), targets)
        index = truth.labels[:, None].expand(-1, len(priors.all), -1)
        score = predictions.logits.sigmoid().gather(2, index) * (iou + 0.1) * inside * valid.unsqueeze(-1)
        least = score.topk(min(self.config.topk, score.shape[1]), dim=1).values[:, -1:]
        best, box = (score * (score >= least)).max(dim=2)
        return Assignment(best > 0, box, self.class_weights(valid))

    def matching_rule(self) -> tuple:
        return self.config.model_type, tuple(self.config.strides), self.config.topk

    def detection_losses(
        self, predictions: HeadPredictions, priors: Priors, assignment: Assignment, truth: GroundTruth
    ) -> DetectionLosses:
        targets = matched_distances(truth, assignment, priors)
        _, giou = distance_overlaps(self.distances(predictions.boxes, priors), targets)
        labels, normalizer = (
            class_targets(truth, assignment, predictions.logits),
            positives_per_image(assignment.positive),
        )
        terms = {
            "loss_cls": focal_loss(predictions.logits, labels) * (assignment.class_weights / normalizer),
            "loss_box": (1 - giou) * (assignment.positive / normalizer),
        }
        return DetectionLosses(terms, assignment, normalizer, normalizer)


def toy_detector(seed: int, **options) -> ToyDetector:
    torch.manual_seed(seed)
    sizes = {"backbone": "resnet18", "fpn_channels": 32, "head_channels": 32, "id2label": LABELS}
    return ToyDetector(ToyConfig(**sizes, **options))


# A method -----------------------------------------------------------------------------------------------------------


class ToyMethod(KDMethod):
    """Features in and around boxes, compared after what the teacher's side learns of its own: as in FGD."""

    name = "toy"

    @dataclass
    class Settings:
        inside: float = setting(1.0, "weight within boxes", minimum=0)
        outside: float = setting(0.1, "weight elsewhere", minimum=0)

    def connect(self, student: Observer, teacher: Observer) -> None:
        self.translate = nn.Conv2d(student.feature_channels, teacher.feature_channels, 1)
        self.attention = nn.Conv2d(teacher.feature_channels, 1, 1)  # of the teacher's maps, and trained

    def terms(
        self, student: Observation, teacher: Observation, student_observer: Observer, teacher_observer: Observer
    ) -> dict[str, Tensor]:
        return {
            "toy_feature": torch.stack(
                [
                    self.level_loss(*maps, stride, student)
                    for *maps, stride in zip(student.features, teacher.features, student.strides, strict=True)
                ]
            )
        }

    def level_loss(self, features: Tensor, teacher: Tensor, stride: int, student: Observation) -> Tensor:
        targets = student.targets
        ys, xs = ((torch.arange(n, device=features.device) + 0.5) * stride for n in features.shape[-2:])
        start_x, start_y, end_x, end_y = targets.boxes_xyxy[..., None, None].unbind(2)
        rows, columns = ys.view(-1, 1), xs.view(1, -1)
        within = (columns >= start_x) & (columns <= end_x) & (rows >= start_y) & (rows <= end_y)
        inside = (within & targets.box_mask[..., None, None]).any(dim=1)
        height, width = targets.image_sizes[..., None, None].unbind(1)
        of_image = (rows < height) & (columns < width)
        weights = torch.where(inside, self.settings.inside, self.settings.outside) * of_image
        attention = self.attention(teacher).sigmoid()
        error = (self.translate(features) - teacher).square().mean(dim=1) + 0.1 * (1 - attention.squeeze(1))
        return (error * weights).mean()


# Both in a pair -----------------------------------------------------------------------------------------------------


def falls(pair: DistillationPair, steps: int = 6) -> dict[str, list[float]]:
    """Each term over some steps on one batch, whose sum must fall."""
    pair.train()
    optimizer = torch.optim.SGD([p for p in pair.parameters() if p.requires_grad], lr=2e-3, momentum=0.9)
    batch, logs = tiny_batch(), []
    for _ in range(steps):
        optimizer.zero_grad()
        output = pair(**batch)
        output.loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in pair.parameters() if p.requires_grad)
        torch.nn.utils.clip_grad_norm_(pair.parameters(), 10.0)
        optimizer.step()
        logs.append({name: term.item() for name, term in output.loss_dict.items()})
    terms = {name: [log[name] for log in logs] for name in logs[0]}
    assert sum(logs[-1].values()) < 0.95 * sum(logs[0].values()), terms
    return terms


def test_a_detector_of_ones_own_is_saved_and_loaded(tmp_path):
    model, batch = toy_detector(1).eval(), tiny_batch()
    model.save_pretrained(tmp_path)
    again = ToyDetector.from_pretrained(tmp_path).eval()
    assert torch.equal(again(**batch).loss, model(**batch).loss) and again.config.topk == 9


@pytest.mark.parametrize("teacher", ["toy", "gfl"])
def test_a_detector_of_ones_own_is_a_student(teacher: str):
    """By each method; a teacher that isn't published has plain weights."""
    taught_by = toy_detector(2) if teacher == "toy" else tiny_model(teacher, seed=2, fpn_channels=16, head_channels=16)
    terms = falls(DistillationPair(toy_detector(1), taught_by, [CrossKD(), PKD(), Mimic()]))
    assert set(terms) == {"loss_cls", "loss_box", "kd_cls", "kd_box", "kd_feature", "mimic_cls", "mimic_box"}


def test_a_detector_of_ones_own_is_a_teacher():
    terms = falls(DistillationPair(tiny_model(seed=1), toy_detector(2), [CrossKD(), PKD()]))
    assert terms["kd_feature"][-1] < terms["kd_feature"][0]


def test_a_method_of_ones_own_with_parts_on_both_sides():
    method = ToyMethod(ToyMethod.Settings(inside=20.0, outside=5.0))
    pair = DistillationPair(tiny_model(seed=1, fpn_channels=16), tiny_model(seed=2), [CrossKD(), method])
    before = {name: value.clone() for name, value in pair.methods.state_dict().items()}
    assert {"toy.translate.weight", "toy.attention.weight"} < set(before)
    terms = falls(pair)
    assert terms["toy_feature"][-1] < terms["toy_feature"][0]
    assert all(not torch.equal(value, before[name]) for name, value in pair.methods.state_dict().items())


def test_a_method_of_ones_own_weighs_boxes_and_leaves_padding_out():
    pair = DistillationPair(tiny_model(seed=1), tiny_model(seed=2), [ToyMethod(ToyMethod.Settings(outside=0.0))])
    batch = tiny_batch()
    mask = torch.zeros(2, 64, 96, dtype=torch.bool)
    mask[:, :1, :1] = True  # no cell's middle lies in one pixel
    assert pair(**batch).loss_dict["toy_feature"] > 0
    assert pair(batch["pixel_values"], mask, batch["labels"]).loss_dict["toy_feature"] == 0
    empty = [{"boxes": torch.zeros(0, 4), "class_labels": torch.zeros(0, dtype=torch.long)} for _ in range(2)]
    assert pair(batch["pixel_values"], labels=empty).loss_dict["toy_feature"] == 0
