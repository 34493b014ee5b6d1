"""Sampled tokens of a batch, on the device, a few steps ahead of who reads them.

Notation: B rows, V vocabulary.
"""

from collections import deque
from collections.abc import Iterable

import torch
from torch import Tensor

from i3dist.errors import UserError
from i3dist.inference.batch_decoder import BatchDecoder
from i3dist.inference.recording import Recorded
from i3dist.inference.sampling import SPLIT_MIX, Sampling, sample, uniform
from i3dist.inference.steps import compile_if, step_kernels

AHEAD = 4  # steps that a GPU may be ahead, once as many tokens were read
NOT_FINITE = -1  # stands for a token that could not be sampled


class TokenStream:
    """Samples a token of each row and reads it, again and again.

    A step, from the tokens read to those sampled next, is one recording. The host only launches it,
    and reads the tokens of `AHEAD` steps before.
    """

    def __init__(
        self,
        decoder: BatchDecoder,
        sampling: Sampling,
        seed: int,
        eos_id: int,
        forbidden: Iterable[int] = (),
        ahead: int = AHEAD,
        drawn: int = 0,
    ):
        """Sample the tokens after the prompts.

        Args:
            decoder: what has read the prompts.
            sampling: how tokens are sampled.
            seed: row i draws its random numbers from seed + i.
            eos_id: the token that ends a document; ``<BOS>`` follows without being sampled.
            forbidden: tokens that are never sampled.
            ahead: steps that a GPU may be ahead; a CPU never is.
            drawn: random numbers to pass over.
        """
        self.decoder, self.sampling, self.eos_id = decoder, sampling, eos_id
        logits = decoder.logits
        self.allowed = torch.zeros_like(logits[0])
        self.allowed[list(forbidden)] = float("-inf")
        seeds = [(seed + row) % 2**63 for row in range(len(logits))]
        self.seeds = torch.tensor(seeds, device=logits.device)
        self.drawn = torch.full_like(self.seeds, drawn)
        self.tokens = torch.zeros_like(self.seeds)  # sampled last
        self.step = Recorded(decoder.recorded)
        self.ahead = ahead if logits.is_cuda else 0
        self.given = 0  # tokens of each row
        # Top-k and top-p sort the vocabulary.
        all_kept = sampling.temperature == 0 or (not sampling.top_k and sampling.top_p == 1)
        self.by_kernel = decoder.by_kernels and all_kept
        self.underway: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()
        self._sample(logits)
        self._send()

    def next(self) -> list[int]:
        """Each row's next token, or `NOT_FINITE`."""
        # The first token waits for no step: the first steps load kernels, and are recorded.
        while len(self.underway) <= min(self.ahead, self.given):
            self.advance()
            self._send()
        self.given += 1
        tokens, sent = self.underway.popleft()
        if sent is not None:
            sent.synchronize()
        return tokens.tolist()

    def read(self, tokens: Tensor) -> None:
        """Read given tokens [L] of the only row, and sample what follows them.

        Only where `ahead` is 0: the decoder has then read all tokens before the last one that
        `next` gave, and is not past it. Each token takes a random number as if it were sampled.
        """
        self.drawn.add_(len(tokens) - 1)
        self._sample(self.decoder.read(tokens))
        self._send()

    def advance(self) -> None:
        """Read the tokens sampled last, and sample the next, without waiting for the device."""
        self.decoder.make_room()
        self.step(self._step)

    def _send(self) -> None:
        """Copy the tokens to the host, without waiting for them."""
        tokens = self.tokens.to("cpu", non_blocking=True, copy=True)
        sent = torch.cuda.Event() if self.tokens.is_cuda else None
        if sent is not None:
            sent.record()
        self.underway.append((tokens, sent))

    def _step(self) -> None:
        tokens = self.tokens if self.by_kernel else self.tokens.clamp(min=0)
        self._sample(self.decoder.forward(tokens))

    def _sample(self, logits: Tensor) -> None:
        """Sample what follows the last tokens, of logits [B, V] fp32."""
        if self.by_kernel:
            ids = self.eos_id, self.decoder.model.bos_id, NOT_FINITE
            temperature, numbers = self.sampling.temperature, (self.seeds, self.drawn)
            step_kernels("token_triton").sample(
                logits, self.allowed, temperature, numbers, self.tokens, *ids, SPLIT_MIX
            )
            return
        choose = compile_if(self.decoder.compiled, choose_tokens)
        sampled = choose(logits, self.allowed, self.sampling, self.seeds, self.drawn)
        ended = (self.tokens == self.eos_id) & (sampled != NOT_FINITE)
        self.tokens.copy_(torch.where(ended, self.decoder.model.bos_id, sampled))
        self.drawn.add_(1)


def finite(token: int) -> int:
    """A token that was sampled; raises `UserError` if it is `NOT_FINITE`."""
    if token == NOT_FINITE:
        raise UserError("the model's logits are not finite: choose an earlier checkpoint of it")
    return token


def choose_tokens(
    logits: Tensor, allowed: Tensor, sampling: Sampling, seeds: Tensor, drawn: Tensor
) -> Tensor:
    """Tokens [B], or `NOT_FINITE`, of logits [B, V] fp32; `allowed` [V] is added to them."""
    sampled = sample(logits + allowed, sampling, uniform(seeds, drawn))
    return torch.where(logits.isfinite().all(-1), sampled, NOT_FINITE)
