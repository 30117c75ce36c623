"""A growing run on disk: what `fit` needs to go on, bit for bit, as if it had never been stopped.

    optimizer = tinyjax.with_birth(optax.adam(1e-3))
    for record in tinyjax.fit(loss_fn, params, batches, optimizer, schedule, key, num_neurons=8):
        if record.step % 100 == 0:
            tinyjax.save("run", record, key=key)

    saved = tinyjax.restore("run", optimizer)  # in a new process
    records = tinyjax.fit(loss_fn, saved.params, batches_from(saved.step), optimizer, schedule, saved.key,
                          num_neurons=8, **saved.progress())

Widths are in the parameters, capacities in the sites; schedules keep no state beyond the step and the history.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jaxtyping import Array

from tinyjax.core.params import Params, named_leaves, path_name
from tinyjax.core.site import Sites, as_sites
from tinyjax.core.slots import width
from tinyjax.core.whole_numbers import whole_number
from tinyjax.growth.info import GrowthInfo
from tinyjax.surgery import Trainable, all_params
from tinyjax.surgery.trainable import Initialiser
from tinyjax.training.checkpoint import storage
from tinyjax.training.checkpoint.model import check_same_model, check_same_optimizer, site_from_json, site_to_json
from tinyjax.training.checkpoint.packing import Leaf, decode, encode, inline, outline, pack, unpack


class Run(Protocol):
    """What `save` needs of a run: a `Record` of `fit` has it, and so has a `Checkpoint`."""

    @property
    def step(self) -> int: ...  # noqa: D102
    @property
    def params(self) -> Params: ...  # noqa: D102
    @property
    def opt_state(self) -> Any: ...  # noqa: D102
    @property
    def sites(self) -> Sites: ...  # noqa: D102
    @property
    def history(self) -> Sequence[GrowthInfo]: ...  # noqa: D102


class Checkpoint(NamedTuple):
    """A growing run between two steps.

    Attributes:
        step: number of gradient steps done.
        params: the parameters.
        opt_state: the optimizer's state, None without one.
        sites: the sites at their present capacities.
        history: what every growth so far did, newest last.
        key: the key the run was started with, None if none was saved.
        position: `(epoch, index)` of the next batch, None if none was saved.
        extra: what else was saved.
    """

    step: int
    params: Params
    opt_state: Any
    sites: Sites
    history: tuple[GrowthInfo, ...] = ()
    key: Array | None = None
    position: tuple[int, int] | None = None
    extra: Any = None

    @property
    def capacities(self) -> dict[str, int]:
        """Slots by site name: what `make_loss` takes, for models that check shapes."""
        return {site.name: site.capacity for site in self.sites}

    def progress(self) -> dict[str, Any]:
        """The keyword arguments of `fit` that make it go on: `sites`, `opt_state`, `step` and `history`."""
        return dict(sites=self.sites, opt_state=self.opt_state, step=self.step, history=self.history)


def save(
    directory: str | os.PathLike,
    record: Run,
    *,
    key: Array | None = None,
    position: tuple[int, int] | None = None,
    extra: Any = None,
    keep: int = 3,
) -> None:
    """Saves a growing run: parameters, optimizer state, sites, history, step, key, position in the data.

    A checkpoint is a folder that appears under `directory/<step>` when it is complete, whatever kills the process. With
    `jax.distributed`, every process calls `save`; arrays are gathered and the first process writes, so that the run can
    go on on any number of devices.

    Args:
        directory: folder of this run's checkpoints; made if it is not there.
        record: a `Record` of `fit`, or a `Checkpoint` from a loop of your own.
        key: the key `fit` was given, typed or raw.
        position: `(epoch, index)` of the next batch, where the step alone does not say it.
        extra: anything else: dicts, lists, tuples, numbers, strings and (small) arrays, which come back as NumPy's.
        keep: number of checkpoints kept, the newest ones.

    Raises:
        ValueError: the folder holds later steps or another run, or `extra` holds something else.

    Example:
        >>> tinyjax.save("run", record, key=key)
    """
    keep = whole_number(keep, "`keep`", least=1)
    sites = as_sites(record.sites)
    named = {"params": named_leaves(record.params), "opt_state": named_leaves(record.opt_state)}
    packed = {kind: [pack(name, leaf) for name, leaf in leaves.items()] for kind, leaves in named.items()}
    content = {
        **{kind: [list(leaf) for leaf, _ in leaves] for kind, leaves in packed.items()},
        "step": int(record.step),
        "widths": {site.name: int(width(record.params, site)) for site in sites.growable},
        "capacities": {site.name: site.capacity for site in sites},
        "structure": _structure(record.params),
        "sites": [site_to_json(site) for site in sites],
        "history": encode([dict(info._asdict()) for info in record.history], inline),
        "key": encode(key, inline),
        "position": None if position is None else [int(number) for number in position],
        "extra": encode(extra, inline),
    }
    if _is_new(directory, content):
        arrays = [array for leaves in packed.values() for _, array in leaves]
        storage.write(directory, content["step"], content, arrays, keep)


def restore(
    directory: str | os.PathLike,
    optimizer: Initialiser | None = None,
    *,
    like: Params = None,
    trainable: Trainable = all_params,
    step: int | None = None,
) -> Checkpoint:
    """Reads what `save` wrote: the newest checkpoint, or the one of `step`.

    Parameters made of dicts, lists and tuples need no template. Nothing is unpickled and no class is looked up by name:
    other containers (Equinox modules, NamedTuples) are taken from `like`.

    Args:
        directory: folder of the run's checkpoints.
        optimizer: the Optax optimizer of the run; its state is rebuilt from `optimizer.init`.
        like: parameters of the model, of any width (the freshly initialised ones): the checkpoint must be of this
            model, and takes its containers.
        trainable: the part of the parameters that the optimizer sees.
        step: which checkpoint; the newest by default.

    Returns:
        The run, its arrays on the default device: shard them again where they were (`jax.device_put`).

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: it is damaged, of a newer format, of another model or optimizer, or of another precision.

    Example:
        >>> tinyjax.save("run", record, key=key)
        >>> saved = tinyjax.restore("run", optimizer, like=params)
        >>> records = tinyjax.fit(
        ...     loss_fn, saved.params, batches[saved.step :], optimizer, schedule, saved.key,
        ...     num_neurons=4, **saved.progress(),
        ... )
        >>> [record.step for record in records]
        [2, 3, 4]
    """
    known = storage.steps(directory)
    if not known or (step is not None and step not in known):
        what = "checkpoint" if step is None else f"checkpoint of step {step}"
        raise FileNotFoundError(f"no {what} in {os.fspath(directory)}; there are {known or 'none'}")
    step = known[-1] if step is None else step
    content = storage.read_record(directory, step)
    leaves = {kind: [_leaf(row) for row in content[kind]] for kind in ("params", "opt_state")}
    sites = Sites(site_from_json(site) for site in content["sites"])
    if like is not None:
        check_same_model(leaves["params"], sites, like)
    arrays = iter(storage.read_arrays(directory, step, [leaf for kind in leaves.values() for leaf in kind]))
    values = {kind: {leaf.name: unpack(leaf, next(arrays)) for leaf in rows} for kind, rows in leaves.items()}
    params = _rebuild(content["structure"], values["params"], like)
    return Checkpoint(
        step=content["step"],
        params=params,
        opt_state=_opt_state(optimizer, trainable, params, leaves["opt_state"], values["opt_state"]),
        sites=sites,
        history=tuple(GrowthInfo(**info) for info in decode(content["history"], outline)),
        key=decode(content["key"], _as_jax),
        position=None if content["position"] is None else tuple(content["position"]),
        extra=decode(content["extra"], outline),
    )


def _is_new(directory: str | os.PathLike, content: Mapping[str, Any]) -> bool:
    """Whether this step is still to be written; a folder with another run in it is refused."""
    step, known = content["step"], storage.steps(directory)
    if known and known[-1] > step:
        raise ValueError(
            f"{os.fspath(directory)} holds a checkpoint of step {known[-1]}, later than this one, {step}: it is of "
            "another run. Choose another folder, `restore` that run, or remove it"
        )
    if step not in known:
        return True
    old = storage.read_record(directory, step)
    if old["params"] != _as_json(content["params"]):
        raise ValueError(
            f"{os.fspath(directory)} holds another run's checkpoint of step {step}: choose another folder, or remove it"
        )
    return False


def _as_json(rows: list[list[Any]]) -> list[list[Any]]:
    return [[list(x) if isinstance(x, tuple) else x for x in row] for row in rows]


def _leaf(row: list[Any]) -> Leaf:
    leaf = Leaf(*row)
    return leaf._replace(shape=tuple(leaf.shape))


def _structure(params: Params) -> Any:
    """The containers of the parameters with the names of the leaves, or None if they are not plain ones."""
    names = jax.tree_util.tree_map_with_path(lambda path, _: path_name(path), params)
    plain = {type(node) for node in _nodes(names)} <= {dict, list, tuple, type(None), str}
    return encode(names, lambda name: name) if plain else None


def _nodes(tree: Any) -> list[Any]:
    """A tree's nodes down to the first that is not a plain container."""
    children = tree.values() if type(tree) is dict else tree if type(tree) in (list, tuple) else ()
    return [tree, *(node for child in children for node in _nodes(child))]


def _rebuild(structure: Any, values: Mapping[str, Array], like: Params) -> Params:
    if like is not None:
        return jax.tree_util.tree_map_with_path(lambda path, _: values[path_name(path)], like)
    if structure is None:
        raise ValueError(
            "these parameters are not made of dicts, lists and tuples alone: pass `like=params`, freshly initialised "
            "ones of this model"
        )
    return decode(structure, lambda name: values[name])


def _opt_state(
    optimizer: Initialiser | None,
    trainable: Trainable,
    params: Params,
    leaves: Sequence[Leaf],
    values: Mapping[str, Array],
) -> Any:
    if optimizer is None:
        if leaves:
            raise ValueError("this run was saved with an optimizer's state: pass its `optimizer`")
        return None
    template = jax.eval_shape(lambda params: optimizer.init(trainable(params)), params)
    check_same_optimizer(leaves, template)
    return jax.tree_util.tree_map_with_path(lambda path, _: values[path_name(path)], template)


def _as_jax(node: Any) -> Any:
    value = outline(node)
    return jax.numpy.asarray(value) if isinstance(value, np.ndarray) else value
