"""benchmarks/encoding.py on a few documents: every encoder is measured on the same ids."""

import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.tokenizer import train_tokenizer
from tests.conftest import ROOT

PROGRAM = str(ROOT / "benchmarks" / "encoding.py")


def test_every_encoder_is_measured(tmp_path: Path) -> None:
    texts = [f"document {number} <BOS> naïve 世界 " * 20 for number in range(200)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    (tmp_path / "t.json").write_bytes(train_tokenizer(texts, 400))
    words = [sys.executable, PROGRAM, str(tmp_path / "*.parquet"), "--repeats", "2"]
    words += ["--tokenizer", str(tmp_path / "t.json")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    bytes_of_text = sum(len(text.encode()) for text in texts)
    assert f" {bytes_of_text:,} bytes, equal ids in all runs" in done.stdout
    for name in ("gigatoken", "encode", "encode_batch_fast"):
        assert re.search(rf"^{name} +[\d.]+ \([\d.]+ to [\d.]+\)$", done.stdout, re.MULTILINE)
