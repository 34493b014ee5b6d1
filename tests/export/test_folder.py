"""What launch/export.py writes, and what it refuses. About 4 s."""

import ast
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from i3dist.checkpoint.format import RunState
from i3dist.checkpoint.weights import export_weights, load_run
from i3dist.config import Settings
from i3dist.errors import UserError
from i3dist.export import folder as module
from i3dist.export.card import Figures
from i3dist.export.folder import CODE, export
from i3dist.model.layer_kinds import LAYER_KINDS
from i3dist.model.rwkv import RwkvBlock
from i3dist.tracking.metrics_log import METRICS, VALIDATION, MetricsLog
from tests.conftest import error_line, program
from tests.export.conftest import Exported, documents, make_run
from tests.export.test_logits import far

FILES = {
    *("README.md", "config.json", "generation_config.json", "model.safetensors"),
    *("tokenizer.json", "tokenizer_config.json", *CODE),
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with logs."""
    make_run(tmp_path / "run")
    file = tmp_path / "run" / "settings.yaml"
    begun = {"train.init_from": tmp_path / "base", "train.compile_cache": tmp_path / "compiled"}
    file.write_text(Settings.load(file).with_values(**begun).to_yaml())
    MetricsLog(tmp_path / "run" / METRICS).append(7, {"tokens_seen": 123_456})
    found = {"loss": 2.5, "bits_per_byte": 1.25, "tokens": 999, "history_gain": 0.125}
    log = MetricsLog(tmp_path / "run" / VALIDATION)
    log.append(0, {"loss": 9.0, "bits_per_byte": 9.0, "tokens": 1})
    log.append(7, found)
    return tmp_path / "run"


def test_the_program_writes_all_files_and_the_runs_figures(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "mine"
    result = program("launch/export.py", run, out)
    assert result.returncode == 0, result.stderr
    assert {path.name for path in out.iterdir()} == FILES
    card = (out / "README.md").read_text()
    parameters = sum(p.numel() for p in make_run(tmp_path / "again").parameters())
    for figure in (
        f"{parameters:,}",
        "| 7 |",
        "123,456",
        "2.5000 nats",
        "1.2500",
        "+0.1250",
        "12.18",
    ):
        assert figure in card, figure
    chosen = card.split("## Settings")[1].split("## License")[0]
    assert "/" not in chosen, "names no place"
    assert "train.init_from: base\ntrain" in chosen
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1
    again = program("launch/export.py", run, out)
    assert "replace it (--overwrite)" in error_line(again)
    assert program("launch/export.py", run, out, "--overwrite").returncode == 0


def test_the_code_needs_torch_and_transformers_only(one: Exported) -> None:
    for name in CODE:
        tree = ast.parse((one.folder / name).read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert f"{node.module}.py" in CODE
            elif isinstance(node, ast.Import | ast.ImportFrom):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                for imported in [*names, getattr(node, "module", None) or "torch"]:
                    top = imported.split(".")[0]
                    assert top in {"torch", "transformers"} | set(sys.stdlib_module_names)


def test_a_checkpoints_figures_are_those_of_its_step(run: Path) -> None:
    checkpoint = run / "checkpoints" / "step-00000007"
    checkpoint.mkdir(parents=True)
    state = RunState(step=7, windows=1, tokens_seen=77, settings={}, data="", engine={})
    (checkpoint / "state.json").write_text(state.model_dump_json())
    (run / METRICS).unlink()
    for path in (checkpoint, run / "checkpoints"):
        figures = Figures.of(path, 5)
        assert (figures.step, figures.tokens) == (7, 77)
        assert figures.validation is not None and figures.validation["loss"] == 2.5
    (run / VALIDATION).unlink()
    assert ("held-out loss", "not measured") in Figures.of(checkpoint, 5).rows()


def test_weights_of_bf16_stay_bf16(run: Path, tmp_path: Path) -> None:
    model = make_run(tmp_path / "other").bfloat16()
    export_weights(run, model.float(), step=7)
    export(run, tmp_path / "out")
    saved = load_file(tmp_path / "out" / "model.safetensors")
    kinds = {name: tensor.dtype for name, tensor in saved.items()}
    parameters = {name for name, _ in model.named_parameters()}
    assert {kinds[name] for name in parameters} == {torch.bfloat16}
    assert {kinds[name] for name in kinds.keys() - parameters} == {torch.float32}
    hf = Exported(model, tmp_path / "out").load()
    assert hf.dtype == torch.bfloat16
    ids = documents(1, 30, 100)[None]
    with torch.no_grad():
        wide = Exported(model, tmp_path / "out").load(dtype=torch.float32)(ids).logits
        assert far(hf(ids).logits.float(), wide) < 0.1


def test_settings_of_an_export_build_the_same_model(each: Exported) -> None:
    again, _, _ = load_run(each.folder, torch.device("cpu"))
    state = each.model.state_dict()
    assert again.state_dict().keys() == state.keys() and again.joined == each.model.joined
    for name, tensor in again.state_dict().items():
        torch.testing.assert_close(tensor, state[name].to(tensor.dtype))


def spoil(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device", "model.safetensors")


@pytest.mark.parametrize("there", [False, True], ids=["new", "replaced"])
def test_an_export_that_fails_leaves_what_was_there(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    out = tmp_path / "place" / "out"
    out.parent.mkdir()
    if there:
        export(run, out)
    before = {path: path.read_bytes() for path in out.parent.rglob("*") if path.is_file()}
    monkeypatch.setattr(module, "write_tensors", spoil)
    with pytest.raises(OSError, match="No space"):
        export(run, out, overwrite=True)
    after = {path: path.read_bytes() for path in out.parent.rglob("*") if path.is_file()}
    assert after == before and len(list(out.parent.iterdir())) == there


def test_an_export_whose_place_cannot_be_taken_leaves_the_former_one(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, rename = tmp_path / "place" / "out", Path.rename
    export(run, out)
    before = {path: path.read_bytes() for path in out.parent.rglob("*") if path.is_file()}
    failed = []

    def refuse_once(path: Path, target: Path) -> Path:
        if target == out and not failed:
            failed.append(path)
            raise OSError(5, "Input/output error", str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse_once)
    with pytest.raises(OSError, match="Input/output"):
        export(run, out, overwrite=True)
    after = {path: path.read_bytes() for path in out.parent.rglob("*") if path.is_file()}
    assert after == before and failed


def test_an_export_that_transformers_saved_again_is_exported(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    loaded.save_pretrained(tmp_path / "again")
    shutil.copy(tmp_path / "out" / "tokenizer.json", tmp_path / "again")
    for source, target in (("again", "twice"), ("twice", "thrice")):
        export(tmp_path / source, tmp_path / target)
        assert "optimizer steps" not in (tmp_path / target / "README.md").read_text()
    saved = [load_file(tmp_path / name / "model.safetensors") for name in ("out", "thrice")]
    assert saved[0].keys() == saved[1].keys()
    assert all(saved[0][name].equal(saved[1][name]) for name in saved[0])
    loaded.save_pretrained(tmp_path / "parts", max_shard_size="1KB")
    shutil.copy(tmp_path / "out" / "tokenizer.json", tmp_path / "parts")
    with pytest.raises(UserError, match=r"model.safetensors is missing: .* max_shard_size"):
        export(tmp_path / "parts", tmp_path / "whole")


def test_the_folder_that_the_user_is_in_is_not_replaced(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"you are in \."):
        export(run, Path("."))
    assert not list(tmp_path.glob("*.safetensors"))


def as_file(out: Path) -> None:
    out.write_text("")


def as_notes(out: Path) -> None:
    out.mkdir()
    (out / "notes.txt").write_text("mine")


def as_other_model(out: Path) -> None:
    out.mkdir()
    (out / "config.json").write_text('{"model_type": "llama"}')


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (as_file, "is no folder"),
        (as_notes, "something else than an export"),
        (as_other_model, "something else than an export"),
    ],
)
def test_what_is_no_export_is_never_replaced(
    run: Path, tmp_path: Path, make: Callable[[Path], None], line: str
) -> None:
    make(tmp_path / "out")
    with pytest.raises(UserError, match=line):
        export(run, tmp_path / "out", overwrite=True)


def test_a_place_beneath_a_file_is_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"/file is no folder: name another place"):
        export(run, tmp_path / "file" / "deep" / "out")


def test_an_empty_folder_is_filled(run: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    export(run, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES


def test_a_kind_of_a_users_own_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LAYER_KINDS, "twin", RwkvBlock)
    make_run(tmp_path / "run", layers="1xrwkv,1xtwin,1xattention")
    with pytest.raises(UserError, match="layers of kind twin, which cannot be exported"):
        export(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()
