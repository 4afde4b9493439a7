"""One way of distilling: a pair of models, observed, and methods between them.

Names are loaded when they are first used: who reads a recipe doesn't wait for the models.
"""

from typing import TYPE_CHECKING

from ..utils.lazy_names import lazy_names

if TYPE_CHECKING:
    from .compatibility import pair_up
    from .method import KDMethod
    from .methods import method_class, method_names
    from .methods.bckd import BCKD
    from .methods.crosskd import CrossKD
    from .methods.cwd import CWD
    from .methods.fgd import FGD
    from .methods.ld import LD
    from .methods.mgd import MGD
    from .methods.mimic import Mimic
    from .methods.pkd import PKD
    from .methods.query_crosskd import QueryCrossKD
    from .methods.query_mimic import QueryMimic
    from .methods.soft_boxes import SoftBoxes
    from .observation import Observation, Observer, PairError, Predictions, Targets
    from .pair import DistillationPair, PairOutput

# Module -> the public names that it holds.
HOMES = {
    "compatibility": ("pair_up",),
    "method": ("KDMethod",),
    "methods": ("method_class", "method_names"),
    "methods.bckd": ("BCKD",),
    "methods.crosskd": ("CrossKD",),
    "methods.cwd": ("CWD",),
    "methods.fgd": ("FGD",),
    "methods.ld": ("LD",),
    "methods.mgd": ("MGD",),
    "methods.mimic": ("Mimic",),
    "methods.pkd": ("PKD",),
    "methods.query_crosskd": ("QueryCrossKD",),
    "methods.query_mimic": ("QueryMimic",),
    "methods.soft_boxes": ("SoftBoxes",),
    "observation": ("Observation", "Observer", "PairError", "Predictions", "Targets"),
    "pair": ("DistillationPair", "PairOutput"),
}
__getattr__, __dir__ = lazy_names(__name__, HOMES)

__all__ = [
    "BCKD",
    "CWD",
    "FGD",
    "LD",
    "MGD",
    "PKD",
    "CrossKD",
    "DistillationPair",
    "KDMethod",
    "Mimic",
    "Observation",
    "Observer",
    "PairError",
    "PairOutput",
    "Predictions",
    "QueryCrossKD",
    "QueryMimic",
    "SoftBoxes",
    "Targets",
    "method_class",
    "method_names",
    "pair_up",
]
