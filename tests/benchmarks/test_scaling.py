"""benchmarks/scaling.py: what its model says must hold of any communication, and bad input."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from i3dist.errors import UserError
from tests.conftest import ROOT, error_line, program

# As for a program started in that folder.
sys.path.append(str(ROOT / "benchmarks"))

import results
import scaling
from scaling import Cost, Scheme, SimulatedJob, all_reduce, ring

COST = Cost.fit({(4, 4): 70e-3, (16, 16): 250e-3})
LINKS = pytest.mark.parametrize("link", scaling.LINKS)
SEVERAL = pytest.mark.parametrize("world", scaling.WORLDS[1:])


def row(contestant: str, shape: str, ms: float, tokens: int) -> results.Row:
    return results.Row(contestant, shape, 1, tokens, ms, 2.0, 1e4, None, 2.0, 1.0)


def engine(shape: str, ms: float, lanes: int) -> results.Row:
    return row("engine", shape, ms, lanes * scaling.LANE_TOKENS)


def store(path: Path, *rows: results.Row) -> Path:
    results.store(path, list(rows), [], {})
    return path


def test_the_flat_tensors_are_the_model_and_little_padding() -> None:
    assert 339_237_770 <= sum(scaling.flats()) < 1.01 * 339_237_770


@pytest.mark.parametrize("scheme", Scheme)
@LINKS
def test_one_gpu_sends_nothing(scheme: Scheme, link: str) -> None:
    job = SimulatedJob(1, 4, 2, scheme, link)
    assert job.communication() == 0
    assert job.efficiency(COST, SimulatedJob(1, 4, 2)) == 1
    assert scaling.memory(scheme, 1) == scaling.memory(Scheme.DP, 1)


@LINKS
def test_efficiency_falls_as_gpus_with_equal_lanes_join(link: str) -> None:
    for jobs in list(scaling.curves().values())[: len(scaling.LANES)]:
        shares = [replace(job, link=link).efficiency(COST, jobs[0]) for job in jobs]
        assert shares == sorted(shares, reverse=True)
        assert 0 < shares[-1] < shares[0] == 1


@pytest.mark.parametrize("world", [2, 4, 8])
@LINKS
def test_a_ring_is_so_many_messages_of_a_part_each(world: int, link: str) -> None:
    size, (hop, _) = 1e9, scaling.RING_HOPS
    message = size / world / scaling.NVLINK + hop
    assert ring(size, world, link) == pytest.approx((world - 1) * message)
    assert all_reduce(size, world, link) == ring(size, world, link) * 2


@LINKS
def test_only_several_nodes_depend_on_their_link(link: str) -> None:
    size, (inside, between) = 1e9, scaling.RING_HOPS
    assert ring(size, 8, link) == ring(size, 8, "InfiniBand")
    hops = 28 * inside + 3 * between
    sending = 31 / 32 * size / scaling.LINKS[link]
    assert ring(size, 32, link) == pytest.approx(sending + hops)


@LINKS
def test_trees_are_for_small_sizes_and_many_nodes(link: str) -> None:
    for size in (8, 1e6, 1e9):
        assert all_reduce(size, 1024, link) <= 2 * ring(size, 1024, link)
    assert all_reduce(8, 1024, link) < 0.1 * ring(8, 1024, link)


@SEVERAL
@LINKS
def test_what_schemes_send(world: int, link: str) -> None:
    dp, one, two = (SimulatedJob(world, 16, 1, scheme, link) for scheme in Scheme)
    gradient = sum(ring(4 * size, world, link) for size in scaling.flats())
    weights = sum(ring(2 * size, world, link) for size in scaling.flats())
    reduced = sum(all_reduce(4 * size, world, link) for size in scaling.flats())
    scalars = scaling.SCALARS * all_reduce(8, world, link)
    assert dp.communication() == pytest.approx(reduced + scalars)
    assert one.communication() == pytest.approx(gradient + weights + scalars)
    assert two.seconds(COST) == one.seconds(COST)
    for count in (2, 8):
        accumulated = [replace(job, micro_batches=count).communication() for job in (dp, one, two)]
        assert accumulated[:2] == [dp.communication(), one.communication()]
        assert accumulated[2] - accumulated[1] == pytest.approx((count - 1) * gradient)


@SEVERAL
def test_gradients_in_bf16_take_as_long_as_weights(world: int) -> None:
    fp32 = SimulatedJob(world, 4, micro_batches=3)
    saved = fp32.communication() - replace(fp32, gradient_bytes=2).communication()
    halves = [
        ring(4 * n, world, "InfiniBand") - ring(2 * n, world, "InfiniBand") for n in scaling.flats()
    ]
    assert saved == pytest.approx(3 * sum(halves))


@SEVERAL
def test_zero_shares_adamw_and_memory(world: int) -> None:
    dp, one = SimulatedJob(world, 4, scheme=Scheme.DP), SimulatedJob(world, 4, scheme=Scheme.ZERO1)
    assert dp.overhead() - dp.communication() == pytest.approx(scaling.ADAMW)
    assert one.overhead() - one.communication() == pytest.approx(scaling.ADAMW / world)
    elements = sum(scaling.flats())
    assert scaling.memory(Scheme.DP, world) == 20 * elements
    for scheme in (Scheme.ZERO1, Scheme.ZERO2):
        assert scaling.memory(scheme, world) == pytest.approx((8 + 16 / world) * elements)


@pytest.mark.parametrize(("four", "sixteen"), [(0.0736, 0.2596), (0.05, 0.1), (0.3, 1.1)])
def test_the_fit_passes_through_its_points(four: float, sixteen: float) -> None:
    cost = Cost.fit({(4, 4): four, (16, 16): sixteen, (32, 16): 9.0, (16, 4): 9.0})
    assert SimulatedJob(1, 4).seconds(cost) == pytest.approx(four)
    assert SimulatedJob(1, 16).seconds(cost) == pytest.approx(sixteen)
    halved = SimulatedJob(1, 16, micro_batches=2).seconds(cost)
    assert halved - sixteen == pytest.approx(cost.micro_batch)


def test_a_step_of_equal_tokens_is_shared_out() -> None:
    for name, lanes in scaling.BATCHES.items():
        for job in scaling.curves()[name]:
            assert job.world * job.lanes == lanes
            assert 16 * (job.micro_batches - 1) < job.lanes <= 16 * job.micro_batches


def test_steps_of_the_engine_are_read(tmp_path: Path) -> None:
    path = store(
        tmp_path / "results.json",
        engine("4 lanes x 8 chunks", 70.0, 4),
        engine("32 lanes by 16 x 8 chunks", 500.0, 32),
        engine("16 lanes x 1 chunk", 1.0, 2),
        engine("4 lanes x 8 chunks, 2 times", 1.0, 8),
        row("engine", "16 lanes x 8 chunks", 1.0, 16 * 8 * 16),  # the toy's chunks
        row("bare", "16 lanes x 8 chunks", 1.0, 16 * scaling.LANE_TOKENS),
    )
    assert scaling.load(path) == {(4, 4): 0.07, (32, 16): 0.5}


@pytest.mark.parametrize(
    ("measured", "says"),
    [
        ({}, "4 and 16 lanes x 8 chunks are needed"),
        ({(4, 4): 0.07, (16, 8): 0.26}, "are needed"),
        ({(4, 4): 0.26, (16, 16): 0.07}, "not of one GPU"),
        ({(4, 4): 0.07, (16, 16): 0.28}, "not of one GPU"),  # no time left for AdamW
        ({(4, 4): 0.07, (16, 16): float("nan")}, "not of one GPU"),
    ],
)
def test_a_fit_that_cannot_be_is_refused(measured: dict[tuple[int, int], float], says: str) -> None:
    with pytest.raises(UserError, match=says):
        Cost.fit(measured)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "there is no file"),
        ("{", "no results of this program"),
        ("[]", "no results of this program"),
        ('{"rows": [{"contestant": "engine"}]}', "no results of this program"),
        ('{"rows": []}', "are needed"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, text: str | None, says: str) -> None:
    path = tmp_path / "results.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=says):
        scaling.main(["--measured", str(path)])


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text('{"rows": [')
    words = ["benchmarks/scaling.py", "--measured", path]
    assert f"{path} holds no results" in error_line(program(*words, timeout=60))


def test_tables_replace_those_of_a_document(tmp_path: Path) -> None:
    path = tmp_path / "document.md"
    path.write_text("# A\n<!-- one -->\n| old |\n| old |\n\ntext\n<!-- two -->\n\n| other |\n")
    for _ in range(2):
        scaling.fill(path, {"one": "| new |\n", "two": "| 2 |\n"})
        wanted = "# A\n<!-- one -->\n| new |\n\ntext\n<!-- two -->\n| 2 |\n\n| other |\n"
        assert path.read_text() == wanted
    with pytest.raises(UserError, match="0 lines <!-- three -->"):
        scaling.fill(path, {"three": ""})


def test_the_formula_beside_steps_on_several_gpus(tmp_path: Path) -> None:
    """Steps that take as long as derived are off by nothing; exchanges that take longer count."""
    cost, path = Cost.fit({(4, 4): 70e-3, (16, 16): 250e-3}), tmp_path / "rows.jsonl"
    job = SimulatedJob(2, 4)
    rows: list[dict[str, object]] = [{"stage": "machine", "gpus": 2}]
    for lanes, ms in ((4, 69.0), (4, 71.0), (16, 250.0)):  # two GPUs, of which the mean counts
        rows.append({"stage": "alone", "case": f"zero2-{lanes}-fp32", "lanes": lanes, "ms": ms})
    ms = 1e3 * job.seconds(cost)
    for case in ("zero2-4-fp32", "zero2-4-fp32-sockets", "ddp-4-bf16"):
        rows.append({"stage": "together", "case": case, "ms": ms})
    for network, exchange in (("local", 500 * job.communication()), ("sockets", 100.0)):
        for what in ("reduce-scatter, fp32", "all-gather, bf16"):
            rows.append({"stage": "exchange", "network": network, "what": what, "ms": exchange})
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    _, _, local, slow = scaling.compared_table(path).splitlines()
    assert local == f"| zero2-4-fp32 | 4 | {ms:.1f} | {ms:.1f} | +0.0% | {ms:.1f} | +0.0% |"
    longer = ms - 1e3 * job.communication() + 200
    assert slow.split(" | ")[3:6] == ["", "", f"{longer:.1f}"]
    path.write_text(json.dumps(rows[0]) + '\n{"stage": "together", "case": "zero2-4-fp32"}\n')
    with pytest.raises(UserError, match="holds no results of multi_gpu"):
        scaling.compared_table(path)


def test_all_that_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From a file of steps; the project's own document has a place for every table."""
    steps = [engine("4 lanes x 8 chunks", 70.0, 4), engine("16 lanes x 8 chunks", 250.0, 16)]
    measured = store(tmp_path / "results.json", *steps)
    document, plot, points = (tmp_path / name for name in ("scaling.md", "plot", "points.json"))
    document.write_text((ROOT / "docs" / "scaling.md").read_text())
    words = ["--measured", measured, "--document", document, "--plot", plot, "--json", points]
    scaling.main([str(word) for word in words])
    tables = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert "| 4 | 4 | 70.0 | 70.0 | +0.0% |" in tables
    assert set(tables) <= set(document.read_text().splitlines())
    assert plot.read_bytes().startswith(b"\x89PNG")
    jobs = json.loads(points.read_text())["jobs"]
    assert len(jobs) == 12 * sum(len(curve) for curve in scaling.curves().values())
    alone = [job["seconds"] for job in jobs if (job["world"], job["lanes"]) == (1, 4)]
    assert alone == pytest.approx([0.07] * len(alone))
