"""A device that pretends to be an accelerator: it computes on the CPU, and is as strict as a GPU.

Its tensors can't be mixed with the CPU's, but for single numbers, and what a GPU's host would wait for is counted. It
is torch's PrivateUse1 backend, which stays registered: a program, which prints what each detector did as JSON.
"""

import json
from collections import Counter

import torch
from tiny import tiny_batch, tiny_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend
from torchvision.ops import box_convert

from crosskd_hf.data.collator import padded_number
from crosskd_hf.distillation import PKD, CrossKD, DistillationPair
from crosskd_hf.models.image_processing import DenseDetectorImageProcessor

aten = torch.ops.aten
DETECTORS = ("gfl", "retinanet", "fcos", "atss")
# The size of what they give depends on values.
WAITING = ("nonzero", "unique", "masked_select", "_local_scalar_dense", "bincount", "torchvision.nms", "equal")


class PretendTensor(Tensor):
    """A CPU tensor that says it is elsewhere."""

    where: torch.device
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> "PretendTensor":
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        return Tensor._make_wrapper_subclass(cls, inner.shape, device=cls.where, **layout)

    def __init__(self, inner: Tensor):
        self.inner = inner

    def tolist(self) -> list:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise RuntimeError(f"{function} outside of PretendDevice")


class Backend(_DummyBackendModule):
    """What torch asks of a backend."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


class PretendDevice(TorchDispatchMode):
    """Runs every operator. Refuses those that mix devices; counts in `waits` those that a GPU's host waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.operators = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        here = any(isinstance(value, PretendTensor) for value in given)
        device = None if kwargs.get("device") is None else torch.device(kwargs["device"])
        copies = function in (aten._to_copy.default, aten.copy_.default)
        if here and not copies and any(not isinstance(value, PretendTensor) and value.dim() for value in given):
            raise RuntimeError(f"{function} mixes tensors of the pretended device and the CPU")
        result_here = here if device is None else device == PretendTensor.where
        if function is aten.copy_.default:
            result_here = isinstance(args[0], PretendTensor)
        self._count(function, args, kwargs, given, result_here)
        made = dict(kwargs) if device is None else {**kwargs, "device": torch.device("cpu")}
        inner_args, inner_kwargs = tree_map_only(PretendTensor, lambda value: value.inner, (args, made))
        result = function(*inner_args, **inner_kwargs)
        if not result_here or function is aten._local_scalar_dense.default:
            return result
        result = tree_map_only(Tensor, PretendTensor, result)
        return return_and_correct_aliasing(function, args, kwargs, result) if here else result

    def _count(self, function, args, kwargs, given: list[Tensor], result_here: bool) -> None:
        here = any(isinstance(value, PretendTensor) for value in given)
        self.operators += here or result_here
        name = str(function)
        if function in (aten._to_copy.default, aten.copy_.default):
            source = args[1] if function is aten.copy_.default else args[0]
            blocking = not (kwargs.get("non_blocking") or (function is aten.copy_.default and args[2:] == (True,)))
            if isinstance(source, PretendTensor) != result_here and blocking:
                self.waits["blocking copy"] += 1
        elif here and any(word in name for word in WAITING):
            self.waits[name] += 1
        elif here and name.startswith("aten.index") and isinstance(args[1], list):
            self.waits[name] += sum(index is not None and index.dtype == torch.bool for index in args[1])


def padded_batch() -> dict:
    """Two images of bytes' size with padded labels and a mask."""
    batch = tiny_batch()
    length = padded_number(3)
    labels = {
        "boxes_xyxy": torch.zeros(2, length, 4),
        "class_labels": torch.zeros(2, length, dtype=torch.long),
        "mask": torch.zeros(2, length, dtype=torch.bool),
    }
    for i, label in enumerate(batch["labels"]):
        count = len(label["boxes"])
        labels["boxes_xyxy"][i, :count] = box_convert(label["boxes"], "cxcywh", "xyxy") * torch.tensor(
            [96, 64, 96, 64]
        )
        labels["class_labels"][i, :count] = label["class_labels"]
        labels["mask"][i, :count] = True
    return {**batch, "pixel_mask": torch.ones(2, 64, 96, dtype=torch.bool), "labels": labels}


class Pair:
    """A student and its teacher of a kind, with all terms, on a device."""

    def __init__(self, detector: str, device: torch.device):
        self.device = device
        student = tiny_model(detector, seed=1).train()
        # Restricted classes and changed pixels have tensors of their own.
        teacher = tiny_model(detector, id2label={0: "dog", 1: "cat"}, backbone_style="caffe", backbone="resnet50")
        self.pair = DistillationPair(student, teacher, [CrossKD(), PKD()])
        self.pair.prepare_teacher()
        self.pair.to(device)

    def inputs(self, device: torch.device | None = None) -> dict:
        batch, device = padded_batch(), device or self.device
        labels = {name: value.to(device, non_blocking=True) for name, value in batch.pop("labels").items()}
        return {**{name: value.to(device, non_blocking=True) for name, value in batch.items()}, "labels": labels}

    def step(self, inputs: dict) -> tuple[Tensor, Tensor]:
        """Loss and a gradient, on the device."""
        loss = self.pair(**inputs).loss
        loss.backward()
        return loss, self.pair.student.head.cls_predictor.weight.grad

    def detect(self, inputs: dict) -> list[dict[str, Tensor]]:
        student = self.pair.student.eval()
        with torch.no_grad():
            output = student(inputs["pixel_values"], inputs["pixel_mask"])
        return DenseDetectorImageProcessor(score_threshold=0.0).post_process_object_detection(output, 0.0)


def refusal(action) -> str:
    """What an action was refused with."""
    try:
        action()
    except RuntimeError as error:
        return str(error)
    return "not refused"


def planted(pair: Pair) -> dict[str, str]:
    """What each tensor that was left on the CPU is refused with."""
    found = {}
    for name in ("pixel_values", "pixel_mask"):
        found[name] = refusal(lambda name=name: pair.step(pair.inputs() | {name: padded_batch()[name]}))
    predictor = pair.pair.teacher.head.cls_predictor
    predictor.weight = nn.Parameter(predictor.weight.inner.clone(), requires_grad=False)
    found["a teacher's weight"] = refusal(lambda: pair.step(pair.inputs()))
    return found


def counted() -> dict[str, int]:
    """What is found of things that a GPU's host waits for, once each, and of those that it doesn't wait for."""
    numbers, copy = torch.arange(4), {"non_blocking": True}
    with PretendDevice() as mode:
        here = numbers.to(PretendTensor.where)
        here = numbers.to(PretendTensor.where, **copy)
        here.sum().item()
        here.nonzero()
        here[here > 1]
        torch.tensor([1, 2], device=PretendTensor.where)
        here[1:] + torch.tensor(1) - here.new_full((3,), 2)
    return dict(mode.waits)


@torch.no_grad()
def cuda_autocast() -> dict[str, str]:
    """What CUDA's own autocast makes of a tower's output. (Without gradients: autograd asks a GPU for its streams.)"""
    PretendTensor.where = torch.device("cuda:0")
    torch.cuda._lazy_init = lambda: None
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # or .to() mixes both tensors
    found = {}
    with PretendDevice():
        for detector in ("gfl", "retinanet"):  # with group norm and without
            head = tiny_model(detector).head.requires_grad_(False).to(PretendTensor.where)
            features = [torch.ones(1, 32, 8, 8).to(PretendTensor.where)]
            torch.set_autocast_enabled("cuda", True)
            torch.set_autocast_dtype("cuda", torch.bfloat16)
            output = head(features, tap_index=4)
            torch.set_autocast_enabled("cuda", False)
            found[detector] = str(output.cls_taps[0].dtype)
    return found


def main() -> None:
    """Each detector on the CPU and on the pretended device."""
    torch.set_num_threads(1)
    _setup_privateuseone_for_python_backend("pretend", Backend())
    PretendTensor.where = torch.device("pretend:0")
    torch._C._set_only_lift_cpu_tensors(True)  # so that torch.tensor(..., device=) is a copy that can be seen
    report = {"counted": counted()}
    for detector in DETECTORS:
        cpu = Pair(detector, torch.device("cpu"))
        loss, gradient = cpu.step(cpu.inputs())
        detections = cpu.detect(cpu.inputs())
        with PretendDevice() as mode:
            pair = Pair(detector, PretendTensor.where)
            inputs = pair.inputs()
            mode.waits.clear()
            mode.operators = 0
            mine, slope = pair.step(inputs)
            waits, operators = dict(mode.waits), mode.operators
            found = pair.detect(inputs)
            report[detector] = {
                "loss": [mine.item(), loss.item()],
                "gradient": (slope.cpu() - gradient).abs().max().item() / gradient.abs().max().item(),
                "detections": [[len(d["scores"]) for d in ds] for ds in (found, detections)],
                "score": max(
                    (a["scores"].cpu() - b["scores"]).abs().max().item()
                    for a, b in zip(found, detections, strict=True)
                ),
                "waits": waits,
                "operators": operators,
            }
            if detector == DETECTORS[-1]:
                report["planted"] = planted(pair)
    report["cuda_autocast"] = cuda_autocast()
    print(json.dumps(report))


if __name__ == "__main__":
    main()
