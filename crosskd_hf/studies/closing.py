"""The last lines of a run: how good the model is, where it is, and what to do with it."""

from pathlib import Path

from ..hub.upload import Content, read_recipe
from ..recipe.run_folder import is_finished
from ..training.metric_table import percent
from ..utils.escaping import printable
from .report import write_report
from .run_results import ReportError


def close_run(folder: Path) -> str:
    """Write the report of a finished run, and say what came of it.

    Args:
        folder: of the run. A student alone that lies beside it and was trained as long on the same data is compared,
            too, as is its teacher.

    Raises:
        Exception: whatever keeps the report from being written; the run itself is complete.
    """
    try:
        path, runs = write_report([*_alone(folder), folder])
    except ReportError:  # the run beside it was evaluated on something else since
        path, runs = write_report([folder])
    *others, last = runs
    better = [f"{one.name} {percent(one.metrics['AP'])}" for one in others]
    lines = [
        f"AP {percent(last.metrics['AP'])}" + (f" ({', '.join(better)})" if better else ""),
        f"model    {folder}",
        f"report   {path}",
        f"next     crosskd predict {folder} IMAGES --output-dir {folder / 'predictions'}",
    ]
    if not others:
        lines.append(f"         crosskd report OTHER_RUN {folder}     (side by side)")
    return "\n".join(map(printable, lines))


def _alone(folder: Path) -> list[Path]:
    """The run beside this one that differs from it in having no teacher."""
    own = read_recipe(folder)
    if own is None or not own.get("teacher"):
        return []
    beside = (path for path in sorted(folder.resolve().parent.iterdir()) if is_finished(path))
    return [path for path in beside if _same_without_teacher(own, read_recipe(path))][:1]


def _same_without_teacher(recipe: Content, other: Content | None) -> bool:
    if other is None or other.get("teacher"):
        return False
    model, other_model = ({**(one.get("model") or {}), "inherit": None} for one in (recipe, other))
    training, other_training = ({**(one.get("training") or {}), "output_dir": None} for one in (recipe, other))
    return (model, recipe.get("data"), training) == (other_model, other.get("data"), other_training)
