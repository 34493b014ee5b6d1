"""Samples of a model's text: how it continues the beginnings of some held-out documents."""

from collections.abc import Iterator

import numpy as np
import torch

from i3dist.data.held_out import HeldOut
from i3dist.data.shards import read_shard
from i3dist.data.tokenizer import Tokenizer
from i3dist.inference.generate import stream
from i3dist.inference.sampling import Sampling
from i3dist.model.lm import I3LM

PROMPT_TOKENS, NEW_TOKENS = 32, 64
SAMPLING = Sampling(temperature=0.8)


def beginnings(held_out: HeldOut, tokenizer: Tokenizer, count: int) -> list[str]:
    """How the first `count` documents of a held-out subset begin, as text; fewer if it has fewer.

    A beginning is half of what its shard has of the document, `PROMPT_TOKENS` at most.

    Raises:
        UserError: a shard is missing or damaged.
    """
    found: list[str] = []
    for shard in dict.fromkeys(shard for shard, _ in held_out.places):
        tokens = read_shard(held_out.folder, held_out.manifest, shard).tokens.ravel()
        for document in _documents(tokens, tokenizer):
            if len(found) == count:
                return found
            text = tokenizer.decode(document[: min(PROMPT_TOKENS, len(document) // 2)])
            found.append(text.rstrip("\ufffd"))  # of a character that is cut
    return found


def _documents(tokens: np.ndarray, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """The tokens of each document that begins in a shard [n], without its special ones."""
    for document in np.split(tokens, np.flatnonzero(tokens == tokenizer.bos_id))[1:]:
        yield document[~np.isin(document, list(tokenizer.special_ids.values()))]


def continuations(model: I3LM, tokenizer: Tokenizer, prompts: list[str]) -> list[dict[str, str]]:
    """Continue each prompt by `NEW_TOKENS` at most: its ``prompt`` and the ``text`` that follows.

    Equal weights give equal texts on the same device: the random numbers are seeded, and are not
    those of torch's global generator.

    Raises:
        UserError: the model's logits are not finite.
    """
    texts = [""] * len(prompts)
    # Prompts have shapes of their own, which are not worth compiling.
    with torch.compiler.set_stance("force_eager"):
        for row, text in stream(model, tokenizer, prompts, NEW_TOKENS, SAMPLING, seed=0):
            texts[row] += text
    return [{"prompt": prompt, "text": text} for prompt, text in zip(prompts, texts, strict=True)]
