"""PKD: feature distillation by Pearson correlation (Cao et al., NeurIPS 2022, arXiv 2207.02039)."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ...utils.recipe_fields import setting
from ..adapters import Adapters
from ..alignment import standardise
from ..method import KDMethod
from ..observation import Observation, Observer, PairError

# By the teacher's model type, as published with CrossKD (arXiv 2306.11369).
PUBLISHED_WEIGHTS = {"crosskd_gfl": 6.0, "crosskd_retinanet": 2.0, "crosskd_fcos": 2.0, "crosskd_atss": 1.0}


@dataclass
class Settings:
    """How much the features count."""

    weight: float | None = setting(
        None, "weight of kd_feature; null: published for the teacher's detector", minimum=0, maximum=1e6
    )


class PKD(KDMethod):
    """Term `kd_feature`: half the mean squared difference of standardised maps (equation 3), summed over levels."""

    name = "pkd"
    Settings = Settings

    def connect(self, student: Observer, teacher: Observer) -> None:
        """Adapt the student's features where the widths differ."""
        if not student.strides:
            raise PairError("pkd: student and teacher have no level of the same stride: leave pkd out")
        given = self.settings.weight
        self.weight = PUBLISHED_WEIGHTS.get(teacher.model_type, 1.0) if given is None else given
        self.resolved = Settings(self.weight)
        self.adapters = Adapters({"fpn": student.feature_channels}, {"fpn": teacher.feature_channels})

    def terms(
        self, student: Observation, teacher: Observation, student_observer: Observer, teacher_observer: Observer
    ) -> dict[str, Tensor]:
        """See `KDMethod.terms`; (levels,)."""
        features = self.adapters.adapt("fpn", student.features)
        return {"kd_feature": self.weight * pkd_loss(features, teacher.features)}


def pkd_loss(student_features: list[Tensor], teacher_features: list[Tensor]) -> Tensor:
    """Half the mean squared difference of standardised maps, (levels,).

    Args:
        student_features, teacher_features: (N, C, H, W) per level, of the same shapes.
    """
    pairs = zip(standardise(student_features), standardise(teacher_features), strict=True)
    return torch.stack([0.5 * F.mse_loss(a, b) for a, b in pairs])
