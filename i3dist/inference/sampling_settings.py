"""How tokens are sampled, as options say it. No torch: programs read their options before it."""

from dataclasses import dataclass
from numbers import Integral, Real

from i3dist.errors import UserError


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
        for name, kind in (("temperature", Real), ("top_k", Integral), ("top_p", Real)):
            if not isinstance(value := getattr(self, name), kind):
                number = "a whole number" if kind is Integral else "a number"
                raise UserError(f"{name}={value!r} must be {number}")
        if self.temperature and not 1e-3 <= self.temperature <= 1e3:
            raise UserError(f"temperature {self.temperature} must be 0, or from 0.001 to 1000")
        if self.top_k < 0:
            raise UserError(f"top_k {self.top_k} must be 0 or more; 0 keeps all")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p {self.top_p} must be above 0 and at most 1")
