"""A trained model as Python code uses it: `i3dist.load(RUN)`.

Notation: L tokens of a stream, V vocabulary, n tokens of a text.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypedDict, Unpack, overload

import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from i3dist.checkpoint.weights import load_run
from i3dist.cli.paths import literal_path
from i3dist.config import Settings
from i3dist.data.tokenizer import Tokenizer
from i3dist.distributed.devices import pick_device
from i3dist.errors import UserError
from i3dist.inference.chat import Chat
from i3dist.inference.forward import read, rows_at_once
from i3dist.inference.generate import stream
from i3dist.inference.sampling import Sampling, check_request
from i3dist.model.lm import I3LM
from i3dist.ops.cross_entropy import IGNORE, token_losses

Texts = list[str] | tuple[str, ...]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Options(TypedDict, total=False):
    """What `LanguageModel.stream` takes beside prompts."""

    tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int
    ignore_eos: bool


class LanguageModel:
    """A trained model with its tokenizer. It is used, not trained: it gives no gradients.

    Attributes:
        model: the `I3LM`, in evaluation mode.
        settings: those of its run.
        tokenizer: text to ids and back; text never makes special ids.
    """

    def __init__(self, model: I3LM, settings: Settings, tokenizer: Tokenizer) -> None:
        self.model, self.settings, self.tokenizer = model, settings, tokenizer

    def __repr__(self) -> str:
        weight = self.model.head.weight
        size = sum(parameter.numel() for parameter in self.model.parameters())
        return f"LanguageModel({size / 1e6:,.1f}M parameters, {weight.dtype}, {weight.device})"

    @property
    def device(self) -> torch.device:
        """The device that it computes on."""
        return self.model.head.weight.device

    def encode(self, text: str) -> Tensor:
        """Ids of a text as a document that begins: [1 + n] int64 on `device`, ``<BOS>`` first.

        Raises:
            UserError: it is no text, or not valid Unicode.
        """
        (text,) = listed([text])
        ids = [self.tokenizer.bos_id, *self.tokenizer.encode(text)]
        return torch.tensor(ids, device=self.device)

    def decode(self, ids: ArrayLike | Tensor) -> str:
        """Text of ids [L]; special tokens give no text."""
        return self.tokenizer.decode(self._checked(ids).flatten().tolist())

    def __call__(self, ids: ArrayLike | Tensor) -> Tensor:
        """Logits of the token that follows each token: [..., L, V] fp32 on `device`.

        A row is a stream as in training: it may be of any length and hold several documents, which
        begin at their ``<BOS>`` (`encode` sets it) and see nothing of each other. Rows of unequal
        length can be padded at their ends with any id. But for the logits memory is constant.

        Args:
            ids: [..., L] integers from 0 to V - 1: a tensor, an array or lists.

        Raises:
            UserError: `ids` are no such integers.
        """
        ids = self._checked(ids)
        rows = ids.unsqueeze(0).flatten(0, -2)
        logits = torch.empty(*rows.shape, self.tokenizer.vocab_size, device=self.device)
        height = rows_at_once(self.model, rows.shape[1])
        for some, out in zip(rows.split(height), logits.split(height), strict=True):
            end = 0
            for hidden in read(self.model, some):
                start, end = end, end + hidden.shape[1]
                out[:, start:end] = self.model.head(hidden)
        return logits.view(*ids.shape, logits.shape[-1])

    @overload
    def score(self, texts: str) -> Tensor: ...
    @overload
    def score(self, texts: Texts) -> list[Tensor]: ...
    def score(self, texts: str | Texts) -> Tensor | list[Tensor]:
        """Log-probability of each token of a text given those before it, in nats.

        Args:
            texts: one text, or several, which are computed side by side.

        Returns:
            [n] fp32 on the CPU, for the n ids of ``tokenizer.encode(text)``; of several texts a
            list. Each text is a document of its own.

        Raises:
            UserError: one is no text, or not valid Unicode.
        """
        if isinstance(texts, str):
            return self.score([texts])[0]
        ids = [self.encode(text) for text in listed(texts)]
        scores = [torch.empty(0)] * len(ids)
        left = sorted(range(len(ids)), key=lambda n: -len(ids[n]))  # the longest first
        while left:
            height = rows_at_once(self.model, len(ids[left[0]]))
            some, left = left[:height], left[height:]
            found = self._log_probabilities([ids[n] for n in some])
            for n, row in zip(some, found, strict=True):
                scores[n] = row[: len(ids[n]) - 1].clone()
        return scores

    @overload
    def generate(self, prompts: str, **options: Unpack[Options]) -> str: ...
    @overload
    def generate(self, prompts: Texts, **options: Unpack[Options]) -> list[str]: ...
    def generate(self, prompts: str | Texts, **options: Unpack[Options]) -> str | list[str]:
        """Continue prompts, side by side; returns the new text of one, or a list of several.

        The options are those of `stream`: tokens, temperature, top_k, top_p, seed, ignore_eos.
        """
        given = listed(prompts)
        texts = [""] * len(given)
        for row, text in self.stream(given, **options):
            texts[row] += text
        return texts[0] if isinstance(prompts, str) else texts

    def stream(
        self,
        prompts: str | Texts,
        *,
        tokens: int = 256,
        temperature: float = Sampling.temperature,
        top_k: int = Sampling.top_k,
        top_p: float = Sampling.top_p,
        seed: int = 0,
        ignore_eos: bool = False,
    ) -> Iterator[tuple[int, str]]:
        """Continue prompts, side by side: yields (row, text) as soon as characters are complete.

        Args:
            prompts: one text (row 0), or several; each begins a document.
            tokens: most new tokens of each; fewer where the model ends the document.
            temperature: divides the logits; 0 takes the likeliest token.
            top_k: number of likeliest tokens to sample from; 0 takes all.
            top_p: probability that the likeliest tokens sampled from reach together; 1 takes all.
            seed: of the random numbers; row i draws them from seed + i.
            ignore_eos: begin another document where one ends, instead of stopping.

        Raises:
            UserError: a prompt is no text, an option is out of range, or the logits are not finite.
        """
        check_request(tokens, seed)
        sampling = Sampling(temperature, top_k, top_p)
        given = listed(prompts)
        return stream(self.model, self.tokenizer, given, tokens, sampling, seed, ignore_eos)

    def chat(
        self,
        messages: Iterable[Mapping[str, str]] = (),
        *,
        tokens: int = 256,
        temperature: float = Sampling.temperature,
        top_k: int = Sampling.top_k,
        top_p: float = Sampling.top_p,
        seed: int = 0,
    ) -> Chat:
        """Begin a conversation, or go on with one: `Chat.say` answers.

        Args:
            messages: what was said before, as ``{"role": "system", "content": "..."}``; roles are
                system, user and assistant.
            tokens: most tokens of an answer.
            temperature: as for `stream`.
            top_k: as for `stream`.
            top_p: as for `stream`.
            seed: of the random numbers.

        Raises:
            UserError: an option is out of range, or a message is none.
        """
        sampling = Sampling(temperature, top_k, top_p)
        return Chat(self.model, self.tokenizer, messages, tokens, sampling, seed)

    def _log_probabilities(self, documents: list[Tensor]) -> Tensor:
        """Of each id but the first, given those before it, [rows, longest] on the CPU."""
        ids = pad_sequence(documents, batch_first=True, padding_value=self.tokenizer.pad_id)
        targets = pad_sequence([ids[1:] for ids in documents], True, IGNORE)
        targets = F.pad(targets, (0, 1), value=IGNORE)
        losses, end = [], 0
        for hidden in read(self.model, ids):
            start, end = end, end + hidden.shape[1]
            head = self.model.head.computed(self.model.head.weight)
            losses.append(token_losses(hidden, head, targets[:, start:end]))
        return -torch.cat(losses, dim=1).cpu()

    def _checked(self, ids: ArrayLike | Tensor) -> Tensor:
        """Ids as int64 on the device; raises `UserError` if they are none."""
        size = self.tokenizer.vocab_size
        legal = f"ids should be whole numbers from 0 to {size - 1}, [..., L]"
        try:
            tensor = torch.as_tensor(ids)
        except (TypeError, ValueError, RuntimeError):
            raise UserError(
                f"{legal} in rows of one length; `encode` makes them of a text"
            ) from None
        if tensor.numel() == 0:  # torch calls no numbers floating point
            tensor = tensor.long()
        if tensor.dim() == 0 or tensor.is_floating_point() or tensor.dtype == torch.bool:
            raise UserError(f"{legal}; these are {tensor.dtype} {list(tensor.shape)}")
        tensor = tensor.to(self.device, torch.int64)
        if tensor.numel() and not 0 <= int(tensor.min()) <= int(tensor.max()) < size:
            raise UserError(f"{legal}; these are from {tensor.min()} to {tensor.max()}")
        return tensor


def listed(texts: str | Texts) -> list[str]:
    """One text or several, as a list.

    Raises:
        UserError: they are something else.
    """
    one = isinstance(texts, str | bytes) or not isinstance(texts, Iterable)
    several: list[Any] = [texts] if one else list(texts)
    if wrong := [type(text).__name__ for text in several if not isinstance(text, str)]:
        raise UserError(f"give a text, or a list of texts: this is of type {wrong[0]}")
    return several


def load(
    path: str | os.PathLike[str],
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
) -> LanguageModel:
    """Load a trained model.

    Args:
        path: the folder of a run that has ended, or a checkpoint: RUN/checkpoints (the newest in
            it), RUN/checkpoints/step-00000100, or a copy of one; or an exported model's folder.
        device: "cpu" or "cuda", torch's current one; "auto" is CUDA where there is a GPU.
        dtype: "float32" or "bfloat16"; "auto" is the type that it was trained in (bfloat16 by
            default), but float32 on a CPU.

    Raises:
        UserError: there is no such model or device. If the model has layers of your own
            (docs/extending.md), import the file that registers them first.
    """
    try:
        place = literal_path(os.fsdecode(path))
    except ValueError as error:
        raise UserError(f"{path!r}: {error}") from None
    name = str(dtype).removeprefix("torch.")
    if name != "auto" and name not in DTYPES:
        raise UserError(f"dtype={name} should be auto, {' or '.join(DTYPES)}")
    return LanguageModel(*load_run(place, pick_device(str(device)), DTYPES.get(name)))
