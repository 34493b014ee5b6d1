"""A conversation with a trained model. The decoder goes on from turn to turn: all is read once."""

from collections.abc import Generator, Iterable, Iterator, Mapping

import torch

from i3dist.data.chat import ANSWERS, ChatIds, encode_conversation, message_of
from i3dist.data.tokenizer import Tokenizer
from i3dist.errors import UserError
from i3dist.inference.batch_decoder import BatchDecoder
from i3dist.inference.sampling import Sampling, check_request
from i3dist.inference.token_stream import TokenStream, finite
from i3dist.model.lm import I3LM


class Chat:
    """A conversation, one document to the model: ``<BOS>``, then each message by the template of
    `i3dist.data.chat`.

    Attributes:
        messages: what was said, as ``{"role": ..., "content": ...}``.
        ids: the same as the model reads it. An answer's ids are those that were sampled; encoding
            its text can give others.
    """

    def __init__(
        self,
        model: I3LM,
        tokenizer: Tokenizer,
        messages: Iterable[Mapping[str, str]],
        tokens: int,
        sampling: Sampling,
        seed: int,
    ) -> None:
        """Begin a conversation, or go on with one.

        Args:
            model: in evaluation mode.
            tokenizer: the model's.
            messages: what was said before, by any role.
            tokens: most tokens of an answer.
            sampling: how they are sampled.
            seed: of the random numbers. A token's number depends on the seed and on how many tokens
                stand before it, so a conversation that goes on continues as if it had not stopped.

        Raises:
            UserError: an argument is out of range, or a message is none.
        """
        check_request(tokens, seed)
        self.model, self.tokenizer = model, tokenizer
        self.tokens, self.sampling, self.seed = tokens, sampling, seed
        self.template = ChatIds.of(tokenizer)
        self.messages: list[dict[str, str]] = []
        self.ids = [tokenizer.bos_id]
        self._stream: TokenStream | None = None
        self._read = 0  # of `ids`, by the decoder
        self._answer: Generator[str] | None = None
        for message in messages:
            self._add(message)

    def say(self, text: str) -> Iterator[str]:
        """Say something as the user. Yields the answer as soon as characters are complete.

        The answer ends where the model ends it, or after `tokens` tokens. `stop`, or saying
        something else, ends it too. What was yielded stays in the conversation.

        Raises:
            UserError: the text is blank, no text or not valid Unicode, or the logits are not
                finite.
        """
        if isinstance(text, str) and not text.strip():
            raise UserError("there is nothing in the message: say something")
        self.stop()
        self._add({"role": "user", "content": text})
        self._answer = self._answered()
        return self._answer

    def stop(self) -> None:
        """End the answer that is under way, if there is one."""
        if self._answer is not None:
            self._answer.close()

    def _add(self, turn: Mapping[str, str]) -> None:
        message = message_of(turn)
        ids, _ = encode_conversation(self.tokenizer, [message])
        self.ids += ids.tolist()
        self.messages.append({"role": message.role, "content": message.content.decode()})

    def _answered(self) -> Generator[str]:
        answer = {"role": ANSWERS, "content": ""}
        self.messages.append(answer)
        self.ids += [self.template.begin, self.template.answers]
        try:
            for piece in self._sampled():
                answer["content"] += piece
                yield piece
        finally:
            if self.ids[-1] != self.template.end:
                self.ids.append(self.template.end)

    def _sampled(self) -> Iterator[str]:
        """Sample the tokens of an answer; yields their text."""
        text = self.tokenizer.stream_decoder()
        try:
            stream = self._catch_up()
            for _ in range(self.tokens):
                token = finite(stream.next()[0])
                self._read = len(self.ids)  # all but this token
                self.ids.append(token)
                if piece := text.push(token):
                    yield piece
                if token == self.template.end:
                    break
        except GeneratorExit:
            raise
        except BaseException:  # nobody knows what the decoder has read: the next will read anew
            self._stream, self._read = None, 0
            raise
        if piece := text.finish():
            yield piece

    def _catch_up(self) -> TokenStream:
        """Read what the decoder has not, and sample the first token after it."""
        new = torch.tensor(self.ids[self._read :], device=self.model.head.weight.device)
        if self._stream is None:
            special = self.tokenizer.special_ids.values()
            self._stream = TokenStream(
                BatchDecoder(self.model, [new]),
                self.sampling,
                self.seed,
                self.tokenizer.eos_id,
                forbidden=[i for i in special if i != self.template.end],
                ahead=0,  # what is said next comes right behind the answer
                drawn=len(new),
            )
        else:
            self._stream.read(new)
        self._read = len(self.ids)
        return self._stream
