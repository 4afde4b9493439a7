"""What a trainer publishes: the facts of its model card, and uploads to the Hugging Face Hub.

A trainer knows of a recipe only what lies in its output folder: `recipe.yaml`, section -> key -> value.
"""

import logging
import re
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from transformers import PreTrainedConfig
from transformers.trainer_utils import HubStrategy, SaveStrategy, SchedulerType
from transformers.utils.hub import PushInProgress, hf_api

from ..data.stream import DetectionStream, number_of_images
from ..hub.model_card import COCO_METRICS, CardFacts, DataFacts, DetectorFacts, TeacherFacts, unique, write_model_card
from ..hub.upload import METRICS_FILE, Content, files_to_upload, public_recipe, read_recipe, upload
from ..models.families import backbone_name, label_names_of
from ..utils.redact import last_part, public
from ..version import __version__
from .base import BaseTrainer

logger = logging.getLogger(__name__)

LIBRARIES = ("torch", "torchvision", "transformers", "timm", "accelerate", "datasets", "pycocotools")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


class HubUpload(BaseTrainer):
    """The part of a trainer that talks to the Hub.

    One private method of `transformers.Trainer` is overridden, `_finish_current_push`: an upload that failed is told.

    Only the files of `UPLOADED` are sent; with hub_strategy "checkpoint" or "all_checkpoints" complete checkpoints,
    too, whose optimizer and random states are pickles.
    """

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Write `output_dir/README.md`, unless there is one that somebody wrote.

        Args:
            language, license, tags, finetuned_from, tasks, dataset_tags: metadata, as in `transformers.Trainer`.
            model_name: title; by default the folder's name.
            dataset, dataset_args: name and split of the evaluation data, which otherwise come from the recipe.
        """
        if not self.is_world_process_zero():
            return
        folder = Path(self.args.output_dir)
        more: dict[str, Any] = {"language": language, "tags": _listed(tags), "datasets": _listed(dataset_tags)}
        optional = {
            "license": license,
            "started_from": finetuned_from,
            "pipeline_tag": next(iter(_listed(tasks)), None),
        }
        more |= {name: value for name, value in optional.items() if value}
        facts = trainer_facts(self, read_recipe(folder), model_name or folder.absolute().name, **more)
        if dataset or dataset_args:
            given: dict[str, Any] = {"name": ", ".join(_listed(dataset)), "split": ", ".join(_listed(dataset_args))}
            data = replace(facts.data, **{key: text for key, text in given.items() if text})
            facts = replace(facts, data=data)
        write_model_card(folder, facts)

    def push_to_hub(  # type: ignore[override]
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo | Future | None:
        """Save the model in `output_dir` and upload it with its card; every process is to call it.

        Args:
            commit_message, blocking, token, revision, private: as in `transformers.Trainer`.
            kwargs: of `create_model_card`.

        Returns:
            the commit, or its `Future` if not `blocking`; None in other processes than the first.

        Raises:
            HfHubHTTPError: the Hub refuses it. The model is saved by then.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = token if token is not None else self.args.hub_token
        self.save_model(_internal_call=True)  # first, so that it is there whatever the Hub says
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        if not self.is_world_process_zero():
            return None
        assert self.hub_model_id is not None  # see `init_hf_repo`
        self._finish_current_push()
        files = self._files_with_card(**kwargs)
        message = commit_message or "End of training"
        job = (self.hub_model_id, files, message, token, revision or self.args.hub_revision)
        return upload(*job) if blocking else hf_api().run_as_future(upload, *job)

    def _files_with_card(self, **kwargs: Any) -> dict[str, Path | bytes]:
        model = self.accelerator.unwrap_model(self.model)
        kwargs["tags"] = unique([*_listed(kwargs.get("tags")), *(model.model_tags or ())])
        kwargs["model_name"] = kwargs.get("model_name") or (self.hub_model_id or "").split("/")[-1]
        self.create_model_card(**kwargs)
        files = files_to_upload(Path(self.args.output_dir))
        if not measured(self):
            files.pop(METRICS_FILE, None)  # of other weights than these
        return files

    def push_checkpoint(self, folder: Path) -> None:
        """Start the upload of a complete checkpoint's model, as `hub_strategy` says; one still under way may skip it.

        Raises:
            OSError: the model can't be written to `output_dir`. What the Hub says is told at the next push.
        """
        strategy = self.args.hub_strategy
        if not self.args.push_to_hub or not self.is_world_process_zero() or strategy == HubStrategy.END:
            return
        if self.push_in_progress is not None and not self.push_in_progress.is_done() and not self.args.hub_always_push:
            return
        self._finish_current_push()  # it reads the files that are replaced now
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        # Not a copy of the checkpoint's: the weights for users may be an average of the trained ones.
        self.save_model(_internal_call=True)
        files = self._files_with_card()
        if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            name = "last-checkpoint" if strategy == HubStrategy.CHECKPOINT else folder.name
            paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
            files |= {f"{name}/{path.relative_to(folder).as_posix()}": path for path in paths}
        step, epoch = f"step {self.state.global_step}", f"epoch {int(self.state.epoch or 0)}"
        message = f"Training in progress, {epoch if self.args.save_strategy == SaveStrategy.EPOCH else step}"
        job = (self.hub_model_id, files, message, self.args.hub_token, self.args.hub_revision)
        self.push_in_progress = PushInProgress([hf_api().run_as_future(upload, *job)])  # type: ignore[arg-type]

    def finish_checkpoint_push(self) -> None:
        """Wait for an upload that reads from checkpoints, before any is removed."""
        if self.args.push_to_hub and self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            self._finish_current_push()

    def _finish_current_push(self) -> None:
        """Wait for an upload, and tell if it failed: transformers wouldn't. Training continues then."""
        push = getattr(self, "push_in_progress", None)
        if push is None:
            return
        super()._finish_current_push()
        for error in filter(None, (job.exception() for job in push.jobs)):
            logger.warning("an upload in training failed, the next one sends all again: %s", error)
        self.push_in_progress = None


def _listed(value: str | Sequence[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


def trainer_facts(trainer: BaseTrainer, recipe: Content | None, name: str, **more: Any) -> CardFacts:
    """What a trainer knows of its model.

    Args:
        trainer: before, in or after training.
        recipe: that the trainer was built from, if it was: section -> key -> value.
        name: of the model.
        more: further fields of `CardFacts`, which go before the trainer's.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    teacher = getattr(trainer, "teacher", None)
    dataset = trainer.eval_dataset
    images = None if dataset is None else len(dataset)
    facts = CardFacts(
        name=name,
        detector=_detector_facts(model.config),
        label_names=label_names_of(model.config),
        repo_id=trainer.hub_model_id,
        teacher=None if teacher is None else _teacher_facts(teacher.config, recipe),
        methods=list(trainer.distilled_by()),
        started_from=_hub_source(model.config),
        data=DataFacts(images=images) if recipe is None else data_facts(recipe.get("data") or {}, images),
        metrics=measured(trainer),
        training=_training_facts(trainer),
        recipe=None if recipe is None else public_recipe(recipe),
    )
    return replace(facts, **more)


def measured(trainer: BaseTrainer) -> dict[str, float]:
    """The metrics of the model as it is now on the trainer's own eval data; empty if there was no such evaluation."""
    step, metrics = trainer.last_evaluation
    loader = trainer.callback_handler.eval_dataloader
    split = getattr(trainer.eval_dataset, "split", None)
    if step != trainer.state.global_step or loader is None or loader.dataset.split is not split:
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


def data_facts(data: dict[str, Any], images: int | None) -> DataFacts:
    """The evaluation data of a resolved recipe, by its section `data`."""
    path, layout = str(data.get("path", "")), data.get("layout")
    on_hub = layout in ("datasets", "auto") and HUB_ID.fullmatch(path) and not Path(path).exists()
    if layout == "shapes":
        name = "generated shapes"
    else:
        name = (path if on_hub else last_part(path)) or DataFacts.name
    return DataFacts(name, path if on_hub else None, data.get("config"), data.get("val_split"), images)


def _detector_facts(config: PreTrainedConfig) -> DetectorFacts:
    return DetectorFacts(type(config).__name__.removesuffix("Config"), config.model_type, backbone_name(config))


def _teacher_facts(config: PreTrainedConfig, recipe: Content | None) -> TeacherFacts:
    # Not the name of the loaded folder if there is a recipe: that of a converted .pth is temporary.
    hub_id = _hub_source(config)
    section = (recipe or {}).get("teacher") or {}
    source = str(section.get("checkpoint") or config.name_or_path)
    if source == "random":
        name = "a teacher with random weights"
    else:
        name = hub_id or (public(source) if "://" in source else last_part(source)) or "a teacher made in Python"
    return TeacherFacts(_detector_facts(config), name, hub_id)


def _hub_source(config: PreTrainedConfig) -> str | None:
    """Hub id that a model was loaded from. It was loaded here, so that a folder's name is that of one."""
    name = config.name_or_path or ""
    return name if "/" in name and HUB_ID.fullmatch(name) and not Path(name).exists() else None


def _training_facts(trainer: BaseTrainer) -> dict[str, str]:
    args, state = trainer.args, trainer.state
    schedule = f"times {args.lr_gamma:g} after epochs {args.lr_milestones}"
    if args.lr_milestones is None:
        schedule = SchedulerType(args.lr_scheduler_type).value
    facts = {
        "Steps": f"{state.global_step}" + (f" of {state.max_steps}" if state.global_step < state.max_steps else ""),
        "Epochs": "" if isinstance(trainer.train_dataset, DetectionStream) else f"{state.epoch or 0:.4g}",
        "Training images": number_of_images(trainer.train_dataset) if trainer.train_dataset is not None else "",
        "Global batch": f"{args.global_batch_size} images ({args.per_device_train_batch_size} a device x "
        f"{args.world_size} processes x {args.gradient_accumulation_steps} accumulated)",
        "Processes": str(args.world_size),
        "Optimizer": f"{getattr(args.optim, 'value', args.optim)}, weight decay {args.weight_decay:g}",
        "Learning rate": f"{args.scaled_learning_rate:g}, {schedule}, warm-up {args.warmup_steps:g}",
        "Weights": "" if args.ema_decay is None else f"average of the trained ones, decay {args.ema_decay:g}",
        "Precision": trainer.precision,
        "Seed": str(args.seed),
        "Distillation": trainer.methods_text(),
        "Versions": ", ".join([f"crosskd_hf {__version__}", *(f"{name} {version(name)}" for name in LIBRARIES)]),
    }
    return {name: value for name, value in facts.items() if value}
