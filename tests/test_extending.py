"""docs/extending.md: its examples are run as they stand there. About 10 s."""

import csv
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT, error_line, program, texts

PAGE = (ROOT / "docs" / "extending.md").read_text("utf-8")
FILES = dict(re.findall(r"^```python\n# (\w+\.py)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
COMMANDS = [
    shlex.split(command)[1:]
    for block in re.findall(r"^```sh\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    for command in block.replace("\\\n", " ").splitlines()
]
# What makes each command small enough for a test.
SMALL = {
    "data_prep/shard.py": [
        *("--workers", "1", "--vocab-size", "400", "--chunk-length", "32"),
        *("--chunks-per-shard", "8", "--valid-fraction", "0.2"),
    ],
    "launch/train.py": [
        *("model.chunk_length=32", "model.d_model=32", "train.window_chunks=2", "train.steps=4"),
        *("optimizer.warmup_steps=1", "log.every=1", "validate.every=0", "validate.chunks=4"),
        *("compression.off_steps=1", "compression.ramp_steps=1", "tracking.enabled=false"),
    ],
    "launch/evaluate.py": [],
    "launch/generate.py": ["--tokens", "5"],
}


def run(
    folder: Path, name: str, *words: str, without: str = "nothing"
) -> subprocess.CompletedProcess[str]:
    """Run a command of the page in `folder`, perhaps without the --extend of a file."""
    (command,) = (command for command in COMMANDS if command[0] == name)
    typed = shlex.join(command[1:]).replace(f"--extend {without} ", "")
    placed = re.sub(r"\b(\w+\.py|data/notes|runs/notes)", rf"{folder}/\1", typed)
    return program(name, *shlex.split(placed), *SMALL[name], *words)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's files, data made with its source, and a run with its kinds."""
    folder = tmp_path_factory.mktemp("extending")
    for name, code in FILES.items():
        (folder / name).write_text(code)
    with (folder / "notes.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["id", "url", "text"])
        rows.writerows([f"note-{number}", "", text] for number, text in enumerate(texts()[:6]))
    for name in ("data_prep/shard.py", "launch/train.py"):
        result = run(folder, name)
        assert result.returncode == 0, result.stderr
    return folder


def test_each_example_is_short() -> None:
    assert set(FILES) == {"notes.py", "shift.py", "means.py", "root.py", "bits.py"}
    for name, code in FILES.items():
        assert sum(bool(line.strip()) for line in code.splitlines()) < 30, name
    assert [command[0] for command in COMMANDS] == list(SMALL), "every command is run below"


def test_the_source_is_in_the_manifest(folder: Path) -> None:
    manifest = json.loads((folder / "data/notes/train/manifest.json").read_text())
    assert manifest["source"] == "notes" and manifest["documents"] > 0


def test_the_run_has_the_metric_and_follows_the_schedule(folder: Path) -> None:
    lines = (folder / "runs/notes/metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    assert [line["step"] for line in metrics] == [1, 2, 3, 4]
    assert all(line["bits_per_token"] > 0 for line in metrics)
    # 2e-3 falls to a tenth over 3 steps after 1 of warm-up; step 3 is 2/3 of the way.
    heights = [1 - 0.9 * (step / 3) ** 0.5 for step in (0, 0, 1, 2)]
    assert [line["learning_rate"] for line in metrics] == pytest.approx(
        [2e-3 * height for height in heights]
    )


def test_the_run_has_the_kinds_and_can_be_used(folder: Path) -> None:
    settings = (folder / "runs/notes/settings.yaml").read_text()
    assert "1xshift" in settings and "compressor: means" in settings
    for name in ("launch/evaluate.py", "launch/generate.py"):
        result = run(folder, name)
        assert result.returncode == 0, result.stderr


def test_the_run_continues_with_its_kinds(folder: Path) -> None:
    result = run(folder, "launch/train.py", "train.steps=5")
    assert result.returncode == 0, result.stderr
    lines = (folder / "runs/notes/metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 5


@pytest.mark.parametrize(
    ("name", "without", "says"),
    [
        ("launch/train.py", "root.py", "optimizer.schedule='root' should be cosine, "),
        (
            "launch/train.py",
            "shift.py",
            "unknown layer kind 'shift': use attention, ",
        ),
        ("launch/evaluate.py", "root.py", "optimizer.schedule='root' should be cosine, "),
        (
            "launch/generate.py",
            "shift.py",
            "unknown layer kind 'shift': use attention, ",
        ),
        ("launch/train.py", "means.py", "unknown model.compressor 'means': use literal, records, "),
        ("launch/evaluate.py", "means.py", "unknown model.compressor 'means': use literal, reco"),
    ],
)
def test_a_kind_that_is_not_there_again_is_one_line(
    folder: Path, name: str, without: str, says: str
) -> None:
    words = ["train.steps=9"] if name == "launch/train.py" else []
    line = error_line(run(folder, name, *words, without=without))
    assert says in line and "--extend FILE.py" in line
