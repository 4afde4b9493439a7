"""What a distillation method is: a module that turns two observations of a batch into loss terms."""

from typing import Any, ClassVar

from torch import Tensor, nn

from ..utils.recipe_fields import check_limits
from .observation import Observation, Observer


class KDMethod(nn.Module):
    """Base of the methods. It knows a method and no family of detectors.

    A method is one file in `methods/`, named as the method, with a dataclass `Settings` and a subclass of this one.
    What it trains itself (adapters, generators) are its submodules: they are trained, averaged by DDP and kept in
    checkpoints with the student, and left out of the saved student.

    Args:
        settings: a `Settings` of this method; None: the published ones.

    Raises:
        TypeError: the settings are something else.
        ValueError: a setting is beyond its limits.

    Attributes:
        name: what recipes call it, and its file is called; a subclass sets it.
        Settings: the dataclass of its settings; a subclass sets it.
        resolved: the settings in effect: `connect` may fill in what depends on the teacher.
        connected: whether it belongs to a pair. It can't belong to another one, too.
    """

    name: ClassVar[str]
    Settings: ClassVar[type]
    resolved: Any
    connected = False

    def __init_subclass__(cls, **options) -> None:
        super().__init_subclass__(**options)
        if missing := [attribute for attribute in ("name", "Settings") if not hasattr(cls, attribute)]:
            raise TypeError(f"the distillation method {cls.__name__} needs the class attributes {', '.join(missing)}")

    def __init__(self, settings: Any = None):
        super().__init__()
        self.settings = self.Settings() if settings is None else settings
        if not isinstance(self.settings, self.Settings):
            own = type(self).__name__
            raise TypeError(f"{own}({settings!r}): give a {own}.Settings, such as {own}({own}.Settings())")
        check_limits(self.settings, self.name)
        self.resolved = self.settings

    def connect(self, student: Observer, teacher: Observer) -> None:
        """Ask both observers for what the method looks at, and make what it trains. Called once, before training.

        Raises:
            PairError: the method can't work for this pair.
        """
        raise NotImplementedError

    def labels(self, labels: Any, teacher: Observation, student_observer: Observer, teacher_observer: Observer) -> Any:
        """What the student learns from its own losses; here, what it is given.

        Args:
            labels: as the student takes them; None of an unlabelled batch.
            teacher: of the same images.
            student_observer, teacher_observer: those that `connect` was given.
        """
        return labels

    def terms(
        self, student: Observation, teacher: Observation, student_observer: Observer, teacher_observer: Observer
    ) -> dict[str, Tensor]:
        """Loss terms of a batch.

        Args:
            student: with targets, if the batch is labelled; gradients flow.
            teacher: of the same images, without gradient.
            student_observer, teacher_observer: those that `connect` was given.

        Returns:
            name -> tensor of any shape (prior by prior, level by level), weighted and normalised; its sum is the loss.
        """
        raise NotImplementedError

    def forward(
        self, student: Observation, teacher: Observation, student_observer: Observer, teacher_observer: Observer
    ) -> dict[str, Tensor]:
        """The sums of `terms`: name -> scalar."""
        terms = self.terms(student, teacher, student_observer, teacher_observer)
        return {name: term.sum() for name, term in terms.items()}
