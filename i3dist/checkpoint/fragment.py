"""The part of a parameter that one rank holds: what engine and checkpoint exchange."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Fragment:
    """The part of one parameter whose optimizer state this rank holds."""

    name: str
    start: int  # first element in the flattened parameter
    tensors: dict[str, Tensor]  # "weight" and the optimizer's states: fp32, 1-D, equal lengths
