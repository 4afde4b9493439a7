"""A student with its teacher and the methods between them, as one module: what is trained."""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BaseImageProcessor, PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from ..models.base import DenseDetector, Labels
from ..models.batchnorm_folding import fold_batchnorms
from ..models.transformers_detectors import TransformersLabels
from .compatibility import pair_up
from .method import KDMethod
from .observation import PairError
from .observers import observe

METHODS_FILE = "distillation.safetensors"  # what the methods train themselves, in a checkpoint


@dataclass
class PairOutput(ModelOutput):
    """Output of a pair.

    Attributes:
        loss: scalar, the sum of all terms.
        loss_dict: name -> scalar: the student's own terms, and those of the methods.
    """

    loss: Tensor | None = None
    loss_dict: dict[str, Tensor] | None = None


class DistillationPair(nn.Module):
    """What DDP wraps, `torch.compile` compiles and the optimizer trains: the student and the methods' own parts.

    The teacher is frozen and no submodule: it has no gradients to average and isn't saved. It moves along with `to`.

    Args:
        student: the detector that is trained.
        teacher: any other detector; it is frozen and put into evaluation mode.
        methods: what the student learns by, such as `[CrossKD()]`.
        processor, teacher_processor: make the input of each; None: the one that goes with the model.
        seed: of the weights of adapters; the global random state is left as it was.

    Attributes:
        student: the detector.
        methods: name -> method.
        notes: what a user should know of the pair, a line each.

    Raises:
        PairError: the student can't learn from this teacher by these methods, with every reason.
    """

    student: PreTrainedModel
    teacher: PreTrainedModel

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        methods: Sequence[KDMethod],
        processor: BaseImageProcessor | None = None,
        seed: int = 0,
        teacher_processor: BaseImageProcessor | None = None,
    ):
        super().__init__()
        pairing = pair_up(student.config, teacher.config, processor, teacher_processor)
        self.student = student
        self.__dict__["teacher"] = teacher  # not registered
        if not isinstance(methods, Sequence):
            raise PairError(f"methods: {type(methods).__name__} is no list: give one, such as [CrossKD(), PKD()]")
        if wrong := [method for method in methods if not isinstance(method, KDMethod)]:
            raise PairError(f"methods: {wrong[0]!r} is not a KDMethod: give objects, such as [CrossKD(), PKD()]")
        # In the order of their names: an optimizer's state knows parameters by their place.
        by_name = {method.name: method for method in sorted(methods, key=lambda method: method.name)}
        self.methods = nn.ModuleDict(by_name)
        self.pixels = pairing.pixels
        self.student_observer = observe(student, pairing.levels[0], pairing.classes[0], processor)
        self.teacher_observer = observe(teacher, pairing.levels[1], pairing.classes[1], teacher_processor)
        self.notes = list(pairing.notes)
        problems = list(pairing.problems)
        if len(self.methods) < len(methods):
            problems.append(f"methods: {', '.join(m.name for m in methods)}: leave one of each name")
        self._connect(by_name.values(), problems, seed)
        teacher.eval().requires_grad_(False)

    def _connect(self, methods: Iterable[KDMethod], problems: list[str], seed: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed GPUs, too
            for method in methods:
                if method.connected:
                    problems.append(f"methods: this {method.name} belongs to another pair already: make a new one")
                    continue
                try:
                    method.connect(self.student_observer, self.teacher_observer)
                except PairError as error:
                    problems.append(str(error))
        if problems:
            raise PairError("this student can't learn from this teacher:\n  - " + "\n  - ".join(problems))
        for method in methods:  # of a pair that was made: after a refusal they can be used again
            method.connected = True
        parts = [f"{name} ({', '.join(map(str, p.shape))})" for name, p in self.methods.named_parameters()]
        if parts:
            self.notes.append(f"trained with the student and not saved with it: {'; '.join(parts)}")

    @property
    def config(self) -> PretrainedConfig:
        """The student's."""
        return self.student.config

    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        labels: Labels | TransformersLabels | None = None,
    ) -> PairOutput:
        """All losses of a batch.

        Args:
            pixel_values, pixel_mask: as the student takes them.
            labels: as the student takes them; None of an unlabelled batch. Its own losses then count only if a method
                gave it boxes, and methods see no targets.
        """
        unlabelled = labels is None
        with torch.no_grad():
            pixels = pixel_values if self.pixels is None else self.pixels(pixel_values, pixel_mask)
            teacher = self.teacher_observer(pixels, pixel_mask)
            for method in self.methods.values():
                labels = cast(KDMethod, method).labels(labels, teacher, self.student_observer, self.teacher_observer)
        student = self.student_observer(pixel_values, pixel_mask, labels)
        terms = dict(student.loss_dict)
        if unlabelled:
            student = replace(student, targets=None)  # what a method gave is no measure of the images' objects
            if labels is not None:
                truth = self.student_observer.ground_truth(labels, teacher.image_sizes)
                terms = {name: term * truth.mask.any() for name, term in terms.items()}
        for method in self.methods.values():
            new = method(student, teacher, self.student_observer, self.teacher_observer)
            if both := terms.keys() & new.keys():
                raise PairError(f"{method.name}: another loss has the name {', '.join(sorted(both))}: choose another")
            terms |= new
        if unlabelled:  # DDP waits for a gradient of every parameter, also of those that only labels train
            name = next(iter(terms))
            terms[name] = terms[name] + 0 * sum(p.sum() for p in self.parameters() if p.requires_grad)
        return PairOutput(loss=torch.stack(list(terms.values())).sum(), loss_dict=terms)

    def prepare_teacher(self, fold_batchnorm: bool = True, dtype: torch.dtype | None = None) -> None:
        """Have the teacher run faster, on a copy: the given one's weights stay as they are.

        Args:
            fold_batchnorm: make the BatchNorms of its backbone part of the convolutions before them.
            dtype: of the autocast that it runs in. Weights of convolutions and linear layers, which autocast would
                cast in each call, are cast once; norms and the levels' scales stay in fp32.
        """
        prepared = prepared_teacher(self.teacher, fold_batchnorm, dtype)
        self.__dict__["teacher"] = self.teacher_observer.__dict__["model"] = prepared

    def _apply(self, fn, recurse: bool = True) -> "DistillationPair":
        self.teacher._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def save_methods(self, folder: str | Path) -> None:
        """Write what the methods train themselves into a checkpoint; nothing if there is nothing."""
        if state := self.methods.state_dict():
            save_file({name: value.contiguous() for name, value in state.items()}, Path(folder) / METHODS_FILE)

    def load_methods(self, folder: str | Path) -> None:
        """Read what `save_methods` wrote.

        Raises:
            PairError: the checkpoint was saved with other methods, teacher or widths.
        """
        path, expected = Path(folder) / METHODS_FILE, self.methods.state_dict()
        saved = load_file(path) if path.is_file() else {}
        if _shapes(saved) != _shapes(expected):
            raise PairError(
                f"{folder}: {METHODS_FILE} holds {_shapes(saved) or 'nothing'}, this pair needs "
                f"{_shapes(expected) or 'nothing'}: its teacher or its methods were others. Resume with those, or "
                "start again in another training.output_dir."
            )
        self.methods.load_state_dict(saved)


def prepared_teacher(
    teacher: PreTrainedModel, fold_batchnorm: bool = True, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """A copy of a frozen teacher as a run calls it; see `DistillationPair.prepare_teacher`. Teachers of transformers'
    own code, which reads the precision of single weights, stay as they are.
    """
    if not isinstance(teacher, DenseDetector):
        return teacher
    parts = dict(teacher.named_children())
    if fold_batchnorm:
        parts["backbone"] = fold_batchnorms(teacher.backbone)
    if dtype is not None:
        parts = {name: _cast_weights(copy.deepcopy(part), dtype) for name, part in parts.items()}
    prepared = copy.copy(teacher)
    prepared._modules = {**parts}
    return prepared


def _cast_weights(part: nn.Module, dtype: torch.dtype) -> nn.Module:
    for module in part.modules():
        # Not those with a forward of their own: some standardise their weights as they run.
        if type(module).forward in (nn.Conv2d.forward, nn.Linear.forward):
            module.to(dtype)
    return part


def _shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in sorted(tensors.items())}
