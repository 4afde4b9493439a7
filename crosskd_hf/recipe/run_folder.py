"""A run's output folder: whether a recipe may resume what is in it, and the metrics of a finished run."""

import dataclasses
import json
import math
from itertools import zip_longest
from pathlib import Path

from transformers import PreTrainedModel, TrainerState

from ..hub.upload import RECIPE_FILE, UPLOADED
from ..models.families import label_names_of
from ..training.checkpoints import MARKER, NAME, checkpoint_folders
from ..training.run_lock import LOCK
from ..utils.escaping import printable
from ..utils.files import flush_to_disk, folder_problem, write_atomically
from ..utils.messages import listed
from ..utils.progress import say
from ..utils.redact import without_credentials
from ..utils.strict_yaml import RecipeError
from ..weights.loading import weights_digest
from .load import load_recipe
from .sections import Recipe

TEACHER_FILE = "teacher.json"  # of which weights a run learns
WEIGHTS = "model.safetensors"
STATE_FILE = "trainer_state.json"  # written last: a run that has it beside its model is finished
# Training arguments that don't change what is computed, so that a run can resume with other values.
MAY_CHANGE = (
    *("output_dir", "disable_tqdm", "report_to", "run_name", "push_to_hub", "hub_model_id", "hub_strategy"),
    *("logging_steps", "logging_strategy", "eval_steps", "eval_strategy", "save_steps", "save_strategy"),
    *("save_total_limit", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor"),
    *("per_device_eval_batch_size", "load_best_model_at_end", "dataloader_persistent_workers"),
    *("evaluation_pictures", "project", "standalone"),
)
# Those that make up the global batch with the number of processes: `check_batch` compares the product.
BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")
# What a checkpoint can't be fitted to: weights, and the optimizer's values a parameter group.
NEEDS_NEW_RUN = (
    *("training.optim", "training.optim_args", "training.bias_lr_factor", "training.bias_weight_decay"),
    *("training.backbone_lr_factor", "training.lr_factors", "training.no_decay"),
)
ACCEPT = "--accept-changes"
SHOWN = 10  # names in a message


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
    others = [path for path in sorted(output.glob("[!.]*")) if path.name != LOCK]
    written = (*UPLOADED, TEACHER_FILE, STATE_FILE, "training_args.bin", "evaluation")
    lost = [p.name for p in others if NAME.fullmatch(p.name) or any(p.match(pattern) for pattern in written)]
    if lost:
        raise RecipeError(
            f"{output} holds {listed(lost, SHOWN)}, which a run would write over, but no {RECIPE_FILE} of a run: name "
            "another training.output_dir."
        )
    if others:
        names = listed([path.name for path in others], SHOWN)
        say(f"{output} holds {names}, of no run: they stay as they are, and the run is written beside them")


def check_output(recipe: Recipe, output: Path, accept_changes: bool = False) -> None:
    """Refuse a folder that holds another run, unless its changes are accepted and possible; then print them.

    Raises:
        RecipeError: naming what differs. A checkpoint restores its own learning rate and schedule, so that changed
            values would be ignored; and a finished run would be written over.
    """
    if not (output / RECIPE_FILE).is_file():
        check_others_files(output)
        return
    try:
        begun = load_recipe(output / RECIPE_FILE)
    except RecipeError as error:
        raise RecipeError(
            f"{output} holds a {RECIPE_FILE} of no run of this version: name another training.output_dir.\n{error}"
        ) from error
    changes = recipe_changes(begun, recipe)
    if not changes:
        return
    lines = "".join(f"\n  - {line}" for line in changes.values())
    if is_finished(output):
        raise RecipeError(
            f"{output} holds a finished run of other settings:{lines}\nChanges come too late for it. Name another "
            f"training.output_dir; a finished model is trained on with model.checkpoint={output}."
        )
    fixed = [key for key in changes if key.startswith("model.") or key in NEEDS_NEW_RUN]
    if fixed:
        raise RecipeError(
            f"{output} holds a run of other settings:{lines}\nIts checkpoints don't fit another {', '.join(fixed)}. "
            "Name another training.output_dir."
        )
    if not accept_changes:
        raise RecipeError(
            f"{output} holds a run of other settings:{lines}\nTo resume that run with these values from its last "
            f"checkpoint on, add {ACCEPT}; or name another training.output_dir."
        )
    say(f"resumes with other settings than {output} was begun with:{lines}")


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
    if now.data.streaming:
        ignored.discard("training.dataloader_num_workers")  # each reads files of its own
    return {
        key: _change(key, old.get(key), new.get(key))
        for key in sorted({*old, *new} - ignored)
        if old.get(key) != new.get(key) and not key.startswith(added)
    }


def _change(key: str, old: object, new: object) -> str:
    before, now = (without_credentials(repr(value)) for value in (old, new))
    if before == now:
        return f"{key}: another user, password or query of {before}"
    return f"{key}: was {before}, is {now}"


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
    """Refuse to resume with another global batch than a run was begun with, unless that is accepted.

    If the same one is made up otherwise, of another number of processes, images per device or accumulated batches,
    say what isn't exact.

    Raises:
        RecipeError: the learning rate and the place in the data would be those of another batch.
    """
    # Complete ones: in others, not every process may have written its state.
    folders = [folder for folder in checkpoint_folders(output) if (folder / MARKER).exists()]
    if not folders or not (output / RECIPE_FILE).is_file():
        return
    ranks = len(list(folders[-1].glob("rng_state*.pth"))) or processes  # one file per process
    before = (ranks, *_batch_values(load_recipe(output / RECIPE_FILE)))
    now = (processes, *_batch_values(recipe))
    if before == now:
        return
    old, new = (f"{p} processes x {i} images x {a} accumulated = {p * i * a}" for p, i, a in (before, now))
    if math.prod(before) == math.prod(now):
        inexact = "random numbers (drop path, dropout), " if before[0] != now[0] else ""
        inexact += "which images share a batch from here to the epoch's end, " if before[1] != now[1] else ""
        say(
            f"resumes with the same global batch, made up otherwise ({old} before, {new} now): learning rate and "
            f"place in the data are the same; not exactly as before: {inexact}an epoch's last batch, if it isn't full"
        )
    elif accept_changes:
        say(
            f"resumes with another global batch ({old} before, {new} now): steps that are done count as steps of the "
            "new size, so that the place in the data and in the schedule move"
        )
    else:
        raise RecipeError(
            f"{output} holds a run of another global batch ({old}; this one: {new}): its learning rate and place in "
            f"the data would not fit. Set training.{BATCH[0]} and {BATCH[1]} so that the product is "
            f"{math.prod(before)} again, start as many processes as before, or add {ACCEPT}."
        )


def _batch_values(recipe: Recipe) -> list[int]:
    return [recipe.training_values()[name] for name in BATCH]


def note_teacher(teacher: PreTrainedModel, output: Path) -> None:
    """Write down of which weights a run learns."""
    write_atomically(output / TEACHER_FILE, json.dumps({"sha256": weights_digest(teacher)}) + "\n")


def check_teacher(teacher: PreTrainedModel, output: Path, accept_changes: bool = False) -> None:
    """Refuse to resume with another teacher than a run was begun with, unless that is accepted.

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
    say(f"resumes with a teacher of other weights than {output} was begun with")


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


def check_classes_of_run(model: PreTrainedModel, checkpoint: str | None) -> None:
    """Refuse to resume from a checkpoint of other classes, or of the same in another order, whatever is accepted.

    Args:
        model: what the run trains; its labels are the data's.
        checkpoint: what the run resumes from, if anything.

    Raises:
        RecipeError: weights that were trained for one class would be taken for another's, or don't fit.
        OSError: its configuration can't be read.
    """
    if checkpoint is None:
        return
    before, now = map(label_names_of, (type(model.config).from_pretrained(checkpoint), model.config))
    if before == now:
        return
    pairs = zip_longest(map(repr, before), map(repr, now), fillvalue="absent")
    index, old, new = next((i, old, new) for i, (old, new) in enumerate(pairs) if old != new)
    of_checkpoint, of_data = (f"{len(names)} classes ({listed(names, SHOWN)})" for names in (before, now))
    text = (
        f"{checkpoint} was trained on {of_checkpoint}, the data has {of_data}, and class {index} was {old}, is {new}: "
        "a run can't resume with other classes, or the same in another order. Name another training.output_dir, or "
        "bring the data's classes back."
    )
    raise RecipeError(printable(text))


def is_finished(output: Path) -> bool:
    """Whether a folder holds the model, the configuration and the metrics of a run that came to its end.

    A state that can't be read, as a power cut may have left it, is none: the run resumes from its last checkpoint.
    """
    weights = (output / WEIGHTS, output / f"{WEIGHTS}.index.json")
    if not (any(path.is_file() for path in weights) and (output / "config.json").is_file()):
        return False
    try:
        state = json.loads((output / STATE_FILE).read_text(encoding="utf-8"))
        last = state["global_step"]
        return any("eval_AP" in entry and entry["step"] == last for entry in state["log_history"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False


def final_metrics(output: Path) -> dict[str, float]:
    """The metrics at the end of a finished run: of its own state, since `crosskd evaluate` may have written others."""
    history = json.loads((output / STATE_FILE).read_text(encoding="utf-8"))["log_history"]
    metrics = next(entry for entry in reversed(history) if "eval_AP" in entry)
    # The file is sorted by name; tables are in the order of the labels.
    labels = json.loads((output / "config.json").read_text(encoding="utf-8")).get("id2label", {})
    classes = [f"eval_AP/{labels[index]}" for index in sorted(labels, key=int)]
    ordered = {name: metrics[name] for name in classes if name in metrics}
    return {name: value for name, value in metrics.items() if name not in ordered} | ordered
