"""New processes for tests. They fork from one that has imported the package, so that each doesn't take its 10 s.

As spawned ones they get pickles, and nothing of the state of the tests' process.
"""

import multiprocessing
from collections.abc import Callable

import torch.multiprocessing

multiprocessing.set_forkserver_preload(["pytest", "torch.distributed", "crosskd_hf.training.trainer"])
CONTEXT = multiprocessing.get_context("forkserver")


def run_processes(function: Callable, args: tuple, count: int) -> None:
    """Call `function(rank, *args)` in `count` processes at once, and wait for them.

    Raises:
        ProcessRaisedException: what one of them raised.
    """
    torch.multiprocessing.start_processes(function, args, nprocs=count, start_method="forkserver")
