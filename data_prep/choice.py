"""Which documents are kept, by what tokenizing finds out about each."""

from dataclasses import dataclass

from data_prep.sources import Part, Skip


@dataclass(frozen=True)
class Choice:
    """The options --min-tokens, --max-tokens and --deduplicate.

    A document has `min_tokens` to `max_tokens` tokens, without <BOS> and <EOS>. These bounds do not
    apply to a source that is for validation.
    """

    min_tokens: int | None = None
    max_tokens: int | None = None
    deduplicate: bool = False

    @property
    def by_length(self) -> bool:
        """Whether documents are chosen by their length."""
        return self.min_tokens is not None or self.max_tokens is not None

    def skip(self, part: Part, tokens: int) -> Skip | None:
        """The reason to skip a document of a part with so many tokens."""
        if part.is_validation:
            return None
        if self.min_tokens is not None and tokens < self.min_tokens:
            return Skip.SHORT
        if self.max_tokens is not None and tokens > self.max_tokens:
            return Skip.LONG
        return None


ALL = Choice()
