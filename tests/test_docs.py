"""The documents: links lead somewhere, names exist, commands are legal, figures are recorded."""

import importlib.util
import json
import re
import statistics
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml

from i3dist.config import Settings
from tests.conftest import ROOT

README, CHANGELOG = ROOT / "README.md", ROOT / "CHANGELOG.md"
MAP = ROOT / "data_prep" / "README.md"
DOCUMENTS = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *(MAP, ROOT / "benchmarks" / "README.md"),
]
each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
FOLDERS = "benchmarks|configs|data_prep|docs|i3dist|launch|slurm|tests"
NAMES = {p.name for folder in FOLDERS.split("|") for p in (ROOT / folder).rglob("*.*")}
FENCE = re.compile(r"^```.*?\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMANDS = re.compile(r"^```(?:sh|text)\n(.*?)^```", re.MULTILINE | re.DOTALL)
FILE = re.compile(rf"(?:(?:{FOLDERS})/)?[\w./-]+\.(?:py|md|sbatch|yaml|toml|svg|png|jsonl?)")
# Files of a run, of prepared data and of users, named in documents.
OF_USERS = re.compile(r"(?:RUN/)?[\w.]+\.(?:jsonl?|yaml)|train/manifest\.json|[A-Z]+\.py")
# Words of the project's own past that a stranger would not know, and terms with a better name.
PRIVATE = [
    "shelf",
    "salien",
    "held back",
    "held_back",
    "look into",
    "one card",
    "same card",
    "each card",
]


def code(text: str) -> list[str]:
    """Everything in backticks, and the lines of commands."""
    commands = "".join(COMMANDS.findall(text)).splitlines()
    return [*re.findall(r"`([^`\n]+)`", FENCE.sub("", text)), *commands]


def anchors(path: Path) -> set[str]:
    """What GitHub makes of a document's headings."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", path.read_text()), re.MULTILINE)
    plain = (re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", heading).lower() for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}


def setting_words(text: str) -> Iterator[str]:
    """`section.key` and `section.key=value` in code; file names such as `model.safetensors` not."""
    sections = "|".join({name.split(".")[0] for name in Settings().flat()})
    pattern = rf"(?<![\w./-])(?:{sections})\.[a-z]\w*\b(?!\()(?:=[^\s`]+)?"
    for words in code(text):
        for word in re.findall(pattern, words):
            if not re.search(r"\.(py|json|jsonl|yaml|parquet|safetensors|md|sbatch)$", word):
                yield word


def test_the_map_of_data_preparation_names_every_module_once() -> None:
    modules = sorted(path.name for path in MAP.parent.rglob("[!_]*.py"))
    mapped = MAP.read_text().partition("| job |")[2]
    programs = ["report.py", "shard.py", "show.py", "verify.py"]
    named = re.findall(r"`(\w+\.py)`(?=.*\|.*\|)", mapped)
    assert sorted(named + programs) == modules


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) < 150


def test_code_of_the_readme_fits_a_terminal() -> None:
    lines = "".join(FENCE.findall(README.read_text())).splitlines()
    assert len(lines) > 10
    assert [line for line in lines if len(line) > 80] == []


@each_document
def test_links_lead_somewhere(path: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", path.read_text())):
        if link.startswith(("http:", "https:")):
            continue
        file, _, anchor = unquote(link).partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@each_document
def test_named_files_and_tests_exist(path: Path) -> None:
    if path == CHANGELOG:
        return
    text = path.read_text()
    examples = re.findall(r"^# ([\w.]+)$", "".join(FENCE.findall(text)), re.MULTILINE)
    for words in code(text):
        for file in FILE.findall(words):
            if words.startswith(("python", "deepspeed", "sbatch")) and not re.match(FOLDERS, file):
                continue  # the user's own
            if OF_USERS.fullmatch(file) or file in examples or "*" in words:
                continue
            here = [base / file for base in (ROOT, path.parent)]
            assert any(p.exists() for p in here) or file in NAMES, file
        if re.fullmatch(rf"(?:{FOLDERS})/[\w./-]*", words):
            assert (ROOT / words).exists(), words
    for file, test in re.findall(r"`(tests/[\w/]+\.py)::(\w+)", text):
        assert f"def {test}(" in (ROOT / file).read_text(), test


@each_document
def test_targets_of_make_exist(path: Path) -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = {m for words in code(path.read_text()) for m in re.findall(r"^make (\w+)", words)}
    assert named <= set(targets)


@each_document
def test_named_settings_exist_and_typed_ones_are_legal(path: Path) -> None:
    if path == CHANGELOG:
        return  # may name settings of the past
    for word in setting_words(path.read_text()):
        name, given, _ = word.partition("=")
        assert name in Settings().flat(), word
        if given and path.name != "extending.md":  # whose own test registers its kinds
            Settings.load(None, [word])


def test_setting_words_are_found() -> None:
    text = "`train.lanes` of `train.py`\n```sh\npython x.py run.path=a/b model.nothing=1\n```\n"
    assert list(setting_words(text)) == ["train.lanes", "run.path=a/b", "model.nothing=1"]


@each_document
def test_words_are_those_of_the_field(path: Path) -> None:
    text = path.read_text().lower()
    assert [word for word in PRIVATE if word in text] == []


def test_the_picture_is_what_its_script_draws_and_what_the_settings_say() -> None:
    script = ROOT / "docs" / "figures" / "architecture.py"
    spec = importlib.util.spec_from_file_location("architecture", script)
    assert spec is not None and spec.loader is not None
    picture = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(picture)
    assert script.with_suffix(".svg").read_text() == picture.draw()
    names = ("chunk_length", "history_chunks", "latents", "sub_latents")
    drawn = (picture.CHUNK, picture.HISTORY, picture.LATENTS, picture.SUB_LATENTS)
    assert drawn == tuple(Settings().flat()[f"model.{name}"] for name in names)


def test_gains_of_the_readme_are_those_recorded() -> None:
    """Loss, gain over none by seed, and share of the ceiling's gain, from the results' sums."""
    later: dict[str, dict[int, float]] = defaultdict(dict)
    lines = (ROOT / "docs" / "results" / "history.jsonl").read_text().splitlines()
    runs = [json.loads(line) for line in lines]
    for run in (run for run in runs if run["tokens"] == max(run["tokens"] for run in runs)):
        sums = run["by_chunk"]
        later[run["arm"]][run["seed"]] = sum(sums["loss"][1:]) / sum(sums["count"][1:])
    gains = {
        arm: statistics.mean(later["none"][seed] - loss for seed, loss in seeds.items())
        for arm, seeds in later.items()
    }
    default = "recipe-dual-soon-joins2000"
    for arm in ("literal", "mean", default, "recipe", "ceiling"):
        loss, seeds = statistics.mean(later[arm].values()), len(later[arm])
        share = gains[arm] / gains["ceiling"]
        row = rf"\| \**{seeds}\** \| {loss:.3f} \| {gains[arm]:.3f}.* \| \**{share:.0%}\** \|"
        assert re.search(row, README.read_text()), row


def test_figures_at_full_size_are_those_recorded() -> None:
    """Losses, gains and costs of the full model and its twin, in history.md, README and others."""
    lines = (ROOT / "docs" / "results" / "twins.jsonl").read_text().splitlines()
    at = {(run["run"], run["step"]): run for run in map(json.loads, lines)}
    history, speeds, readme = (
        (ROOT / name).read_text()
        for name in ("docs/history.md", "docs/performance.md", "README.md")
    )
    for step in sorted(step for name, step in at if name == "run"):
        ours, twin = (at[name, step]["by_chunk"] for name in ("run", "twin"))
        count, columns = sum(ours["count"][1:]), (*ours.items(), ("none", twin["withheld"]))
        later = {name: sum(values[1:]) / count for name, values in columns}
        first = (sums[0] / ours["count"][0] for sums in (twin["withheld"], ours["loss"]))
        losses = (*first, later["none"], later["loss"])
        costs = (later[name] - later["loss"] for name in ("none", "withheld", "other"))
        row = [f"{loss:.4f}" for loss in losses] + [f"{cost:.3f}" for cost in costs]
        assert " | ".join(row) in history.replace("**", "")
    gain = later["none"] - later["loss"]
    assert f"gains {gain:.3f} over its twin" in readme
    for run in (at["run", step], at["twin", step]):
        row = (f"{run['ms']:.1f}", f"{run['tokens_per_s']:,}", f"{run['mfu']:.1%}")
        assert f"| {' | '.join(row)} |" in speeds


def test_needles_of_the_full_model_are_those_recorded() -> None:
    results = json.loads((ROOT / "docs" / "results" / "needle.json").read_text())["results"]
    history = (ROOT / "docs" / "history.md").read_text()
    for each in results:
        margins = (
            f"{each['margin'][name]['mean']:.3f}" for name in ("history", "withheld", "other")
        )
        gain, found = each["gain"], each["found"]["history"]["mean"]
        half = (gain["high"] - gain["low"]) / 2
        row = f"{' | '.join(margins)} | {gain['mean']:.3f} ± {half:.3f} | {found:.3f} |"
        assert f"| {each['distance']:,} | {row}" in history


def test_speeds_of_the_readme_are_those_recorded() -> None:
    rows = json.loads((ROOT / "docs" / "results" / "train_throughput.json").read_text())["rows"]
    best: dict[str, float] = defaultdict(float)
    for row in rows:
        best[row["contestant"]] = max(best[row["contestant"]], row["tokens_per_s"])
    text = " ".join(README.read_text().split())
    assert f"{best['engine']:,.0f}"[:3] + ",000 tokens/s" in text
    assert f"{best['engine'] / best['gpt-512']:.2f} times a GPT of equal size at length 512" in text
    assert f"{best['engine'] / best['gpt-4096']:.2f} times at 4,096" in text


def test_the_citation_names_the_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert citation["version"] == project["version"]
    assert citation["license"] == project["license"] == "Apache-2.0"
    assert {"cff-version", "message", "title", "authors"} <= set(citation)


def test_files_that_know_of_cuda_are_listed() -> None:
    """For who wants another accelerator."""
    text = (ROOT / "docs" / "extending.md").read_text().partition("## Another accelerator")[2]
    files = [p for folder in ("i3dist", "launch") for p in (ROOT / folder).rglob("*.py")]
    knowing = {str(p.relative_to(ROOT)) for p in files if "cuda" in p.read_text()}
    assert set(re.findall(r"`([\w/]+\.py)`", text)) == knowing
