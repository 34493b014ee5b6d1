"""Would the tests notice? A seeded sample of one-place changes to the code, each run against them.

    python -m venv /tmp/mutants && /tmp/mutants/bin/pip install cosmic-ray
    /tmp/mutants/bin/python tests/mutants.py times  --out /tmp/mutants/out      # about `make test`
    /tmp/mutants/bin/python tests/mutants.py sample --out /tmp/mutants/out
    /tmp/mutants/bin/python tests/mutants.py summary --out /tmp/mutants/out

cosmic-ray finds the places and makes the changes. Places are drawn uniformly over i3dist/,
data_prep/ and launch/, and for each one of the changes that it allows. What is mutated is the last
commit, in copies of it. A mutant is run first against the test files that import its module, then
against those that reach it through others, the quick ones first. `sample` may be stopped at any
time, and goes on where it was. Not part of CI.

Left out: Triton kernels, which no CPU runs, and `|` in annotations, which means nothing there.
"""

import argparse
import ast
import difflib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
Place = tuple[int, int]  # line and column

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("i3dist", "data_prep", "launch")
# Seconds of tests that a mutant is run against: of its module's own, and of those further away.
NEAR_SECONDS, FAR_SECONDS = 120.0, 300.0
TIMES, RESULTS = "times.json", "results.jsonl"
# A program that a test starts by its path.
STARTED = re.compile(r"(launch/\w+|data_prep/shard)\.py|load\(\"(\w+)\"\)")


@dataclass(frozen=True)
class Mutant:
    """One change of one place."""

    path: str
    line: int
    operator: str
    occurrence: int

    @property
    def package(self) -> str:
        """The folder that its module lies in."""
        return str(Path(self.path).parent)


@dataclass(frozen=True)
class Verdict:
    """What came of a mutant: by which test it was killed, or that it lived."""

    mutant: Mutant
    outcome: str  # killed, timed out or lived
    by: str
    seconds: float
    diff: str


def sources(root: Path) -> list[Path]:
    """The modules that are mutated."""
    every = (path for package in PACKAGES for path in (root / package).rglob("*.py"))
    return sorted(path for path in every if not path.stem.endswith("_triton"))


def drawn(root: Path, count: int, seed: int) -> list[Mutant]:
    """`count` places, with a change for each; the same for a commit and a seed."""
    places: dict[tuple[str, Place], list[Mutant]] = defaultdict(list)
    annotated = {path: Annotated(path) for path in sources(root)}
    for m in mutations(list(annotated)):
        path = Path(m.module_path)
        if "BitOr" in m.operator_name and m.start_pos in annotated[path]:
            continue
        name = str(path.relative_to(root))
        mutant = Mutant(name, m.start_pos[0], m.operator_name, m.occurrence)
        places[name, tuple(m.start_pos)].append(mutant)
    rng = random.Random(seed)
    chosen = rng.sample(sorted(places), count)
    return [rng.choice(places[place]) for place in chosen]


def mutations(paths: Sequence[Path]) -> Iterator[Any]:
    """All that cosmic-ray can change in these modules."""
    from cosmic_ray.commands import init
    from cosmic_ray.work_db import WorkDB, use_db

    with TemporaryDirectory() as folder, use_db(f"{folder}/db", WorkDB.Mode.create) as database:
        init(paths, database, {})
        for item in database.work_items:
            yield from item.mutations


class Annotated:
    """The places of a module that lie in annotations."""

    def __init__(self, path: Path) -> None:
        self._ranges: list[tuple[Place, Place]] = []
        for node in ast.walk(ast.parse(path.read_text())):
            part = getattr(node, "annotation", None) or getattr(node, "returns", None)
            if part is not None:
                end = (part.end_lineno, part.end_col_offset)
                self._ranges.append(((part.lineno, part.col_offset), end))

    def __contains__(self, place: Sequence[int]) -> bool:
        return any(start <= tuple(place) < end for start, end in self._ranges)


class Reach:
    """Which test files import a module, and which reach it through others."""

    def __init__(self, root: Path, times: dict[str, float], far_seconds: float) -> None:
        self.root = root
        self.times = times
        self.far_seconds = far_seconds

    @cached_property
    def _imports(self) -> dict[str, set[str]]:
        """The project's own files that each of them imports, or starts by its path."""
        folders = (*PACKAGES, "tests", "benchmarks")
        files = [path for folder in folders for path in (self.root / folder).rglob("*.py")]
        return {str(path.relative_to(self.root)): self._imported(path) for path in files}

    def _imported(self, path: Path) -> set[str]:
        text = path.read_text()
        names: set[str] = set()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                names.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module)
                names.update(f"{node.module}.{alias.name}" for alias in node.names)
        files = {f"{name.replace('.', '/')}.py" for name in names}
        if path.is_relative_to(self.root / "tests"):
            started = STARTED.findall(text)
            files |= {f"{a}.py" if a else f"i3dist/programs/{b}.py" for a, b in started}
        return {file for file in files if (self.root / file).exists()}

    def _closure(self, file: str) -> set[str]:
        reached, todo = {file}, [file]
        while todo:
            new = self._imports.get(todo.pop(), set()) - reached
            reached |= new
            todo += new
        return reached

    @cached_property
    def _reached(self) -> dict[str, set[str]]:
        return {test: self._closure(test) for test in self.times}

    def rings(self, module: str) -> tuple[list[str], list[str]]:
        """Test files near and far, the quick ones first, in as much time as there is for them."""
        own = f"test_{Path(module).stem}.py"
        named = {test for test in self.times if Path(test).name == own}
        near = {test for test in self.times if module in self._imports[test]} - named
        far = {test for test in self.times if module in self._reached[test]} - near - named
        first = self._within([*self._quick(named), *self._quick(near)], NEAR_SECONDS)
        left = (named | near) - set(first)
        return first, self._within([*self._quick(left), *self._quick(far)], self.far_seconds)

    def _quick(self, tests: Iterable[str]) -> list[str]:
        return sorted(tests, key=self.times.__getitem__)

    def _within(self, tests: Sequence[str], seconds: float) -> list[str]:
        taken: list[str] = []
        for test in tests:
            if not taken or self.times[test] <= seconds:
                taken.append(test)
                seconds -= self.times[test]
        return taken


class TestBed:
    """A copy of the last commit in which one mutant after the other is run."""

    def __init__(self, folder: Path, python: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run(["git", "clone", "-q", "--no-hardlinks", ROOT, folder], check=True)
        self.root = folder
        self.python = python

    def run(self, tests: Sequence[str], seconds: float) -> tuple[int | None, str]:
        """Run test files, up to the first failure: pytest's status, None where it took too long,
        and what it said."""
        words = [
            "nice",
            str(self.python),
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            *tests,
        ]
        process = subprocess.Popen(
            words,
            cwd=self.root,
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        try:
            said = process.communicate(timeout=seconds)[0]
            return process.returncode, said
        except subprocess.TimeoutExpired:
            return None, ""
        finally:
            with suppress(ProcessLookupError):  # what the tests have left behind, too
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            shutil.rmtree(self.root / ".hypothesis", ignore_errors=True)

    def _environment(self) -> dict[str, str]:
        # A mutant may have the size and the second of what it replaces: no compiled files.
        path = f"{self.python.parent}{os.pathsep}{os.environ['PATH']}"
        own = {"PYTHONPATH": str(self.root), "PYTHONDONTWRITEBYTECODE": "1", "PATH": path}
        return os.environ | own

    def judge(self, mutant: Mutant, reach: Reach) -> Verdict:
        """Run a mutant against its tests, the near ones first."""
        from cosmic_ray.mutating import mutate_code
        from cosmic_ray.plugins import get_operator

        path = self.root / mutant.path
        before = path.read_text()
        after = mutate_code(before, get_operator(mutant.operator)(), mutant.occurrence)
        assert after is not None
        diff = "\n".join(
            difflib.unified_diff(before.split("\n"), after.split("\n"), n=0, lineterm="")
        )
        started = time.monotonic()
        outcome, by = "lived", ""
        path.write_text(after)
        try:
            for tests in filter(None, reach.rings(mutant.path)):
                expected = sum(reach.times[test] for test in tests)
                status, said = self.run(tests, 120 + 3 * expected)
                if status != 0:
                    outcome = "timed out" if status is None else "killed"
                    by = _first_failure(said)
                    break
        finally:
            path.write_text(before)
        return Verdict(mutant, outcome, by, round(time.monotonic() - started, 1), diff)


def _first_failure(said: str) -> str:
    found = re.search(r"^(?:FAILED|ERROR) (.*?)(?: - .*)?$", said, re.MULTILINE)
    return found[1] if found else (said.strip().splitlines() or [""])[-1][:200]


def spread(
    benches: Sequence[TestBed], work: Iterable[Item], do: Callable[[TestBed, Item], Result]
) -> Iterator[Result]:
    """`do` of every item, one at a time in each bench; results in the order of the work."""
    free: SimpleQueue[TestBed] = SimpleQueue()
    for bench in benches:
        free.put(bench)

    def one(item: Item) -> Result:
        bench = free.get()
        try:
            return do(bench, item)
        finally:
            free.put(bench)

    with ThreadPoolExecutor(len(benches)) as pool:
        yield from pool.map(one, work)


def take_times(out: Path, benches: Sequence[TestBed], tests: Sequence[str]) -> None:
    """Run each test file alone, as it is; a file that fails is left out of everything."""

    def timed(bench: TestBed, test: str) -> tuple[str, float, int | None, str]:
        started = time.monotonic()
        status, said = bench.run([test], 1200)
        return test, round(time.monotonic() - started, 1), status, said

    path = out / TIMES
    times = json.loads(path.read_text()) if path.exists() else {}
    todo = [test for test in tests if test not in times]
    for test, seconds, status, said in spread(benches, todo, timed):
        if status in (0, 5):
            times[test] = seconds
            path.write_text(json.dumps(times, indent=1))
        fault = "" if status in (0, 5) else f"FAILS\n{said[-2000:]}"
        print(f"{seconds:6.1f} s  {test} {fault}".rstrip(), flush=True)


def take_sample(
    out: Path, benches: Sequence[TestBed], mutants: Sequence[Mutant], reach: Reach, again: bool
) -> None:
    """Judge the mutants that are not judged yet; with `again` those that lived."""
    outcomes = {verdict.mutant: verdict.outcome for verdict in read(out)}
    todo = [mutant for mutant in mutants if outcomes.get(mutant) == ("lived" if again else None)]

    def judge(bench: TestBed, mutant: Mutant) -> None:
        verdict = bench.judge(mutant, reach)
        with (out / RESULTS).open("a") as file:
            file.write(json.dumps(asdict(verdict)) + "\n")
        place = f"{mutant.path}:{mutant.line}"
        print(f"{verdict.outcome:9} {verdict.seconds:6.1f} s  {place}", flush=True)

    for _ in spread(benches, todo, judge):
        pass


def read(out: Path) -> list[Verdict]:
    """The verdicts so far, of each mutant the last."""
    path = out / RESULTS
    lines = path.read_text().splitlines() if path.exists() else []
    raw = [json.loads(line) for line in lines]
    verdicts = [Verdict(**(line | {"mutant": Mutant(**line["mutant"])})) for line in raw]
    return list({verdict.mutant: verdict for verdict in verdicts}.values())


def summarise(verdicts: Sequence[Verdict]) -> None:
    """Print shares by package, and the mutants that lived."""
    killed: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for verdict in verdicts:
        for name in (verdict.mutant.package, "all"):
            total[name] += 1
            killed[name] += verdict.outcome != "lived"
    for name in sorted(total, key=lambda name: (name == "all", name)):
        print(f"{name:16} {killed[name]:3} of {total[name]:3}  {killed[name] / total[name]:.0%}")
    for verdict in verdicts:
        if verdict.outcome == "lived":
            changed = [line for line in verdict.diff.split("\n")[2:] if line[:1] in "+-"]
            place = f"{verdict.mutant.path}:{verdict.mutant.line} {verdict.mutant.operator}"
            print("\n" + "\n".join([place, *changed]))


def main() -> None:
    """Read the command line and do as it says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("times", "sample", "summary"))
    parser.add_argument("--out", type=Path, required=True, help="folder of times and verdicts")
    parser.add_argument("--count", type=int, default=100, help="mutants of the sample (100)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (0)")
    parser.add_argument(
        "--far", type=float, default=FAR_SECONDS, help=f"seconds of far tests ({FAR_SECONDS:.0f})"
    )
    parser.add_argument("--again", action="store_true", help="judge those that lived once more")
    parser.add_argument("--jobs", type=int, default=2, help="at a time (2)")
    parser.add_argument("--first", type=int, help="only so many of the sample")
    parser.add_argument(
        "--python", type=Path, default=ROOT / ".venv" / "bin" / "python", help="runs the tests"
    )
    parser.add_argument("tests", nargs="*", help="test files to time (default: all)")
    arguments = parser.parse_intermixed_args()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    if arguments.what == "summary":
        summarise(read(out))
        return
    python = arguments.python.absolute()  # not resolved: a link tells which environment it is of
    benches = [TestBed(out / f"copy-{number}", python) for number in range(arguments.jobs)]
    if arguments.what == "times":
        root = benches[0].root
        every = sorted(str(p.relative_to(root)) for p in (root / "tests").rglob("test_*.py"))
        take_times(out, benches, arguments.tests or every)
    else:
        mutants = drawn(benches[0].root, arguments.count, arguments.seed)
        times = json.loads((out / TIMES).read_text())
        reach = Reach(benches[0].root, times, arguments.far)
        take_sample(out, benches, mutants[: arguments.first], reach, arguments.again)


if __name__ == "__main__":
    main()
