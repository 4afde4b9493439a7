"""LD: localization distillation (Zheng et al., CVPR 2022, arXiv 2102.12252).

Where boxes are distributions over distances, the student's learn the teacher's: at positive priors, and in a region
around them that is valuable for localization.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...utils.recipe_fields import setting
from ..adapters import Adapters
from ..method import KDMethod
from ..observation import Observation, Observer, PairError
from ..regions import fine_grained_region, per_level, valuable_region


@dataclass
class Settings:
    """The values published for GFL, R101 -> R50; for R18 and R34 the imitation is 0."""

    main_weight: float = setting(0.25, "weight of ld_main", minimum=0, maximum=1e6)
    main_temperature: float = setting(10.0, "of the distributions", minimum=0.01, maximum=1000)
    region_weight: float = setting(0.25, "weight of ld_region", minimum=0, maximum=1e6)
    region_temperature: float = setting(10.0, "of the distributions", minimum=0.01, maximum=1000)
    class_weight: float = setting(10.0, "weight of ld_class", minimum=0, maximum=1e6)
    class_temperature: float = setting(2.0, "of the class logits", minimum=0.01, maximum=1000)
    imitation_weight: float = setting(2.0, "weight of ld_imitation; 0: none", minimum=0, maximum=1e6)


class LD(KDMethod):
    """Terms `ld_main`, `ld_region` (equation 4), `ld_class` and `ld_imitation`. For two detectors with the same priors
    whose boxes are distributions with the same bins, and whose assignment is ATSS: GFL.

    `ld_main` and `ld_region` are sums: as published, they grow with the images of a device. The authors warn against
    more than three.
    """

    name = "ld"
    Settings = Settings

    def connect(self, student: Observer, teacher: Observer) -> None:
        """Look at the predictions of both; adapt the student's features where the widths differ.

        Raises:
            PairError: they are no such detectors.
        """
        kinds = [student.model_type, teacher.model_type]
        if kinds != ["crosskd_gfl"] * 2 or not student.labels_like(teacher):
            raise PairError(
                f"ld: student and teacher are {' and '.join(kinds)}; it is for two GFL with the same strides and "
                "anchors, whose boxes are distributions: leave ld out"
            )
        student.ask_for_predictions()
        teacher.ask_for_predictions()
        channels = {"fpn": student.feature_channels} if self.settings.imitation_weight else {}
        self.adapters = Adapters(channels, {"fpn": teacher.feature_channels})

    def terms(
        self, student: Observation, teacher: Observation, student_observer: Observer, teacher_observer: Observer
    ) -> dict[str, Tensor]:
        """See `KDMethod.terms`; (N, P), and (levels,) of the imitation. Nothing in an unlabelled batch."""
        predictions, goals, targets = student.predictions, teacher.predictions, student.targets
        assert predictions is not None and goals is not None
        if targets is None:
            zero = predictions.logits.sum() * 0
            return {"ld_main": zero, "ld_region": zero, "ld_class": zero, "ld_imitation": zero}
        settings, priors, positive = self.settings, student.context.priors, targets.positive
        boxes, valid = (targets.boxes_xyxy, targets.box_mask), targets.mask > 0
        region = valuable_region(priors.all, priors.level_sizes, valid, *boxes)
        on_level = per_level(positive, priors.level_sizes)
        sure = predictions.logits.detach().amax(-1).sigmoid()
        bins, teacher_bins = predictions.bins, goals.bins
        assert bins is not None and teacher_bins is not None
        terms = {
            "ld_main": (settings.main_weight / 4)
            * (sure * positive)
            * mean_kl(bins, teacher_bins, settings.main_temperature).sum(-1),
            "ld_region": (settings.region_weight / 16)
            * region
            * mean_kl(bins, teacher_bins, settings.region_temperature).sum(-1),
            "ld_class": settings.class_weight
            * (positive / on_level.clamp(min=1))
            * mean_kl(predictions.logits, goals.logits, settings.class_temperature),
        }
        if settings.imitation_weight:
            fine = fine_grained_region(priors.all, valid, *boxes) & (on_level > 0)
            maps = self.adapters.adapt("fpn", student.features)
            losses = imitation_losses(maps, teacher.features, fine.split(priors.level_sizes, dim=1))
            terms["ld_imitation"] = settings.imitation_weight * losses
        return terms


def mean_kl(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T^2 times KL(teacher || student) of softmaxes over the last dimension, as a mean over its entries.

    Args:
        logits, teacher_logits: (..., entries).
        temperature: T.
    """
    log_p, log_goal = ((values / temperature).log_softmax(-1) for values in (logits, teacher_logits))
    return (log_goal.exp() * (log_goal - log_p)).mean(-1) * temperature**2


def imitation_losses(maps: list[Tensor], teacher_maps: list[Tensor], regions: tuple[Tensor, ...]) -> Tensor:
    """Mean squared difference of maps (N, C, H, W) inside a region (N, H*W) bool; (levels,), 0 of an empty region."""
    losses = []
    for level, goal, region in zip(maps, teacher_maps, regions, strict=True):
        squares = (level.float() - goal.float()).square().sum(1).flatten(1)
        losses.append((squares * region).sum() / (region.sum() * level.shape[1]).clamp(min=1))
    return torch.stack(losses)
