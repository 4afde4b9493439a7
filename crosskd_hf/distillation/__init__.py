"""One way of distilling: a pair of models, observed, and methods between them."""

from .method import KDMethod
from .methods import method_class, method_names
from .methods.crosskd import CrossKD
from .methods.mimic import Mimic
from .methods.pkd import PKD
from .methods.query_crosskd import QueryCrossKD
from .methods.query_mimic import QueryMimic
from .methods.soft_boxes import SoftBoxes
from .observation import Observation, Observer, PairError, Predictions, Targets
from .pair import DistillationPair, PairOutput

__all__ = [
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
]
