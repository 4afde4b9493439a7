"""Starting a student from its teacher's weights (inheriting strategy: Kang et al., NeurIPS 2021, arXiv 2110.12724)."""

from collections.abc import Sequence

import torch

from .models.modeling_dense import DenseDetector

# What a recipe calls a part -> the detector's submodule.
PARTS = {"neck": "fpn", "head": "head"}
# Outputs that only mean the same in a detector of the same kind: FCOS's four numbers are distances, ATSS's are deltas.
OF_ONE_KIND = ("box_predictor", "centerness_predictor", "scales")


@torch.no_grad()
def inherit_weights(student: DenseDetector, teacher: DenseDetector, parts: Sequence[str]) -> str:
    """Copy the teacher's weights into the student, layer by layer, wherever names, shapes and meaning agree.

    The class predictor is taken only if both know the same classes in the same order, box predictors, centerness and
    scales only from a detector of the same kind.

    Args:
        student: changed in place.
        teacher: left as it is.
        parts: keys of `PARTS`.

    Returns:
        what was taken and what wasn't, a line.

    Raises:
        ValueError: if nothing fits.
    """
    own, given = student.state_dict(), teacher.state_dict()
    misfits = {_module(name) for name in own if not _fits(name, student, teacher, own, given)}
    if "head.box_predictor" in misfits:
        misfits.add("head.scales")  # they scale its output
    reports, total = [], 0
    for part in parts:
        names = [name for name in own if name.startswith(f"{PARTS[part]}.")]
        taken = [name for name in names if _module(name) not in misfits]
        for name in taken:
            own[name].copy_(given[name])
        total += len(taken)
        left = [name for name in names if name not in taken]
        new = f" (new: {', '.join(left[:4])}{', ...' if len(left) > 4 else ''})" if left else ""
        reports.append(f"{part} {len(taken)} of {len(names)} tensors{new}")
    report = f"inherited from the teacher: {'; '.join(reports)}"
    if not total:
        raise ValueError(
            f"model.inherit {list(parts)}: no weight of the teacher fits this student. Give it the teacher's "
            "fpn_channels and head_channels, or leave model.inherit out."
        )
    return report


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _fits(name: str, student: DenseDetector, teacher: DenseDetector, own: dict, given: dict) -> bool:
    if name not in given or given[name].shape != own[name].shape:
        return False
    if "cls_predictor" in name:
        return student.config.id2label == teacher.config.id2label and type(student) is type(teacher)
    return type(student) is type(teacher) or not any(part in name for part in OF_ONE_KIND)
