"""CrossKD between query-based detectors: queries that left the student's layers finish in the *teacher's* decoder.

Reference boxes take the place of the alignment of statistics. Three passes differ in whose queries are compared:

* `teacher`: the student's layers run on the teacher's picks; compared with the teacher's own predictions.
* `student`: the student's own queries; compared with the teacher's decoder run on the student's picks.
* `memory`: the teacher's own queries, layer by layer, look at the student's encoder output.

`memory` follows the authors' Deformable DETR branch; `teacher` and `student` are not published.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...utils.recipe_fields import setting
from ..method import KDMethod
from ..observation import Observation, Observer, PairError
from ..observers.decoders.decoder import LayerPredictions, Memory, Picks, Queries, QueryDecoder, Run, same_places
from ..observers.query import QueryObserver, refuse_other_frames
from ..query_losses import confidence_weights, first, in_fp32, l1_giou_loss, pixel_l1_loss, query_cls_loss, stacked

BETWEEN_DECODERS = {"beta": 1.0, "box_loss": "l1_giou", "l1_weight": 5.0, "giou_weight": 2.0}
MEMORY = {"beta": 0.0, "box_loss": "pixels", "l1_weight": 1.0, "giou_weight": 1.0}  # as the reference's branch


@dataclass
class Settings:
    """Which pass, where the student's queries change over, and the weights. null takes the pass's own value."""

    weight: float = setting(1.0, "weight of all terms", minimum=0, maximum=1e6)
    queries: str | None = setting(
        None,
        "whose queries are compared; null: teacher, or memory where none are picked",
        ("teacher", "student", "memory"),
    )
    layer: int | None = setting(
        None, "teacher layers that the student's stand in for; null: half of them, rounded up", minimum=0
    )
    student_layer: int | None = setting(None, "layers the student runs; null: half of them, rounded up", minimum=0)
    memory_queries: str = setting(
        "teacher", "queries memory: whose queries look at the student's encoder output", ("teacher", "student")
    )
    beta: float | None = setting(
        None, "exponent of |p - p_teacher| in kd_cls; null: 1, of memory 0", minimum=0, maximum=10
    )
    cls_weight: float = setting(1.0, "weight of kd_cls", minimum=0, maximum=1e6)
    box_loss: str | None = setting(
        None,
        "kd_box: L1 and GIoU of relative boxes, or L1 of xyxy in pixels; null: l1_giou, of memory pixels",
        ("l1_giou", "pixels"),
    )
    l1_weight: float | None = setting(None, "weight of kd_box's L1; null: 5, of memory 1", minimum=0, maximum=1e6)
    giou_weight: float | None = setting(
        None, "weight of 1 - GIoU in l1_giou; null: 2, of memory 1", minimum=0, maximum=1e6
    )


class QueryCrossKD(KDMethod):
    """Terms `kd_cls` and `kd_box`: the mean over the teacher's remaining layers."""

    name = "query_crosskd"
    Settings = Settings

    def connect(self, student: Observer, teacher: Observer) -> None:
        """Adapt queries or memory, both with `memory_queries: student`, where the widths differ."""
        if not (isinstance(student, QueryObserver) and isinstance(teacher, QueryObserver)):
            raise PairError(
                "query_crosskd is for two query-based detectors; between dense ones it is crosskd, between both kinds "
                "soft_boxes"
            )
        widths = student.decoder.width, teacher.decoder.width
        refuse_other_frames(self.name, student, teacher)
        self.resolved = settings = _resolved(self.settings, student, teacher)
        levels = (observer.levels or range(len(observer.strides)) for observer in (student, teacher))
        self.levels = list(zip(*levels, strict=True))
        self.adapter = nn.Identity() if widths[0] == widths[1] else nn.Linear(*widths)
        if settings.memory_queries == "student":
            self.query_adapter = nn.Identity() if widths[0] == widths[1] else nn.Linear(*widths)

    def terms(
        self, student: Observation, teacher: Observation, student_observer: Observer, teacher_observer: Observer
    ) -> dict[str, Tensor]:
        """See `KDMethod.terms`; (layers, N, Q)."""
        assert isinstance(student_observer, QueryObserver) and isinstance(teacher_observer, QueryObserver)
        passes = {
            "teacher": self.at_teachers_picks,
            "student": self.at_students_picks,
            "memory": self.in_students_memory,
        }
        cross_pass = passes[self.resolved.queries]
        cross, target = cross_pass(
            student_observer.decoder, student.context, teacher_observer.decoder, teacher.context
        )
        count = min(cross[0].boxes.shape[1], target[0].boxes.shape[1])  # LW-DETR's slots are those of the smaller
        cross_layers, target_layers = (
            stacked([first(teacher_observer.shared(p), count) for p in layers]) for layers in (cross, target)
        )
        return self.losses(cross_layers, target_layers, teacher.context.image_sizes)

    # The three passes: predictions of the teacher's remaining layers, and those that they are compared with ---------

    def at_teachers_picks(
        self, student: QueryDecoder, run: Run, teacher: QueryDecoder, teacher_run: Run
    ) -> tuple[list[LayerPredictions], list[LayerPredictions]]:
        """The teacher's picks go through the student's layers, as a group of their own."""
        picks = moved(teacher_run.picks, teacher_run.memory, run.memory)
        queries, _ = student.layers(0, self.resolved.student_layer, student.start(picks, run.memory), run.memory)
        cross = self.finish(queries, student, teacher, teacher_run.start, teacher_run.memory)
        with torch.no_grad():
            own = teacher.own_layers(teacher_run)[1]
        return cross, own[self.resolved.layer :]

    def at_students_picks(
        self, student: QueryDecoder, run: Run, teacher: QueryDecoder, teacher_run: Run
    ) -> tuple[list[LayerPredictions], list[LayerPredictions]]:
        """The student's picks go through the teacher's decoder."""
        queries = student.own_layers(run, self.resolved.student_layer)[0][-1]
        with torch.no_grad():
            start = teacher.start(moved(run.picks, run.memory, teacher_run.memory), teacher_run.memory)
            _, target = teacher.layers(0, teacher.depth, start, teacher_run.memory)
        return self.finish(queries, student, teacher, start, teacher_run.memory), target[self.resolved.layer :]

    def in_students_memory(
        self, student: QueryDecoder, run: Run, teacher: QueryDecoder, teacher_run: Run
    ) -> tuple[list[LayerPredictions], list[LayerPredictions]]:
        """Each layer of the teacher's is called once more: on its own queries, or on those that reached the student's
        layer of the same number.
        """
        adapted = replace(run.memory, tokens=self.adapter(run.memory.tokens))
        memory = seen_by_teacher(adapted, teacher_run.memory, self.levels)
        with torch.no_grad():
            before, target = teacher.own_layers(teacher_run)
        if self.resolved.memory_queries == "student":
            before = self.students_queries(student, run, teacher, teacher_run)
            with torch.no_grad():
                target = [teacher.layer(i, queries, teacher_run.memory)[1] for i, queries in enumerate(before)]
        return [teacher.layer(i, queries, memory)[1] for i, queries in enumerate(before[: teacher.depth])], target

    def students_queries(
        self, student: QueryDecoder, run: Run, teacher: QueryDecoder, teacher_run: Run
    ) -> list[Queries]:
        """The student's queries before each of its layers, as the teacher's; as many as both have layers."""
        start = teacher_run.start
        if run.picks is not None:
            with torch.no_grad():
                start = teacher.start(moved(run.picks, run.memory, teacher_run.memory), teacher_run.memory)
        before = student.own_layers(run, min(student.depth, teacher.depth) - 1)[0]
        adapted = (replace(queries, hidden=self.query_adapter(queries.hidden)) for queries in before)
        return [teacher.adopt(queries, student, start) for queries in adapted]

    def finish(
        self, queries: Queries, student: QueryDecoder, teacher: QueryDecoder, start: Queries, memory: Memory
    ) -> list[LayerPredictions]:
        """The rest of the teacher's decoder on queries that left the student's layers.

        Args:
            start: the teacher's own queries at the same picks.
            memory: the teacher's.
        """
        adopted = teacher.adopt(replace(queries, hidden=self.adapter(queries.hidden)), student, start)
        if self.resolved.layer == 0:  # D-FINE's first layer makes its own first boxes
            adopted = replace(adopted, first_boxes=None, corners=None)
        return teacher.layers(self.resolved.layer, teacher.depth, adopted, memory)[1]

    def losses(self, cross: LayerPredictions, target: LayerPredictions, sizes: Tensor) -> dict[str, Tensor]:
        """Both terms, (layers, N, Q).

        Args:
            cross, target: (layers, N, Q, ...).
            sizes: (N, 2) height and width in pixels of what boxes are relative to.
        """
        settings = self.resolved
        with torch.autocast(cross.logits.device.type, enabled=False):
            cross, target = (in_fp32(p) for p in (cross, target))
            sure = confidence_weights(target)
            classes = query_cls_loss(cross.logits, target.logits, settings.beta)
            # The reference's branch averages over the queries, whatever the teacher makes of them.
            classes = classes / classes[0].numel() if settings.queries == "memory" else classes * sure
            if settings.box_loss == "pixels":
                boxes = settings.l1_weight * pixel_l1_loss(cross.boxes, target.boxes, sizes)
            else:
                boxes = l1_giou_loss(cross.boxes, target.boxes, settings.l1_weight, settings.giou_weight)
            weight = settings.weight / len(sure)  # the mean over layers
            return {"kd_cls": classes * (weight * settings.cls_weight), "kd_box": boxes * sure * weight}


def moved(picks: Picks | None, memory: Memory, other: Memory) -> Picks:
    """Picks from one memory at the same places of another."""
    assert picks is not None  # see `connect`
    return (
        picks if picks.tokens is None else replace(picks, tokens=same_places(picks.tokens, memory.sizes, other.sizes))
    )


def seen_by_teacher(memory: Memory, teacher: Memory, levels: list[tuple[int, int]]) -> Memory:
    """The teacher's memory, with the student's tokens on the levels that both have.

    Args:
        memory: the student's.
        teacher: the teacher's; of its other levels it sees its own tokens.
        levels: (student's, teacher's) number of each level of the same stride.

    Raises:
        PairError: such levels have other sizes.
    """
    seen, others = (list(m.tokens.split([h * w for h, w in m.sizes], 1)) for m in (teacher, memory))
    for own, teachers in levels:
        if memory.sizes[own] != teacher.sizes[teachers]:
            sizes = f"{memory.sizes[own]} and {teacher.sizes[teachers]}"
            raise PairError(
                f"query_crosskd: levels of one stride have {sizes} cells: set data.size to multiples of 32"
            )
        seen[teachers] = others[own]
    return replace(teacher, tokens=torch.cat(seen, 1))


def _resolved(settings: Settings, student: QueryObserver, teacher: QueryObserver) -> Settings:
    """With every null filled in.

    Raises:
        PairError: the pair can't run that pass.
    """
    picking = all(observer.picks for observer in (student, teacher))
    placed = student.decoder.can_start_from(teacher.decoder)
    queries = settings.queries or ("teacher" if picking and placed else "memory")
    if queries == "memory":
        if not student.strides:
            raise PairError("query_crosskd.queries is memory, but no level of both has the same stride")
    elif not picking:
        raise PairError(
            f"query_crosskd.queries is {queries}, but queries are picked by two-stage detectors only: set it to memory"
        )
    else:
        receiver, giver = (student, teacher) if queries == "teacher" else (teacher, student)
        if not receiver.decoder.can_start_from(giver.decoder):
            raise PairError(
                f"query_crosskd.queries is {queries}, but {giver.model_type} picks boxes only, and "
                f"{receiver.model_type} needs to know where in the image: set it to memory"
            )
    if settings.memory_queries == "student" and queries != "memory":
        raise PairError(f"query_crosskd.memory_queries is student, but queries is {queries}: set that to memory")
    values: dict[str, Any] = {"queries": queries}
    defaults = MEMORY if queries == "memory" else BETWEEN_DECODERS
    values |= {name: value for name, value in defaults.items() if getattr(settings, name) is None}
    for name, whose, observer in (("layer", "teacher", teacher), ("student_layer", "student", student)):
        depth, given = observer.decoder.depth, getattr(settings, name)
        layer = values[name] = (depth + 1) // 2 if given is None else given
        most = depth - 1 if whose == "teacher" else depth
        if layer > most:
            raise PairError(
                f"query_crosskd.{name} is {layer}, the {whose}'s decoder has {depth} layers: set it to {most} or less"
            )
    return replace(settings, **values)
