"""Run transformers' own common tests on the detectors and the image processor.

    python tests/upstream/run.py [--sdist FILE] [pytest arguments]

Takes the source distribution of the installed transformers version from the package index (or FILE), unpacks its
common tests into a temporary folder, adds the few modules that they import and the archive lacks, and runs them on
what `test_detectors.py` and `test_image_processor.py` beside this file name. Nothing of transformers is kept.
Needs `pip install parameterized` beside the packages of the extra `test`.
"""

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import transformers

HERE = Path(__file__).parent
PACKAGE = "transformers_tests"  # the name the archive's tests/ is imported by
WANTED = ("test_modeling_common.py", "test_image_processing_common.py", "test_configuration_common.py")
# Modules that the common tests import and the source distribution leaves out.
STAND_INS = {
    f"{PACKAGE}/__init__.py": "",
    # Tests of transformers' own exporters: `crosskd export` has tests of its own.
    f"{PACKAGE}/exporters/__init__.py": "",
    f"{PACKAGE}/exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    # Text generation; a detector has none.
    f"{PACKAGE}/generation/__init__.py": "",
    f"{PACKAGE}/generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    # Turns the address of a test image into a path; only slow tests, which need the network, ask for one.
    "utils/fetch_hub_objects_for_ci.py": "def url_to_local_path(url):\n    return url\n",
}
# What every configuration must take and keep; the values are unlike the defaults.
CONFIG_KEYWORDS = """
config_common_kwargs = {
    "return_dict": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 5,
    "architectures": ["AnyModel"],
    "id2label": {0: "label"},
    "label2id": {"label": 0},
    "problem_type": "regression",
}
"""


def main() -> int:
    """Fetch, unpack, run. Returns pytest's exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sdist", type=Path, help="transformers-VERSION.tar.gz (default: from the package index)")
    arguments, pytest_arguments = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        archive = arguments.sdist or download(Path(folder))
        unpack(archive, Path(folder))
        # Offline: what a test would fetch from the Hub is none of ours.
        environment = {**os.environ, "PYTHONPATH": folder, "HF_HUB_OFFLINE": "1"}
        # An empty configuration: ours is strict about markers, of which the common tests have some.
        write(Path(folder) / "pytest.ini", "[pytest]\n")
        options = [
            "-c",
            f"{folder}/pytest.ini",
            "--rootdir",
            str(HERE),
            "-p",
            "no:cacheprovider",
            "-rs",
            "-W",
            "ignore",
        ]
        command = [sys.executable, "-m", "pytest", *options, str(HERE), *pytest_arguments]
        return subprocess.run(command, env=environment, cwd=HERE.parent.parent, check=False).returncode


def download(folder: Path) -> Path:
    """The source distribution of the installed transformers version.

    Raises:
        CalledProcessError: the index can't be reached or doesn't have it.
    """
    wanted = f"transformers=={transformers.__version__}"
    options = ["--no-deps", "--no-binary", "transformers", "--dest", str(folder), "--quiet"]
    subprocess.run([sys.executable, "-m", "pip", "download", *options, wanted], check=True)
    return next(folder.glob("transformers-*.tar.gz"))


def unpack(archive: Path, folder: Path) -> None:
    """Write the archive's common tests and the stand-ins into a folder.

    Raises:
        FileNotFoundError: the archive lacks a common test file.
    """
    with tarfile.open(archive) as files:
        members = {Path(member.name).name: member for member in files if Path(member.name).parent.name == "tests"}
        for name in WANTED:
            content = files.extractfile(members[name]) if name in members else None
            if content is None:
                raise FileNotFoundError(f"{archive} has no tests/{name}")
            write(folder / PACKAGE / name, content.read().decode("utf-8"))
    for name, text in STAND_INS.items():
        write(folder / name, text)
    write(folder / PACKAGE / "utils" / "__init__.py", "")
    write(folder / PACKAGE / "utils" / "test_configuration_utils.py", CONFIG_KEYWORDS)


def write(path: Path, text: str) -> None:
    """Write a file, with its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
