"""A trained model is found wherever its run or checkpoint lies, by whatever name it is reached."""

import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from i3dist.checkpoint.format import TOKENIZER
from i3dist.checkpoint.weights import SavedModel, export_weights, load_run
from i3dist.cli.former_settings import FORMER_LAYERS
from i3dist.errors import UserError
from i3dist.model.attention import AttentionBlock
from i3dist.model.lm import I3LM
from tests.conftest import last_checkpoint, program

CPU = torch.device("cpu")


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy of a finished run; the only one that these tests change."""
    return Path(shutil.copytree(whole, tmp_path / "the run"))


def newest(run: Path) -> Path:
    return run / "checkpoints" / last_checkpoint(run)


def same(path: Path, whole: Path) -> bool:
    """Whether a path is read as the weights, settings and tokenizer of the run at its end."""
    model, settings, tokenizer = load_run(path, CPU)
    wanted, its_settings, its_tokenizer = load_run(whole, CPU)
    return (
        model.state_dict().keys() == wanted.state_dict().keys()
        and all(t.equal(wanted.state_dict()[name]) for name, t in model.state_dict().items())
        and (settings.model, settings.train) == (its_settings.model, its_settings.train)
        and tokenizer.sha256 == its_tokenizer.sha256
    )


def copied(path: Path, elsewhere: Path) -> Path:
    return Path(shutil.copytree(path, elsewhere / "kept #1?"))


def moved(path: Path, elsewhere: Path) -> Path:
    return path.rename(elsewhere / "best%41 \udcff")


def linked(path: Path, elsewhere: Path) -> Path:
    (elsewhere / "link").symlink_to(path)
    return elsewhere / "link"


def as_it_is(path: Path, elsewhere: Path) -> Path:
    return path


def without_run(path: Path, elsewhere: Path) -> Path:
    place = moved(path, elsewhere)
    shutil.rmtree(elsewhere.parent / "the run", ignore_errors=True)
    return place


def test_a_run_without_a_stack_is_of_the_former_one(run: Path) -> None:
    """Weights of its 14 layers load beside settings that do not name them."""
    sizes = {"model.d_model": 16, "model.heads": 2, "model.layers": FORMER_LAYERS}
    settings = load_run(run, CPU)[1].with_values(**sizes)
    text = settings.to_yaml()
    assert f"  layers: {FORMER_LAYERS}\n" in text
    (run / "settings.yaml").write_text(text.replace(f"  layers: {FORMER_LAYERS}\n", ""))
    export_weights(run, I3LM(settings.model, bos_id=2), settings.train.steps)
    model, loaded, _ = load_run(run, CPU)
    assert loaded == settings and [type(block) for block in model.upper] == [AttentionBlock] * 2


WAYS = [as_it_is, copied, moved, linked, without_run]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("what", ["run", "checkpoint", "checkpoints"])
def test_what_was_trained_is_found_wherever_it_lies(
    run: Path, whole: Path, tmp_path: Path, way: Callable[[Path, Path], Path], what: str
) -> None:
    path = {"run": run, "checkpoint": newest(run), "checkpoints": run / "checkpoints"}[what]
    (tmp_path / "elsewhere").mkdir()
    assert same(way(path, tmp_path / "elsewhere"), whole)


def test_what_is_in_the_folder_may_be_named_too(
    run: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`latest`, a link to it, and the checkpoint that one stands in."""
    assert same(run / "checkpoints" / "latest", whole)
    (tmp_path / "latest").symlink_to(run / "checkpoints" / "latest")
    assert same(tmp_path / "latest", whole)
    monkeypatch.chdir(newest(run))
    assert same(Path("."), whole)
    monkeypatch.chdir(run)
    assert same(Path("."), whole)


def test_latest_means_what_a_run_would_continue_from(run: Path) -> None:
    (run / "checkpoints" / "latest").write_text("step-00000010")
    by_name, by_latest, by_folder = (
        load_run(run / "checkpoints" / name, CPU)[0].head.weight
        for name in ("step-00000010", "latest", "")
    )
    assert by_latest.equal(by_name) and by_folder.equal(by_name)
    assert not by_name.equal(load_run(run, CPU)[0].head.weight)


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("assign", [False, True])
def test_another_model_takes_the_weights(whole: Path, checkpoint: bool, assign: bool) -> None:
    """Into its own memory, or with that of the file."""
    saved = SavedModel.find(newest(whole) if checkpoint else whole)
    model = I3LM(saved.settings.model, saved.tokenizer.bos_id)
    before = model.head.weight.data_ptr()
    saved.load_into(model, assign)
    wanted = saved.as_model(CPU, None).state_dict()
    assert all(t.float().equal(wanted[name].float()) for name, t in model.state_dict().items())
    assert (model.head.weight.data_ptr() == before) != assign


def test_weights_that_do_not_fit_on_the_disk_are_one_line_and_leave_the_old_ones(
    whole: Path, tmp_path: Path
) -> None:
    """A limit on the size of files stands in for a full disk."""
    model, *_ = load_run(whole, CPU)
    export_weights(tmp_path, model, 1)
    before = (tmp_path / "model.safetensors").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(
            UserError, match=r"cannot be written: .*File too large.*; fix that"
        ) as error:
            export_weights(tmp_path, model, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"{tmp_path}/model.safetensors" in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert (tmp_path / "model.safetensors").read_bytes() == before
    export_weights(tmp_path, model, 2)
    assert (tmp_path / "model.safetensors").read_bytes() != before


def of_an_earlier_version(path: Path) -> Path:
    """Make a checkpoint as one that has no tokenizer of its own."""
    (path / TOKENIZER).unlink()
    listed = json.loads((path / "manifest.json").read_text())
    del listed["files"][TOKENIZER]
    (path / "manifest.json").write_text(json.dumps(listed))
    return path


def test_a_checkpoint_of_an_earlier_version_uses_its_runs_tokenizer(
    run: Path, whole: Path, tmp_path: Path
) -> None:
    """Where it lies in one; elsewhere one line says what to do, and that helps."""
    path = of_an_earlier_version(newest(run))
    assert same(path, whole)
    (tmp_path / "link").symlink_to(path)
    assert same(tmp_path / "link", whole)
    (tmp_path / "a" / "b").mkdir(parents=True)
    alone = path.rename(tmp_path / "a" / "b" / "alone")
    with pytest.raises(UserError, match=r"copy that of its run, .* to .*/a/b$") as error:
        load_run(alone, CPU)
    advised = Path(str(error.value).rpartition(" to ")[2])
    shutil.copy(run / "tokenizer.json", advised)
    assert same(alone, whole)


def test_what_a_checkpoint_holds_is_named_with_its_hash(run: Path) -> None:
    path = newest(run)
    listed = json.loads((path / "manifest.json").read_text())["files"]
    assert {file.name for file in path.iterdir()} == {*listed, "manifest.json"}
    assert (path / "tokenizer.json").read_bytes() == (run / "tokenizer.json").read_bytes()
    (path / "tokenizer.json").write_bytes(b"{}")
    with pytest.raises(UserError, match=r"tokenizer\.json has 2 of .* bytes"):
        load_run(path, CPU)


@pytest.mark.parametrize("name", [".DS_Store", "._state.json", ".nfs0001"])
def test_files_that_a_copy_leaves_behind_do_not_spoil_a_checkpoint(
    run: Path, whole: Path, name: str
) -> None:
    (newest(run) / name).write_text("x")
    assert same(newest(run), whole)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nowhere", "nowhere is not there: name a run's folder with model.safetensors"),
        ("", "is neither the folder of a run nor a checkpoint nor an export"),
        ("file", "is neither the folder of a run nor a checkpoint nor an export"),
        ("latest", "is neither the folder of a run nor a checkpoint nor an export"),
        (
            "step-00000005",
            "step-00000005 is neither the folder of a run nor a checkpoint nor an export",
        ),
        ("half", r"half: manifest\.json cannot be read; name another"),
    ],
)
def test_anything_else_is_one_line(tmp_path: Path, name: str, says: str) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "latest").write_text("step-00000007")
    (tmp_path / "step-00000005").mkdir()
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "state.json").write_text("{}")
    if name in ("latest", ""):
        (tmp_path / "step-00000005").rmdir()
    with pytest.raises(UserError, match=says):
        load_run(tmp_path / name, CPU)


def test_the_programs_take_a_checkpoint_of_which_the_run_is_gone(
    run: Path, data: Path, tmp_path: Path
) -> None:
    alone = newest(run).rename(tmp_path / "best #1")
    shutil.rmtree(run)
    done = program("launch/generate.py", "--checkpoint", alone, "--prompt", "x", "--tokens", 2)
    assert done.returncode == 0, done.stderr
    done = program("launch/evaluate.py", "--checkpoint", alone, "--data", data)
    assert done.returncode == 0 and "perplexity" in done.stdout, done.stderr
