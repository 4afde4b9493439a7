"""Conversion of MMDetection checkpoints, and that nothing in such a file is ever executed."""

import functools
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import assert_equal_weights, filled, reference_state

from crosskd_hf import DenseDetector
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
WEIGHTS = {"a": torch.ones(2)}


@functools.cache
def tiny(detector: str = "gfl", **options) -> DenseDetector:
    options = {"backbone": "resnet18", "fpn_channels": 32, "head_channels": 32, "head_blocks": 2} | options
    return filled(MODELS[detector](CONFIGS[detector](num_labels=len(CLASSES), **options)))


class Named:
    """Pickles as `module.name`, called with arguments (not if they are None), and given a state.

    Whether or not there is such a module here. The function may be a `Named` itself.
    """

    def __init__(self, function, *arguments, state=None):
        self.function, self.arguments, self.state = function, arguments, state


class NamingPickler(pickle._Pickler):
    """Writes a `Named` as what it stands for."""

    def save(self, obj, save_persistent_id=True):
        if not isinstance(obj, Named):
            super().save(obj, save_persistent_id)
            return
        if isinstance(obj.function, str):
            module, _, name = obj.function.rpartition(".")
            self.write(pickle.GLOBAL + f"{module}\n{name}\n".encode())
        else:
            self.save(obj.function)
        if obj.arguments != (None,):
            self.save(obj.arguments)
            self.write(pickle.REDUCE)
        if obj.state is not None:
            self.save(obj.state)
            self.write(pickle.BUILD)


def save(content: object, path: Path, zip_format: bool = True) -> Path:
    """`torch.save` of a content that may hold `Named`."""
    module = types.SimpleNamespace(
        Pickler=NamingPickler,
        dump=lambda obj, file, protocol: NamingPickler(file, protocol).dump(obj),
        __name__="pickle",
    )
    torch.save(content, path, pickle_module=module, _use_new_zipfile_serialization=zip_format)
    return path


# Names --------------------------------------------------------------------------------------------------------------


def test_names_of_the_reference():
    for key, name in {
        "backbone.body.layer2.0.downsample.1.running_var": "backbone.layer2.0.downsample.1.running_var",
        "fpn.lateral_convs.2.weight": "neck.lateral_convs.2.conv.weight",
        "fpn.output_convs.0.bias": "neck.fpn_convs.0.conv.bias",
        "fpn.extra_convs.1.weight": "neck.fpn_convs.4.conv.weight",
        "head.cls_tower.1.conv.weight": "bbox_head.cls_convs.1.conv.weight",
        "head.reg_tower.0.norm.bias": "bbox_head.reg_convs.0.gn.bias",
        "head.scales.4": "bbox_head.scales.4.scale",
    }.items():
        assert key in tiny().state_dict()
        assert reference_key(key, tiny()) == name


@pytest.mark.parametrize(
    ("detector", "predictors"),
    [
        ("gfl", {"gfl_cls", "gfl_reg"}),
        ("retinanet", {"retina_cls", "retina_reg"}),
        ("fcos", {"conv_cls", "conv_reg", "conv_centerness"}),
        ("atss", {"atss_cls", "atss_reg", "atss_centerness"}),
    ],
)
def test_each_detector_is_loaded_from_the_references_names(detector, predictors):
    model = tiny(detector)
    names = reference_keys(model)
    assert len(set(names.values())) == len(names)
    head = {name.split(".")[1] for name in names.values() if name.startswith("bbox_head.")}
    assert head - {"cls_convs", "reg_convs", "scales"} == predictors
    state = reference_state(model)
    old = {key.replace("bbox_head.conv_", "bbox_head.fcos_"): value for key, value in state.items()}  # FCOS of 2.0
    for given in (state, old):
        loaded = MODELS[detector](model.config)
        load_reference_state(loaded, given)
        assert_equal_weights(loaded, model)


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
    state = reference_state(model)
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
    } <= set(state)
    state["backbone.stages.0.blocks.0.attn.w_msa.relative_position_index"] = torch.zeros(49, 49)
    loaded = MODELS["retinanet"](model.config)
    load_reference_state(loaded, state)
    assert_equal_weights(loaded, model)


# Conversion ---------------------------------------------------------------------------------------------------------


def content_of(version: int, state: dict) -> dict:
    """A checkpoint as MMDetection 2.x or 3.x writes it: objects of its own, numpy's, and the optimizer's state."""
    optimizer = {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.01}]}
    if version == 2:
        meta = {"epoch": 12, "CLASSES": CLASSES, "hook_msgs": {"best": np.float32(40.2)}}
        return {"meta": meta, "state_dict": state, "optimizer": optimizer}
    buffer = "mmengine.logging.history_buffer.HistoryBuffer"
    history = {
        "_log_history": np.array([0.5, 0.25]),
        # mmengine pickles the buffer's methods: as calls of getattr.
        "statistics_methods": {"min": Named("builtins.getattr", Named(buffer, None), "min")},
    }
    return {
        "meta": {
            "config": Named("mmengine.config.config.ConfigDict", state={"model": "GFL"}),
            "best": np.float64(0.402),
            "dataset_meta": {"CLASSES": CLASSES, "PALETTE": [(220, 20, 60)]},
        },
        "state_dict": state | {"data_preprocessor.mean": torch.ones(3, 1, 1)},
        "message_hub": {
            "log_scalars": {"train/loss": Named(buffer, state=history)},
            "runtime_info": {"last_lr": np.array([0.001])},
        },
        "optimizer": optimizer,
    }


@FORMATS
@pytest.mark.parametrize("version", [2, 3])
def test_converts_a_checkpoint_without_importing_what_it_names(tmp_path, version, zip_format):
    path = save(content_of(version, reference_state(tiny())), tmp_path / "gfl.pth", zip_format)
    before = set(torch.serialization.get_safe_globals())
    state, names = read_checkpoint(path)
    assert set(torch.serialization.get_safe_globals()) == before, "stand-ins are gone"
    assert names == CLASSES and "mmengine" not in sys.modules
    model = MODELS["gfl"](tiny().config)
    load_reference_state(model, state)
    assert_equal_weights(model, tiny())


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ({"meta": {"CLASSES": ["a", "b"]}}, ("a", "b")),
        ({"meta": {"dataset_meta": {"classes": ["a", "b"]}}}, ("a", "b")),
        ({"meta": {"CLASSES": ("traffic_light", "polar_bear")}}, ("traffic light", "polar_bear")),  # COCO's, another's
        ({"meta": {"CLASSES": None, "dataset_meta": None}}, None),
        ({"meta": "text"}, None),
        ({}, None),
    ],
)
def test_class_names(tmp_path, content, names):
    assert read_checkpoint(save(content | {"state_dict": WEIGHTS}, tmp_path / "a.pth"))[1] == names


def test_a_bare_state_dict_in_half_precision(tmp_path):
    halves = {key: value.half() if value.is_floating_point() else value for key, value in WEIGHTS.items()}
    state, names = read_checkpoint(save(halves, tmp_path / "bare.pth"))
    assert names is None and state["a"].dtype == torch.float16
    state = {k: v.half() if v.is_floating_point() else v for k, v in reference_state(tiny()).items()}
    model = MODELS["gfl"](tiny().config)
    load_reference_state(model, state)
    assert model.dtype == torch.float32
    torch.testing.assert_close(model.head.cls_predictor.bias, tiny().head.cls_predictor.bias, atol=1e-3, rtol=0)


def test_every_wrong_key_is_listed_and_nothing_loaded():
    state = reference_state(tiny())
    del state["bbox_head.gfl_cls.bias"]
    state["bbox_head.atss_centerness.weight"] = torch.zeros(1)
    state["neck.lateral_convs.0.conv.weight"] = torch.zeros(256, 128, 1, 1)
    model = filled(MODELS["gfl"](tiny().config))
    with pytest.raises(CheckpointError) as caught:
        load_reference_state(model, state, source="teacher.pth")
    text = str(caught.value)
    assert "teacher.pth" in text and "resnet18" in text and "3 labels" in text and "architecture" in text
    assert "1 missing keys:\n    bbox_head.gfl_cls.bias" in text
    assert "1 unexpected keys:\n    bbox_head.atss_centerness.weight" in text
    assert "neck.lateral_convs.0.conv.weight: (256, 128, 1, 1), the model has (32, 128, 1, 1)" in text
    assert_equal_weights(model, tiny())
    with pytest.raises(CheckpointError, match=r"(?s)missing keys:.*\.\.\.") as caught:
        load_reference_state(model, WEIGHTS)
    assert len(str(caught.value).splitlines()) < 20, "many keys are cut short"


# Files that are no checkpoints --------------------------------------------------------------------------------------


@FORMATS
@pytest.mark.parametrize("kept", [0, 1, 0.5, 0.99])
def test_truncated_file(tmp_path, zip_format, kept):
    path = save({"meta": {}, "state_dict": {"a": torch.rand(1000)}}, tmp_path / "cut.pth", zip_format)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with pytest.raises(CheckpointError, match=r"cut\.pth can't be read safely"):
        read_checkpoint(path)


@pytest.mark.parametrize("content", [None, b"<html>404</html>", b"\x80\x02.", b"PK\x03\x04" + bytes(100), bytes(1000)])
def test_file_of_another_kind(tmp_path, content):
    if content is not None:
        (tmp_path / "other.pth").write_bytes(content)
    reason = "doesn't exist" if content is None else "can't be read safely"
    with pytest.raises(CheckpointError, match=rf"other\.pth {reason}"):
        read_checkpoint(tmp_path / "other.pth")


@pytest.mark.parametrize(
    "content",
    [[torch.zeros(1)], {}, {"state_dict": None}, {"state_dict": {"a": 1}}, {"state_dict": {1: torch.zeros(1)}}],
    ids=str,
)
def test_content_without_a_state_dict(tmp_path, content):
    with pytest.raises(CheckpointError, match="no state dict of tensors"):
        read_checkpoint(save(content, tmp_path / "other.pth"))


# Files that want to run code ----------------------------------------------------------------------------------------


@FORMATS
@pytest.mark.parametrize(
    "name",
    [
        "numpy.testing._private.utils.runstring",
        "numpy.load",
        "numpy.memmap",
        "numpy.core.multiarray._reconstruct",
        "numpy.os.system",
        "mmengine.utils.package_utils.call_command",
        "mmcv.os.system",
        "mmdet.apis.eval",
        "builtins.getattr",
    ],
)
def test_a_name_of_a_known_package_is_inert(tmp_path, zip_format, name):
    mark = tmp_path / "executed"
    hidden = Named(name, f"open({str(mark)!r}, 'w')", {})
    content = {"meta": {"CLASSES": CLASSES, "hidden": hidden}, "state_dict": WEIGHTS}
    before = set(sys.modules)
    state, names = read_checkpoint(save(content, tmp_path / "evil.pth", zip_format))
    assert torch.equal(state["a"], WEIGHTS["a"]) and names == CLASSES
    assert not mark.exists()
    assert not {module for module in set(sys.modules) - before if module.startswith(("numpy", "mm"))}


@FORMATS
@pytest.mark.parametrize("place", ["meta", "state_dict", "message_hub"])
@pytest.mark.parametrize(
    "name",
    [
        *("os.system", "posix.system", "mmengine_evil.run", "numpyx.run", "xnumpy.run", "subprocess.getoutput"),
        *("builtins.__import__", "builtins.getattrs", "__builtin__.eval", "torch.hub.load", "torch.load"),
        *("importlib.import_module", "operator.attrgetter", "pickle.loads"),
    ],
)
def test_a_name_of_another_package_is_refused_and_not_called(tmp_path, zip_format, place, name):
    mark = tmp_path / "executed"
    content = {"meta": {"CLASSES": CLASSES}, "state_dict": WEIGHTS}
    content[place] = content.get(place, {}) | {"hidden": Named(name, f"touch {mark}")}
    path = save(content, tmp_path / "evil.pth", zip_format)
    with pytest.raises(CheckpointError, match=name.split(".")[-1]):
        read_checkpoint(path)
    assert not mark.exists()
    if name == "os.system":
        torch.load(path, weights_only=False)
        assert mark.exists(), "plain pickle would run it"


@FORMATS
def test_getattr_gives_no_way_from_a_stand_in_to_code(tmp_path, zip_format):
    # getattr(getattr(numpy.core, "os"), "system")("touch ..."), as a chain of calls.
    mark = tmp_path / "executed"
    module = Named("builtins.getattr", Named("numpy.core", 1), "os")
    hidden = Named(Named("builtins.getattr", module, "system"), f"touch {mark}")
    path = save({"meta": {"hidden": hidden}, "state_dict": WEIGHTS}, tmp_path / "evil.pth", zip_format)
    with pytest.raises(CheckpointError, match="can't be read safely"):
        read_checkpoint(path)
    assert not mark.exists()
