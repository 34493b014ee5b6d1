"""Conversations for tests, and what an output must hold of them."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from i3dist.data.manifest import Manifest
from i3dist.data.tokenizer import Tokenizer
from tests.data_prep.corpus import WORDS

Turns = list[dict[str, str]]
_MORE_WORDS = [*WORDS, "<|im_end|>", "<|assistant|>", "<EOS>"]


def conversation(number: int) -> Turns:
    """A conversation of 2 to 20 turns; most are longer than a chunk of 64 tokens."""
    rng = random.Random(number)

    def turn(role: str) -> dict[str, str]:
        words = rng.choices(_MORE_WORDS, k=rng.randint(0, 40))
        return {"role": role, "content": " ".join([str(rng.random())[:5], *words])}

    turns = [turn("system")] if rng.random() < 0.3 else []
    for _ in range(rng.choice((1, 1, 2, 10))):
        turns += [turn("user"), turn("assistant")]
    return [*turns, turn("user")] if rng.random() < 0.2 else turns


def write_chats(folder: Path, count: int = 60) -> dict[str, Turns]:
    """Write two files of conversations below `folder`; returns them by id."""
    chats = {f"chat-{number}": conversation(number) for number in range(count)}
    lines = [json.dumps({"id": name, "messages": turns}) for name, turns in chats.items()]
    (folder / "a.jsonl").write_text("\n".join(lines[: count // 2]))
    (folder / "b.ndjson").write_text("\n".join(lines[count // 2 :]))
    return chats


def framed(tokenizer: Tokenizer, turns: Turns) -> list[tuple[int, bool]]:
    """A document token by token, with <BOS> and <EOS>: the id, and whether it is learned."""
    ids = tokenizer.special_ids
    found = [(tokenizer.bos_id, False)]
    for turn in turns:
        answer = turn["role"] == "assistant"
        found += [(ids["<|im_start|>"], False), (ids[f"<|{turn['role']}|>"], False)]
        found += [(token, answer) for token in tokenizer.encode(turn["content"])]
        found.append((ids["<|im_end|>"], answer))
    return [*found, (tokenizer.eos_id, False)]


def expected(out: Path, split: str, chats: dict[str, Turns]) -> NDArray[Any]:
    """The stream of a split, [2, tokens]: ids and mask, from the order of documents alone."""
    tokenizer = Tokenizer.load(out / "tokenizer.json")
    rows = pq.read_table(out / split / "index.parquet").to_pylist()
    stream = [
        token for row in rows if row["piece"] == 0 for token in framed(tokenizer, chats[row["id"]])
    ]
    length = Manifest.load(out / split).chunk_length
    stream += [(tokenizer.pad_id, False)] * (-len(stream) % length)
    return np.array(stream).T
