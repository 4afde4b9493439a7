"""The model card of a trained detector, rendered from plain facts: what it is, how it was made, what it measured.

`model_card.md` beside this module is the template. Everything that it shows has been made harmless here: names may
come from outside.
"""

import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..utils.escaping import markdown, markdown_block, markdown_code, printable
from ..utils.files import write_atomically
from ..utils.redact import without_tokens

logger = logging.getLogger(__name__)

TEMPLATE = Path(__file__).with_name("model_card.md")
CARD_FILE = "README.md"
MARKER = "<!-- Written by crosskd_hf, which will write it again; remove this line to keep your own changes. -->"
# Ours, and what transformers' Trainer and push_to_hub say in theirs.
GENERATED = (MARKER, "has been generated automatically", "has been automatically generated")
# Metric -> what COCO calls it.
COCO_METRICS = {
    "AP": "IoU 0.50:0.95, all areas, 100 detections an image",
    "AP50": "IoU 0.50, all areas, 100 detections an image",
    "AP75": "IoU 0.75, all areas, 100 detections an image",
    "APs": "IoU 0.50:0.95, areas below 32^2 pixels, 100 detections an image",
    "APm": "IoU 0.50:0.95, areas of 32^2 to 96^2 pixels, 100 detections an image",
    "APl": "IoU 0.50:0.95, areas above 96^2 pixels, 100 detections an image",
}


@dataclass(frozen=True)
class DetectorFacts:
    """What a detector is.

    Attributes:
        architecture: as people write it, such as GFL.
        model_type: of its configuration.
        backbone: timm's name of it.
    """

    architecture: str
    model_type: str
    backbone: str


@dataclass(frozen=True)
class TeacherFacts:
    """A student's teacher.

    Attributes:
        detector: what it is.
        name: what to call it; never a complete local path.
        hub_id: if it came from the Hub.
    """

    detector: DetectorFacts
    name: str
    hub_id: str | None = None


@dataclass(frozen=True)
class DataFacts:
    """The data that a model was evaluated on.

    Attributes:
        name: as people call it.
        hub_id: of the data set, if it is one of the Hub.
        config: its configuration there.
        split: that was evaluated on.
        images: their number in the evaluation.
    """

    name: str = "evaluation data"
    hub_id: str | None = None
    config: str | None = None
    split: str | None = None
    images: int | None = None


@dataclass(frozen=True)
class CardFacts:
    """All that a model card is written from.

    Attributes:
        name: of the model.
        detector: what the model is.
        label_names: its classes, in the order of the labels.
        repo_id: where it is or will be on the Hub.
        teacher: None if it was trained alone.
        methods: by which it was distilled.
        started_from: Hub id of the detector whose weights training started from.
        data: what the metrics are of.
        metrics: COCO metrics in 0..1; only those of `COCO_METRICS` that were measured are told.
        training: lines "what -> value" on how it was trained.
        recipe: the resolved recipe as YAML that everybody may read.
        license, tags, language, pipeline_tag, datasets: metadata beside or instead of the usual.
    """

    name: str
    detector: DetectorFacts
    label_names: Sequence[str]
    repo_id: str | None = None
    teacher: TeacherFacts | None = None
    methods: Sequence[str] = ()
    started_from: str | None = None
    data: DataFacts = DataFacts()
    metrics: Mapping[str, float] = field(default_factory=dict)
    training: Mapping[str, str] = field(default_factory=dict)
    recipe: str | None = None
    license: str = "apache-2.0"
    tags: Sequence[str] = ()
    language: str | None = None
    pipeline_tag: str = "object-detection"
    datasets: Sequence[str] = ()


def model_card(facts: CardFacts) -> ModelCard:
    """The card of a trained detector.

    Raises:
        ValueError: the metadata isn't one that the Hub's client reads.
    """
    data, teacher = facts.data, facts.teacher
    hub_id = teacher and teacher.hub_id
    card = ModelCard.from_template(
        card_data(facts),
        template_path=str(TEMPLATE),
        title=markdown(facts.name),
        marker=MARKER,
        detector=_description(facts.detector),
        teacher=teacher
        and (f"[{hub_id}](https://huggingface.co/{hub_id})" if hub_id else markdown_code(teacher.name)),
        crosskd="crosskd" in facts.methods,
        teacher_detector=teacher and _description(teacher.detector),
        # Quoted, whatever it holds.
        source=printable(json.dumps(facts.repo_id or facts.name, ensure_ascii=False)),
        results=eval_results(facts),
        data=markdown(" ".join(filter(None, (data.name, data.config, data.split)))),
        images=data.images,
        labels=[markdown_code(name) for name in facts.label_names],
        training=facts.training,
        recipe=facts.recipe and markdown_block(facts.recipe, "yaml"),
        license=facts.license,
    )
    return ModelCard(without_tokens(str(card)))


def card_data(facts: CardFacts) -> ModelCardData:
    """The card's metadata."""
    detector, teacher = facts.detector, facts.teacher.hub_id if facts.teacher else None
    bases = unique(filter(None, (facts.started_from, teacher)))
    # Without a relation the Hub takes one by itself: it has no word for a teacher.
    relation = {"base_model_relation": "finetune"} if bases and not teacher else {}
    results = eval_results(facts)
    distilled = ["knowledge-distillation", *facts.methods] if facts.teacher else []
    tags = ["crosskd_hf", *distilled, "object-detection"]
    tags += [detector.model_type.removeprefix("crosskd_"), detector.model_type, *facts.tags]
    return ModelCardData(
        language=facts.language,
        license=facts.license,
        library_name="transformers",
        pipeline_tag=facts.pipeline_tag,
        tags=unique(tags),
        base_model=bases or None,
        datasets=unique(filter(None, (facts.data.hub_id, *facts.datasets))) or None,
        model_name=facts.name if results else None,
        eval_results=results or None,
        **relation,
    )


def eval_results(facts: CardFacts) -> list[EvalResult]:
    """The measured metrics; -1, which COCO's metrics have where there is nothing to find, and NaN aren't any."""
    data = facts.data
    slug = re.sub(r"[^a-z0-9._-]+", "-", data.name.lower()).strip("-") or "unknown"
    return [
        EvalResult(
            task_type="object-detection",
            task_name="Object Detection",
            dataset_type=data.hub_id or slug,
            dataset_name=data.name,
            dataset_config=data.config,
            dataset_split=data.split,
            metric_type=name,
            metric_name=name,
            metric_value=float(facts.metrics[name]),
            metric_config=f"COCO metrics, bbox, {how}",
        )
        for name, how in COCO_METRICS.items()
        if facts.metrics.get(name, -1) >= 0
    ]


def _description(detector: DetectorFacts) -> str:
    article = "an" if detector.architecture[0] in "AF" else "a"  # ATSS and FCOS, as they are spoken
    return f"{article} {detector.architecture} detector with the backbone `{detector.backbone}`"


def unique(values: Iterable[str]) -> list[str]:
    """The values in their order, each once."""
    return list(dict.fromkeys(values))


def write_model_card(folder: str | Path, facts: CardFacts) -> bool:
    """Write `README.md`, unless there is one that somebody wrote.

    Returns:
        whether it was written.

    Raises:
        OSError: it can't be written.
    """
    path = Path(folder) / CARD_FILE
    if path.exists() and not is_generated(path):
        logger.warning("%s isn't a generated card: it is left as it is", path)
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, str(model_card(facts)))
    return True


def is_generated(card: Path) -> bool:
    """Whether a card was written by this package or by transformers, not by somebody."""
    text = card.read_text(encoding="utf-8-sig", errors="replace")
    return any(words in text for words in GENERATED)
