"""What a growth reports, and the errors it can turn into on the host."""

import enum
from typing import NamedTuple

from jaxtyping import Array


class Status(enum.IntEnum):
    """What became of a growth.

    `REJECTED` also stands for slots that even the filler could not use: neurons that would read nothing but inputs that
    never vary (a dead layer before).
    """

    GROWN = 0
    SKIPPED = 1
    NO_FREE_SLOT = 2
    BEYOND_RANK = 3
    REJECTED = 4
    NON_FINITE = 5


class GrowthInfo(NamedTuple):
    """What a `grow_step` did; every field is a dict by site name.

    Bottlenecks and their gains are in units of mean |V_goal|^2 over the samples the statistics saw, as the linear model
    has them at amplitude 1; `()` or, for a stack of layers, `stack`. Losses are those of the whole batch.

    Attributes:
        psi_before: the bottleneck before any update, mean |V_goal|^2.
        psi_after: what the update and the neurons leave of it.
        gain_predicted: what the neurons take away from it after the update (a side that is born zero at its best).
        gain_held_out: the same for neurons fitted on one half of the samples, on the other half.
        gain_achieved: decrease of the loss.
        amplitude: gamma of the neurons, ().
        amplitude_update: gamma of the best update, ().
        written: neurons of the method that were written, int32.
        filled: neurons of `fill` that were written, int32.
        born: which slots were written, (capacity,) booleans.
        width: used slots afterwards, int32.
        loss_before: before this site's growth.
        loss_after: after it.
        status: a `Status`, int32.
    """

    psi_before: dict[str, Array]
    psi_after: dict[str, Array]
    gain_predicted: dict[str, Array]
    gain_held_out: dict[str, Array]
    gain_achieved: dict[str, Array]
    amplitude: dict[str, Array]
    amplitude_update: dict[str, Array]
    written: dict[str, Array]
    filled: dict[str, Array]
    born: dict[str, Array]
    width: dict[str, Array]
    loss_before: dict[str, Array]
    loss_after: dict[str, Array]
    status: dict[str, Array]


def check(info: GrowthInfo) -> None:
    """Turns what went wrong inside a jitted growth into an error; call it on the host.

    A growth that was skipped, or rejected because the loss would have risen, is not an error.

    Raises:
        ValueError: naming the site and the cure.
    """
    for name, status in info.status.items():
        if status == Status.NON_FINITE:
            raise ValueError(
                f"site `{name}`: the loss or the statistics are not finite, nothing was changed. Look for NaN or "
                "Inf in the batch and in the parameters."
            )
        if status == Status.NO_FREE_SLOT:
            raise ValueError(
                f"site `{name}` has fewer free slots than neurons asked for: width {int(info.width[name])} of "
                f"{info.born[name].shape[0]} slots. Make room with `resize` or ask for fewer with `neurons=`."
            )
        if status == Status.BEYOND_RANK:
            raise ValueError(
                f"site `{name}`: the method found {int(info.written[name])} neurons, fewer than asked for. Give a "
                "`fill` for the other slots, or ask for fewer."
            )
