"""From files to batches: `coco` annotations, `dataset` items, `transforms`, the order of `sampler`, `collator`."""
