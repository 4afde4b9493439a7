"""From files to batches: `coco` annotations, `dataset` items, `transforms`, the order of `sampler`, `collator`.

Nothing is imported here, so that inference, which needs `transforms` alone, does not load the `datasets` library.
"""
