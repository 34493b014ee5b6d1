"""benchmarks/shard_throughput.py on a few documents: programs are run, and all their CPU counts."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.tokenizer import train_tokenizer
from tests.conftest import ROOT


def test_both_programs_write_the_same_documents(tmp_path: Path) -> None:
    """The tars lack what is left of a chunk at each end."""
    texts = [f"document {number} <BOS> naïve 世界 " * 20 for number in range(200)]
    for name in ("a", "b"):
        pq.write_table(pa.table({"text": texts, "id": texts, "url": texts}), tmp_path / name)
    (tmp_path / "t.json").write_bytes(train_tokenizer(texts, 400))
    program, results = str(ROOT / "benchmarks" / "shard_throughput.py"), tmp_path / "runs.jsonl"
    for name in ("a", "b"):
        (tmp_path / name).rename(tmp_path / f"{name}.parquet")
    words = [str(tmp_path / "*.parquet"), "--tokenizer", str(tmp_path / "t.json")]
    words += ["--rounds", "1", "--json", str(results)]
    done = subprocess.run([sys.executable, program, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    runs = {run["name"]: run for run in map(json.loads, results.read_text().splitlines())}
    assert list(runs) == ["shard.py", "tars"]
    gap = runs["shard.py"]["tokens"] - runs["tars"]["tokens"]
    assert 0 <= gap < 2 * 512
    assert all(run["cpu_s"] > 0.1 and run["memory"] > 1e7 for run in runs.values())


def test_processes_whose_parent_has_ended_are_counted() -> None:
    """As those of a fork server are, which its program does not wait for."""
    busy = "import time; x = time.process_time\nwhile x() < 0.5: pass"
    orphaning = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {busy!r}])"
    code = f"""
import subprocess, sys
sys.path.append({str(ROOT / "benchmarks")!r})
import shard_throughput
shard_throughput.adopt()
process = subprocess.Popen([sys.executable, "-c", {orphaning!r}])
print(sum(used.ru_utime + used.ru_stime for _, _, used in shard_throughput.ended()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) > 0.5


def test_a_contestant_that_fails_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    (tmp_path / "t.json").write_bytes(train_tokenizer(["some text"] * 9, 300))
    words = [str(tmp_path / "a.parquet"), "--tokenizer", str(tmp_path / "t.json")]
    program = str(ROOT / "benchmarks" / "shard_throughput.py")
    done = subprocess.run([sys.executable, program, *words], capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.search(r"error: .*shard\.py failed: .*a\.parquet", done.stderr)
