"""The machine that a program runs on."""

import os


def is_busy() -> bool:
    """Whether other programs want the processor's cores, too: where so, one thread is faster than several that wait
    for each other. False where the system doesn't say."""
    if not hasattr(os, "getloadavg"):
        return False
    return os.getloadavg()[0] > 0.75 * (os.cpu_count() or 1)


def threads_are_chosen() -> bool:
    """Whether the user has said how many threads to use."""
    return "OMP_NUM_THREADS" in os.environ
