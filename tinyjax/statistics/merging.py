"""Records of several batches or devices as one."""

import dataclasses

import jax
import jax.numpy as jnp

from tinyjax.statistics.record import Statistics, map_sums


def merge(a: Statistics, b: Statistics) -> Statistics:
    """The statistics of the samples of `a` and of `b` together.

    The sums are meaningful only if both were taken at the same parameters; weights and width are those of `b`.

    Raises:
        ValueError: the two do not describe the same layers, or hold third moments, each along its own outputs.

    Example:
        >>> more = data.Batch(images[::-1], batch.label[::-1])
        >>> both = tinyjax.statistics.merge(estimate(params, batch), estimate(params, more))
        >>> float(jnp.sum(both.count))
        128.0
    """
    structures = [jax.tree.map(jnp.shape, x) for x in (a, b)]
    if structures[0] != structures[1]:
        raise ValueError(
            "`merge` got statistics of different shapes or fields; merge only statistics of one site at one capacity, "
            f"estimated with the same options. Got {structures[0]} and {structures[1]}."
        )
    if a.third_outputs is not None:
        raise ValueError(
            "third moments of two records cannot be added: they belong to the residual of either's samples"
        )
    added = map_sums(lambda y, x: x + y, b, a)
    return dataclasses.replace(added, ridge=None, ridge_update=None, spectra=None)


def merge_over(statistics: Statistics, axis_name: str | tuple[str, ...]) -> Statistics:
    """The statistics of all devices along a mesh axis together; for use inside `jax.shard_map`.

    Every device estimates on its own samples; only the sums travel (`jax.lax.psum`). The losses of the devices must be
    means over their own samples, and the parameters replicated.

    Args:
        statistics: of the samples of this device.
        axis_name: the axis of the mesh, or several.

    Returns:
        The same record on every device: what follows from it (ridges, neurons) is computed on each, alike.

    Raises:
        ValueError: the site is too wide for statistics to be added.

    Example:
        >>> def on_a_device(params, batch):
        ...     return tinyjax.statistics.merge_over(tinyjax.estimate(loss_fn, params, batch, site), "data")
        >>> P, mesh = jax.sharding.PartitionSpec, jax.sharding.Mesh(jax.devices(), ("data",))
        >>> specs = dict(in_specs=(P(), P("data")), out_specs=P(), check_vma=False)
        >>> statistics = jax.jit(jax.shard_map(on_a_device, mesh=mesh, **specs))(params, batch)
    """
    anew = {"gates": statistics.gates, "third moments": statistics.third_outputs}
    chosen = [what for what, value in anew.items() if value is not None]
    if statistics.link is None or chosen:
        why = f"chooses its {chosen[0]} anew on every device" if chosen else "is too wide"
        raise ValueError(f"this site {why}, so that its statistics cannot be added: let `jit` shard the batch instead")
    added = map_sums(lambda x: jax.lax.psum(x, axis_name), statistics)
    return dataclasses.replace(added, ridge=None, ridge_update=None, spectra=None)
