"""Trained detectors on a Hub: the real client over real HTTP, to the server of `hub_server`.

The client reads its settings when it is imported, so that it works in a process of its own: this file, run as a
script, executes the functions of its first half by name.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import LARGE, TOKEN, HubServer
from paths import ROOT, TESTS

MODEL = {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"}
METRICS = "evaluation/eval_metrics.json"
CREATED = {".gitattributes"}  # by the Hub itself


# In the client's process ----------------------------------------------------------------------------------------


def push_model(repo: str, seed: int) -> None:
    """The processor first: neither needs the other."""
    from tiny import tiny_model, tiny_processor

    model = tiny_model(seed=seed)
    for part in (tiny_processor(model), model):
        part.push_to_hub(repo)


def distil(folder: str, teacher: str, repo: str) -> str:
    """Train two steps, evaluate, push; the last commit. A prediction is saved."""
    import torch
    from tiny import tiny_args, tiny_batch, tiny_model, tiny_processor, tiny_split

    from crosskd_hf import DistillationTrainer

    student = tiny_model(seed=1)
    split = tiny_split(Path(folder).parent / "data")
    args = tiny_args(Path(folder), max_steps=2, hub_model_id=repo, hub_token=TOKEN)
    trainer = DistillationTrainer(
        student, teacher, args, train_dataset=split, eval_dataset=split, processing_class=tiny_processor(student)
    )
    trainer.train()
    trainer.evaluate()
    commit = trainer.push_to_hub(dataset="noise", dataset_args="mini")
    with torch.no_grad():
        output = trainer.model.eval()(tiny_batch()["pixel_values"])
    torch.save({"logits": output.logits, "boxes": output.pred_boxes}, Path(folder) / "expected.pt")
    return commit.oid


def download(repo: str, cache: str, expected: str) -> dict:
    """Load a model into an empty cache, and look how its predictions compare."""
    import torch
    from tiny import tiny_batch
    from transformers import AutoImageProcessor, AutoModelForObjectDetection

    model = AutoModelForObjectDetection.from_pretrained(repo, cache_dir=cache).eval()
    processor = AutoImageProcessor.from_pretrained(repo, cache_dir=cache)
    with torch.no_grad():
        output = model(tiny_batch()["pixel_values"])
    known = torch.load(expected, weights_only=True)
    same = torch.equal(output.logits, known["logits"]) and torch.equal(output.pred_boxes, known["boxes"])
    return {"same": same, "size": dict(processor.size), "kind": type(processor).__name__}


def run_recipe(recipe: str, overrides: list[str]) -> None:
    from crosskd_hf.commands import train

    train.main([recipe, *overrides])


def serve() -> None:
    """Call what the lines of stdin name, and answer each with a line."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what is printed in between is no answer
    for line in sys.stdin:
        name, options = json.loads(line)
        try:
            answer = {"value": globals()[name](**options)}
        except (Exception, SystemExit) as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


# In the tests' process ------------------------------------------------------------------------------------------


class ClientError(Exception):
    """What went wrong in the client's process."""


class Client:
    """The process that talks to the server."""

    def __init__(self, hub: HubServer, home: Path):
        self.home = home
        path = os.pathsep.join([str(TESTS), str(ROOT), os.environ.get("PYTHONPATH", "")])
        self.log = open(home / "stderr.txt", "w+", encoding="utf-8")
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            env=os.environ | hub.environment(home) | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )

    def call(self, function: Any, timeout: float = 180, **options: Any) -> Any:
        """The value of a function there.

        Raises:
            ClientError: what it raised, or what its process left.
        """
        timer = threading.Timer(timeout, self.process.kill)
        timer.start()
        try:
            print(json.dumps([function.__name__, options]), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        finally:
            timer.cancel()
        if not line:
            raise ClientError((self.home / "stderr.txt").read_text(encoding="utf-8")[-3000:])
        answer = json.loads(line)
        if "error" in answer:
            raise ClientError(answer["error"])
        return answer["value"]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()
        self.log.close()


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def client(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    client = Client(hub, tmp_path_factory.mktemp("home"))
    yield client
    client.close()


@pytest.fixture
def failures(hub: HubServer) -> Iterator[dict]:
    yield hub.failures
    hub.failures.clear()


@pytest.fixture(scope="module")
def distilled(hub: HubServer, client: Client, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """A teacher from the Hub, and its student there."""
    folder = tmp_path_factory.mktemp("distilled")
    client.call(push_model, repo="user/teacher", seed=2)
    oid = client.call(distil, folder=str(folder / "run"), teacher="user/teacher", repo="user/student")
    return {"oid": oid, "folder": folder / "run"}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Of two steps, pushed as it is trained; otherwise it would be over before its first upload."""
    from tiny import write_tiny_recipe

    pushed = {"push_to_hub": True, "hub_always_push": True}
    return write_tiny_recipe(tmp_path, max_steps=2, save_strategy="steps", save_steps=1, **pushed)


def test_a_trained_student_arrives_with_exactly_its_files(hub: HubServer, distilled: dict) -> None:
    folder = distilled["folder"]
    assert set(hub.repos["user/teacher"].files) == MODEL | CREATED, "of a model and its processor alone"
    commit = hub.repos["user/student"].commits[-1]
    assert (commit.message, commit.oid) == ("End of training", distilled["oid"])
    assert set(commit.files) == MODEL | {METRICS} | CREATED
    assert (folder / "training_args.bin").is_file() and (folder / "evaluation/eval_predictions.json").is_file()
    for name in MODEL | {METRICS}:
        assert commit.files[name] == (folder / name).read_bytes(), name
    assert "base_model:\n- user/teacher\n" in commit.files["README.md"].decode()
    assert TOKEN.encode() not in (folder / "training_args.bin").read_bytes(), "where transformers has it"
    assert not [name for name, content in commit.files.items() if TOKEN.encode() in content]
    assert len(commit.files["model.safetensors"]) > LARGE, "so that it went by LFS"
    posts = [path for method, path, _ in hub.requests if method != "HEAD"]
    assert "/user/student.git/info/lfs/objects/batch" in posts
    assert all(authorized for method, path, authorized in hub.requests if "/api/models/user/student/commit" in path)


def test_a_fresh_cache_predicts_the_same(client: Client, distilled: dict, tmp_path: Path) -> None:
    expected = str(distilled["folder"] / "expected.pt")
    found = client.call(download, repo="user/student", cache=str(tmp_path / "cache"), expected=expected)
    assert found == {
        "same": True,
        "size": {"shortest_edge": 64, "longest_edge": 96},
        "kind": "DenseDetectorImageProcessor",
    }


def test_a_run_pushes_every_checkpoint_and_then_itself(hub: HubServer, client: Client, recipe: Path) -> None:
    """With an average of its weights, which is what is pushed."""
    overrides = ["training.hub_model_id=user/recipe", "training.ema_decay=0.5", "training.hub_strategy=checkpoint"]
    client.call(run_recipe, recipe=str(recipe), overrides=overrides)
    commits = hub.repos["user/recipe"].commits
    messages = ["initial commit", "Training in progress, step 1", "Training in progress, step 2", "End of training"]
    assert [commit.message for commit in commits] == messages
    checkpoints = [{name for name in commit.files if name.startswith("last-checkpoint/")} for commit in commits]
    assert set(commits[1].files) - checkpoints[1] == MODEL | {"recipe.yaml"} | CREATED, "not evaluated yet"
    assert set(commits[3].files) - checkpoints[3] == MODEL | {"recipe.yaml", METRICS} | CREATED
    weights = [commit.files["model.safetensors"] for commit in commits[1:]]
    trained = (recipe.parent / "run" / "checkpoint-2" / "model.safetensors").read_bytes()
    assert weights[0] != weights[1] and weights[1] == weights[2] != trained
    local = {path.name: path.read_bytes() for path in (recipe.parent / "run" / "checkpoint-2").iterdir()}
    pushed = {name.removeprefix("last-checkpoint/"): commits[2].files[name] for name in checkpoints[2]}
    assert pushed == local and {"complete.json", "optimizer.pt", "trainer_state.json"} <= set(local)
    cards = [commit.files["README.md"].decode() for commit in commits[1:]]
    assert "Steps: 1 of 2" in cards[0] and "model-index" not in cards[0]
    assert "Steps: 2\n" in cards[2] and "model-index" in cards[2]
    assert str(recipe.parent) not in commits[3].files["recipe.yaml"].decode()
    assert not [name for commit in commits for name in commit.files if name.startswith(("_", "checkpoint"))]


def test_the_same_command_sends_what_the_hub_refused(
    hub: HubServer, client: Client, failures: dict, recipe: Path
) -> None:
    name = ["training.hub_model_id=user/again"]
    failures["POST", "/commit/main"] = 401
    with pytest.raises(ClientError, match=r"SystemExit: .*401"):
        client.call(run_recipe, recipe=str(recipe), overrides=name)
    trained = (recipe.parent / "run" / "model.safetensors").read_bytes()
    assert "an upload in training failed" in (client.home / "stderr.txt").read_text(encoding="utf-8")
    failures.clear()
    repo, card = hub.repos["user/again"], b"---\nlicense: mit\n---\nMine.\n"
    repo.add("Create README.md", repo.files | {"README.md": card})
    client.call(run_recipe, recipe=str(recipe), overrides=name)
    assert repo.files["model.safetensors"] == trained
    assert set(repo.files) == MODEL | {"recipe.yaml", METRICS} | CREATED
    assert repo.files["README.md"] == card, "what somebody wrote on the Hub is kept"


if __name__ == "__main__":
    serve()
