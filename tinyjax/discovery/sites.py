"""Discovery: the hidden dimensions of a model, read off the jaxpr of its loss.

Every axis of every parameter leaf is traced through the graph (`axes`); those that turn out to be the same dimension
form one `Site`: the kernels that produce it, the kernels that consume it, and the vectors in between. A dimension that
cannot grow is listed too, with the reason.
"""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from tinyjax.core.kernels import require_growable
from tinyjax.core.params import Params, named_leaves, replace_leaves
from tinyjax.core.site import Kernel, Site, Sites, resized
from tinyjax.discovery.census import Census, Missed
from tinyjax.discovery.classification import classify, describe
from tinyjax.discovery.dimensions.axes import Axes
from tinyjax.discovery.dimensions.dimensions import Dimensions, kernel_atoms
from tinyjax.discovery.dimensions.products import Product, find_products
from tinyjax.discovery.dimensions.retracing import with_numbers
from tinyjax.discovery.dimensions.unification import Atom, root
from tinyjax.discovery.graph.def_use import DefUse
from tinyjax.discovery.graph.flattening import flatten
from tinyjax.discovery.graph.graph import Graph
from tinyjax.discovery.graph.tracing import Trace, trace
from tinyjax.discovery.paths.path import Path, Verdict


def find_sites(
    loss_fn: Callable[..., Any],
    params: Params,
    batch: Any,
    *,
    has_aux: bool = False,
    make_loss: Callable[[dict[str, int]], Callable[..., Any]] | None = None,
) -> Sites:
    """The hidden dimensions of a model.

    Nothing is run: the loss is traced, so `params` and `batch` may be abstract (`jax.ShapeDtypeStruct`). Trace at
    a capacity of at least two slots a layer and with at least two samples: an axis of length one has no identity.

    The loss is traced a few times more, at other capacities, to see which numbers in it follow them: `Site.powers` says
    which leaves `resize` multiplies to make up for them, `Site.fixed` what it cannot make up for, `Site.unchecked` why
    that is not known (a model that checks shapes and no `make_loss`).

    Args:
        loss_fn: `loss_fn(params, batch) -> loss`, the mean over the samples of the batch.
        params: any pytree of arrays the hidden dimensions run through.
        batch: any pytree; every leaf has the samples as leading axis, except 0-d leaves and typed PRNG keys that are
            not as many as the samples.
        has_aux: whether `loss_fn` returns `(loss, aux)`.
        make_loss: from capacities by site name to a loss, for models that check shapes (Linen, Haiku).

    Returns:
        The sites in the order in which the model computes them, also those that cannot grow (with `reason`).

    Raises:
        ValueError: the batch is empty or ragged, has a single sample, the loss is not a scalar, or a kernel is integer.

    Example:
        >>> params = {"in": jnp.ones((4, 8)), "out": jnp.ones((8, 3))}
        >>> loss_fn = lambda p, x: jnp.mean((jax.nn.relu(x @ p["in"]) @ p["out"]) ** 2)
        >>> tinyjax.find_sites(loss_fn, params, jnp.ones((16, 4)))["in"].capacity
        8
    """
    found = discover(traced := trace(loss_fn, params, batch, has_aux=has_aux))

    def retrace(capacities: dict[str, int]) -> Trace:
        wider = resized(found.sites, capacities)
        loss = loss_fn if make_loss is None else make_loss({site.name: site.capacity for site in wider.growable})
        return trace(loss, _reshaped(params, wider.growable), batch, has_aux=has_aux)

    return with_numbers(found.sites, traced, found.graph, found.axes, found.dimensions, retrace)


def _reshaped(params: Params, sites: Sites) -> Params:
    """The parameters in the shapes of sites, abstract where they differ."""
    shapes = {member.leaf: member.layout.shape for site in sites for member in site.members}
    return replace_leaves(
        params,
        {
            name: jax.ShapeDtypeStruct(shapes[name], leaf.dtype, weak_type=getattr(leaf, "weak_type", False))
            for name, leaf in named_leaves(params).items()
            if name in shapes and np.shape(leaf) != shapes[name]
        },
    )


class Discovery(NamedTuple):
    """What a trace says about a model.

    Attributes:
        sites: the hidden dimensions.
        paths: for every growable site, by name, its paths.
        graph: the flat graph.
        axes: the axes of its tensors.
        dimensions: for every growable site, by name, its dimension.
    """

    sites: Sites
    paths: dict[str, Sequence[Path]]
    graph: Graph
    axes: Axes
    dimensions: dict[str, Atom]


def discover(traced: Trace) -> Discovery:
    """Finds the hidden dimensions of a traced loss; see `find_sites`."""
    if traced.num_samples < 2:
        raise ValueError("`batch` has a single sample; trace with at least two, an axis of length one has no identity")
    graph = flatten(traced)
    axes = Axes(graph, traced.batched, traced.num_samples)
    def_use = DefUse(graph)
    names = traced.leaf_names
    uses, obstructed = find_products(graph, axes, def_use, names)
    _refuse_integer_kernels(graph, uses, names)
    model = Dimensions(graph, axes, def_use, names, uses, obstructed)
    hidden = [dimension for dimension in model.leaves if model.is_hidden(dimension)]
    census = Census(model, hidden)
    classified = [(model.first_op(dimension), dimension, classify(model, dimension)) for dimension in hidden]
    classified += [(model.order[missed.op], None, (_missed(model, missed), ())) for missed in census.missed]
    classified.sort(key=lambda one: one[0])
    found = _named(model, [*(one for *_, one in classified), *_single(model), *_unseen(model, hidden, census.unseen)])
    paths = {site.name: paths for site, paths in found if site.growable}
    dimensions = {
        site.name: root(dimension)
        for (_, dimension, _), (site, _) in zip(classified, found)
        if dimension is not None and site.growable
    }
    return Discovery(Sites(site for site, _ in found), paths, graph, axes, dimensions)


def paths_of(discovery: Discovery, site: Site) -> Sequence[Path]:
    """The paths of a site in this trace.

    Raises:
        ValueError: the model has no such site, or it cannot grow in this trace.
    """
    here = next((s for s in discovery.sites if s.name == site.name), None)
    if here is None:
        known = ", ".join(f"`{s.name}`" for s in discovery.sites) or "none"
        raise ValueError(f"this loss has no site `{site.name}`; its sites are {known}")
    require_growable(here)
    if here.members != site.members:
        raise ValueError(
            f"site `{site.name}` was found with {site.capacity} slots in leaves of other shapes than these parameters "
            f"have ({here.capacity} slots). Use the sites that `resize` returned, or call `find_sites` again."
        )
    return discovery.paths[site.name]


def _single(model: Dimensions) -> list[tuple[Site, Sequence[Path]]]:
    """Hidden dimensions of one slot: an axis of length one cannot be told from the axes that broadcasting makes."""
    found = {}
    for producer in model.uses:
        kept, _ = kernel_atoms(model.axes, producer)
        reader = None if kept else model.fed_narrow(producer)
        if reader is not None and len(model.graph.params[model.names.index(producer.leaf)].shape) > 1:
            why = "it has a single slot, and an axis of length one has no identity; trace with at least two slots"
            kernels = (Kernel(producer.kernel),), (Kernel(reader.kernel),)
            found.setdefault(producer.leaf, (Site("", 1, False, why, (), *kernels), ()))
    return list(found.values())


def _named(model: Dimensions, found: Sequence[tuple[Site, Sequence[Path]]]) -> list[tuple[Site, Sequence[Path]]]:
    """The sites with their names: of several behind one kernel, those that grow come first, then `name[1]`, ..."""
    taken: set[str] = set()
    names: dict[int, str] = {}
    siblings = _matrices_by_module(model)
    for i in sorted(range(len(found)), key=lambda i: not found[i][0].growable):
        site, _ = found[i]
        name = site.name or _short_name(siblings, (*site.producers, *site.members)[0].leaf)
        candidates = (name if k == 0 else f"{name}[{k}]" for k in itertools.count())
        names[i] = next(candidate for candidate in candidates if candidate not in taken)  # a leaf may be called `w[1]`
        taken.add(names[i])
    return [(dataclasses.replace(site, name=names[i]), paths) for i, (site, paths) in enumerate(found)]


def _matrices_by_module(model: Dimensions) -> Counter[str]:
    """How many matrices every module has."""
    return Counter(leaf.removesuffix("/value").rpartition("/")[0] for leaf in model.matrices)


def _short_name(siblings: Counter[str], leaf: str) -> str:
    """The module's path where the kernel is its only matrix, else the leaf's path; without a leading `params`."""
    leaf = leaf.removesuffix("/value")  # the inner name of an NNX variable
    parent = leaf.rpartition("/")[0]
    short = parent if parent not in ("", "params") and siblings[parent] <= 1 else leaf
    return short.removeprefix("params/") or "params"  # a single array has no path


def _missed(model: Dimensions, missed: Missed) -> Site:
    """The site of a dimension that only the census found, named after the leaf behind it."""
    name = "" if missed.dimension in model.leaves else _short_name(_matrices_by_module(model), model.names[missed.leaf])
    return describe(model, missed.dimension, Verdict(missed.reason.replace("``", "`params`")), name)


def _unseen(model: Dimensions, dimensions: Sequence[Atom], leaves: Sequence[int]) -> list[tuple[Site, Sequence[Path]]]:
    """Matrices among leaves that never meet an activation, as far as can be seen."""
    listed = {leaf for d in dimensions for leaf, _ in model.leaves[d]}
    unseen, siblings = [], _matrices_by_module(model)
    for leaf in leaves:
        wide = [n for n in model.graph.params[leaf].shape[model.depth(leaf) :] if n > 1]
        if leaf in listed or model.names[leaf] in model.matrices or len(wide) < 2:
            continue
        why = f"`{model.names[leaf]}` never reaches a matrix product that can be seen{model.first_user(leaf)}"
        unseen.append((Site(_short_name(siblings, model.names[leaf]), wide[-1], False, why, (), (), ()), ()))
    return unseen


def _refuse_integer_kernels(graph: Graph, uses: Sequence[Product], names: Sequence[str]) -> None:
    dtypes = dict(zip(names, (value.dtype for value in graph.params)))
    for use in uses:
        if not np.issubdtype(np.dtype(dtypes[use.leaf]), np.inexact) and not str(dtypes[use.leaf]).startswith(
            ("bf", "fl")
        ):
            raise ValueError(
                f"the kernel `{use.leaf}` has integer dtype {dtypes[use.leaf]}; make the parameters floats"
            )
