"""Observers, one file a family of detectors."""
