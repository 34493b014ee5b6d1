"""Text from a trained model, in constant memory whatever its length. Letter: V vocabulary."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from i3dist.data.tokenizer import Tokenizer
from i3dist.errors import UserError
from i3dist.inference.decoder import Decoder
from i3dist.model.lm import I3LM


@dataclass(frozen=True)
class Sampling:
    """How the next token is sampled."""

    temperature: float = 0.8
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int = 0
    """Number of likeliest tokens to keep; 0 keeps all."""
    top_p: float = 1.0
    """Probability that the likeliest tokens kept reach together (nucleus sampling: Holtzman et al.,
    2020, arXiv:1904.09751); 1 keeps all."""

    def __post_init__(self) -> None:
        if self.temperature and not 1e-3 <= self.temperature <= 1e3:
            raise UserError(f"--temperature {self.temperature} must be 0, or from 0.001 to 1000")
        if self.top_k < 0:
            raise UserError(f"--top-k {self.top_k} must be 0 or more; 0 keeps all")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p {self.top_p} must be above 0 and at most 1")


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Sample one token id from logits [V] fp32; never one at -inf."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    ids, probabilities = distribution(logits, sampling)
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])


def distribution(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """What a token is sampled from at a temperature above 0.

    Args:
        logits: [V] fp32.
        sampling: temperature, then `top_k`, then `top_p` of what `top_k` leaves.

    Returns:
        Ids [k], likeliest first and equal ones by number, and their weights [k] fp32: the
        probabilities, or 0 where `top_p` cuts. They need not sum to 1.
    """
    values, ids = torch.sort(logits / sampling.temperature, descending=True, stable=True)
    if sampling.top_k:
        values, ids = values[: sampling.top_k], ids[: sampling.top_k]
    probabilities = values.softmax(-1)
    if sampling.top_p < 1:  # at 1 a rounded sum could cut the last tokens
        # A token stays if those before it have not reached top_p. So the first always stays.
        before = F.pad(probabilities[:-1].double().cumsum(-1), (1, 0))
        probabilities = probabilities.masked_fill(before >= sampling.top_p, 0.0)
    return ids, probabilities


def generate(
    model: I3LM,
    tokenizer: Tokenizer,
    prompt: str,
    tokens: int,
    sampling: Sampling,
    seed: int,
    ignore_eos: bool = False,
) -> Iterator[str]:
    """Continue `prompt`; yields text as soon as its characters are complete.

    Args:
        model: in evaluation mode.
        tokenizer: the model's.
        prompt: plain text; special tokens written in it stay text.
        tokens: number of new tokens; fewer where the model ends the document.
        sampling: how tokens are sampled.
        seed: of the random numbers.
        ignore_eos: start another document after ``<EOS>`` instead of stopping.

    Raises:
        UserError: the model's logits are not finite.
    """
    device = model.head.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    # A document is text and its end: no other special token may follow.
    allowed = torch.zeros(tokenizer.vocab_size, device=device)
    allowed[[i for i in tokenizer.special_ids.values() if i != tokenizer.eos_id]] = float("-inf")
    decoder, text = Decoder(model), tokenizer.stream_decoder()
    fed = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    for _ in range(tokens):
        logits = decoder.feed(torch.tensor(fed, device=device))
        if not logits.isfinite().all():
            raise UserError("the model's logits are not finite: choose an earlier checkpoint of it")
        token = sample(logits + allowed, sampling, generator)
        if token == tokenizer.eos_id:
            if not ignore_eos:
                break
            yield text.finish() + "\n\n"
            text = tokenizer.stream_decoder()
            fed = [token, tokenizer.bos_id]
            continue
        yield text.push(token)
        fed = [token]
    yield text.finish()


def stream(
    model: I3LM,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    tokens: int,
    sampling: Sampling,
    seed: int,
    ignore_eos: bool = False,
) -> Iterator[tuple[int, str]]:
    """Continue several prompts; yields (row, text) as soon as characters are complete.

    The arguments are those of `generate`; a row's text is the same alone and beside others.
    """
    for row, prompt in enumerate(prompts):
        for text in generate(model, tokenizer, prompt, tokens, sampling, seed, ignore_eos):
            yield row, text
