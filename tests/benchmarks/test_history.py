"""Books, arms and the recall task of benchmarks/, at toy size. Half a minute."""

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from i3dist.config import ModelSettings
from i3dist.engine.flat_parameters import FlatModel
from i3dist.errors import UserError
from i3dist.model.layers import Channels
from i3dist.model.lm import I3LM
from i3dist.model.state import LaneState
from i3dist.ops.cross_entropy import IGNORE
from tests.conftest import ROOT
from tests.model.streams import BOS, depth_of, hidden_states, stream

# As for a program started in that folder.
sys.path.append(str(ROOT / "benchmarks"))

import books
import compressors
import history
import history_arms
import history_cost
import history_report
import recall
import synthetic

SIZES = ModelSettings(
    vocab_size=64, d_model=32, layers="1xrwkv,2xattention", heads=2, chunk_length=32,
    latents=4,
)  # fmt: skip
ARMS = history_arms.ARMS
TOY = ["--width", "16", "--layers", "1", "--lanes", "2"]


def logits(arm: str, tokens: torch.Tensor) -> torch.Tensor:
    model = history_arms.build(arm, SIZES, BOS, seed=0)
    state = LaneState.empty(len(tokens), model.settings, tokens.device, torch.float32)
    return model.head(hidden_states(model, tokens, depth_of(tokens), state, torch.ones(()))[0])


def test_a_book_is_its_pieces_in_order(tmp_path: Path) -> None:
    pieces = {"A/b#2": "three", "A/b#10.1": "five", "C/d#1": "other", "A/b#1.1": "two"}
    pieces |= {"A/b#1.0": "one", "A/b#10.0": "four"}
    rows = {"text": list(pieces.values()), "url": list(pieces)}
    pq.write_table(pa.table(rows), tmp_path / "in.parquet")
    books.main([str(tmp_path / "in.parquet"), str(tmp_path / "out.parquet")])
    found = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [row["url"] for row in found] == ["A/b", "C/d"]
    assert found[0]["text"].split() == ["one", "two", "three", "four", "five"]


def test_a_url_that_names_no_piece_is_one_line() -> None:
    with pytest.raises(UserError, match="BOOK#CHAPTER"):
        books.place("A/b#second")


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_mean_pooling_is_means_of_what_is_kept(seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    x, keep = torch.randn(3, 12, 16, generator=random), torch.rand(3, 12, generator=random) < 0.6
    sizes = ModelSettings(d_model=16, chunk_length=12, latents=4)
    means = compressors.MeanPool(sizes, Channels(16))(x, keep)
    for n in range(3):
        for m in range(4):
            kept = [x[n, t] for t in range(3 * m, 3 * m + 3) if keep[n, t]]
            want = torch.stack(kept).mean(0) if kept else torch.zeros(16)
            torch.testing.assert_close(means[n, m], torch.nn.functional.layer_norm(want, (16,)))


def chosen(arm: str, scores: torch.Tensor) -> list[int]:
    model = history_arms.build(arm, SIZES.model_copy(update={"sub_latents": 2}), BOS, seed=0)
    found: list[int] = model.compressor.choose(scores).tolist()
    return found


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_arms_choose_tokens_as_they_say(seed: int) -> None:
    """8 of 32: every fourth, the best two of each eighth tokens, or the best of all."""
    scores = torch.randn(32, generator=torch.Generator().manual_seed(seed))
    assert chosen("records2-even", scores) == list(range(3, 32, 4))
    best = scores.topk(8).indices.sort().values.tolist()
    assert chosen("records2", scores) == best
    in_spans = scores.view(4, 8).topk(2).indices.sort().values + torch.arange(0, 32, 8)[:, None]
    assert chosen("records2-spans", scores) == in_spans.flatten().tolist()


@pytest.mark.parametrize("arm", ARMS)
def test_no_arm_sees_the_future(arm: str) -> None:
    tokens = stream(3, 4, 32, 64, 90)
    changed = tokens.clone()
    changed[0, 2, 20:] = torch.randint(4, 64, (12,))
    before = logits(arm, tokens).flatten(0, 2)[: 2 * 32 + 20]
    after = logits(arm, changed).flatten(0, 2)[: 2 * 32 + 20]
    torch.testing.assert_close(before, after, atol=1e-5, rtol=0)


@pytest.mark.parametrize("arm", ARMS)
def test_no_arm_sees_another_document(arm: str) -> None:
    """Nor does one of which a chunk holds fewer tokens than there are records."""
    tokens = torch.randint(4, 64, (1, 3, 32), generator=torch.Generator().manual_seed(0))
    tokens[0, 0, 0] = tokens[0, 0, 29] = BOS
    changed = tokens.clone()
    changed[0, 0, 1:29] = 4 + (changed[0, 0, 1:29] - 3) % 60
    before, after = (logits(arm, x).flatten(0, 2)[29:] for x in (tokens, changed))
    torch.testing.assert_close(before, after, atol=1e-5, rtol=0)


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_is_the_same_on_packed_parameters(arm: str) -> None:
    tokens = stream(3, 4, 32, 64, 90)
    model = history_arms.build(arm, SIZES, BOS, seed=0)
    if "joins" in arm:
        model.join_softmaxes(0.3)
    state = LaneState.empty(1, model.settings, tokens.device, torch.float32)
    inputs = (tokens, tokens.roll(-1, -1), depth_of(tokens), state, torch.ones(()))
    plain = model(*inputs)[0]
    plain.sum().backward()
    packed = FlatModel(model)
    losses = packed(*inputs)[0]
    torch.testing.assert_close(losses, plain, atol=1e-5, rtol=0)
    losses.sum().backward()
    for flat in packed.flats:
        assert flat.parameter.grad is not None
        for name, extent in zip(flat.names, flat.extents, strict=True):
            part = flat.parameter.grad.narrow(0, extent.start, extent.size)
            want = model.get_parameter(name).grad
            want = torch.zeros(extent.shape) if want is None else want
            torch.testing.assert_close(extent.stored(part), want, atol=2e-4, rtol=1e-3)


def test_dual_attention_with_all_of_it_undone_is_attention() -> None:
    """Then its values and gradients are those of one softmax."""
    tokens = stream(3, 4, 32, 64, 1000)
    one, two = (
        history_arms.build(arm, SIZES, BOS, seed=0).double()
        for arm in ("recipe", "recipe-dual-taught-mixed-pulled-shared")
    )
    torch.nn.init.normal_(one.upper[0].attention.query.weight)
    weights = {n.replace("attention.", "dual-attention.", 1) if n.startswith("attention") else n: p
               for n, p in one.state_dict().items()}  # fmt: skip
    missing, _ = two.load_state_dict(weights, strict=False)
    assert {name.rsplit("attention.")[-1] for name in missing} == {"reserve.weight", "reserve_bias"}
    found = []
    for model in (one, two):
        state = LaneState.empty(1, model.settings, tokens.device, torch.float64)
        losses, _ = model(tokens, tokens.roll(-1), depth_of(tokens), state, torch.ones(()))
        losses.sum().backward()
        shared = [model.compressor.token, *(block.attention.key_value for block in model.upper)]
        found.append((losses, *(part.weight.grad for part in shared)))
    for wanted, got in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted)


def test_published_arms_are_what_they_were_whatever_is_the_default() -> None:
    """Their kinds of layers, and the parameters that the results were measured with."""
    default = ModelSettings(vocab_size=8192, d_model=512, layers="6xrwkv,2xdual-attention")
    published = {}
    for name in ("history.jsonl", "history_other.jsonl", "history_cost.json"):
        text = (ROOT / "docs" / "results" / name).read_text()
        rows = json.loads(text) if name.endswith("json") else map(json.loads, text.splitlines())
        published |= {row["arm"]: row["parameters"] for row in rows}
    assert {"none", "recipe", "recipe-soon", "literal", "mean", "ceiling"} <= set(published)
    for arm, parameters in published.items():
        with torch.device("meta"):
            model = history_arms.build(arm, default, BOS, seed=0)
        assert sum(p.numel() for p in model.parameters()) == parameters, arm
        kind = "dual-attention" if "-dual" in arm else "attention"
        assert model.settings.layers == f"6xrwkv,2x{kind}", arm


def test_the_cost_of_the_default_is_measured() -> None:
    """The arm recipe-dual is the settings' model in all but its sizes."""
    assert "recipe-dual" in history_cost.ARMS
    default = ModelSettings()
    assert history_arms.Arm.parse("recipe-dual").settings(default) == default


def test_arms_of_a_seed_share_what_they_can() -> None:
    models = {arm: history_arms.build(arm, SIZES, BOS, seed=1) for arm in ARMS}
    for model in models.values():
        for name, parameter in model.rwkv.named_parameters():
            assert parameter.equal(models["none"].rwkv.get_parameter(name))


def test_a_detached_compressor_has_no_gradient() -> None:
    tokens = stream(3, 4, 32, 64, 300)
    for arm, trained in (("literal", True), ("recipe", True), ("recipe-detached", False)):
        model = history_arms.build(arm, SIZES, BOS, seed=0)
        state = LaneState.empty(1, model.settings, tokens.device, torch.float32)
        model(tokens, tokens.roll(-1, -1), depth_of(tokens), state, torch.ones(()))[
            0
        ].sum().backward()
        assert any(p.grad is not None for p in model.compressor.parameters()) == trained


def test_the_literal_arm_is_the_setting() -> None:
    """With the seed's weights, so that figures of the one are figures of the other."""
    arm = history_arms.build("literal", SIZES, BOS, seed=1)
    model = I3LM(SIZES.model_copy(update={"compressor": "literal"}), BOS)
    torch.manual_seed(1)
    model.reset_parameters()
    named = dict(model.named_parameters())
    assert list(named) == [name for name, _ in arm.named_parameters()]
    assert all(named[name].equal(parameter) for name, parameter in arm.named_parameters())


def test_a_match_teaches_what_makes_records_and_nothing_else() -> None:
    """It learns to err less, also where a token is more than its record has room for."""
    model = history_arms.build("recipe-match", SIZES, BOS, seed=0)
    assert isinstance(model, history_arms.Matched)
    tokens = stream(3, 4, 32, 64, 300)
    state = LaneState.empty(1, model.settings, tokens.device, torch.float32)
    x = model.below(tokens, depth_of(tokens), state)[0].x
    parts = ("record.weight", "norm_out.weight", "norm_out.bias", "token.weight")
    taught = {f"compressor.{part}" for part in parts}
    (before := model.missed(x).mean()).backward()
    moved = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == taught
    optimizer = torch.optim.Adam([model.get_parameter(name) for name in taught], 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model.missed(x.detach()).mean().backward()
        optimizer.step()
    assert 0 < model.missed(x).mean().item() < 0.5 * before.item()


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("recipes", "recipes"),
        ("recipe-quick", "quick"),
        ("ceiling-match", "match"),
        ("none-open", "open"),
        ("recipe-even-each", "even"),
    ],
)
def test_an_arm_that_there_is_not_is_named(name: str, word: str) -> None:
    with pytest.raises(UserError, match=f"'{word}'"):
        history.main(["run", "--data", "x", "--held-out", "y", "--arms", name])


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two arms trained for a few steps on random documents."""
    folder = tmp_path_factory.mktemp("history")
    data, held_out = (random_documents(folder / name) for name in ("data", "held-out"))
    command = ["run", "--data", str(data), "--held-out", str(held_out), *TOY, "--tokens", "1024"]
    file = folder / "results.jsonl"
    for arms in (["none"], ["none", "ceiling"]):  # the second time only what is missing
        history.main([*command, "--arms", *arms, "--results", str(file)])
    return file


def random_documents(folder: Path) -> Path:
    (folder / "train").mkdir(parents=True)
    synthetic.Data.write(folder / "train", 64, 16, 4, 16)
    return folder


def test_runs_append_what_is_missing(results: Path) -> None:
    lines = history_report.read(results)
    assert [line["arm"] for line in lines] == ["none"] * 2 + ["ceiling"] * 2
    assert [line["tokens"] for line in lines] == [512, 1024] * 2
    counts = [line["by_chunk"]["count"] for line in lines]
    assert all(count == counts[0] for count in counts), "every arm is asked the same"


def test_withheld_and_foreign_history_are_nothing_to_a_model_without(results: Path) -> None:
    for line in history_report.read(results):
        sums = line["by_chunk"]
        assert (sums["loss"] == sums["withheld"] == sums["other"]) == (line["arm"] == "none")
        assert sums["loss"][0] == pytest.approx(sums["withheld"][0], rel=1e-6)


def test_arms_are_timed(tmp_path: Path) -> None:
    file, data = tmp_path / "costs.json", random_documents(tmp_path / "data")
    words = ["--arms", "none", "recipe-carry", "--warm-up", "1", "--steps", "1"]
    costs = history_cost.main(["--data", str(data), *TOY, *words, "--json", str(file)])
    assert [cost["arm"] for cost in json.loads(file.read_text())] == ["none", "recipe-carry"]
    none, recipe = costs
    assert all(history_arms.named_arm(arm) for arm in history_cost.ARMS)
    assert recipe.parameters > none.parameters
    assert none.tokens_per_s == pytest.approx(2 * 8 * 16 / none.ms * 1e3)


def test_the_report_compares_arms_of_a_seed(results: Path, tmp_path: Path) -> None:
    history.main(["report", str(results), "--plot", str(tmp_path / "gain.png")])
    assert (tmp_path / "gain.png").stat().st_size > 1000
    none, full = (
        {0: history_report.Figures.of(json.loads(line))}
        for line in results.read_text().splitlines()[1::2]
    )
    arms = {"none": none, "ceiling": full}
    assert history_report.recovered(arms, "ceiling") == "1.00"
    assert history_report.recovered(arms, "none").lstrip("-") == "0.00"


@pytest.mark.parametrize(
    ("name", "begins"),
    [
        ("/dev/stdout", b"\x89PNG"),
        ("gain", b"\x89PNG"),
        ("gain.svg", b"<?xml"),
        ("gain.eps", b"%!PS"),
        ("gain.jpg", b"\xff\xd8"),
        ("gain.webp", b"RIFF"),
        ("gain.tif", b"II*"),
    ],
)
def test_a_plot_is_of_the_kind_that_its_name_says(
    results: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfdbinary: pytest.CaptureFixture[bytes],
    name: str,
    begins: bytes,
) -> None:
    """A PNG where it says none; on standard output it stands alone."""
    monkeypatch.chdir(tmp_path)
    history.main(["report", str(results), "--plot", name])
    out, aside = capfdbinary.readouterr()
    on_output = name == "/dev/stdout"
    assert (out if on_output else Path(name).read_bytes()).startswith(begins)
    assert b"recovered" in (aside if on_output else out)
    assert len(list(tmp_path.iterdir())) == 1 - on_output


@pytest.mark.parametrize("differs", ["data", "evaluated tokens of a row without data"])
def test_arms_of_different_data_are_not_compared(
    results: Path, tmp_path: Path, differs: str
) -> None:
    """Neither in a report nor in a plot, and nothing is trained to be added to them."""
    lines = history_report.read(results)
    if differs == "data":
        lines[-1]["data"] = "another"
    else:
        del lines[-1]["data"]
        lines[-1]["by_chunk"]["count"][0] += 1
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = ["report", str(mixed)]
    curves = ["curves", str(mixed), "--arms", "ceiling", "--plot", str(tmp_path / "plot.png")]
    data, held_out = results.parent / "data", results.parent / "held-out"
    run = ["run", "--data", str(data), "--held-out", str(held_out), *TOY, "--results", str(mixed)]
    if differs != "data":
        with pytest.raises(UserError, match=r"mixed.jsonl has lines that do not say of which data"):
            history.main(run)
        run = report
    for words in (report, curves, run):
        with pytest.raises(UserError, match=r"seed 0 and .* are of different data: compare"):
            history.main(words)


def test_gains_in_training_are_of_the_longest_runs_of_common_seeds(tmp_path: Path) -> None:
    def line(arm: str, seed: int, tokens: int, losses: list[float]) -> dict[str, Any]:
        return {"arm": arm, "seed": seed, "tokens": tokens, "curve": {"loss": losses}}

    none = [line("none", 0, 300, [5, 4, 3]), line("none", 1, 300, [6, 5, 4])]
    ours = [line("recipe", 1, 400, [6, 4, 1, 0]), line("recipe", 1, 100, [9])]
    of_none_only = [line("recipe", 2, 400, [0, 0, 0, 0])]
    tokens, gains = history_report.training_gain([*ours, *none, *of_none_only], "recipe")
    assert tokens.tolist() == [50, 150, 250]
    assert gains.tolist() == [[0, 1, 3]]
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for file, lines in zip(files, (none, [*ours, *of_none_only]), strict=True):
        file.write_text("".join(json.dumps(each) + "\n" for each in lines))
    words = ["curves", *map(str, files), "--plot", str(tmp_path / "c.png"), "--arms", "recipe"]
    history.main(words)
    assert (tmp_path / "c.png").stat().st_size > 1000
    with pytest.raises(UserError, match="no run of mean with a seed of none"):
        history.main([*words, "mean"])


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), chunks=st.integers(2, 5), pairs=st.integers(1, 7))
def test_answers_are_what_was_stated(seed: int, chunks: int, pairs: int) -> None:
    task = recall.Task(chunks, 32, pairs, values=5, distances=chunks - 1)
    tokens, targets, distance, depth = task.sample(3, torch.Generator().manual_seed(seed))
    assert not distance[targets == IGNORE].any()
    for b in range(3):
        ends = tokens[b].view(chunks, 2, 8, 2)[:, :, 8 - pairs :].flatten(1, 2)
        stated = [dict(row.tolist()) for row in ends]
        assert len({key for pairs_of in stated for key in pairs_of}) == chunks * 2 * pairs
        for k, t in (targets[b] != IGNORE).nonzero().tolist():
            key, d = int(tokens[b, k, t]), int(distance[b, k, t])
            assert stated[k - d][key] == int(targets[b, k, t])
            assert d > 0 or key in tokens[b, k, : t - 1], "of its own chunk, what is stated already"
        values = (tokens[b] >= recall.FIRST) & (tokens[b] < recall.FIRST + 5)
        assert values.sum() == chunks * 2 * pairs, "a value is in the text where it is stated, only"
    assert depth.tolist() == [list(range(chunks))] * 3


def test_every_distance_is_as_frequent() -> None:
    task = recall.Task(chunks=9, length=64, pairs=2, distances=6)
    _, targets, distance, _ = task.sample(400, torch.Generator().manual_seed(0))
    found = torch.bincount(distance[distance > 0], minlength=7)[1:]
    expected = 400 * task.answers
    assert ((found - expected).abs() < 5 * expected**0.5).all()
    own = ((distance == 0) & (targets != IGNORE)).sum()
    expected = 400 * 9 * 3 * task.questions / 2  # all parts but a chunk's first, half of the time
    assert (own - expected).abs() < 5 * expected**0.5


def test_latents_recall_what_was_stated_as_far_as_history_reaches() -> None:
    """The recall probe, small: about 20 s."""
    task = recall.Task(chunks=5, length=32, distances=3)
    sizes = recall.settings(task, 64, history=2)
    model = history_arms.build("recipe-open", sizes, recall.BOS, seed=1)
    found = [0.0]
    for step, _ in enumerate(recall.train(model, task, steps=1200, documents=16, lr=3e-3)):
        if step % 25 == 0:
            found = recall.accuracy(model, task, documents=64)
            if min(found[:3]) > 0.95:
                break
    withheld = recall.accuracy(model, task, documents=64, gate=0.0)
    assert min(found[:3]) > 0.95
    assert max(*found[3:], *withheld[1:]) < 2.5 / task.values, "chance is 1 / values"
