"""Text from a trained model, in constant memory whatever its length.

Notation: B rows, one for each prompt; V vocabulary.
"""

from collections import deque
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from i3dist.data.tokenizer import Tokenizer
from i3dist.errors import UserError
from i3dist.inference.batch_decoder import BatchDecoder
from i3dist.inference.recording import Recorded
from i3dist.inference.sampling import Sampling, sample, uniform
from i3dist.model.lm import I3LM

__all__ = ["Sampling", "generate", "stream"]

AHEAD = 4  # tokens that a GPU may be ahead of the text
NOT_FINITE = -1  # in place of a token that could not be sampled


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
    writing = _Writing(BatchDecoder(model, given), tokenizer, sampling, seed)
    texts = [_Text(tokenizer, tokens, ignore_eos) for _ in prompts]
    while not all(text.ended for text in texts):
        for row, (text, token) in enumerate(zip(texts, writing.next(), strict=True)):
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
        if token == NOT_FINITE:
            raise UserError("the model's logits are not finite: choose an earlier checkpoint of it")
        self.left -= 1
        if token != self.tokenizer.eos_id:
            piece = self.decoder.push(token)
        elif self.ignore_eos:
            piece = self.decoder.finish() + "\n\n"
        else:
            self.left, piece = 0, ""
        return piece + self.decoder.finish() if self.ended else piece


class _Writing:
    """Samples tokens and reads them, on the device, a few tokens ahead of the host."""

    def __init__(
        self, decoder: BatchDecoder, tokenizer: Tokenizer, sampling: Sampling, seed: int
    ) -> None:
        self.decoder, self.sampling = decoder, sampling
        self.bos_id, self.eos_id = tokenizer.bos_id, tokenizer.eos_id
        logits = decoder.logits
        # A document is text and its end: no other special token may follow.
        self.allowed = torch.zeros(tokenizer.vocab_size, device=logits.device)
        forbidden = [i for i in tokenizer.special_ids.values() if i != tokenizer.eos_id]
        self.allowed[forbidden] = float("-inf")
        seeds = [(seed + row) % 2**63 for row in range(len(logits))]
        self.seeds = torch.tensor(seeds, device=logits.device)
        self.drawn = torch.zeros((), dtype=torch.int64, device=logits.device)
        self.tokens = torch.zeros_like(self.seeds)  # sampled last
        self.step = Recorded(self._step, decoder.recorded)
        self.underway: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()
        self._sample(logits)
        self._send()

    def next(self) -> list[int]:
        """Each row's next token, `NOT_FINITE` if there is none; after ``<EOS>`` follows ``<BOS>``,
        which was not sampled."""
        ahead = AHEAD if self.tokens.is_cuda else 0
        while len(self.underway) <= ahead:
            self.decoder.make_room()
            self.step()
            self._send()
        tokens, sent = self.underway.popleft()
        if sent is not None:
            sent.synchronize()
        return tokens.tolist()

    def _send(self) -> None:
        """Copy the tokens to the host, without waiting for them."""
        tokens = self.tokens.to("cpu", non_blocking=True, copy=True)
        sent = torch.cuda.Event() if self.tokens.is_cuda else None
        if sent is not None:
            sent.record()
        self.underway.append((tokens, sent))

    def _step(self) -> None:
        self._sample(self.decoder.forward(self.tokens.clamp(min=0)))

    def _sample(self, logits: Tensor) -> None:
        """Sample what follows the last tokens, of logits [B, V] fp32."""
        sampled = sample(logits + self.allowed, self.sampling, uniform(self.seeds, self.drawn))
        sampled = torch.where(self.tokens == self.eos_id, self.bos_id, sampled)
        finite = logits.isfinite().all(-1)
        self.tokens.copy_(torch.where(finite, sampled, NOT_FINITE))
        self.drawn.add_(1)
