"""transformers' `ImageProcessingTestMixin` on the processor. Run by `python tests/upstream/run.py`."""

import unittest

import pytest

common = pytest.importorskip("transformers_tests.test_image_processing_common", reason="python tests/upstream/run.py")

import crosskd_hf  # noqa: E402


class ProcessorTester(common.ImageProcessingTester):
    """Small images for the processor."""

    def __init__(self, parent, **kwargs):
        kwargs.setdefault("size", {"shortest_edge": 48, "longest_edge": 96})
        super().__init__(parent, min_resolution=30, max_resolution=200, **kwargs)

    def _get_image_processing_classes(self):
        # The mixin would look for a model named like this folder.
        return {"torchvision": crosskd_hf.DenseDetectorImageProcessor}

    def expected_output_image_shape(self, images):
        # Padded to a multiple of size_divisor, which the mixin doesn't know of.
        channels, height, width = super().expected_output_image_shape(images)
        return channels, -(-height // 32) * 32, -(-width // 32) * 32


class ProcessorTest(common.ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = ProcessorTester
