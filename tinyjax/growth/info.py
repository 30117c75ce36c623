"""What a growth reports, and the errors it can turn into on the host."""

import enum
from typing import NamedTuple

from jaxtyping import Array


class Status(enum.IntEnum):
    """What became of a growth.

    `GROWN`: all neurons asked for were written. `SKIPPED`: none were asked for. `NO_FREE_SLOT`, `BEYOND_RANK`,
    `NON_FINITE`: see `check`. `REJECTED`: some of them would have raised the loss. `DEAD_INPUTS`: slots
    stayed empty because every input of the site is zero on this batch (a dead layer before it, or squares that
    underflow): there is nothing to read but the constant of a bias. Nothing is lost, schedules ask again. The cure is
    upstream: grow the layer before it, which the same schedule does, or give its dead units another bias.
    """

    GROWN = 0
    SKIPPED = 1
    NO_FREE_SLOT = 2
    BEYOND_RANK = 3
    REJECTED = 4
    NON_FINITE = 5
    DEAD_INPUTS = 6


class GrowthInfo(NamedTuple):
    """What a `grow_step` did; every field is a dict by site name.

    Bottlenecks and their gains are in units of mean |V_goal|^2 over the samples the statistics saw, as the linear model
    has them at amplitude 1, neurons in front of a convolution at the amplitude that is best there (with the paper's
    bound S they are computed too small); `()` or, for a stack of layers, `stack`. Losses are those of the whole batch.

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
        finite_loss: whether the loss before is finite, (); if one of these three is False, nothing was changed.
        finite_statistics: whether all sums are.
        finite_update: whether all parameters would have been.
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
    finite_loss: dict[str, Array]
    finite_statistics: dict[str, Array]
    finite_update: dict[str, Array]
    status: dict[str, Array]


def check(info: GrowthInfo) -> None:
    """Turns what went wrong inside a jitted growth into an error; call it on the host.

    A growth that was skipped, that was rejected because the loss would have risen, or that had nothing to read, is not
    an error.

    Raises:
        ValueError: naming the site and the cure.

    Example:
        >>> grow_step = tinyjax.make_grow_step(loss_fn, site, num_neurons=2, method=methods.random0, update=None)
        >>> params, info = jax.jit(grow_step)(params, batch, key)
        >>> tinyjax.check(info)
    """
    if not isinstance(info, GrowthInfo):
        whole = f"all {len(info)} results of a growth: pass the last" if isinstance(info, tuple) else repr(info)
        raise ValueError(f"`info` must be the `GrowthInfo` that a `grow_step` returns last, got {whole}")
    for name, status in info.status.items():
        if status == Status.NON_FINITE:
            raise ValueError(f"site `{name}`: {_not_finite(info, name)}")
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


def _not_finite(info: GrowthInfo, name: str) -> str:
    if not info.finite_loss[name]:
        return (
            "the loss is not finite, nothing was changed. Look for NaN or Inf in the batch and in the parameters, and "
            "for a learning rate that is too large."
        )
    if not info.finite_statistics[name]:
        return (
            "the statistics are not finite, nothing was changed. Look for NaN or Inf in the parameters; if there are "
            "none, squares of the activations or of the gradients leave the range of their dtype: scale the inputs or "
            "the loss, or compute in float64."
        )
    return (
        "the new parameters would not be finite, nothing was changed. Give the method a larger `ridge`, or scale the "
        "inputs."
    )
