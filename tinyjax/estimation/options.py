"""The options of an estimate."""

import dataclasses
from collections.abc import Mapping
from typing import TypedDict

from jaxtyping import Array

from tinyjax.core.whole_numbers import whole_number
from tinyjax.methods.solvers.best_update import Ridge
from tinyjax.statistics.dense import null_signs
from tinyjax.statistics.sums import Extras


class EstimateOptions(TypedDict, total=False):
    """The keywords of `tinyjax.estimate`, which `SumOptions` gives their defaults."""

    energy_matrix: bool
    offset_gram: bool
    null_draws: int
    num_gates: int | Mapping[str, int]
    third_moments: int
    chunk: int | None
    micro_batch: int | None
    project: Ridge | None


@dataclasses.dataclass(frozen=True)
class SumOptions:
    """Which sums to form, and of how many samples at a time; `tinyjax.estimate` says what each means.

    Raises:
        ValueError: for a value that is out of range, or two that exclude each other.
    """

    energy_matrix: bool = False
    offset_gram: bool = False
    null_draws: int = 0
    num_gates: int | Mapping[str, int] = 1
    third_moments: int = 0
    chunk: int | None = None
    micro_batch: int | None = None
    project: Ridge | None = None

    def __post_init__(self) -> None:
        """Refuses what cannot be."""
        for name in ("null_draws", "third_moments"):
            if whole_number(getattr(self, name), f"`{name}`") < 0:
                raise ValueError(f"`{name}` must be >= 0, got {getattr(self, name)}")
        if self.project is not None and self.null_draws:
            raise ValueError("`null_draws` are made of `link`, which `project` leaves out: pass one of them")
        if self.chunk is not None and self.micro_batch is not None:
            raise ValueError("`micro_batch` and `chunk` both say how many samples pass at a time: leave one out")
        for name in ("chunk", "micro_batch"):
            size = getattr(self, name)
            if size is not None and (whole_number(size, f"`{name}`") < 2 or size % 2):
                raise ValueError(f"`{name}` must be an even number of samples, got {size}")

    def extras(self, first: Array | int, num_samples: int) -> Extras:
        """What to sum besides the usual sums of samples of which `first` is the index of the first."""
        signs = null_signs(self.null_draws, first, num_samples) if self.null_draws else None
        return Extras(self.energy_matrix or self.third_moments > 0, self.offset_gram, signs)


DEFAULTS = SumOptions()
