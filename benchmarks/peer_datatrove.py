"""Turns parquet files into shuffled files of tokens with datatrove: a peer.

    python benchmarks/peer_datatrove.py OUT TOKENIZER WORKERS FILE...

It needs datatrove 0.10 and nothing of i3dist, so any Python that has it will do. It prints the
number of tokens.
"""

import sys
from pathlib import Path

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import ParquetReader
from datatrove.pipeline.tokens import DocumentTokenizer


def main() -> None:
    """Read, encode, shuffle and write."""
    out, tokenizer, workers = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    source = out / "source"
    source.mkdir(parents=True)
    for number, file in enumerate(sys.argv[4:]):
        (source / f"{number:05}.parquet").symlink_to(Path(file).resolve())
    writer = DocumentTokenizer(str(out / "tokens"), tokenizer, eos_token="<EOS>", seed=0)
    LocalPipelineExecutor(
        pipeline=[ParquetReader(str(source), read_metadata=False), writer],
        tasks=len(sys.argv[4:]),
        workers=workers,
        logging_dir=str(out / "logs"),
    ).run()
    print(sum(path.stat().st_size for path in (out / "tokens").rglob("*.ds")) // 2)


if __name__ == "__main__":
    main()
