"""Former names and defaults: still taken from saved runs, files and words, and never ambiguous."""

from pathlib import Path

import pytest

from i3dist.cli.former_settings import BEFORE
from i3dist.config import Settings
from i3dist.errors import UserError
from i3dist.training.continuing import first_conflict, inherit_decided

DEFAULTS = Settings()
FORMER = "12xrwkv,2xattention"
RWKV, ATTENTION, RECORDS = "model.rwkv_layers", "model.attention_layers", "model.records"


def load(tmp_path: Path, text: str, *words: str) -> Settings:
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    return Settings.load(file, words)


def former(settings: Settings) -> dict[str, dict[str, object]]:
    """What a run has saved that was made under the former names."""
    values = settings.to_dict()
    stack, model = settings.model.layer_kinds, values["model"]
    del model["layers"]
    model["rwkv_layers"], model["attention_layers"] = (
        stack.count(kind) for kind in ("rwkv", "attention")
    )
    model["records"] = model.pop("sub_latents")
    return values


@pytest.mark.parametrize("layers", ["12xrwkv,2xattention", "3xrwkv,1xattention"])
def test_a_saved_run_has_the_settings_of_today(layers: str) -> None:
    settings = DEFAULTS.with_values(**{"model.layers": layers, "model.sub_latents": 8})
    saved = former(settings)
    untouched = {section: dict(values) for section, values in saved.items()}
    assert Settings.build(saved) == settings
    assert first_conflict(Settings.build(saved), settings) is None
    assert saved == untouched, "what was read stays as it was"


def test_a_run_from_before_there_was_a_choice_has_the_records_compressor(tmp_path: Path) -> None:
    """In a checkpoint and in the run's file; and continuing it with another is refused."""
    values = DEFAULTS.to_dict()
    assert values["model"].pop("compressor") == "records"
    text = DEFAULTS.to_yaml().replace("  compressor: records\n", "")
    for saved in (Settings.build(values), load(tmp_path, text)):
        assert saved == DEFAULTS and first_conflict(DEFAULTS, saved) is None
        literal = DEFAULTS.with_values(**{"model.compressor": "literal"})
        says = "model.compressor is literal but the saved run has records;"
        assert str(first_conflict(literal, saved)).startswith(says)


def test_a_saved_run_without_a_stack_has_the_former_one(tmp_path: Path) -> None:
    """In a checkpoint and in the run's file; what they do say stays."""
    assert DEFAULTS.model.layers != FORMER
    for stack in ("", "  layers: 3xrwkv,1xdual-attention\n", "  layers: 3xrwkv,1xattention\n"):
        saved = load(tmp_path, f"model:\n  d_model: 64\n{stack}train:\n  seed: 3\n").of_saved_run()
        assert saved.model.layers == (stack.partition(": ")[2].strip() or FORMER)
        assert (saved.model.d_model, saved.train.seed) == (64, 3)
        assert Settings.build(saved.to_dict()).of_saved_run() == saved


@pytest.mark.parametrize("words", [[], ["train.seed=3", "model.compressor=literal"]])
def test_the_same_words_go_on_with_the_former_default(words: list[str]) -> None:
    """Where `model.layers` is not among them. A typed stack is compared, be it today's default."""
    saved = Settings.load(None, [*words, f"model.layers={FORMER}", "train.lanes=8"])
    again = Settings.load(None, words)
    assert again.model.layers == DEFAULTS.model.layers
    assert inherit_decided(again, saved) == saved
    typed = Settings.load(None, [*words, f"model.layers={DEFAULTS.model.layers}"])
    line = first_conflict(inherit_decided(typed, saved), saved)
    assert line is not None and f"; type model.layers={FORMER} to continue it" in line


def test_only_a_former_default_is_gone_on_with() -> None:
    """A stack that the run was given is to be given again."""
    saved = Settings.load(None, ["model.layers=3xrwkv,1xattention"])
    line = first_conflict(inherit_decided(Settings.load(), saved), saved)
    assert line is not None and "; type model.layers=3xrwkv,1xattention to continue it" in line


def test_a_run_from_before_softmaxes_were_joined_never_joins_them(tmp_path: Path) -> None:
    """Whatever today's default is; and continuing it with a schedule is refused."""
    saved = load(tmp_path, "compression:\n  off_steps: 5\ntrain:\n  lanes: 8\n").of_saved_run()
    assert saved.compression.join_after == "never" == BEFORE["compression.join_after"]
    again = Settings.load(None, [f"model.layers={FORMER}", "compression.off_steps=5"])
    assert inherit_decided(again, saved).compression == saved.compression
    typed = again.with_values(**{"compression.join_after": 9})
    line = first_conflict(inherit_decided(typed, saved), saved)
    assert line is not None and "; type compression.join_after=never to continue it" in line


@pytest.mark.parametrize(
    ("text", "words", "layers", "parts"),
    [
        ("model: {rwkv_layers: 3, attention_layers: 1}", [], "3xrwkv,1xattention", 4),
        ("model: {records: 2}", [f"{RWKV}=5"], "5xrwkv,2xattention", 2),
        ("", [f"{ATTENTION}=1", f"{RWKV}=2", f"{RECORDS}=8"], "2xrwkv,1xattention", 8),
        ("model: {layers: '3xrwkv,1xattention'}", [f"{RWKV}=2"], "2xrwkv,1xattention", 4),
        ("model: {layers: '3xrwkv,1xattention'}", [f"{RWKV}=2", f"{ATTENTION}=4"],
         "2xrwkv,4xattention", 4),
        ("model: {rwkv_layers: 3, records: 2}", ["model.layers=1xrwkv,1xattention"],
         "1xrwkv,1xattention", 2),
        ("model: {records: 2}", ["model.sub_latents=8"], FORMER, 8),
        ("model: {sub_latents: 8}", [f"{RECORDS}=2"], FORMER, 2),
        ("model: {layers: '3xrwkv,1xdual-attention'}", [f"{RWKV}=2"],
         "2xrwkv,1xdual-attention", 4),
        ("model: {layers: '2xconv,3xrwkv,1xattention'}", [f"{RWKV}=1"],
         "2xconv,1xrwkv,1xattention", 4),
    ],
)  # fmt: skip
def test_words_win_over_files_whichever_names_they_use(
    tmp_path: Path, text: str, words: list[str], layers: str, parts: int
) -> None:
    model = load(tmp_path, text, *words).model
    assert (model.layers, model.sub_latents) == (layers, parts)


@pytest.mark.parametrize(
    ("text", "words", "says"),
    [
        ("model:\n  layers: 1xrwkv,1xattention\n  rwkv_layers: 2", [],
         r"settings.yaml, line 3: model.layers and its former name model.rwkv_layers are both"),
        ("model:\n  sub_latents: 2\n  records: 2", [], "line 3: model.sub_latents and its former"),
        ("", [f"{RECORDS}=2", "model.sub_latents=2"], "^model.sub_latents and its former name"),
        ("", [f"{RWKV}=2", "model.layers=1xrwkv,1xattention"], "^model.layers and its former"),
        ("model:\n  rwkv_layers: 0", [], "line 2: setting model.rwkv_layers=0 .* 1 to 1024"),
        ("", [f"{ATTENTION}=1025"], "^setting model.attention_layers=1025 should"),
        ("", [f"{RWKV}=1.5"], "^setting model.rwkv_layers=1.5 should"),
        ("", [f"{RWKV}=some"], "^setting model.rwkv_layers='some' should"),
        ("model:\n  records: 0", [], "line 2: setting model.sub_latents=0 should"),
        ("model: {layers: '1xrwkv,1xconv,1xrwkv,1xattention'}", [f"{RWKV}=2"],
         "model.rwkv_layers cannot change .* 2 groups"),
        ("model: {layers: '3xrwkv,1xdual-attention'}", [f"{ATTENTION}=2"],
         "model.attention_layers cannot change .* 0 groups of attention: give model.layers"),
        ("model: {layers: 'none'}", [f"{RWKV}=2"], "setting model.layers='none'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line(tmp_path: Path, text: str, words: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says) as refused:
        load(tmp_path, text, *words)
    assert "\n" not in str(refused.value)


def test_what_is_no_tree_of_settings_is_left_to_validation() -> None:
    for values in ([], "model", {"model": 3}, {"model": None, "train": {}}):
        with pytest.raises(UserError):
            Settings.build(values)
