"""A training step and an inference of each detector on a device that is as strict as a GPU, see `pretend_device`."""

import json
import subprocess
import sys

import pytest
from paths import TESTS
from torch.utils import backend_registration

DETECTORS = ("gfl", "retinanet", "fcos", "atss")
pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch can't register a device from Python",
)


@pytest.fixture(scope="module")
def report() -> dict:
    """Of a process of its own, in which the device stays registered."""
    script = TESTS / "pretend_device.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("detector", DETECTORS)
def test_a_step_and_an_inference_mix_no_devices(report: dict, detector: str) -> None:
    found = report[detector]
    assert found["operators"] > 1000
    assert found["loss"][0] == pytest.approx(found["loss"][1], rel=1e-5)
    assert found["gradient"] < 1e-4 and found["score"] < 1e-5
    assert found["detections"][0] == found["detections"][1] and min(found["detections"][0]) > 0
    assert not any(found["waits"].values()), "the host waits"


def test_a_tensor_left_on_the_cpu_is_refused(report: dict) -> None:
    planted = report["planted"]
    assert len(planted) == 3 and all("mixes tensors" in text for text in planted.values()), planted


def test_what_a_host_waits_for_is_counted(report: dict) -> None:
    assert report["counted"] == {
        "blocking copy": 2,  # .to() and torch.tensor()
        "aten._local_scalar_dense.default": 1,
        "aten.nonzero.default": 1,
        "aten.index.Tensor": 1,
    }


def test_towers_keep_half_precision_under_cudas_autocast(report: dict) -> None:
    assert report["cuda_autocast"] == dict.fromkeys(("gfl", "retinanet"), "torch.bfloat16")
