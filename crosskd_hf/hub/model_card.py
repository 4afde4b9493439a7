"""The model card of a trained detector: what it is, how it was made, what it measured, how it is used."""

import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..models.configuration import DenseDetectorConfig
from ..recipe.sections import RECIPE_FILE, DataSection, Recipe
from ..utils.escaping import markdown, markdown_block, markdown_code, printable
from ..utils.files import write_atomically
from ..utils.redact import last_part, public, without_tokens
from ..version import __version__

if TYPE_CHECKING:
    from ..training.trainer import DetectionTrainer

logger = logging.getLogger(__name__)

CARD_FILE = "README.md"
MARKER = "<!-- Written by crosskd_hf, which will write it again; remove this line to keep your own changes. -->"
# Ours, and what transformers' Trainer and push_to_hub say in theirs.
GENERATED = (MARKER, "has been generated automatically", "has been automatically generated")
TAGS = ("crosskd", "knowledge-distillation", "object-detection")
# Metric -> what COCO calls it.
COCO_METRICS = {
    "AP": "IoU 0.50:0.95, all areas, 100 detections an image",
    "AP50": "IoU 0.50, all areas, 100 detections an image",
    "AP75": "IoU 0.75, all areas, 100 detections an image",
    "APs": "IoU 0.50:0.95, areas below 32^2 pixels, 100 detections an image",
    "APm": "IoU 0.50:0.95, areas of 32^2 to 96^2 pixels, 100 detections an image",
    "APl": "IoU 0.50:0.95, areas above 96^2 pixels, 100 detections an image",
}
LIBRARIES = ("torch", "torchvision", "transformers", "timm", "accelerate", "datasets", "pycocotools")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
PAPER = "https://arxiv.org/abs/2306.11369"
CITATION = """@inproceedings{wang2024crosskd,
  title     = {CrossKD: Cross-Head Knowledge Distillation for Object Detection},
  author    = {Wang, Jiabao and Chen, Yuming and Zheng, Zhaohui and Li, Xiang and Cheng, Ming-Ming and Hou, Qibin},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  year      = {2024},
  eprint    = {2306.11369},
  archivePrefix = {arXiv}
}"""


# What a card tells ----------------------------------------------------------------------------------------------


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
class TeacherFacts:
    """A student's teacher.

    Attributes:
        config: its configuration.
        name: what to call it; never a whole local path.
        hub_id: if it came from the Hub.
    """

    config: DenseDetectorConfig
    name: str
    hub_id: str | None = None


@dataclass(frozen=True)
class CardFacts:
    """All that a model card is written from.

    Attributes:
        name: of the model.
        config: of the model.
        repo_id: where it is or will be on the Hub.
        teacher: None if it was trained alone.
        started_from: Hub id of the detector whose weights training started from.
        data: what the metrics are of.
        metrics: COCO metrics in 0..1; only those of `COCO_METRICS` that were measured are told.
        training: lines "what -> value" on how it was trained.
        recipe: the resolved recipe.
        license, tags, language, pipeline_tag, datasets: metadata beside or instead of the usual.
    """

    name: str
    config: DenseDetectorConfig
    repo_id: str | None = None
    teacher: TeacherFacts | None = None
    started_from: str | None = None
    data: DataFacts = DataFacts()
    metrics: Mapping[str, float] = field(default_factory=dict)
    training: Mapping[str, str] = field(default_factory=dict)
    recipe: Recipe | None = None
    license: str = "apache-2.0"
    tags: Sequence[str] = ()
    language: str | None = None
    pipeline_tag: str = "object-detection"
    datasets: Sequence[str] = ()


def trainer_facts(trainer: "DetectionTrainer", recipe: Recipe | None, name: str, **more: Any) -> CardFacts:
    """What a trainer knows of its model.

    Args:
        trainer: before, in or after training.
        recipe: that the trainer was built from, if it was.
        name: of the model.
        more: further fields of `CardFacts`, which go before the trainer's.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    teacher = getattr(trainer, "teacher", None)
    dataset = trainer.eval_dataset
    images = None if dataset is None else len(dataset)
    facts = {
        "name": name,
        "config": model.config,
        "repo_id": trainer.hub_model_id,
        "teacher": None if teacher is None else _teacher_facts(teacher.config, recipe),
        "started_from": _hub_source(model.config),
        "data": DataFacts(images=images) if recipe is None else data_facts(recipe.data, images),
        "metrics": measured(trainer),
        "training": _training_facts(trainer),
        "recipe": recipe,
    }
    return CardFacts(**{**facts, **more})


def measured(trainer: "DetectionTrainer") -> dict[str, float]:
    """The metrics of the model as it is now on the trainer's own eval data; empty if there was no such evaluation."""
    step, metrics = trainer.last_evaluation
    loader = trainer.callback_handler.eval_dataloader
    own = getattr(trainer.eval_dataset, "split", None)
    if step != trainer.state.global_step or loader is None or loader.dataset.split is not own:
        return {}
    history = trainer.state.log_history
    ended, evaluated = (
        max((i for i, entry in enumerate(history) if key in entry), default=-1) for key in ("train_runtime", "eval_AP")
    )
    # At the end of training the best checkpoint may have taken the place of what was evaluated.
    best = trainer.state.best_global_step
    if trainer.args.load_best_model_at_end and best not in (None, step) and evaluated < ended:
        return {}
    return {name: metrics[f"eval_{name}"] for name in COCO_METRICS if f"eval_{name}" in metrics}


def data_facts(data: DataSection, images: int | None) -> DataFacts:
    """The evaluation data of a recipe."""
    on_hub = data.layout == "datasets" and HUB_ID.fullmatch(data.path) and not Path(data.path).exists()
    if data.layout == "shapes":
        name = "generated shapes"
    else:
        name = data.path if on_hub else last_part(data.path)
    return DataFacts(name, data.path if on_hub else None, data.config, data.val_split, images)


def _teacher_facts(config: DenseDetectorConfig, recipe: Recipe | None) -> TeacherFacts:
    # Not the name of the loaded folder if there is a recipe: a converted .pth lies in a cache.
    hub_id = _hub_source(config)
    source = (recipe.teacher.checkpoint if recipe and recipe.teacher else None) or config.name_or_path
    if source == "random":
        name = "a teacher with random weights"
    else:
        name = hub_id or (public(source) if "://" in source else last_part(source)) or "a teacher made in Python"
    return TeacherFacts(config, name, hub_id)


def _hub_source(config: DenseDetectorConfig) -> str | None:
    """Hub id that a model was loaded from. It was loaded here, so that a folder's name is that of one."""
    name = config.name_or_path
    return name if "/" in name and HUB_ID.fullmatch(name) and not Path(name).exists() else None


def _training_facts(trainer: "DetectionTrainer") -> dict[str, str]:
    args, state = trainer.args, trainer.state
    schedule = f"times {args.lr_gamma:g} after epochs {args.lr_milestones}"
    if args.lr_milestones is None:
        schedule = str(args.lr_scheduler_type.value)
    facts = {
        "Steps": f"{state.global_step}" + (f" of {state.max_steps}" if state.global_step < state.max_steps else ""),
        "Epochs": f"{state.epoch or 0:.4g}",
        "Training images": str(len(trainer.train_dataset)) if trainer.train_dataset is not None else "",
        "Global batch": f"{args.global_batch_size} images ({args.per_device_train_batch_size} a device x "
        f"{args.world_size} processes x {args.gradient_accumulation_steps} accumulated)",
        "Processes": str(args.world_size),
        "Optimizer": f"{getattr(args.optim, 'value', args.optim)}, weight decay {args.weight_decay:g}",
        "Learning rate": f"{args.scaled_learning_rate:g}, {schedule}, warm-up {args.warmup_steps:g}",
        "Weights": "" if args.ema_decay is None else f"average of the trained ones, decay {args.ema_decay:g}",
        "Precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
        "Seed": str(args.seed),
        "Distillation": str(trainer.settings) if getattr(trainer, "settings", None) else "",
        "Versions": ", ".join([f"crosskd_hf {__version__}", *filter(None, map(_library, LIBRARIES))]),
    }
    return {name: value for name, value in facts.items() if value}


def _library(name: str) -> str | None:
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return None


# What may be read by everybody -----------------------------------------------------------------------------------


def public_recipe(recipe: Recipe) -> str:
    """A resolved recipe as YAML, without the folders of the machine, credentials in URLs, or tokens."""
    content = {
        section: values and {key: public(value) for key, value in values.items()}
        for section, values in recipe.to_dict().items()
    }
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


# The card -------------------------------------------------------------------------------------------------------


def model_card(facts: CardFacts) -> ModelCard:
    """The card of a trained detector.

    Raises:
        ValueError: the metadata isn't one that the Hub's client reads.
    """
    sections = (
        f"# {markdown(facts.name)}",
        MARKER,
        _introduction(facts),
        _usage(facts),
        _results(facts),
        _labels(facts.config),
        _training(facts),
        _licence(facts),
        f"## Citation\n\n```bibtex\n{CITATION}\n```",
    )
    text = "\n\n".join(section for section in sections if section)
    return ModelCard(without_tokens(f"---\n{card_data(facts).to_yaml()}\n---\n\n{text}\n"))


def card_data(facts: CardFacts) -> ModelCardData:
    """The card's metadata."""
    teacher = facts.teacher.hub_id if facts.teacher else None
    bases = unique(filter(None, (facts.started_from, teacher)))
    # Without a relation the Hub takes one by itself: it has no word for a teacher.
    relation = {"base_model_relation": "finetune"} if bases and not teacher else {}
    results = eval_results(facts)
    tags = [*TAGS, _detector(facts.config), facts.config.model_type, *facts.tags]
    return ModelCardData(
        language=facts.language,
        license=facts.license,
        library_name="transformers",
        pipeline_tag=facts.pipeline_tag,
        tags=unique(tag for tag in tags if facts.teacher or tag != "knowledge-distillation"),
        base_model=bases or None,
        datasets=unique(filter(None, (facts.data.hub_id, *facts.datasets))) or None,
        model_name=facts.name if results else None,
        eval_results=results or None,
        **relation,
    )


def eval_results(facts: CardFacts) -> list[EvalResult]:
    """The measured metrics; -1, which pycocotools gives where there is nothing to find, and NaN aren't any."""
    data = facts.data
    return [
        EvalResult(
            task_type="object-detection",
            task_name="Object Detection",
            dataset_type=data.hub_id or _slug(data.name),
            dataset_name=data.name,
            dataset_config=data.config,
            dataset_split=data.split,
            metric_type=name,
            metric_name=name,
            metric_value=float(facts.metrics[name]),
            metric_config=f"pycocotools COCOeval, bbox, {how}",
        )
        for name, how in COCO_METRICS.items()
        if _is_measured(facts.metrics.get(name))
    ]


def _is_measured(value: float | None) -> bool:
    return value is not None and math.isfinite(value) and value >= 0


def _introduction(facts: CardFacts) -> str:
    text = f"{_upper(_architecture(facts.config))}, trained with `crosskd_hf`"
    teacher = facts.teacher
    if teacher is None:
        return f"{text}, alone: without a teacher."
    name = markdown_code(teacher.name)
    if teacher.hub_id:
        name = f"[{teacher.hub_id}](https://huggingface.co/{teacher.hub_id})"
    return (
        f"{text} as the student of {name}, {_architecture(teacher.config)}. The method is cross-head knowledge "
        f"distillation ([CrossKD]({PAPER})); the teacher is no part of this model."
    )


def _usage(facts: CardFacts) -> str:
    where = printable(json.dumps(facts.repo_id or facts.name, ensure_ascii=False))  # quoted, whatever it holds
    return f"""## Use

```python
import crosskd_hf  # registers the detectors
from transformers import AutoImageProcessor, AutoModelForObjectDetection, pipeline

pipeline("object-detection", model={where})("photo.jpg")

model = AutoModelForObjectDetection.from_pretrained({where})
processor = AutoImageProcessor.from_pretrained({where})
```"""


def _results(facts: CardFacts) -> str:
    results = eval_results(facts)
    if not results:
        return ""
    data = facts.data
    where = markdown(" ".join(filter(None, (data.name, data.config, data.split))))
    images = f" ({data.images} images)" if data.images else ""
    names = " | ".join(result.metric_name for result in results)
    values = " | ".join(f"{100 * result.metric_value:.1f}" for result in results)
    return (
        f"## Results\n\nBox AP in percent on {where}{images}, computed by pycocotools' COCOeval in this run.\n\n"
        f"| {names} |\n|{'---|' * len(results)}\n| {values} |"
    )


def _labels(config: DenseDetectorConfig) -> str:
    names = [markdown_code(name) for name in config.label_names]
    text = ", ".join(names)
    if len(names) > 20:
        text = f"<details><summary>{len(names)} labels</summary>\n\n{text}\n\n</details>"
    return f"## Labels\n\n{text}"


def _training(facts: CardFacts) -> str:
    lines = [f"- {name}: {value}" for name, value in facts.training.items()]
    if facts.recipe is not None:
        recipe = public_recipe(facts.recipe)
        lines.append(
            f"\n`{RECIPE_FILE}` is the resolved recipe.\n\n"
            f"<details><summary>{RECIPE_FILE}</summary>\n\n{markdown_block(recipe, 'yaml')}\n\n</details>"
        )
    return "## Training\n\n" + "\n".join(lines) if lines else ""


def _licence(facts: CardFacts) -> str:
    return (
        f"## Licence\n\nThe code that made this model is under apache-2.0; this repository says {facts.license}. "
        "Weights that were trained on somebody's data, or started from somebody's weights, are also under the terms "
        "of those."
    )


def _architecture(config: DenseDetectorConfig) -> str:
    name = type(config).__name__.removesuffix("Config")
    return f"{'an' if name[0] in 'AF' else 'a'} {name} detector with the backbone `{config.backbone}`"


def _upper(text: str) -> str:
    return text[0].upper() + text[1:]


def _detector(config: DenseDetectorConfig) -> str:
    return config.model_type.removeprefix("crosskd_")


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-") or "unknown"


def unique(values: Any) -> list:
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
