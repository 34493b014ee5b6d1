"""benchmarks/needle.py: models that know the needle or do not, its reach, and a trained run."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor

from i3dist.checkpoint.weights import load_run
from i3dist.config import ModelSettings
from i3dist.data.corpus import Corpus
from i3dist.data.tokenizer import Tokenizer
from i3dist.errors import UserError
from i3dist.model.layers import Channels
from i3dist.model.lm import I3LM, Below
from i3dist.model.segments import segment_ids
from i3dist.model.state import LaneState
from tests.conftest import ROOT, texts
from tests.model.conftest import BOS, BUILT_IN, SMALL, build

# As for a program started in that folder.
sys.path.append(str(ROOT / "benchmarks"))

import needle
import needles

T, C, V = SMALL["chunk_length"], SMALL["history_chunks"], SMALL["vocab_size"]
BEFORE, CANDIDATES = 6, 4  # chunks of a text before the query's; values to choose from
CHANCE = 1 / CANDIDATES
ALL = [k * T for k in range(1, BEFORE + 1)]


def trials(count: int, seed: int = 0, words: int = 1) -> list[needles.Trial]:
    """Needles `a b VALUE c` in texts of small tokens, which hold none of a needle's."""
    rng, of_values = np.random.default_rng(seed), np.random.default_rng(seed)

    def text(chunks: int) -> needles.Tokens:
        tokens = rng.integers(4, 20, (chunks, T))
        tokens[0, 0] = BOS
        return tokens

    def one(number: int) -> needles.Trial:
        query = np.array([20 + number % 8, 28 + number % 7])
        free = np.arange(35, V)
        drawn = [of_values.choice(free, CANDIDATES, replace=False) for _ in range(words)]
        offset = int(rng.integers(1, T - 2 - words))
        return needles.Trial(
            text(BEFORE + 1), text(C), offset, query, np.stack(drawn, 1), np.array([19])
        )

    return [one(number) for number in range(count)]


class Copier:
    """A stub with history as its latents: it predicts what followed the last two tokens there.

    Where it finds them it gives that token e^-0.1, and else each token 1/V.
    """

    def __init__(self, knows: bool = True):
        self.settings = ModelSettings.model_validate(SMALL | {"latents": T, "d_model": 8})
        self.head = SimpleNamespace(weight=torch.zeros(1, dtype=torch.float64))
        self.width = Channels(8, alignment=1)
        self.knows = knows

    def below(self, tokens: Tensor, depth: Tensor, state: LaneState) -> tuple[Below, LaneState]:
        """Latents are the tokens."""
        x = tokens.double().unsqueeze(-1).expand(-1, -1, -1, 8)
        latents = torch.cat([state.latents, x], dim=1)
        return Below(x, segment_ids(tokens, BOS), depth, latents), state._replace(
            latents=latents[:, -C:]
        )

    def above(self, below: Below, gate: Tensor) -> Tensor:
        """[B, 1, T, 8]: the predicted token, or -1."""
        predicted = torch.full_like(below.x, -1)
        for row, latents in enumerate(below.latents[:, :C, :, 0]):
            past = latents.flatten().tolist()
            own = below.x[row, 0, :, 0].tolist()
            after: dict[tuple[float, float], float] = {}
            for first, second, token in zip(past, past[1:], past[2:], strict=False):
                after[first, second] = token
            for place in range(1, T):
                predicted[row, 0, place] = after.get((own[place - 1], own[place]), -1)
        return predicted if self.knows and gate > 0 else torch.full_like(predicted, -1)

    def losses(self, x: Tensor, targets: Tensor) -> Tensor:
        """Nats of each target."""
        sure = torch.where(x[..., 0] == targets, 0.1, 50.0).double()
        return torch.where(x[..., 0] < 0, torch.tensor(V).double().log(), sure)


def results(model: object, given: Sequence[needles.Trial], *distances: int) -> list[needle.Result]:
    measured = needle.measure(cast("I3LM", model), given, distances, rows=3)
    return [needle.summarize(given, distance, found, C) for distance, found in measured.items()]


def test_a_model_that_knows_finds_every_needle_within_its_reach_and_no_other() -> None:
    """Reach is C chunks. The margin is 49.9: what a wrong value costs more than the true one."""
    found = results(Copier(), trials(20), *ALL)
    assert [r.distance for r in found] == ALL
    for r in found:
        within = r.distance <= C * T
        assert r.within_reach == within
        assert r.found["history"].mean == (1.0 if within else CHANCE)
        assert r.margin["history"].mean == pytest.approx(49.9 if within else 0.0)
        assert r.gain.mean == pytest.approx(49.9 if within else 0.0)
        for condition in ("withheld", "other"):
            assert r.found[condition].mean == CHANCE and r.margin[condition].mean == 0.0


def test_a_model_that_does_not_know_is_at_chance_everywhere() -> None:
    for r in results(Copier(knows=False), trials(20), *ALL):
        assert {figure.mean for figure in r.found.values()} == {CHANCE}
        assert {figure.mean for figure in r.margin.values()} == {0.0}
        assert r.gain == needle.Mean(0.0, 0.0, 0.0)


@pytest.mark.parametrize("compressor", BUILT_IN)
def test_the_reach_is_exactly_the_history(compressor: str) -> None:
    """Another value in the needle moves likelihoods iff it stands in the C chunks before."""
    model = build(compressor=compressor)
    words = 2
    ours = trials(6, words=words)
    exchanged = [
        needles.Trial(t.haystack, t.other, t.offset, t.query, t.values[::-1].copy(), t.end)
        for t in ours
    ]
    for distance in (*ALL, 5, T + 5, C * T + 5, C * T - 5):
        one, other = (
            next(needle.likelihoods(model, given, [distance])) for given in (ours, exchanged)
        )
        moved = (one["history"] - other["history"].flip(1)).abs().amax(1) > 0
        starts = torch.tensor([t.offset - distance for t in ours])
        ends = starts + words + 2  # of what differs
        assert moved[starts >= -C * T].all() and not moved[ends <= -C * T].any()
        if distance >= 2 * T:  # the needle is not in the query's chunk
            assert one["withheld"].equal(other["withheld"].flip(1))
            assert one["other"].equal(other["other"].flip(1))


def test_likelihoods_are_those_of_whole_forwards() -> None:
    """Candidate by candidate, of the text with the needle and the query in it."""
    model, given, distance = build(), trials(3, words=2), 2 * T
    found = next(needle.likelihoods(model, given, [distance]))
    for row, trial in enumerate(given):
        text = trial.text(distance)
        for column, value in enumerate(trial.values):
            tokens = torch.from_numpy(text.copy())[None]
            begin = trial.offset + len(trial.query)
            tokens[0, -1, begin : begin + 2] = torch.from_numpy(value)
            depth = torch.arange(BEFORE + 1)[None]
            nothing = LaneState.empty(1, model.settings, torch.device("cpu"), torch.float64)
            for condition, gate in (("history", 1.0), ("withheld", 0.0)):
                losses, _ = model(tokens, tokens.roll(-1, -1), depth, nothing, torch.tensor(gate))
                wanted = -losses[0, -1, begin - 1 : begin + 1].double().mean()
                torch.testing.assert_close(
                    found[condition][row, column], wanted, rtol=1e-6, atol=1e-6
                )


def test_the_number_computed_at_once_changes_nothing() -> None:
    model, given = build(), trials(7)
    one, other = (needle.measure(model, given, [T, 2 * T], rows) for rows in (2, 7))
    for distance in (T, 2 * T):
        for condition in needle.CONDITIONS:
            np.testing.assert_allclose(
                one[distance][condition], other[distance][condition], rtol=1e-6
            )


def test_the_needle_and_the_query_stand_where_they_should() -> None:
    (trial,) = trials(1)
    text, plain = trial.text(2 * T + 1).ravel(), trial.haystack.ravel()
    asked = BEFORE * T + trial.offset
    assert text[asked : asked + 2].tolist() == trial.query.tolist()
    stated = text[asked - 2 * T - 1 :][:4].tolist()
    assert stated == [*trial.query, trial.values[0, 0], trial.end[0]]
    assert (text != plain).sum() <= 6 and len(text) == len(plain)


def test_margins_and_hits_by_hand() -> None:
    likelihood = np.array([[-1.0, -2.0, -4.0], [-3.0, -1.0, -3.0], [-2.0, -2.0, -5.0]])
    assert needle.margins(likelihood).tolist() == [2.0, -1.0, 1.5]
    assert needle.hits(likelihood).tolist() == [1.0, 0.0, 0.5]


def test_intervals_cover_the_mean_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    covered = {"mean": 0, "share": 0}
    for _ in range(200):
        mean = needle.Mean.of(rng.normal(0.3, 1, 60))
        share = needle.Mean.of_share((rng.random(60) < 0.3).astype(float))
        covered["mean"] += mean.low <= 0.3 <= mean.high
        covered["share"] += share.low <= 0.3 <= share.high
    assert all(180 <= count <= 199 for count in covered.values())
    all_found = needle.Mean.of_share(np.ones(200))
    assert all_found.mean == pytest.approx(all_found.high) == 1.0
    assert all_found.low == pytest.approx(0.98116, abs=1e-4)


def test_trials_of_a_seed_are_the_same_and_as_they_should_be(whole: Path) -> None:
    tokenizer = Tokenizer.load(whole / "tokenizer.json")
    documents = [np.array(tokenizer.encode(text)) for text in texts()]
    sizes = needles.Sizes(trials=12, candidates=8, words=2, before=4, length=512, chunks=2, seed=3)
    made = needles.sample(documents, tokenizer, sizes)
    again = needles.sample(documents, tokenizer, sizes)
    words = set(needles.common_words(tokenizer).tolist())
    assert len({tuple(t.values[0]) for t in made}) == 12, "every needle has another value"
    for one, other in zip(made, again, strict=True):
        assert (one.text(512) == other.text(512)).all()
        assert one.haystack.shape == (5, 512) and one.other.shape == (2, 512)
        assert len({tuple(v) for v in one.values.tolist()}) == 8
        assert words.issuperset(one.values.ravel().tolist())
        text, other_text = (tokenizer.decode(t.ravel()) for t in (one.haystack, one.other))
        sources = [[i for i, d in enumerate(texts()) if part.strip("\ufffd") in d]
                   for part in (text, other_text)]  # fmt: skip
        assert sources[0] and sources[1] and sources[0] != sources[1]
        needle_text = tokenizer.decode(np.concatenate([one.query, one.values[0], one.end]))
        assert needle_text.startswith(" ") and needle_text.endswith(".")
        assert one.offset + one.query.size + 2 + one.end.size <= 512


def test_the_other_document_is_never_the_own_one(whole: Path) -> None:
    """Of two documents, each of which is one word over and over."""
    tokenizer = Tokenizer.load(whole / "tokenizer.json")
    documents = [np.full(9_000, word) for word in (50, 60)]
    sizes = needles.Sizes(trials=20, candidates=2, words=2, before=2, length=512, chunks=3, seed=0)
    for trial in needles.sample(documents, tokenizer, sizes):
        own, other = (set(text.ravel()[1:].tolist()) for text in (trial.haystack, trial.other))
        assert own | other == {50, 60} and own != other


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"trials": 5}, "--trials 5 should be at least --candidates 8"),
        ({"before": 400}, "the haystacks need a document of 205,311 tokens and another of 1,023"),
        ({"words": 1, "trials": 600}, "--words 1 of .* make too few values"),
        ({"length": 16, "before": 9}, "a chunk of 16 tokens has no room for a needle"),
    ],
)
def test_what_cannot_be_tested_is_one_line(whole: Path, changes: dict[str, int], says: str) -> None:
    tokenizer = Tokenizer.load(whole / "tokenizer.json")
    documents = [np.array(tokenizer.encode(text)) for text in texts()]
    sizes = {"trials": 12, "candidates": 8, "words": 2, "before": 4, "length": 512, "chunks": 2}
    with pytest.raises(UserError, match=says):
        needles.sample(documents, tokenizer, needles.Sizes(**sizes | changes, seed=0))


def test_documents_are_those_of_the_split(data: Path, whole: Path) -> None:
    model, _, tokenizer = load_run(whole, torch.device("cpu"))
    split = Corpus.open(data, model.settings, trained_with=tokenizer).valid
    found = [
        tokenizer.decode(document) for document in needles.read_documents(split) if len(document)
    ]
    assert len(found) == split.manifest.documents
    assert set(found) <= set(texts())


def test_a_trained_run(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Reported, plotted, printed; its figures do not depend on how many are computed at once."""
    books = [tmp_path / "one.txt", tmp_path / "two.txt"]
    for book, part in zip(books, (texts()[::2], texts()[1::2]), strict=True):
        book.write_text("\n".join(part))
    words = ["--checkpoint", whole, "--text", *books, "--distances", 512, 1100, "--trials", 6]
    words += ["--candidates", 3, "--json", tmp_path / "r.json", "--plot", tmp_path / "r.png"]
    found = needle.main([*map(str, words), "--device", "cpu"])
    report = json.loads((tmp_path / "r.json").read_text())
    assert [r["distance"] for r in report["results"]] == [r.distance for r in found] == [512, 1100]
    assert (report["trials"], report["candidates"], report["chunks"]) == (6, 3, 8)
    assert report["results"][0]["margin"]["history"]["mean"] == found[0].margin["history"].mean
    assert (tmp_path / "r.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "1,100" in printed and f"{found[0].margin['history'].mean:+.3f}" in printed
    with pytest.raises(UserError, match="--distances should be at least"):
        needle.main([*map(str, words), "--device", "cpu", "--distances", "3"])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--text", "nowhere"], "error: --text nowhere cannot be read: No such file or directory"),
        (["--text", "pipe"], "error: --text pipe cannot be read: it is a FIFO, not a file; name"),
        (["--text", "bytes"], "error: --text bytes is not UTF-8 text: convert it"),
        (
            ["--text", "bytes", "--json", "."],
            "error: argument --json: . cannot be written: Is a directory; name another file",
        ),
        (
            ["--text", "bytes", "--plot", "bytes/x"],
            "error: argument --plot: bytes/x cannot be written: Not a directory; name another file",
        ),
        (
            ["--text", "bytes", "--plot", "x.txt"],
            "error: argument --plot: x.txt is no plot: end its name in one of .png, .svg, .pdf",
        ),
    ],
)
def test_files_that_cannot_be_used_are_one_line_before_anything_is_measured(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], says: str
) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as raised:
        needle.main(["--checkpoint", str(whole), *words, "--device", "cpu"])
    assert f"error: {raised.value}".startswith(says)
