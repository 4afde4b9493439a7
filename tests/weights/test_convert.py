"""Conversion of MMDetection checkpoints, and that nothing in such a file is ever executed."""

import builtins
import functools
import os
import pickle
import sys
import types
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from crosskd_hf import DenseDetector, GFLForObjectDetection
from crosskd_hf.models import CONFIGS, MODELS
from crosskd_hf.weights.mmdet import (
    CheckpointError,
    from_reference,
    load_reference_state,
    read_checkpoint,
    reference_key,
    reference_keys,
    to_reference,
)

CLASSES = ("cat", "dog", "emu")
FORMATS = pytest.mark.parametrize("zip_format", [True, False], ids=["zip", "legacy"])


@functools.cache
def tiny(detector: str, **options) -> DenseDetector:
    """A detector of few weights, all of them different from their initial values."""
    options = {"backbone": "resnet18", "fpn_channels": 32, "head_channels": 32, "head_blocks": 2} | options
    model = MODELS[detector](CONFIGS[detector](num_labels=len(CLASSES), **options))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator))
    return model


def tiny_gfl(**options) -> DenseDetector:
    return tiny("gfl", **options)


def reference_state(model: DenseDetector) -> OrderedDict[str, torch.Tensor]:
    """What MMDetection would have saved of the same model: its names, and the buffers that carry nothing."""
    own = model.state_dict()
    state = OrderedDict((name, own[key].clone()) for key, name in reference_keys(model).items())
    state["backbone.bn1.num_batches_tracked"] = torch.tensor(7)
    state["bbox_head.integral.project"] = torch.arange(17.0)
    return state


@pytest.fixture
def foreign_modules(monkeypatch: pytest.MonkeyPatch):
    """Makes modules with a class each; afterwards they are gone, as on a user's machine."""

    def make(module_name: str, class_name: str, bases: tuple = (), **members) -> type:
        parts = module_name.split(".")
        for end in range(1, len(parts) + 1):
            name = ".".join(parts[:end])
            if name not in sys.modules:
                monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        made = type(class_name, bases, {"__module__": module_name, **members})
        setattr(sys.modules[module_name], class_name, made)
        return made

    yield make
    monkeypatch.undo()


def history_buffer(foreign_modules):
    """An object that is pickled as mmengine's HistoryBuffer is, its own methods included."""

    def smallest(self):
        raise AssertionError("executed")

    smallest.__module__, smallest.__qualname__ = "mmengine.logging.history_buffer", "HistoryBuffer.min"
    buffer_class = foreign_modules(
        "mmengine.logging.history_buffer",
        "HistoryBuffer",
        min=smallest,
        __getstate__=lambda self: {**self.__dict__, "statistics_methods": {"min": type(self).min}},
        __setstate__=lambda self, state: (_ for _ in ()).throw(AssertionError("executed")),
    )
    buffer = buffer_class()
    buffer._log_history = np.array([0.5, 0.25])
    buffer._count_history = np.array([1, 2])
    buffer.max_length = 1_000_000
    return buffer


def foreign_content(foreign_modules, model: DenseDetector) -> dict:
    """A checkpoint as MMDetection 3.x writes it."""
    state = reference_state(model)
    state["data_preprocessor.mean"] = torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1)
    state["data_preprocessor.std"] = torch.ones(3, 1, 1)
    config = foreign_modules("mmengine.config.config", "ConfigDict")()
    config.model = "GFL"
    return {
        "meta": {
            "epoch": 12,
            "cfg": "model = dict(type='GFL')",
            "config": config,
            "best": np.float64(0.402),
            "dataset_meta": {"CLASSES": CLASSES, "PALETTE": [(220, 20, 60)]},
        },
        "state_dict": state,
        "message_hub": {
            "log_scalars": OrderedDict({"train/loss": history_buffer(foreign_modules)}),
            "runtime_info": OrderedDict({"iter": 87960, "last_lr": np.array([0.001])}),
            "resumed_keys": OrderedDict({"train/loss": True}),
        },
        "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.01}]},
    }


def assert_equal_models(model: torch.nn.Module, other: torch.nn.Module) -> None:
    state, expected = model.state_dict(), other.state_dict()
    assert list(state) == list(expected)
    for key, tensor in expected.items():
        if "num_batches_tracked" not in key:
            assert torch.equal(state[key], tensor), key


# Names --------------------------------------------------------------------------------------------------------------


def test_names_of_the_reference():
    model = tiny_gfl()
    for key, name in {
        "backbone.body.layer2.0.downsample.1.running_var": "backbone.layer2.0.downsample.1.running_var",
        "fpn.lateral_convs.2.weight": "neck.lateral_convs.2.conv.weight",
        "fpn.output_convs.0.bias": "neck.fpn_convs.0.conv.bias",
        "fpn.extra_convs.1.weight": "neck.fpn_convs.4.conv.weight",
        "head.cls_tower.1.conv.weight": "bbox_head.cls_convs.1.conv.weight",
        "head.reg_tower.0.norm.bias": "bbox_head.reg_convs.0.gn.bias",
        "head.cls_predictor.bias": "bbox_head.gfl_cls.bias",
        "head.box_predictor.weight": "bbox_head.gfl_reg.weight",
        "head.scales.4": "bbox_head.scales.4.scale",
    }.items():
        assert key in model.state_dict()
        assert reference_key(key, model) == name
    with pytest.raises(KeyError, match="no counterpart"):
        reference_key("head.other.weight", model)


def test_every_tensor_has_one_name():
    names = reference_keys(tiny_gfl())
    assert len(set(names.values())) == len(names)
    assert set(names) == {key for key in tiny_gfl().state_dict() if "num_batches_tracked" not in key}


@pytest.mark.parametrize(
    ("detector", "predictors"),
    [
        ("gfl", {"gfl_cls", "gfl_reg"}),
        ("retinanet", {"retina_cls", "retina_reg"}),
        ("fcos", {"conv_cls", "conv_reg", "conv_centerness"}),
        ("atss", {"atss_cls", "atss_reg", "atss_centerness"}),
    ],
)
def test_names_of_each_detectors_predictors(detector, predictors):
    model = tiny(detector)
    names = set(reference_keys(model).values())
    head = {name.split(".")[1] for name in names if name.startswith("bbox_head.")} - {"cls_convs", "reg_convs"}
    assert head - {"scales"} == predictors
    assert ("scales" in head) == (detector != "retinanet")
    other = MODELS[detector](model.config)
    load_reference_state(other, reference_state(model))
    assert_equal_models(other, model)


def test_old_names_of_fcos():
    model = tiny("fcos")
    state = {key.replace("bbox_head.conv_", "bbox_head.fcos_"): value for key, value in reference_state(model).items()}
    assert "bbox_head.fcos_centerness.bias" in state
    other = MODELS["fcos"](model.config)
    load_reference_state(other, state)
    assert_equal_models(other, model)


def test_order_of_swins_patch_merging():
    """Reference channel `c * 4 + kh * 2 + kw` is timm's `(kw * 2 + kh) * C + c`."""
    channels = 3
    reference = torch.tensor([100 * c + 10 * kh + kw for c in range(channels) for kh in (0, 1) for kw in (0, 1)])
    ours = torch.tensor([100 * c + 10 * kh + kw for kw in (0, 1) for kh in (0, 1) for c in range(channels)])
    for name, shape in (("norm.weight", (12,)), ("norm.bias", (12,)), ("reduction.weight", (2, 12))):
        key = f"backbone.body.layers_1.downsample.{name}"
        assert torch.equal(from_reference(key, reference.expand(shape)), ours.expand(shape))
        assert torch.equal(to_reference(key, ours.expand(shape)), reference.expand(shape))
    for key in ("backbone.body.layers_1.blocks.0.norm1.weight", "backbone.body.layer1.0.downsample.0.weight"):
        assert torch.equal(from_reference(key, reference), reference)


def test_names_of_swin():
    model = tiny("retinanet", backbone="swin_tiny_patch4_window7_224", frozen_stages=0)
    names = reference_keys(model)
    assert {
        "backbone.patch_embed.projection.weight",
        "backbone.patch_embed.norm.bias",
        "backbone.stages.0.blocks.0.attn.w_msa.qkv.weight",
        "backbone.stages.0.blocks.1.attn.w_msa.relative_position_bias_table",
        "backbone.stages.0.downsample.reduction.weight",
        "backbone.stages.2.downsample.norm.weight",
        "backbone.stages.3.blocks.1.ffn.layers.0.0.bias",
        "backbone.stages.3.blocks.1.ffn.layers.1.weight",
        "backbone.norm1.weight",
        "backbone.norm3.bias",
    } <= set(names.values())
    assert len(set(names.values())) == len(names)
    own = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    state = {name: to_reference(key, own[key]) for key, name in names.items()}
    state["backbone.stages.0.blocks.0.attn.w_msa.relative_position_index"] = torch.zeros(49, 49)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    load_reference_state(model, state)
    assert all(torch.equal(tensor, own[key]) for key, tensor in model.state_dict().items())


# Conversion ---------------------------------------------------------------------------------------------------------


@FORMATS
def test_converts_a_2x_checkpoint(tmp_path, zip_format):
    source, path = tiny_gfl(), tmp_path / "gfl.pth"
    meta = {"env_info": "...", "epoch": 12, "CLASSES": CLASSES, "hook_msgs": {"best": np.float32(40.2)}}
    content = {"meta": meta, "state_dict": reference_state(source), "optimizer": {"state": {}}}
    torch.save(content, path, _use_new_zipfile_serialization=zip_format)
    state, names = read_checkpoint(path)
    assert names == CLASSES
    model = GFLForObjectDetection(source.config)
    load_reference_state(model, state)
    assert_equal_models(model, source)


@FORMATS
def test_converts_a_3x_checkpoint_without_importing_what_it_names(tmp_path, zip_format, foreign_modules, monkeypatch):
    source, path = tiny_gfl(), tmp_path / "gfl.pth"
    content = foreign_content(foreign_modules, source)
    torch.save(content, path, _use_new_zipfile_serialization=zip_format)
    # It is what mmengine writes: pickled methods come as a call of getattr.
    assert b"getattr" in path.read_bytes()
    monkeypatch.undo()
    assert "mmengine" not in sys.modules
    state, names = read_checkpoint(path)
    assert "mmengine" not in sys.modules
    assert names == CLASSES
    model = GFLForObjectDetection(source.config)
    load_reference_state(model, state)
    assert_equal_models(model, source)


def test_reads_a_bare_state_dict_without_names(tmp_path):
    torch.save(reference_state(tiny_gfl()), tmp_path / "bare.pth")
    state, names = read_checkpoint(tmp_path / "bare.pth")
    assert names is None
    load_reference_state(GFLForObjectDetection(tiny_gfl().config), state)


@pytest.mark.parametrize(
    ("meta", "names"),
    [
        ({"CLASSES": ("a", "b")}, ("a", "b")),
        ({"CLASSES": ["a", "b"]}, ("a", "b")),
        ({"dataset_meta": {"CLASSES": ("a", "b")}}, ("a", "b")),
        ({"dataset_meta": {"classes": ["a", "b"]}}, ("a", "b")),
        ({"CLASSES": ("traffic_light", "polar_bear")}, ("traffic light", "polar_bear")),  # COCO's and another's
        ({"CLASSES": None}, None),
        ({"dataset_meta": None}, None),
        ({}, None),
        (None, None),
        ("text", None),
    ],
)
def test_class_names(tmp_path, meta, names):
    torch.save({"meta": meta, "state_dict": {"a": torch.zeros(1)}}, tmp_path / "a.pth")
    assert read_checkpoint(tmp_path / "a.pth")[1] == names


def test_half_precision_becomes_the_models():
    source = tiny_gfl()
    state = {k: v.half() if v.is_floating_point() else v for k, v in reference_state(source).items()}
    model = GFLForObjectDetection(source.config)
    load_reference_state(model, state)
    assert model.dtype == torch.float32
    torch.testing.assert_close(model.head.cls_predictor.bias, source.head.cls_predictor.bias, atol=1e-3, rtol=0)


def test_every_wrong_key_is_listed_and_nothing_loaded():
    state = reference_state(tiny_gfl())
    del state["bbox_head.gfl_cls.bias"]
    state["bbox_head.atss_centerness.weight"] = torch.zeros(1)
    state["neck.lateral_convs.0.conv.weight"] = torch.zeros(256, 128, 1, 1)
    model = GFLForObjectDetection(tiny_gfl().config)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_reference_state(model, state, source="teacher.pth")
    text = str(caught.value)
    assert "teacher.pth" in text and "resnet18" in text and "3 labels" in text
    assert "1 missing keys:\n    bbox_head.gfl_cls.bias" in text
    assert "1 unexpected keys:\n    bbox_head.atss_centerness.weight" in text
    assert "neck.lateral_convs.0.conv.weight: (256, 128, 1, 1), the model has (32, 128, 1, 1)" in text
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_many_wrong_keys_are_cut_short():
    with pytest.raises(CheckpointError, match=r"(?s)missing keys:.*\.\.\.") as caught:
        load_reference_state(GFLForObjectDetection(tiny_gfl().config), {"a": torch.zeros(1)})
    assert len(str(caught.value).splitlines()) < 20


@pytest.mark.parametrize("options", [{"head_blocks": 3}, {"fpn_channels": 64}, {"backbone": "resnet34"}])
def test_another_architecture_is_refused(options):
    with pytest.raises(CheckpointError, match="architecture"):
        load_reference_state(tiny_gfl(**options), reference_state(tiny_gfl()))


# Files that are no checkpoints --------------------------------------------------------------------------------------


def test_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"gone\.pth doesn't exist"):
        read_checkpoint(tmp_path / "gone.pth")


@FORMATS
@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, 0.99])
def test_truncated_file(tmp_path, zip_format, kept):
    path = tmp_path / "cut.pth"
    torch.save({"meta": {}, "state_dict": {"a": torch.rand(1000)}}, path, _use_new_zipfile_serialization=zip_format)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with pytest.raises(CheckpointError, match=r"cut\.pth can't be read safely"):
        read_checkpoint(path)


@pytest.mark.parametrize("content", [b"<html>404</html>", b"\x80\x02.", b"PK\x03\x04" + bytes(100), bytes(1000)])
def test_file_of_another_kind(tmp_path, content):
    (tmp_path / "other.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"other\.pth can't be read safely"):
        read_checkpoint(tmp_path / "other.pth")


@pytest.mark.parametrize(
    "content",
    [
        [torch.zeros(1)],
        torch.zeros(1),
        {},
        {"state_dict": {}},
        {"state_dict": None},
        {"state_dict": [torch.zeros(1)]},
        {"state_dict": {"a": 1}},
        {"state_dict": {1: torch.zeros(1)}},
        {"meta": {}, "weights": torch.zeros(1)},
    ],
    ids=str,
)
def test_content_without_a_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="no state dict of tensors"):
        read_checkpoint(tmp_path / "other.pth")


# Files that want to run code ----------------------------------------------------------------------------------------


class Call:
    """Pickles as a call of whatever stands under a name."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


class Named:
    """Pickles as a call of `module.name`, whether or not there is such a module here, or of what a call gave."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments


class NamingPickler(pickle._Pickler):
    """Writes a `Named` as the call that it stands for."""

    def save(self, obj, save_persistent_id=True):
        if not isinstance(obj, Named):
            super().save(obj, save_persistent_id)
            return
        if isinstance(obj.function, str):
            module, _, name = obj.function.rpartition(".")
            self.write(pickle.GLOBAL + f"{module}\n{name}\n".encode())
        else:
            self.save(obj.function)
        self.save(obj.arguments)
        self.write(pickle.REDUCE)


def save_named(content: dict, path: Path, zip_format: bool) -> None:
    """`torch.save` of a content with `Named` in it."""
    module = types.SimpleNamespace(
        Pickler=NamingPickler,
        dump=lambda obj, file, protocol: NamingPickler(file, protocol).dump(obj),
        __name__="pickle",
    )
    torch.save(content, path, pickle_module=module, _use_new_zipfile_serialization=zip_format)


@FORMATS
@pytest.mark.parametrize("place", ["meta", "state_dict", "message_hub"])
@pytest.mark.parametrize("function", [os.system, builtins.eval, builtins.exec, builtins.open, os.mkdir])
def test_a_call_is_refused_and_not_made(tmp_path, zip_format, place, function):
    mark, path = tmp_path / "executed", tmp_path / "evil.pth"
    argument = {
        os.system: f"touch {mark}",
        builtins.eval: f"open({str(mark)!r}, 'w')",
        builtins.exec: f"open({str(mark)!r}, 'w')",
        os.mkdir: str(mark),
    }.get(function, str(mark))
    arguments = (argument, "w") if function is builtins.open else (argument,)
    content = {"meta": {"CLASSES": CLASSES}, "state_dict": {"a": torch.zeros(1)}}
    content[place] = {**content.get(place, {}), "b": Call(function, *arguments)}
    torch.save(content, path, _use_new_zipfile_serialization=zip_format)
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    assert function.__name__ in str(caught.value)
    assert not mark.exists()
    # The file is what it is said to be: plain pickle would run it.
    function(*arguments)
    assert mark.exists()


@FORMATS
@pytest.mark.parametrize(
    "name",
    [
        "numpy.testing._private.utils.runstring",
        "numpy.f2py.capi_maps.load_f2cmap_file",
        "numpy.load",
        "numpy.lib.npyio.load",
        "numpy.memmap",
        "numpy.distutils.exec_command.exec_command",
        "numpy.core.multiarray._reconstruct",
        "numpy.os.system",
        "mmengine.utils.package_utils.call_command",
        "mmcv.os.system",
        "mmdet.apis.eval",
        "builtins.getattr",
    ],
)
def test_a_name_of_a_known_package_is_inert(tmp_path, zip_format, name):
    mark, path = tmp_path / "executed", tmp_path / "evil.pth"
    hidden = Named(name, f"open({str(mark)!r}, 'w')", {})
    content = {"meta": {"CLASSES": CLASSES, "hidden": hidden}, "state_dict": {"a": torch.ones(2)}}
    save_named(content, path, zip_format)
    before = set(sys.modules)
    state, names = read_checkpoint(path)
    assert torch.equal(state["a"], torch.ones(2)) and names == CLASSES
    assert not mark.exists()
    assert not {module for module in set(sys.modules) - before if module.startswith(("numpy", "mm"))}


@FORMATS
@pytest.mark.parametrize(
    "name",
    [
        "mmengine_evil.run",
        "numpyx.run",
        "xnumpy.run",
        "os.system",
        "posix.system",
        "nt.system",
        "sys.exit",
        "subprocess.Popen",
        "builtins.__import__",
        "builtins.getattrs",
        "__builtin__.eval",
        "torch.hub.load",
        "torch.load",
        "importlib.import_module",
        "operator.attrgetter",
        "pickle.loads",
        "runpy.run_path",
    ],
)
def test_a_name_of_another_package_is_refused(tmp_path, zip_format, name):
    content = {"meta": {"hidden": Named(name, "a")}, "state_dict": {"a": torch.ones(2)}}
    path = tmp_path / "evil.pth"
    save_named(content, path, zip_format)
    with pytest.raises(CheckpointError):
        read_checkpoint(path)


@FORMATS
def test_getattr_gives_no_way_from_a_stand_in_to_code(tmp_path, zip_format):
    # getattr(getattr(numpy.core, "os"), "system")("touch ..."), as a chain of calls.
    mark, path = tmp_path / "executed", tmp_path / "evil.pth"
    module = Named("builtins.getattr", Named("numpy.core", 1), "os")
    content = {
        "meta": {"hidden": Named(Named("builtins.getattr", module, "system"), f"touch {mark}")},
        "state_dict": {"a": torch.ones(2)},
    }
    save_named(content, path, zip_format)
    with pytest.raises(CheckpointError, match="can't be read safely"):
        read_checkpoint(path)
    assert not mark.exists()


def test_stand_ins_are_gone_afterwards(tmp_path):
    path = tmp_path / "a.pth"
    content = {"meta": {"b": np.float64(1)}, "state_dict": {"a": torch.ones(2)}}
    torch.save(content, path)
    before = set(torch.serialization.get_safe_globals())  # torch keeps them in a set: their order is chance
    read_checkpoint(path)
    assert set(torch.serialization.get_safe_globals()) == before
