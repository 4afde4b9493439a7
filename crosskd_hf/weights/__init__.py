"""Weights from elsewhere: MMDetection checkpoints, downloads, saved detectors."""
