"""Uploading a run to the Hugging Face Hub: its model and what explains it, and no file that doesn't belong there."""

import logging
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from huggingface_hub import CommitInfo, CommitOperationAdd
from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError
from transformers.utils.hub import hf_api

from ..models.standalone import MODULE
from ..utils.redact import public
from ..utils.strict_yaml import RecipeError, read_yaml
from .model_card import CARD_FILE, is_generated

logger = logging.getLogger(__name__)

RECIPE_FILE = "recipe.yaml"  # the resolved recipe, in a run's output folder
METRICS_FILE = "evaluation/eval_metrics.json"
MODEL_FILES = (
    *("config.json", "preprocessor_config.json"),
    *("model.safetensors", "model-*.safetensors", "model.safetensors.index.json"),
    f"{MODULE}.py",
)
# Everything else stays here: predictions are large, training_args.bin is a pickle that may hold a token, and
# underscored files are a run's own.
UPLOADED = (*MODEL_FILES, CARD_FILE, RECIPE_FILE, METRICS_FILE)

Content = dict[str, dict[str, Any] | None]  # of a recipe: section -> key -> value


def files_to_upload(folder: Path) -> dict[str, Path | bytes]:
    """Name in the repository -> file, or content, of what a run's folder has for the Hub."""
    files: dict[str, Path | bytes] = {
        path.relative_to(folder).as_posix(): path
        for pattern in UPLOADED
        for path in sorted(folder.glob(pattern))
        if path.is_file() and path.name != RECIPE_FILE
    }
    if (recipe := read_recipe(folder)) is not None:
        files[RECIPE_FILE] = public_recipe(recipe).encode()
    return files


def read_recipe(folder: Path) -> Content | None:
    """The recipe that a run wrote into its folder; None if there is none that can be read."""
    path = folder / RECIPE_FILE
    if not path.is_file():
        return None
    try:
        content = read_yaml(path)
        if isinstance(content, dict) and all(isinstance(values, dict | None) for values in content.values()):
            return content
        problem = "it holds no sections"
    except RecipeError as error:
        problem = str(error)
    logger.warning("the model card tells no recipe: %s can't be read (%s)", path, problem)
    return None


def public_recipe(recipe: Content) -> str:
    """A resolved recipe as YAML, without the folders of the machine, credentials in URLs, or tokens."""
    return yaml.safe_dump(public(recipe), sort_keys=False, allow_unicode=True)


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
