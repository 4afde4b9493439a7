"""A run's output folder: whether a recipe may go on with what is in it, and what a finished run says."""

import dataclasses
import json
from pathlib import Path

from transformers import TrainerState

from ..hub.upload import RECIPE_FILE, UPLOADED
from ..models.base import DenseDetector
from ..recipe.load import load_recipe
from ..recipe.sections import Recipe
from ..training.checkpoints import MARKER, NAME, checkpoint_folders, last_complete_checkpoint
from ..training.run_lock import LOCK
from ..utils.escaping import printable
from ..utils.files import flush_to_disk, folder_problem, write_atomically
from ..utils.progress import say
from ..utils.redact import without_credentials
from ..utils.strict_yaml import RecipeError
from ..weights.loading import weights_digest

TEACHER_FILE = "teacher.json"  # of which weights a run learns
WEIGHTS = "model.safetensors"
STATE_FILE = "trainer_state.json"  # written last: a run that has it beside its model is finished
# Training arguments that don't change what is computed, so that a run can go on with other values.
MAY_CHANGE = (
    *("output_dir", "disable_tqdm", "report_to", "run_name", "push_to_hub", "hub_model_id", "hub_strategy"),
    *("logging_steps", "logging_strategy", "eval_steps", "eval_strategy", "save_steps", "save_strategy"),
    *("save_total_limit", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor"),
    *("per_device_eval_batch_size", "load_best_model_at_end", "dataloader_persistent_workers"),
    *("evaluation_pictures", "project"),
)
# Those that make up the global batch with the number of processes: `check_batch` compares the product.
BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")
# What a checkpoint can't be fitted to: weights, and the optimizer's values a parameter group.
FIXED = ("training.optim", "training.optim_args", "training.bias_lr_factor", "training.bias_weight_decay")
ACCEPT = "--accept-changes"
SHOWN = 10  # class names in a message


def check_folder(path: str | None, key: str) -> None:
    """Raise RecipeError if no run can write to a folder; `key` names it. None is transformers' own folder."""
    if path is not None and (problem := folder_problem(path)):
        raise RecipeError(f"{key}: {problem}.")


def check_others_files(output: Path) -> None:
    """Name what lies in a folder that holds no run, and refuse what a run would write over.

    Raises:
        RecipeError: naming it.
    """
    # Hidden ones are nobody's work, and the lock is of a run that was killed before it wrote its recipe.
    found = [path for path in sorted(output.glob("[!.]*")) if path.name != LOCK]
    written = (*UPLOADED, TEACHER_FILE, "training_args.bin", "evaluation")
    lost = [p.name for p in found if NAME.fullmatch(p.name) or any(p.match(pattern) for pattern in written)]
    if lost:
        raise RecipeError(
            f"{output} holds {_names(lost)}, which a run would write over, but no {RECIPE_FILE} of a run: name "
            "another training.output_dir."
        )
    if found:
        names = _names([path.name for path in found])
        say(f"{output} holds {names}, of no run: they stay as they are, and the run is written beside them")


def _names(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def check_output(recipe: Recipe, output: Path, accept_changes: bool = False) -> bool:
    """Refuse a folder that holds another run, unless its changes are accepted and possible.

    Returns:
        whether changes were accepted; each is printed.

    Raises:
        RecipeError: naming what differs. A checkpoint restores its own learning rate and schedule, so that changed
            values would be ignored; and a finished run would be written over.
    """
    if not (output / RECIPE_FILE).is_file():
        check_others_files(output)
        return False
    try:
        begun = load_recipe(output / RECIPE_FILE)
    except RecipeError as error:
        raise RecipeError(
            f"{output} holds a {RECIPE_FILE} of no run of this version: name another training.output_dir.\n{error}"
        ) from error
    changes = recipe_changes(begun, recipe)
    if not changes:
        return False
    lines = "".join(f"\n  - {line}" for line in changes.values())
    if is_finished(output):
        raise RecipeError(
            f"{output} holds a finished run of other settings:{lines}\nChanges come too late for it. Name another "
            f"training.output_dir; a finished model is trained on with model.checkpoint={output}."
        )
    fixed = [key for key in changes if key.startswith("model.") or key in FIXED]
    if fixed:
        raise RecipeError(
            f"{output} holds a run of other settings:{lines}\nIts checkpoints don't fit another {', '.join(fixed)}. "
            "Name another training.output_dir."
        )
    if not accept_changes:
        raise RecipeError(
            f"{output} holds a run of other settings:{lines}\nTo go on with that run with these values from its last "
            f"checkpoint on, add {ACCEPT}; or name another training.output_dir."
        )
    say(f"goes on with other settings than {output} was begun with:{lines}")
    return True


def recipe_changes(before: Recipe, now: Recipe) -> dict[str, str]:
    """`section.key` -> a line that tells both values, of what is computed otherwise. Batches are left out."""
    old, new = flat_settings(before), flat_settings(now)
    if (old.get("teacher.checkpoint") is None) != (new.get("teacher.checkpoint") is None):
        # One line, instead of one for each of the teacher's fields.
        old, new = (
            {key: value for key, value in settings.items() if key == "teacher.checkpoint" or key[:8] != "teacher."}
            for settings in (old, new)
        )
    # A method that only one of them has is told by `distillation.methods`.
    methods = [set(recipe.distillation.methods) if recipe.distillation else set() for recipe in (before, now)]
    added = tuple(f"distillation.{name}." for name in methods[0] ^ methods[1])
    ignored = {"data.cache_dir", *(f"training.{name}" for name in (*MAY_CHANGE, *BATCH))}
    return {
        key: _change(key, old.get(key), new.get(key))
        for key in sorted({*old, *new} - ignored)
        if old.get(key) != new.get(key) and not key.startswith(added)
    }


def _change(key: str, old: object, new: object) -> str:
    shown, now = (without_credentials(repr(value)) for value in (old, new))
    if shown == now:
        return f"{key}: another user, password or query of {shown}"
    return f"{key}: was {shown}, is {now}"


def flat_settings(recipe: Recipe) -> dict[str, object]:
    """`section.key` -> value, of `training` too those that weren't given: a default may be written out."""
    content = {**recipe.to_dict(), "training": recipe.training_values()}
    distillation = content.pop("distillation") or {}
    content |= {f"distillation.{name}": distillation.pop(name) for name in distillation.get("methods", [])}
    content["distillation"] = distillation
    settings = {f"{name}.{key}": value for name, values in content.items() for key, value in (values or {}).items()}
    for key in ("teacher.checkpoint", "model.checkpoint", "data.path"):  # one folder has several names
        if settings.get(key) and Path(settings[key]).exists():
            settings[key] = str(Path(settings[key]).resolve())
    return settings


def check_batch(recipe: Recipe, output: Path, processes: int, accept_changes: bool = False) -> None:
    """Refuse to go on with another global batch than a run was begun with, unless that is accepted.

    If the same one is made up otherwise, of another number of processes, images a device or accumulated batches, it
    is said what isn't exact.

    Raises:
        RecipeError: the learning rate and the place in the data would be those of another batch.
    """
    # Whole ones: in others, not every process may have written its state.
    folders = [folder for folder in checkpoint_folders(output) if (folder / MARKER).exists()]
    if not folders or not (output / RECIPE_FILE).is_file():
        return
    ranks = len(list(folders[-1].glob("rng_state*.pth"))) or processes  # one file a process
    before, now = _batch(load_recipe(output / RECIPE_FILE), ranks), _batch(recipe, processes)
    if before == now:
        return
    sizes = [images * accumulated * ranks for ranks, images, accumulated in (before, now)]
    texts = [
        f"{ranks} processes x {images} images x {accumulated} accumulated"
        for ranks, images, accumulated in (before, now)
    ]
    if sizes[0] == sizes[1]:
        inexact = ["random numbers (drop path, dropout)"] if ranks != processes else []
        inexact += ["which images share a batch from here to the epoch's end"] if before[1] != now[1] else []
        inexact += ["an epoch's last batch, if it isn't full"]
        say(
            f"goes on with {texts[1]}, where {texts[0]} were used: the same global batch of {sizes[0]}, learning rate "
            f"and place in the data; not exactly as before: {', '.join(inexact)}"
        )
        return
    if not accept_changes:
        raise RecipeError(
            f"{output} holds a run of a global batch of {sizes[0]} images ({texts[0]}), this one has {sizes[1]} "
            f"({texts[1]}): its learning rate and place in the data would not fit. Set training."
            f"{BATCH[0]} and {BATCH[1]} so that the product is {sizes[0]} again, start as many processes as before, "
            f"or add {ACCEPT}."
        )
    say(
        f"goes on with a global batch of {sizes[1]} ({texts[1]}) instead of {sizes[0]} ({texts[0]}): steps that are "
        "done count as steps of the new size, so that the place in the data and in the schedule move"
    )


def _batch(recipe: Recipe, processes: int) -> tuple[int, int, int]:
    values = recipe.training_values()
    images, accumulated = (values[name] for name in BATCH)
    return processes, images, accumulated


def note_teacher(teacher: DenseDetector, output: Path) -> None:
    """Write down of which weights a run learns."""
    write_atomically(output / TEACHER_FILE, json.dumps({"sha256": weights_digest(teacher)}) + "\n")


def check_teacher(teacher: DenseDetector, output: Path, accept_changes: bool = False) -> None:
    """Refuse to go on with another teacher than a run was begun with, unless that is accepted.

    The one at its path may have been trained anew.

    Raises:
        RecipeError: its weights are others.
    """
    path = output / TEACHER_FILE
    if not path.is_file() or not checkpoint_folders(output):
        return
    if json.loads(path.read_text(encoding="utf-8"))["sha256"] == weights_digest(teacher):
        return
    if not accept_changes:
        raise RecipeError(
            f"{output} holds a run that learnt from other weights than its teacher has now: bring those back, or add "
            f"{ACCEPT}, or name another training.output_dir."
        )
    say(f"goes on with a teacher of other weights than {output} was begun with")


def mark_finished(state: TrainerState, output: Path) -> None:
    """Write the state that says that a run is finished. One process is to call it, when all else is written.

    What the run leaves is flushed to the disk first and the state appears at once, so that a power cut can't leave a
    finished run without its model.

    Raises:
        OSError: it can't be written.
    """
    for path in (path for pattern in UPLOADED for path in output.glob(pattern)):
        if path.name != STATE_FILE:
            flush_to_disk(path)
    text = json.dumps(dataclasses.asdict(state), indent=2, sort_keys=True) + "\n"  # as transformers writes it
    write_atomically(output / STATE_FILE, text)


def check_labels(model: DenseDetector, checkpoint: str | None) -> None:
    """Refuse to go on from a checkpoint of other classes, or of the same in another order, whatever is accepted.

    Args:
        model: what the run trains; its labels are the data's.
        checkpoint: what the run goes on from, if anything.

    Raises:
        RecipeError: weights that were trained for one class would be taken for another's, or don't fit.
        OSError: its configuration can't be read.
    """
    if checkpoint is None:
        return
    before, now = type(model.config).from_pretrained(checkpoint).label_names, model.config.label_names
    if before == now:
        return
    pairs = enumerate(zip(before, now, strict=False))
    first = next((i for i, (old, new) in pairs if old != new), min(len(before), len(now)))
    texts = [f"{len(names)} classes ({_excerpt(names, first)})" for names in (before, now)]
    raise RecipeError(
        f"{checkpoint} was trained on {texts[0]}, the data has {texts[1]}: it can't go on with other classes, or the "
        "same in another order. Name another training.output_dir, or bring the data's classes back."
    )


def _excerpt(names: list[str], first: int) -> str:
    """Names around the first that differs: some data sets have a thousand."""
    start, end = max(0, first - SHOWN // 2), first + SHOWN // 2
    shown = ["..."] * (start > 0) + list(map(printable, names[start:end])) + ["..."] * (end < len(names))
    return ", ".join(shown)


def check_weights(output: Path) -> None:
    """Say that the weights of a run that came to its end are gone, which its last complete checkpoint brings back.

    Raises:
        RecipeError: there is none.
    """
    if not _came_to_its_end(output) or _has_weights(output):
        return
    missing = f"{output} holds this run, finished, but its weights are missing ({output / WEIGHTS})"
    checkpoint = last_complete_checkpoint(output)
    if checkpoint is None:
        raise RecipeError(
            f"{missing}, and no complete checkpoint: bring the file back, or name another training.output_dir."
        )
    say(f"{missing}: they are made again from {checkpoint}")


def _has_weights(output: Path) -> bool:
    return any((output / name).is_file() for name in (WEIGHTS, f"{WEIGHTS}.index.json"))


def is_finished(output: Path) -> bool:
    """Whether a folder holds the model and the metrics of a run that came to its end."""
    return _has_weights(output) and _came_to_its_end(output)


def _came_to_its_end(output: Path) -> bool:
    """Whether a folder holds the configuration and the metrics of a finished run.

    A state that can't be read, as a power cut may have left it, is none: the run goes on from its last checkpoint.
    """
    if not ((output / STATE_FILE).is_file() and (output / "config.json").is_file()):
        return False
    try:
        state = json.loads((output / STATE_FILE).read_text(encoding="utf-8"))
        last = state["global_step"]
        return any("eval_AP" in entry and entry["step"] == last for entry in state["log_history"])
    except (ValueError, KeyError, TypeError):
        return False


def final_metrics(output: Path) -> dict[str, float]:
    """The metrics at the end of a finished run: of its own state, since `crosskd evaluate` may have written others."""
    history = json.loads((output / STATE_FILE).read_text(encoding="utf-8"))["log_history"]
    found = next(entry for entry in reversed(history) if "eval_AP" in entry)
    # The file is sorted by name; tables are in the order of the labels.
    labels = json.loads((output / "config.json").read_text(encoding="utf-8")).get("id2label", {})
    classes = [f"eval_AP/{labels[index]}" for index in sorted(labels, key=int)]
    ordered = {name: found[name] for name in classes if name in found}
    return {name: value for name, value in found.items() if name not in ordered} | ordered
