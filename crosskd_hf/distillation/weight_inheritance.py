"""Starting a student from its teacher's weights (inheriting strategy: Kang et al., NeurIPS 2021, arXiv 2110.12724)."""

from collections.abc import Sequence

import torch

from ..models.anchors import grid_cells
from ..models.base import DenseDetector
from ..utils.label_names import coco_spelling

# What a recipe calls a part -> the detector's submodule.
PARTS = {"neck": "fpn", "head": "head"}
# Outputs that mean the same on the same priors only: FCOS's four numbers are distances, ATSS's are deltas.
PREDICTORS = ("cls_predictor", "box_predictor", "centerness_predictor", "scales")


@torch.no_grad()
def inherit_weights(student: DenseDetector, teacher: DenseDetector, parts: Sequence[str]) -> str:
    """Copy the teacher's weights into the student, layer by layer, wherever names, shapes and meaning agree.

    What predicts (classes, boxes, centerness, scales) is taken only from a detector of the same kind with the same
    priors, box format and number of tower blocks, the class predictor only if both know the same classes in the same
    order, the FPN's extra convolutions only if they are applied to the same.

    Args:
        student: changed in place.
        teacher: left as it is.
        parts: keys of `PARTS`.

    Returns:
        what was taken and what wasn't, a line.

    Raises:
        ValueError: if nothing of a part fits.
    """
    weights, teacher_weights = student.state_dict(), teacher.state_dict()
    foreign = _foreign(student, teacher)
    shapes = {name: weight.shape for name, weight in teacher_weights.items()}
    misfits = {_module(name) for name, weight in weights.items() if shapes.get(name) != weight.shape}
    misfits |= {_module(name) for name in weights if any(part in name for part in foreign)}
    if "head.box_predictor" in misfits:
        misfits.add("head.scales")  # they scale its output
    reports, empty = [], []
    for part in parts:
        names = [name for name in weights if name.startswith(f"{PARTS[part]}.")]
        taken = [name for name in names if _module(name) not in misfits]
        for name in taken:
            weights[name].copy_(teacher_weights[name])
        if not taken:
            empty.append(part)
        left = [name for name in names if name not in taken]
        new = f" (new: {', '.join(left[:4])}{', ...' if len(left) > 4 else ''})" if left else ""
        reports.append(f"{part} {len(taken)} of {len(names)} tensors{new}")
    report = f"inherited from the teacher: {'; '.join(reports)}"
    if empty:
        fields = ("fpn_channels", "head_channels", "head_blocks")
        values = (f"{name} {getattr(teacher.config, name)} and {getattr(student.config, name)}" for name in fields)
        raise ValueError(
            f"model.inherit: no weight of the teacher's {' and '.join(empty)} fits this student. Teacher and student "
            f"have {', '.join(values)}. Give the student the teacher's, or leave {', '.join(empty)} out of "
            "model.inherit."
        )
    return report


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _foreign(student: DenseDetector, teacher: DenseDetector) -> set[str]:
    """Parts of names whose weights mean something else in the teacher, whatever their shapes."""
    config, teacher_config = student.config, teacher.config
    foreign: set[str] = set()
    if not _same_outputs(student, teacher):
        foreign.update(PREDICTORS)
    if coco_spelling(config.label_names) != coco_spelling(teacher_config.label_names):
        foreign.add("cls_predictor")
    if any(getattr(config, key) != getattr(teacher_config, key) for key in ("fpn_extra_convs", "fpn_relu_before_p7")):
        foreign.add("extra_convs")
    return foreign


def _same_outputs(student: DenseDetector, teacher: DenseDetector) -> bool:
    """Whether the last convolutions say the same of the same boxes, after as many blocks.

    Not `DenseDetector.matching_rule`, which also asks for the same assignment: weights don't depend on its thresholds.
    """
    if type(student) is not type(teacher) or student.config.head_blocks != teacher.config.head_blocks:
        return False
    if getattr(student.config, "delta_scales", None) != getattr(teacher.config, "delta_scales", None):
        return False

    def priors_of_one_cell(model: DenseDetector) -> torch.Tensor:
        """Per level."""
        strides = model.config.strides
        return model.cell_priors(*grid_cells([(1, 1)] * len(strides), strides, torch.device("cpu")))

    return torch.equal(priors_of_one_cell(student), priors_of_one_cell(teacher))
