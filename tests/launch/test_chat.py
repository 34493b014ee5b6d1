"""launch/chat.py on a model that has learned a toy dialogue, and on models that may not answer."""

import io
import json
import random
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import i3dist
from data_prep.formats import usable_conversation
from i3dist.errors import UserError
from i3dist.inference.language_model import LanguageModel
from i3dist.programs import chat
from i3dist.tracking.origin import data_format
from tests.conftest import program, run_ranks
from tests.launch.conftest import typed

COLORS = {"the sky": "blue", "grass": "green", "snow": "white", "coal": "black", "gold": "yellow"}
LEARNING = [
    *("--config", "configs/tiny.yaml", "model.d_model=32", "model.layers=1xrwkv,1xdual-attention"),
    *("model.heads=2", "model.latents=4", "model.sub_latents=2", "model.history_chunks=2"),
    *("model.chunk_length=64", "train.window_chunks=2", "train.steps=100", "optimizer.lr=0.01"),
    *("optimizer.warmup_steps=5", "compression.off_steps=0", "compression.ramp_steps=2"),
    *("checkpoint.every=0", "validate.every=0", "validate.samples=0", "log.diagnose_every=0"),
    "tracking.enabled=false",
]


def question(thing: str) -> str:
    return f"What color is {thing}?"


def dialogue(things: Sequence[str]) -> list[dict[str, str]]:
    turns = ((question(thing), f"It is {COLORS[thing]}.") for thing in things)
    roles = ("user", "assistant")
    return [
        {"role": r, "content": text} for turn in turns for r, text in zip(roles, turn, strict=True)
    ]


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that has learned the colors of things from conversations."""
    folder, rng = tmp_path_factory.mktemp("taught"), random.Random(0)
    chats = [dialogue(rng.choices([*COLORS], k=rng.randint(1, 3))) for _ in range(400)]
    lines = (json.dumps({"messages": turns}) for turns in chats)
    (folder / "chats.jsonl").write_text("\n".join(lines))
    options = ["--source", folder / "chats.jsonl", "--format", "chat", "--out", folder / "data"]
    options += ["--vocab-size", 300, "--chunk-length", 64, "--chunks-per-shard", 4]
    made = program("data_prep/shard.py", *options, "--valid-fraction", 0.1, "--workers", 1)
    assert made.returncode == 0, made.stderr
    places = f"data.path={folder / 'data'}", f"run.path={folder / 'run'}"
    done = run_ranks(*LEARNING, *places, ranks=1)
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.fixture(scope="module")
def model(taught: Path) -> LanguageModel:
    return i3dist.load(taught, device="cpu")


def say(monkeypatch: pytest.MonkeyPatch, run: Path, lines: Sequence[str], *words: object) -> None:
    """Run the program with these lines as standard input."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    typed(monkeypatch, "--checkpoint", run, "--device", "cpu", "--temperature", 0, *words)
    chat.main()


def test_a_run_learns_a_dialogue_and_answers_it(
    taught: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Over more than one chunk; blank lines are no messages, and /quit ends."""
    things = [*COLORS, *COLORS]
    say(monkeypatch, taught, ["", *map(question, things), " /quit ", question("grass")])
    said = capsys.readouterr()
    assert said.out.splitlines() == [f"It is {COLORS[thing]}." for thing in things]
    assert said.err == ""


def test_a_conversation_is_kept_and_goes_on(
    taught: Path, model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the ids of one that was not stopped; and the file is data for shard.py."""
    file, things = tmp_path / "chat.jsonl", [*COLORS]
    words = ["--conversation", file, "--system", "Colors."]
    for some in (things[:2], [], things[2:]):
        say(monkeypatch, taught, list(map(question, some)), *words)
    (line,) = file.read_text().splitlines()
    turns = json.loads(line)["messages"]
    assert turns == [{"role": "system", "content": "Colors."}, *dialogue(things)]
    assert isinstance(usable_conversation(turns), bytes)
    whole = model.chat(turns[:1], temperature=1.0, seed=5)
    for thing in things:
        list(whole.say(question(thing)))
    resumed = model.chat(whole.messages[:5], temperature=1.0, seed=5)
    for thing in things[2:]:
        list(resumed.say(question(thing)))
    assert resumed.ids == whole.ids


class Pressing(io.StringIO):
    """A terminal at which Ctrl-C is pressed when something is printed for the first time."""

    pressed = False

    def write(self, text: str) -> int:
        if text and not self.pressed:
            self.pressed = True
            signal.raise_signal(signal.SIGINT)
        return super().write(text)


def test_ctrl_c_stops_an_answer_and_the_conversation_goes_on(
    taught: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(sys, "stdout", Pressing())
    say(monkeypatch, taught, [question("snow"), question("coal")])
    first, second = sys.stdout.getvalue().splitlines()  # type: ignore[attr-defined]
    assert first != "It is white." and "It is white.".startswith(first)
    assert second == "It is black."
    assert signal.getsignal(signal.SIGINT) is before


def test_a_model_that_may_not_answer_says_so_first(
    taught: Path,
    finished: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for run, newest in ((taught, "chat"), (finished, None)):
        assert data_format(run) == newest
    assert data_format(taught / "checkpoints") == "chat"
    say(monkeypatch, finished, [])
    assert "does not say whether it was trained on conversations" in capsys.readouterr().err
    lines = [{"step": 0, "data_format": "chat"}, {"step": 3, "data_format": "text"}]
    (finished / "starts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    say(monkeypatch, finished, [])
    assert f"note: {finished} was trained on text, not on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--tokens", "0"], "--tokens 0 must be 1 or more"),
        (["--system", " "], "--system has no text"),
        (["--conversation", "nowhere/a"], "there is no folder nowhere"),
        (["--conversation", "."], "cannot be read: Is a directory"),
        (["--conversation", "kept", "--system", "b"], "begins with another message than --system"),
        (["--conversation", "two"], "two is no conversation: it should be one line of JSON"),
        (["--conversation", "tool"], "tool: a message should have a role"),
        (["--conversation", "latin"], "latin is no conversation"),
    ],
)
def test_what_cannot_be_is_one_line(
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    kept = json.dumps({"messages": dialogue(["snow"])})
    files = {"kept": kept, "two": f"{kept}\n{kept}", "tool": kept.replace("user", "tool")}
    for name, text in files.items():
        Path(name).write_text(text)
    Path("latin").write_bytes(kept.replace("snow", "sn\xf6w").encode("latin-1"))
    with pytest.raises(UserError, match=says):
        say(monkeypatch, finished, [], *words)


@pytest.mark.parametrize("content", [None, b"caf\xe9\n"])
@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # locale C has the latter
def test_input_that_is_no_text_is_refused(
    finished: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None, errors: str
) -> None:
    typed(monkeypatch, "--checkpoint", finished, "--device", "cpu")
    stdin = content and io.TextIOWrapper(io.BytesIO(content), "utf-8", errors)
    monkeypatch.setattr(sys, "stdin", stdin)
    with pytest.raises(UserError, match="standard input is "):
        chat.main()
