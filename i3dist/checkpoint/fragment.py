"""The part of a parameter that one rank holds: what engine and checkpoint exchange."""

from dataclasses import dataclass

from torch import Tensor

ADAM_STATES = ("exp_avg", "exp_avg_sq")
KINDS = ("weight", *ADAM_STATES)


@dataclass(frozen=True)
class Fragment:
    """The part of one parameter whose optimizer state this rank holds."""

    name: str
    start: int  # first element in the flattened parameter
    tensors: dict[str, Tensor]  # one for each of `KINDS`: fp32, 1-D, equal lengths
