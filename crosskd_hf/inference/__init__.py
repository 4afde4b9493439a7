"""Detections of images, and models for other runtimes."""
