"""Does it help? Trains students alone and with every kind of distillation, seed by seed, and compares them in pairs.

    python benchmarks/evidence.py benchmarks/evidence/shapes.yaml
    python benchmarks/evidence.py benchmarks/evidence/shapes.yaml --results benchmarks/evidence/shapes --summary

One run at a time, each an ordinary `python -m crosskd_hf train`, so that the same command goes on where it was
interrupted, in the middle of a run too. A finished run leaves a JSON in the results folder; one whose JSON is there is
not run again. The second command draws tables and curves from the committed results, without training.

A setting's YAML holds
    teachers: name -> {recipe: a bare name or a whole recipe, set: [section.key=value, ...]}
    student: {recipe: ..., set: [...]}
    seeds: of the students
    teacher_seed: a number (one teacher for all), or `each` (a teacher a seed, of that seed)
    variants: name -> {teacher: name or null, set: [...], seeds: how many of the seeds (default: all)}
    tables: title -> variants, the first being what the others are compared with
"""

import argparse
import dataclasses
import hashlib
import json
import math
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from crosskd_hf.recipe.distillation import DistillationSection
from crosskd_hf.recipe.load import load_recipe
from crosskd_hf.recipe.run_folder import STATE_FILE, check_output, is_finished
from crosskd_hf.recipe.sections import SECTIONS, Recipe
from crosskd_hf.utils.files import write_atomically
from crosskd_hf.utils.plots import new_figure, save_figure
from crosskd_hf.utils.strict_yaml import RecipeError

ROOT = Path(__file__).resolve().parents[1]
# Two-sided 95% quantiles of Student's t by degrees of freedom.
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145)
STARTS_FILE = "starts.json"  # in a run's folder: with what it was begun, and gone on with
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
SUMMARY_COLUMNS = ("AP", "APs", "APm", "APl", "AP_third", "AP_two_thirds")
TITLES = {"AP_third": "AP at 1/3", "AP_two_thirds": "AP at 2/3"}
MAY_DIFFER = ("output_dir", "dataloader_num_workers")  # of two starts of one run
COLOURS = ("black", "tab:gray", "tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown")


class EvidenceError(ValueError):
    """A setting that can't be run, or results that don't belong to it."""


# The setting ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One training: a name, what it learns from, and its recipe as arguments of `load_recipe`."""

    name: str
    variant: str
    seed: int
    recipe: str
    overrides: tuple[str, ...]
    folder: Path
    needs: "Run | None" = None

    def arguments(self) -> list[str]:
        """The words after `python -m crosskd_hf train`."""
        return [self.recipe, *self.overrides, f"training.output_dir={self.folder}"]

    def resolved(self) -> Recipe:
        """The recipe as it runs.

        Raises:
            RecipeError: if it can't.
        """
        return load_recipe(self.recipe, self.arguments()[1:])

    def digest(self) -> str:
        """SHA-256 of the recipe's values that aren't defaults (new fields then change nothing), and of the teacher's.

        What may differ between two machines is left out.
        """
        recipe = self.resolved()
        content = {"training": {k: v for k, v in recipe.training.items() if k not in MAY_DIFFER}}
        content["distillation"] = digested(recipe.distillation)
        for name in ("model", "teacher", "data"):
            section = SECTIONS[name]
            values, defaults = getattr(recipe, name), dataclasses.asdict(section())
            given = dataclasses.asdict(values) if values else {}
            content[name] = {k: v for k, v in given.items() if v != defaults[k]}
        content["data"].pop("path", None)
        if content["data"].get("layout") == "coco":  # the default when the first results were made
            del content["data"]["layout"]
        if self.needs:
            content["teacher"]["checkpoint"] = self.needs.digest()
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def digested(distillation: DistillationSection | None) -> dict:
    """Values that aren't defaults, spelt as in the recipes of the committed results: a weight for each method, and
    CrossKD's keys beside them."""
    if distillation is None:
        return {}
    weights = {"crosskd": 0.0, "pkd": 0.0, "mimic": 0.0}
    others = {}
    for name, settings in distillation.methods.items():
        values, defaults = dataclasses.asdict(settings), dataclasses.asdict(type(settings)())
        if name in weights:
            weights[name] = values.pop("weight")
        else:
            others[name] = True
        others |= {k if name == "crosskd" else f"{name}.{k}": v for k, v in values.items() if v != defaults[k]}
    usual = {"crosskd": 1.0, "pkd": 0.0, "mimic": 0.0}
    return {k: v for k, v in weights.items() if v != usual.get(k)} | others


@dataclass(frozen=True)
class Setting:
    """A setting's file."""

    name: str
    content: dict
    folder: Path  # of its runs

    @classmethod
    def load(cls, path: Path, output: Path) -> "Setting":
        """Read and check a setting.

        Raises:
            EvidenceError: naming what is missing or unknown.
        """
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise EvidenceError(f"{path} can't be read: {error}") from error
        keys = {"teachers", "student", "seeds", "teacher_seed", "variants", "tables"}
        if not isinstance(content, dict) or set(content) != keys:
            holds = ", ".join(map(str, content)) if isinstance(content, dict) else repr(content)
            raise EvidenceError(f"{path} must hold exactly {', '.join(sorted(keys))}, but holds {holds}")
        if content["teacher_seed"] != "each" and not isinstance(content["teacher_seed"], int):
            raise EvidenceError(f"{path}: teacher_seed is a number or each, not {content['teacher_seed']!r}")
        for name, variant in content["variants"].items():
            if not {"teacher", "set"} <= set(variant) <= {"teacher", "set", "seeds"}:
                raise EvidenceError(f"{path}: variant {name!r} needs teacher and set, and may have seeds")
        if len(content["seeds"]) > len(T_95) + 1:
            raise EvidenceError(f"{path}: {len(content['seeds'])} seeds; intervals are known up to {len(T_95) + 1}")
        known = set(content["variants"])
        for title, names in content["tables"].items():
            if unknown := set(names) - known:
                raise EvidenceError(f"{path}: table {title!r} names no variant: {', '.join(sorted(unknown))}")
        for name, variant in content["variants"].items():
            if variant["teacher"] not in (None, *content["teachers"]):
                raise EvidenceError(f"{path}: variant {name!r} names no teacher: {variant['teacher']!r}")
        return cls(path.stem, content, output / path.stem)

    def runs(self) -> Iterator[Run]:
        """The students' runs in the order in which they are made: table by table, seed by seed."""
        seen = set()
        for names in self.content["tables"].values():
            for seed in self.content["seeds"]:
                for variant in names:
                    run = self.run(variant, seed)
                    if run is not None and run.name not in seen:
                        seen.add(run.name)
                        yield run

    def run(self, variant: str, seed: int) -> Run | None:
        """A variant's run of a seed; None if it isn't run with that one."""
        options, seeds = self.content["variants"][variant], self.content["seeds"]
        if seed not in seeds[: options.get("seeds", len(seeds))]:
            return None
        teacher = self.teacher(options["teacher"], seed) if options["teacher"] else None
        source = f"teacher.checkpoint={teacher.folder}" if teacher else "teacher=null"
        extra = [source] if teacher else [source, "distillation=null"]
        return self._run(variant, seed, self.content["student"], [*extra, *options["set"]], teacher)

    def teacher(self, name: str, seed: int) -> Run:
        """The teacher of a student's seed."""
        given = self.content["teacher_seed"]
        return self._run(
            f"teacher_{name}", seed if given == "each" else given, self.content["teachers"][name], [], None
        )

    def _run(self, variant: str, seed: int, source: dict, extra: Sequence[str], needs: Run | None) -> Run:
        name = f"{variant}-{seed}"
        overrides = (*source["set"], *extra, f"training.seed={seed}")
        recipe = self._recipe_name(variant if needs is None and variant.startswith("teacher_") else "student", source)
        return Run(name, variant, seed, recipe, overrides, self.folder / name, needs)

    def _recipe_name(self, role: str, source: dict) -> str:
        if isinstance(source["recipe"], str):
            return source["recipe"]
        path = self.folder / "recipes" / f"{role}.yaml"
        text = yaml.safe_dump(source["recipe"], sort_keys=False)
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, text)
        return str(path)


# Runs -----------------------------------------------------------------------------------------------------------


def make(run: Run, results: Path, threads: int, weights: bool = False) -> None:
    """Train a run, and its teacher before it, unless its JSON is there.

    Args:
        run: which.
        results: where the JSONs go.
        threads: of the training.
        weights: also those of its folder are needed, which then must be of this setting.

    Raises:
        EvidenceError: if the JSON or the folder is of other settings, or the training fails.
    """
    path = results / f"{run.name}.json"
    if path.is_file():
        check_result(json.loads(path.read_text(encoding="utf-8")), run, path)
    if weights:
        try:
            check_output(run.resolved(), run.folder)
        except RecipeError as error:
            raise EvidenceError(str(error)) from error
    if path.is_file() and (is_finished(run.folder) or not weights):
        return
    if run.needs is not None and not is_finished(run.folder):
        make(run.needs, results, threads, weights=True)
    print(f"{run.name}: {' '.join(run.arguments())}", flush=True)
    note_start(run.folder, threads)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    environment.pop("MKL_NUM_THREADS", None)
    with open(run.folder.with_name(f"{run.name}.log"), "a", encoding="utf-8") as log:
        command = [sys.executable, "-m", "crosskd_hf", "train", *run.arguments()]
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=ROOT).returncode
    if code:
        raise EvidenceError(f"{run.name} ended with {code}; see {log.name}")
    if not is_finished(run.folder):  # told to end by SIGTERM
        raise EvidenceError(f"{run.name} was ended before its last step: the same command goes on with it")
    write_atomically(path, json.dumps(result(run), indent=1) + "\n")


def note_start(folder: Path, threads: int) -> None:
    """Write down with what a run is begun or gone on with, unless it is finished."""
    starts = read_starts(folder)
    now = {
        "commit": commit(),
        "torch": torch.__version__,
        "threads": threads,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }
    if now not in starts and not is_finished(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / STARTS_FILE, json.dumps([*starts, now], indent=1) + "\n")


def read_starts(folder: Path) -> list[dict]:
    """What `note_start` wrote of a run, if anything."""
    path = folder / STARTS_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


def provenance(folder: Path) -> dict[str, object]:
    """With what a run was made; of several starts that differ, all values."""
    starts = read_starts(folder)
    values = {key: list(dict.fromkeys(start[key] for start in starts)) for key in (starts[0] if starts else ())}
    return {key: found[0] if len(found) == 1 else found for key, found in values.items()}


def result(run: Run) -> dict:
    """What is kept of a finished run."""
    history = json.loads((run.folder / STATE_FILE).read_text(encoding="utf-8"))["log_history"]
    evaluations = [entry for entry in history if "eval_AP" in entry]
    final = evaluations[-1]
    curve = {e["step"]: [e["step"] / final["step"], e["eval_AP"]] for e in evaluations}
    return {
        "variant": run.variant,
        "seed": run.seed,
        "teacher": run.needs.name if run.needs else None,
        "recipe_sha256": run.digest(),
        "metrics": {name.removeprefix("eval_"): v for name, v in final.items() if name.startswith("eval_AP")},
        "curve": list(curve.values()),
        "losses": loss_curve(history),
        "minutes": minutes(history),
        "peak_memory_gb": max(entry.get("memory_gb", 0) for entry in history),
        **provenance(run.folder),
    }


def minutes(history: list[dict]) -> float:
    """Training (batches, steps) and evaluation, over all starts of a run; without start-up."""
    seconds, before = 0.0, 0
    for entry in history:
        if "step_time" in entry and entry["step"] > before:
            seconds += (entry["step"] - before) * (entry["step_time"] + entry["data_time"])
            before = entry["step"]
        seconds += entry.get("eval_runtime", 0.0)
    return seconds / 60


def loss_curve(history: list[dict]) -> dict[str, list[float]]:
    """Each loss term at every log."""
    logs = [entry for entry in history if "step_time" in entry and "loss" in entry]
    names = [name for name in logs[0] if name.startswith(("loss_", "kd_", "mimic_"))]
    return {"step": [entry["step"] for entry in logs]} | {n: [round(entry[n], 5) for entry in logs] for n in names}


def commit() -> str:
    """The checkout's commit, with a mark if the package differs from it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "crosskd_hf", "recipes") else "")


def check_result(found: dict, run: Run, path: Path) -> None:
    """Refuse a result of other settings.

    Raises:
        EvidenceError: naming the file.
    """
    if found["recipe_sha256"] != run.digest():
        raise EvidenceError(f"{path} is of other settings than {run.name} has now: move it away to run that again")


# Summary --------------------------------------------------------------------------------------------------------


def values_of(found: dict) -> dict[str, float]:
    """Every number of a run that tables show; AP in percent, NaN where the data has no such boxes."""
    metrics = {name: found["metrics"].get(name, -1) for name in METRICS}
    metrics["AP_third"], metrics["AP_two_thirds"] = (at(found["curve"], part) for part in (1 / 3, 2 / 3))
    percent = {name: 100 * value if value >= 0 else math.nan for name, value in metrics.items()}
    return {**percent, "minutes": found["minutes"], "memory_gb": found["peak_memory_gb"]}


def at(curve: list[list[float]], part: float) -> float:
    """AP of the evaluation at a part of the schedule.

    Raises:
        EvidenceError: if none is within 1% of it.
    """
    done, value = min(curve, key=lambda point: abs(point[0] - part))
    if abs(done - part) > 0.01:
        raise EvidenceError(
            f"no evaluation at {part:.2f} of the schedule, the nearest is at {done:.2f}: set eval_steps"
        )
    return value


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation; NaN of what the data hasn't, or of a single value."""
    if any(math.isnan(value) for value in values):
        return math.nan, math.nan
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """Mean of paired differences and half the width of its 95% interval (Student's t); NaN of a single pair."""
    mean, deviation = mean_and_deviation(differences)
    pairs = len(differences)
    return mean, T_95[pairs - 2] * deviation / pairs**0.5 if pairs > 1 else math.nan


def summarise(setting: Setting, results: Path) -> dict:
    """Tables of the runs that have results, and the curves beside them."""
    found: dict[str, dict[int, dict]] = {}
    teachers: dict[str, dict] = {}
    for run in setting.runs():
        if content := read_result(run, results):
            found.setdefault(run.variant, {})[run.seed] = content
        if run.needs and run.needs.name not in teachers and (content := read_result(run.needs, results)):
            teachers[run.needs.name] = content
    summary: dict = {"setting": setting.name, "tables": {}}
    for title, names in setting.content["tables"].items():
        rows = [row(name, names[0], found) for name in names if name in found]
        summary["tables"][title] = rows
        curves = {name: [r["curve"] for r in found[name].values()] for name in names if name in found}
        if curves:
            draw_curves(curves, results / f"curves_{title.replace(' ', '_')}.png")
    summary["teachers"] = {name: values_of_teacher(content) for name, content in sorted(teachers.items())}
    everything = [*teachers.values(), *(content for runs in found.values() for content in runs.values())]
    summary["commits"] = sorted({str(content.get("commit", "unknown")) for content in everything})
    return summary


def read_result(run: Run, results: Path) -> dict | None:
    """A run's JSON; None if there is none.

    Raises:
        EvidenceError: it is of other settings.
    """
    path = results / f"{run.name}.json"
    if not path.is_file():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    check_result(content, run, path)
    return content


def values_of_teacher(found: dict) -> dict[str, float]:
    """A teacher's numbers."""
    return {name: round(100 * found["metrics"][name], 2) for name in ("AP", "AP50", "AP75")}


def row(name: str, reference: str, found: dict[str, dict[int, dict]]) -> dict:
    """A variant's line of a table."""
    runs = {seed: values_of(content) for seed, content in found[name].items()}
    base = {seed: values_of(content) for seed, content in found.get(reference, {}).items()}
    shared = sorted(set(runs) & set(base))
    line: dict = {"variant": name, "seeds": sorted(runs), "AP_each": [round(runs[s]["AP"], 2) for s in sorted(runs)]}
    for column in (*SUMMARY_COLUMNS, "minutes", "memory_gb"):
        line[column], line[f"{column}_std"] = mean_and_deviation([values[column] for values in runs.values()])
    if name != reference and shared:
        for column in SUMMARY_COLUMNS:
            mean, half = interval([runs[s][column] - base[s][column] for s in shared])
            line[f"{column}_gain"], line[f"{column}_gain_half_width"] = mean, half
        line["pairs"] = len(shared)
    return line


def draw_curves(curves: dict[str, list[list[list[float]]]], path: Path) -> None:
    """Mean AP over the seeds along the schedule, with a band of one standard deviation."""
    figure = new_figure(7, 4.5)
    axes = figure.add_subplot()
    for (name, runs), colour in zip(curves.items(), COLOURS * 2, strict=False):
        points = [list(column) for column in zip(*runs, strict=True)]
        xs = [column[0][0] for column in points]
        aps = [[100 * ap for _, ap in column] for column in points]
        means = [statistics.fmean(values) for values in aps]
        axes.plot(xs, means, marker="o", markersize=3, color=colour, label=f"{name} ({len(runs)} seeds)")
        if len(runs) > 1:
            stds = [statistics.stdev(values) for values in aps]
            low, high = ([m + sign * s for m, s in zip(means, stds, strict=True)] for sign in (-1, 1))
            axes.fill_between(xs, low, high, color=colour, alpha=0.12, linewidth=0)
    axes.set(xlabel="part of the schedule", ylabel="AP (COCO, %), mean and standard deviation", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    save_figure(figure, path)


def markdown(summary: dict) -> str:
    """The tables as text."""
    lines = [f"# {summary['setting']}"]
    for title, rows in summary["tables"].items():
        columns = [c for c in SUMMARY_COLUMNS if not all(math.isnan(r[c]) for r in rows)]
        heads = [TITLES.get(column, column) for column in columns[1:]]
        lines += ["", f"## {title}", ""]
        lines.append("| |" + "|".join([" seeds ", " AP ", " against the first, 95% ", *heads, "minutes", "GB"]) + "|")
        lines.append("|" + "---|" * (6 + len(heads)))
        for r in rows:
            gain = with_error(r["AP_gain"], r["AP_gain_half_width"], "+.1f") if "AP_gain" in r else "-"
            others = [with_error(r[column], math.nan) for column in columns[1:]]
            cells = [r["variant"], str(len(r["seeds"])), with_error(r["AP"], r["AP_std"]), gain, *others]
            cells += [f"{r['minutes']:.1f}", f"{r['memory_gb']:.2f}"]
            lines.append(f"| {' | '.join(cells)} |")
    if summary["teachers"]:
        shown = ", ".join(f"{name} {values['AP']:.1f}" for name, values in summary["teachers"].items())
        lines += ["", f"Teachers' AP: {shown}."]
    lines += ["", "AP in percent: mean ± standard deviation over the seeds. Differences are paired by seed, with the"]
    lines += ["half width of their 95% interval (Student's t). Minutes are of training and evaluation."]
    lines += ["", f"Made by the code of: {', '.join(summary['commits']) or 'nothing yet'}."]
    return "\n".join(lines) + "\n"


def with_error(value: float, error: float, form: str = ".1f") -> str:
    """A number and its error, or what there is of both."""
    if math.isnan(value):
        return "-"
    return f"{value:{form}}" + ("" if math.isnan(error) else f" ± {error:.1f}")


def without_nan(value: object) -> object:
    """The same with None for NaN, which JSON doesn't have."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("setting", type=Path, help="a setting's YAML")
    parser.add_argument("--output", type=Path, default=Path("runs/evidence"), help="where the runs go")
    parser.add_argument("--results", type=Path, help="where the JSONs go (default: inside the runs' folder)")
    parser.add_argument("--summary", action="store_true", help="only make the summary of what is there")
    parser.add_argument("--only", nargs="*", metavar="VARIANT", help="run these variants only")
    parser.add_argument("--threads", type=int, default=1, help="of each run (default: 1); recorded")
    arguments = parser.parse_args()
    try:
        setting = Setting.load(arguments.setting, arguments.output.absolute())
        results = arguments.results or setting.folder / "results"
        variants = setting.content["variants"]
        if unknown := set(arguments.only or ()) - set(variants):
            raise EvidenceError(f"--only {', '.join(sorted(unknown))}: no variant. There are {', '.join(variants)}")
        if arguments.summary and not list(results.glob("*-*.json")):
            raise EvidenceError(f"no results in {results}: run this without --summary, or name them with --results")
        results.mkdir(parents=True, exist_ok=True)
        runs = [run for run in setting.runs() if not arguments.only or run.variant in arguments.only]
        for run in runs:  # every recipe is read before the first one is trained
            try:
                run.resolved()
            except RecipeError as error:
                raise EvidenceError(f"{arguments.setting}, variant {run.variant}: {error}") from error
        for number, run in enumerate([] if arguments.summary else runs, start=1):
            print(f"[{number}/{len(runs)}] {run.name}", flush=True)
            make(run, results, arguments.threads)
        summary = summarise(setting, results)
    except EvidenceError as error:
        raise SystemExit(f"EvidenceError: {error}") from error
    write_atomically(results / "summary.json", json.dumps(without_nan(summary), indent=1, allow_nan=False) + "\n")
    write_atomically(results / "summary.md", markdown(summary))
    print(markdown(summary))


if __name__ == "__main__":
    main()
