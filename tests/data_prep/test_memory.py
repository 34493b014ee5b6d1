"""Of a large document a process holds its text and its tokens a few times, not many."""

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.formats import FORMATS
from data_prep.reading.files import file_source
from data_prep.shuffle import Spiller
from data_prep.sources import CHAT, TEXT
from i3dist.data.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent.parent
SENTENCE = "the end of a line "
SIZE = 40_000_000
WHOLE = SENTENCE * (SIZE // len(SENTENCE))

MOST_TIMES = {
    "a.txt": 3.6,
    "a.jsonl": 4.9,
    "wide.jsonl": 4.9,
    "a.parquet": 5.0,
    "chat.jsonl": 7.0,
    "wide-chat.jsonl": 7.0,
}
"""How many times its size a process may grow; one copy of the text more is too much."""


def peaks(tokenizer: Path, out: Path, *sources: str) -> None:
    """Tokenize each source in a process of its own; print by how many bytes it grew."""
    loaded = Tokenizer.load(tokenizer)
    loaded.encoder  # noqa: B018  # chosen before the processes are made
    for source in sources:
        before = psutil.Process().memory_info().rss
        if not (child := os.fork()):
            kind = CHAT if "chat" in source else TEXT
            spiller = Spiller(loaded, out, 0, lambda tokens: None, FORMATS[kind])
            spiller.spill(file_source(source, kind).parts()[0], 0)
            os._exit(0)
        _, status, used = os.wait4(child, 0)
        assert status == 0
        print(used.ru_maxrss * 1024 - before)


def test_pass_1_holds_a_large_document_a_few_times(tokenizer: Path, tmp_path: Path) -> None:
    messages = [{"role": role, "content": WHOLE[: SIZE // 2]} for role in ("user", "assistant")]
    (tmp_path / "a.txt").write_text(WHOLE)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": WHOLE}))
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": messages}))
    # One such character makes each of a `str` take four bytes.
    for name, wide in (("a.jsonl", "wide.jsonl"), ("chat.jsonl", "wide-chat.jsonl")):
        text = (tmp_path / name).read_text().replace("the end", "the \U0001f600", 1)
        (tmp_path / wide).write_text(text)
    pq.write_table(pa.table({"text": [WHOLE]}), tmp_path / "a.parquet")
    code = "import sys; from pathlib import Path; from tests.data_prep.test_memory import peaks; "
    code += "peaks(*map(Path, sys.argv[1:3]), *sys.argv[3:])"
    words = [sys.executable, "-c", code, str(tokenizer), str(tmp_path)]
    words += [str(tmp_path / name) for name in MOST_TIMES]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    grown = [int(line) / SIZE for line in done.stdout.split()]
    most = MOST_TIMES.values()
    assert all(found < bound for found, bound in zip(grown, most, strict=True)), grown
