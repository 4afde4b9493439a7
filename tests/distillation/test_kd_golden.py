"""Losses of the other methods against recorded cases of their published code: values, gradients, regions.

`pytest --kd-golden DIR` compares the cases of another folder. Bars: totals 1e-5, terms 1e-4, gradients 1e-4 of the
largest entry of their tensor.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from crosskd_hf.distillation.adapters import Adapters
from crosskd_hf.distillation.methods.bckd import BCKD
from crosskd_hf.distillation.methods.cwd import cwd_loss
from crosskd_hf.distillation.methods.fgd import Level, object_mask
from crosskd_hf.distillation.methods.ld import LD
from crosskd_hf.distillation.methods.mgd import Generator, mgd_loss
from crosskd_hf.distillation.methods.pkd import pkd_loss
from crosskd_hf.distillation.observation import Observation, Predictions, Targets
from crosskd_hf.distillation.observers.dense import DenseContext
from crosskd_hf.distillation.regions import fine_grained_region, valuable_region
from crosskd_hf.models.assigners import Assignment, atss_assign
from crosskd_hf.models.box_coding import expected_bins
from crosskd_hf.models.outputs import Priors
from crosskd_hf.models.targets import positives_per_image

CASES = [f"{method}_{i}" for method in ("bckd", "cwd", "fgd", "ld", "mgd", "pkd") for i in (0, 1)]


class Case:
    """A recorded case; tensors that have a gradient in it require one."""

    def __init__(self, folder: Path, name: str) -> None:
        self.tensors = load_file(folder / f"{name}.safetensors")
        self.hyper = json.loads((folder / f"{name}.json").read_text())["hyper"]
        for key in self.gradients:
            self.tensors[key].requires_grad_()

    @property
    def gradients(self) -> list[str]:
        return [key.removeprefix("grad.") for key in self.tensors if key.startswith("grad.")]

    def levels(self, name: str) -> list[Tensor]:
        count = sum(key.startswith(f"{name}.") for key in self.tensors)
        return [self.tensors[f"{name}.{level}"] for level in range(count)]

    def compare(self, total: Tensor, terms: dict[str, Tensor]) -> None:
        """Values, then gradients of the total."""
        expected = self.tensors
        assert terms.keys() == {key[9:] for key in expected if key.startswith("expected.")} - {"total"}
        for name, term in terms.items():
            torch.testing.assert_close(term, expected[f"expected.{name}"], rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(total, expected["expected.total"], rtol=1e-5, atol=0)
        total.backward()
        largest = max(float(expected[f"grad.{key}"].abs().max()) for key in self.gradients)
        for key in self.gradients:
            goal, found = expected[f"grad.{key}"], expected[key].grad
            found = torch.zeros_like(goal) if found is None else found
            scale = float(goal.abs().max())
            bar = 1e-4 * scale if scale >= 1e-5 * largest else 1e-6 * largest
            assert float((found - goal).abs().max()) <= bar, key

    def load(self, module: torch.nn.Module, names: dict[str, str], level: int) -> torch.nn.Module:
        """Give a module a level's parameters, by their names in the case -> in the module."""
        for theirs, ours in names.items():
            for short, long in (("w", "weight"), ("b", "bias")):
                if (value := self.tensors.get(f"param.{level}.{theirs}.{short}")) is not None:
                    owner, _, attribute = f"{ours}.{long}".rpartition(".")
                    submodule = module.get_submodule(owner)
                    delattr(submodule, attribute)
                    setattr(submodule, attribute, value)  # itself, so that its gradient is found
        return module


@pytest.fixture
def case(request: pytest.FixtureRequest) -> Case:
    folder = Path(request.config.getoption("--kd-golden"))
    if not (folder / f"{request.param}.json").exists():
        pytest.skip(f"{folder} has no {request.param}")
    return Case(folder, request.param)


def cases(method: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", [f"{method}_0", f"{method}_1"], indirect=True)


@cases("cwd")
def test_cwd(case: Case) -> None:
    kind = "feat" if case.hyper["where"] == "FPN levels" else "map"
    losses = case.hyper["w"] * cwd_loss(case.levels(f"s.{kind}"), case.levels(f"t.{kind}"), case.hyper["tau"])
    case.compare(losses.sum(), {"loss": losses})


@cases("pkd")
def test_pkd(case: Case) -> None:
    maps, goals = case.levels("s.feat"), case.levels("t.feat")
    maps = [
        level if level.shape == goal.shape else torch.nn.functional.interpolate(level, goal.shape[2:], mode="bilinear")
        for level, goal in zip(maps, goals, strict=True)
    ]
    losses = case.hyper["w"] * pkd_loss(maps, goals)
    case.compare(losses.sum(), {"loss": losses})


@cases("mgd")
def test_mgd(case: Case) -> None:
    names = {"align": "align", "gen.conv1": "conv1", "gen.conv2": "conv2"}
    losses = []
    for i, (level, goal) in enumerate(zip(case.levels("s.feat"), case.levels("t.feat"), strict=True)):
        generator = case.load(Generator(level.shape[1], goal.shape[1]), names, i)
        losses.append(case.hyper["alpha"] * mgd_loss(generator(level, case.tensors[f"mask.{i}"]), goal))
    case.compare(torch.stack(losses).sum(), {"loss": torch.stack(losses)})


def padded_boxes(case: Case) -> tuple[Tensor, Tensor]:
    """(N, G, 4) and (N, G)."""
    count = sum(key.endswith(".boxes") for key in case.tensors)
    boxes = [case.tensors[f"gt.{i}.boxes"] for i in range(count)]
    most = max([len(one) for one in boxes] + [1])
    padded = torch.stack([torch.cat([one, one.new_zeros(most - len(one), 4)]) for one in boxes])
    return padded, torch.stack([torch.arange(most) < len(one) for one in boxes])


@cases("fgd")
def test_fgd(case: Case) -> None:
    boxes, mask = padded_boxes(case)
    nothing, one = torch.zeros(0), torch.ones(())
    targets = Targets(boxes, mask.long(), mask, case.tensors["img_shape"], nothing, nothing, one, one)
    names = {"align": "align", "mask_s": "student_context.mask", "mask_t": "teacher_context.mask"}
    for side, ours in (("ch_s", "student_context"), ("ch_t", "teacher_context")):
        names |= {
            f"{side}.{part}": f"{ours}.{name}"
            for part, name in (("conv1", "conv1"), ("ln", "norm"), ("conv2", "conv2"))
        }
    rows = []
    for i, (level, goal) in enumerate(zip(case.levels("s.feat"), case.levels("t.feat"), strict=True)):
        module = case.load(Level(level.shape[1], goal.shape[1]), names, i)
        rows.append(module(level, goal, object_mask(targets, goal), case.hyper["temp"]))
    terms = {
        name: torch.stack(row) for name, row in zip(("fg", "bg", "mask", "rela"), zip(*rows, strict=True), strict=True)
    }
    weights = [case.hyper[name] for name in ("alpha", "beta", "gamma", "lam")]
    weighted = [weight * term for weight, term in zip(weights, terms.values(), strict=True)]
    case.compare(torch.stack(weighted).sum(), terms | {"loss": torch.stack(weighted).sum(0)})


def flat(maps: list[Tensor]) -> Tensor:
    """(N, C, H, W) per level -> (N, P, C)."""
    return torch.cat([level.flatten(2).transpose(1, 2) for level in maps], dim=1)


def gfl_observation(case: Case, side: str, priors: Priors, targets: Targets | None) -> Observation:
    """What an observer of a GFL shows."""
    bins = flat(case.levels(f"{side}.reg")).unflatten(-1, (4, -1))
    distances = expected_bins(bins.flatten(2)) * priors.strides
    return Observation(
        features=case.levels(f"{side}.feat"),
        predictions=Predictions(
            logits=flat(case.levels(f"{side}.cls")),
            sides=lambda: (priors.centers, distances),
            mask=torch.ones(distances.shape[:2]),
            bins=bins,
        ),
        targets=targets,
        context=DenseContext(priors),
    )


def assigned(case: Case) -> tuple[Priors, Assignment, Tensor, tuple[Tensor, Tensor]]:
    """Priors, ATSS's result, which priors are valid, and the padded boxes."""
    sizes = [level.shape[2:] for level in case.levels("s.cls")]
    anchors, level_sizes = torch.cat(case.levels("anchors")), [height * width for height, width in sizes]
    strides = torch.cat(
        [torch.full((n, 1), float(r)) for n, r in zip(level_sizes, case.hyper["strides"], strict=True)]
    )
    corners = (anchors[:, :2] + anchors[:, 2:]) / 2
    priors = Priors.of(anchors, level_sizes, strides, corners)
    cells = torch.ceil(case.tensors["pad_shape"].flip(1)[:, None] / strides)
    valid = (corners / strides < cells).all(-1)
    boxes = padded_boxes(case)
    return priors, atss_assign(anchors, level_sizes, valid, *boxes, case.hyper["topk"]), valid, boxes


def observations(case: Case) -> tuple[Observation, Observation]:
    """Of student and teacher; the assignment and the regions are compared on the way."""
    priors, assignment, valid, boxes = assigned(case)
    labels = torch.cat(case.levels("target.labels"), dim=1)
    assert torch.equal(assignment.positive, labels < case.hyper["num_classes"])
    assert torch.equal(assignment.class_weights, torch.cat(case.levels("target.label_weights"), dim=1))
    if "target.vlr.0" in case.tensors:
        region = valuable_region(priors.all, priors.level_sizes, valid, *boxes, case.hyper["topk"])
        torch.testing.assert_close(region, torch.cat(case.levels("target.vlr"), dim=1), rtol=1e-5, atol=1e-6)
        fine = fine_grained_region(priors.all, valid, *boxes)
        assert torch.equal(fine, torch.cat(case.levels("target.im"), dim=1) > 0)
    normalizer = positives_per_image(assignment.positive)
    assert float(normalizer) == float(case.tensors["num_pos_total"])
    targets = Targets(
        *(boxes[0], boxes[1].long(), boxes[1], case.tensors["img_shape"]),
        *(assignment.class_weights, assignment.positive, normalizer, normalizer),
    )
    return gfl_observation(case, "s", priors, targets), gfl_observation(case, "t", priors, None)


def by_level(case: Case, term: Tensor) -> Tensor:
    sizes = [len(level) for level in case.levels("anchors")]
    return torch.stack([part.sum() for part in term.split(sizes, dim=1)])


@cases("bckd")
def test_bckd(case: Case) -> None:
    student, teacher = observations(case)
    method = BCKD(BCKD.Settings(cls_weight=case.hyper["w_kd"], box_weight=case.hyper["w_loc"]))
    terms = method.terms(student, teacher, None, None)
    total = torch.stack([term.sum() for term in terms.values()]).sum()
    names = {"cls": "bckd_cls", "loc": "bckd_box"}
    case.compare(total, {name: by_level(case, terms[ours]) for name, ours in names.items()})


@cases("ld")
def test_ld(case: Case) -> None:
    student, teacher = observations(case)
    hyper = case.hyper
    weights = (
        hyper["w_ld"],
        hyper["T_ld"],
        hyper["w_vlr"],
        hyper["T_vlr"],
        hyper["w_kd"],
        hyper["T_kd"],
        hyper["w_im"],
    )
    method = LD(LD.Settings(*map(float, weights)))
    method.adapters = Adapters({}, {})
    terms = method.terms(student, teacher, None, None)
    total = torch.stack([term.sum() for term in terms.values()]).sum()
    names = {"ld": "ld_main", "vlr": "ld_region", "kd": "ld_class"}
    found = {name: by_level(case, terms[ours]) for name, ours in names.items()}
    case.compare(total, found | {"im": terms["ld_imitation"]})
