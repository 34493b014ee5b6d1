"""Text from a trained model, in constant memory whatever its length."""

from collections.abc import Iterator, Sequence

import torch

from i3dist.data.tokenizer import Tokenizer
from i3dist.inference.batch_decoder import BatchDecoder
from i3dist.inference.sampling import Sampling
from i3dist.inference.token_stream import TokenStream, finite
from i3dist.model.lm import I3LM

__all__ = ["Sampling", "generate", "stream"]

# New tokens of a row from which a GPU's sampling with top-k or top-p is compiled, and what else has
# no kernels: that takes seconds to a minute, and saves a part of a millisecond.
COMPILED_FROM = 100_000


def generate(
    model: I3LM,
    tokenizer: Tokenizer,
    prompt: str,
    tokens: int,
    sampling: Sampling,
    seed: int,
    ignore_eos: bool = False,
) -> Iterator[str]:
    """Continue one prompt: the text of `stream`."""
    for _, text in stream(model, tokenizer, [prompt], tokens, sampling, seed, ignore_eos):
        yield text


def stream(
    model: I3LM,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    tokens: int,
    sampling: Sampling,
    seed: int,
    ignore_eos: bool = False,
) -> Iterator[tuple[int, str]]:
    """Continue prompts side by side; yields (row, text) as soon as characters are complete.

    Row i draws its random numbers from seed + i. So its text is that of its prompt alone with that
    seed, unless two tokens are equally likely to within rounding.

    Args:
        model: in evaluation mode.
        tokenizer: the model's.
        prompts: plain text; special tokens written in it stay text.
        tokens: number of new tokens of each row; fewer where the model ends the document.
        sampling: how tokens are sampled.
        seed: of the random numbers.
        ignore_eos: start another document after ``<EOS>`` instead of stopping.

    Raises:
        UserError: the model's logits are not finite.
    """
    if not prompts:
        return
    device = model.head.weight.device
    given = [
        torch.tensor([tokenizer.bos_id, *tokenizer.encode(prompt)], device=device)
        for prompt in prompts
    ]
    compiled = device.type == "cuda" and tokens >= COMPILED_FROM
    decoder = BatchDecoder(model, given, compiled)
    # A document is text and its end: no other special token may follow.
    forbidden = [i for i in tokenizer.special_ids.values() if i != tokenizer.eos_id]
    sampled = TokenStream(decoder, sampling, seed, tokenizer.eos_id, forbidden)
    texts = [_Text(tokenizer, tokens, ignore_eos) for _ in prompts]
    while not all(text.ended for text in texts):
        for row, (text, token) in enumerate(zip(texts, sampled.next(), strict=True)):
            if piece := text.push(token):
                yield row, piece


class _Text:
    """One row's text as its tokens come in."""

    def __init__(self, tokenizer: Tokenizer, tokens: int, ignore_eos: bool):
        self.tokenizer, self.ignore_eos = tokenizer, ignore_eos
        self.left = tokens
        self.decoder = tokenizer.stream_decoder()

    @property
    def ended(self) -> bool:
        """Whether no more tokens belong to the row."""
        return not self.left

    def push(self, token: int) -> str:
        """What a token adds to the text; the last one also completes it."""
        if self.ended or token == self.tokenizer.bos_id:
            return ""
        self.left -= 1
        if token != self.tokenizer.eos_id:
            piece = self.decoder.push(finite(token))
        elif self.ignore_eos:
            piece = self.decoder.finish() + "\n\n"
        else:
            self.left, piece = 0, ""
        return piece + self.decoder.finish() if self.ended else piece
