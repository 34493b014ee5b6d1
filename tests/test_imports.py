"""The tree's directions: imports run one way, and heavy packages stay behind one file each."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Each layer may import itself and those before it.
LAYERS = [
    {
        *("i3dist.aside", "i3dist.errors", "i3dist.files", "i3dist.garbage", "i3dist.heap"),
        *("i3dist.registry", "i3dist.optim.schedules"),
    },
    {"i3dist.cli"},
    {"i3dist.config"},
    {"i3dist.distributed", "i3dist.ops"},
    {"i3dist.model", "i3dist.data", "i3dist.optim"},
    {"i3dist.checkpoint"},
    {"i3dist.engine", "i3dist.inference"},
    {"i3dist.tracking", "i3dist.page"},
    {"i3dist.export", "i3dist.preflight"},
    {"i3dist.training"},
    {"i3dist.report"},
    {"i3dist.programs", "i3dist.__main__"},
]


def layer_of(module: str) -> int:
    for level, names in enumerate(LAYERS):
        if any(module == name or module.startswith(name + ".") for name in names):
            return level
    raise AssertionError(f"{module} stands in no layer: add it to LAYERS")


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def known(name: str) -> bool:
    """Whether a dotted name is a module of ours, not something inside one."""
    path = ROOT / Path(*name.split("."))
    return path.with_suffix(".py").is_file()


@pytest.mark.parametrize("path", modules("i3dist"), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    if path.name == "__init__.py":
        return
    here = dotted(path)
    for name in imports(path):
        assert not name.startswith(("launch", "data_prep", "tests")), name
        if name.startswith("i3dist.") and known(name):
            assert layer_of(name) <= layer_of(here), f"{here} imports {name}"


def test_no_module_imports_itself_through_others() -> None:
    """Neither at its top nor inside a function."""
    paths = {dotted(path): path for folder in ("i3dist", "data_prep") for path in modules(folder)}
    graph = {name: {*imports(path)} & {*paths} for name, path in paths.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("imports go round: " + " <- ".join(error.args[1]))


def test_the_model_never_sees_data() -> None:
    for path in modules("i3dist/model"):
        assert not any(name.startswith("i3dist.data") for name in imports(path)), path


@pytest.mark.parametrize(
    ("package", "owner"),
    [
        ("deepspeed", "i3dist/engine/deepspeed_internals.py"),
        ("mlflow", "i3dist/tracking/mlflow_store.py"),
    ],
)
def test_one_file_imports(package: str, owner: str) -> None:
    files = [p for folder in ("i3dist", "launch", "data_prep") for p in modules(folder)]
    using = {
        str(path.relative_to(ROOT))
        for path in files
        if any(name.split(".")[0] == package for name in imports(path))
    }
    assert using == {owner}


def status_of(script: str) -> int:
    """What Python exits with that runs a script."""
    return subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False).returncode


def test_data_preparation_needs_no_torch() -> None:
    script = (
        "import sys, pkgutil, importlib, data_prep, i3dist.data.manifest, i3dist.data.tokenizer\n"
        "[importlib.import_module(m.name) "
        "for m in pkgutil.walk_packages(data_prep.__path__, 'data_prep.')]\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert status_of(script) == 0


def test_training_on_cpu_loads_no_library_for_which_it_has_no_use() -> None:
    """They would cost every rank seconds at its start."""
    script = (
        "import sys, i3dist.training.run, i3dist.training.summary\n"
        "from i3dist.config import Settings\n"
        "i3dist.training.summary.count_parameters(Settings())\n"
        "early = {'mlflow', 'matplotlib', 'torch._dynamo', 'torch._inductor'} & set(sys.modules)\n"
        "from i3dist.distributed.job import Job\n"
        "from i3dist.engine import setup\n"
        "from tests.engine.steps import build\n"
        "setup.start(Job.detect({}))\n"
        "build()\n"
        "late = {'mlflow', 'torch._inductor.compile_fx'} & set(sys.modules)\n"
        "sys.exit(f'{early | late}' if early | late else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_loading_evaluating_and_generating_import_no_deepspeed() -> None:
    script = (
        "import sys, runpy, pkgutil, importlib, i3dist.inference, i3dist.checkpoint.weights\n"
        "import i3dist.engine.interface, i3dist.training.guard\n"
        "[importlib.import_module(f'i3dist.inference.{m.name}') "
        "for m in pkgutil.iter_modules(i3dist.inference.__path__)]\n"
        "[runpy.run_path(f'launch/{name}.py') for name in ('evaluate', 'generate')]\n"
        "sys.exit('deepspeed' in sys.modules)"
    )
    assert status_of(script) == 0


def test_what_is_typed_for_generate_is_read_before_torch_is_imported() -> None:
    script = (
        "import sys, i3dist.programs.generate as program\n"
        "sys.argv = ['generate', '--checkpoint', 'runs/mine', '--prompt', 'Once']\n"
        "program.sampling_of(program.parse_arguments())\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert status_of(script) == 0


def test_importing_i3dist_and_its_settings_loads_no_torch() -> None:
    script = "import sys, i3dist, i3dist.config\nsys.exit('torch' in sys.modules)"
    assert status_of(script) == 0
