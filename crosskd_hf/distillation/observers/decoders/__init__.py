"""Decoders of transformers' query-based detectors, one file per group of families."""
