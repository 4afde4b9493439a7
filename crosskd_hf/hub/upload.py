"""Uploading a run to the Hugging Face Hub: its model and what explains it, and no file that doesn't belong there."""

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd
from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils.hub import PushInProgress, hf_api

from ..recipe.sections import RECIPE_FILE, Recipe, RecipeError, load_recipe
from .model_card import (
    CARD_FILE,
    CardFacts,
    DataFacts,
    is_generated,
    measured,
    public_recipe,
    trainer_facts,
    unique,
    write_model_card,
)

logger = logging.getLogger(__name__)

METRICS_FILE = "evaluation/eval_metrics.json"
MODEL_FILES = (
    *("config.json", "preprocessor_config.json"),
    *("model.safetensors", "model-*.safetensors", "model.safetensors.index.json"),
)
# Everything else stays here: predictions are large, training_args.bin is a pickle that may hold a token, and
# underscored files are a run's own.
UPLOADED = (*MODEL_FILES, CARD_FILE, RECIPE_FILE, METRICS_FILE, "trainer_state.json")


def files_to_upload(folder: Path) -> dict[str, Path | bytes]:
    """Name in the repository -> file, or content, of what a run's folder has for the Hub."""
    files: dict[str, Path | bytes] = {
        path.relative_to(folder).as_posix(): path
        for pattern in UPLOADED
        for path in sorted(folder.glob(pattern))
        if path.is_file()
    }
    if (recipe := read_recipe(folder)) is not None:
        files[RECIPE_FILE] = public_recipe(recipe).encode()
    return files


def read_recipe(folder: Path) -> Recipe | None:
    """The recipe of the run in a folder, if there is one that can be read."""
    if not (folder / RECIPE_FILE).is_file():
        return None
    try:
        return load_recipe(folder / RECIPE_FILE)
    except (RecipeError, OSError) as error:
        logger.warning("the model card tells no recipe: %s", error)
        return None


def upload(
    repo_id: str, files: Mapping[str, Path | bytes], message: str, token: str | None, revision: str | None
) -> CommitInfo:
    """Send files in one commit. A card on the Hub that somebody wrote there is left as it is.

    Raises:
        HfHubHTTPError: the Hub refuses it.
        OSError: a file can't be read, or the Hub not be reached.
    """
    if CARD_FILE in files and not _may_replace_card(repo_id, token, revision):
        logger.warning("the card of %s isn't a generated one: it is left as it is", repo_id)
        files = {name: content for name, content in files.items() if name != CARD_FILE}
    operations = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=content if isinstance(content, bytes) else str(content))
        for name, content in files.items()
    ]
    return hf_api().create_commit(repo_id, operations, commit_message=message, token=token, revision=revision)


def _may_replace_card(repo_id: str, token: str | None, revision: str | None) -> bool:
    with TemporaryDirectory() as folder:  # not the cache: it would give an old card if the Hub can't be reached
        try:
            path = hf_api().hf_hub_download(repo_id, CARD_FILE, revision=revision, token=token, local_dir=folder)
        except (EntryNotFoundError, RevisionNotFoundError):
            return True
        return is_generated(Path(path))


class HubUpload:
    """The part of a trainer that talks to the Hub; goes before `transformers.Trainer` among the bases.

    One private method of `transformers.Trainer` is overridden, `_finish_current_push`: an upload that failed is told.

    Only the files of `UPLOADED` are sent. With hub_strategy "checkpoint" or "all_checkpoints" whole checkpoints are,
    whose optimizer and random states are pickles.
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
        for name, value in (("license", license), ("started_from", finetuned_from)):
            more |= {name: value} if value else {}
        more |= {"pipeline_tag": _listed(tasks)[0]} if tasks else {}
        facts = trainer_facts(self, read_recipe(folder), model_name or folder.absolute().name, **more)
        if dataset or dataset_args:
            known = facts.data
            name, split = (", ".join(_listed(value)) for value in (dataset, dataset_args))
            data = DataFacts(name or known.name, known.hub_id, known.config, split or known.split, known.images)
            facts = CardFacts(**{**vars(facts), "data": data})
        write_model_card(folder, facts)

    def push_to_hub(
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
        self._finish_current_push()
        files = self._files_with_card(**kwargs)
        job = (self.hub_model_id, files, commit_message, token, revision or self.args.hub_revision)
        return upload(*job) if blocking else hf_api().run_as_future(upload, *job)

    def _files_with_card(self, **kwargs: Any) -> dict[str, Path | bytes]:
        model = self.accelerator.unwrap_model(self.model)
        kwargs["tags"] = unique([*_listed(kwargs.get("tags")), *(model.model_tags or ())])
        kwargs["model_name"] = kwargs.get("model_name") or self.hub_model_id.split("/")[-1]
        self.create_model_card(**kwargs)
        files = files_to_upload(Path(self.args.output_dir))
        if not measured(self):
            files.pop(METRICS_FILE, None)  # of other weights than these
        return files

    def push_checkpoint(self, folder: Path) -> None:
        """Start the upload of a whole checkpoint's model, as `hub_strategy` says; one still under way may skip it.

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
            found = (path for path in sorted(folder.rglob("*")) if path.is_file())
            files |= {f"{name}/{path.relative_to(folder).as_posix()}": path for path in found}
        step, epoch = f"step {self.state.global_step}", f"epoch {int(self.state.epoch or 0)}"
        message = f"Training in progress, {epoch if self.args.save_strategy == SaveStrategy.EPOCH else step}"
        job = (self.hub_model_id, files, message, self.args.hub_token, self.args.hub_revision)
        self.push_in_progress = PushInProgress([hf_api().run_as_future(upload, *job)])

    def finish_checkpoint_push(self) -> None:
        """Wait for an upload that reads from checkpoints, before any is removed."""
        if self.args.push_to_hub and self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            self._finish_current_push()

    def _finish_current_push(self) -> None:
        """Wait for an upload, and tell if it failed: transformers wouldn't. Training goes on then."""
        push = getattr(self, "push_in_progress", None)
        if push is None:
            return
        super()._finish_current_push()
        for error in filter(None, (job.exception() for job in push.jobs)):
            logger.warning("an upload in training failed, the next one sends all again: %s", error)
        self.push_in_progress = None


def _listed(value: str | Sequence[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())
