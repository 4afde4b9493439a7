"""What an import brings, and in which order: each case in a process of its own."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import crosskd_hf
from crosskd_hf import distillation, models

CHECK = """
from transformers import AutoConfig, AutoImageProcessor, AutoModelForObjectDetection
from transformers.pipelines import PIPELINE_REGISTRY
config = AutoConfig.for_model("crosskd_gfl", backbone="resnet18", fpn_channels=32, head_channels=32, head_blocks=1)
assert type(AutoModelForObjectDetection.from_config(config)).__name__ == "GFLForObjectDetection"
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
assert "DenseDetectorImageProcessor" in str(IMAGE_PROCESSOR_MAPPING[type(config)])
assert PIPELINE_REGISTRY.check_task("object-detection")[1]["impl"].__name__ == "DenseDetectionPipeline"
"""


def run(program: str) -> str:
    """A program's output."""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.mark.parametrize(
    "imports",
    [
        "from transformers import AutoModelForObjectDetection, pipeline; import crosskd_hf",
        pytest.param("import crosskd_hf", marks=pytest.mark.slow),
        pytest.param("from crosskd_hf import GFLForObjectDetection", marks=pytest.mark.slow),
    ],
)
def test_detectors_are_registered_whatever_is_imported_first(imports: str) -> None:
    run(f"{imports}\n{CHECK}")


def test_a_wrong_recipe_is_told_without_the_models() -> None:
    """Then DETR: its module imports the auto classes half-way through one that our detectors need themselves."""
    models = ("timm", "transformers.modeling_utils", "crosskd_hf.models.base")
    program = (
        "import sys\nfrom crosskd_hf.commands.main import main\ntry:\n"
        "    main(['train', 'gfl_r50_crosskd', 'distillation.crosskd.weigth=1'])\nexcept SystemExit as error:\n"
        f"    print('weigth' in str(error), [name for name in {models} if name in sys.modules])\n"
    )
    assert run(f"{program}from transformers import DetrForObjectDetection\n{CHECK}").endswith("True []\n")


HEAVY = ("torch", "transformers", "numpy", "datasets")


COMMANDS = ["--help"], ["--version"], ["trian"], ["train", "--help"], ["predict"], ["--print-completion", "bash"]


@pytest.mark.parametrize("words", COMMANDS)
def test_help_and_typos_import_nothing_heavy(words: list[str]) -> None:
    program = (
        f"import sys\nfrom crosskd_hf.commands.main import main\ntry:\n    main({words})\nexcept SystemExit:\n"
        f"    print('\\n', [name for name in {HEAVY} if name in sys.modules])"
    )
    assert run(program).endswith(" []\n")


def imported_for_types(module_file: str) -> set[str]:
    """Names that a module imports under TYPE_CHECKING."""
    tree = ast.parse(Path(module_file).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    return {alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}


@pytest.mark.parametrize("package", [crosskd_hf, models, distillation])
def test_lazy_names_are_those_that_type_checkers_see(package) -> None:
    lazy = {name for names in package.HOMES.values() for name in names}
    assert lazy == imported_for_types(package.__file__) == set(package.__all__) - {"__version__"}
    assert all(getattr(package, name) is not None for name in package.__all__) and lazy <= set(dir(package))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = package.nothing


def test_modules_are_found_without_being_imported() -> None:
    program = "import crosskd_hf\nprint(crosskd_hf.data.__name__, hasattr(crosskd_hf, 'nothing'))"
    assert run(program) == "crosskd_hf.data False\n"
