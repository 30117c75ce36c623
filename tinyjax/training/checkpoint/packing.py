"""Trees as JSON: containers by kind, leaves by a function; and arrays with what proves that they came back whole.

Reading builds nothing but dicts, lists, tuples, numbers, strings and arrays: no class is ever looked up by name.
"""

import base64
import hashlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array

Json = Any


class Leaf(NamedTuple):
    """What is known of a stored array.

    Attributes:
        name: path in its tree.
        dtype: its name.
        shape: its shape.
        weak: whether JAX promotes it like a Python number.
        key: the implementation if the array is the data of a typed PRNG key, else None.
        digest: SHA-256 of dtype, shape and bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    weak: bool
    key: str | None
    digest: str


def pack(name: str, value: Any) -> tuple[Leaf, np.ndarray]:
    """A leaf of a tree as a host array and its record; arrays that are spread over processes are gathered."""
    key = None
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        key, value = str(jax.random.key_impl(value)), jax.random.key_data(value)
    value = value if isinstance(value, np.ndarray) else jnp.asarray(value)
    array = on_host(value)
    weak = bool(getattr(value, "weak_type", False))
    return Leaf(name, array.dtype.name, array.shape, weak, key, digest(array)), array


def unpack(leaf: Leaf, array: np.ndarray) -> Array:
    """The leaf that `pack` was given, on the default device.

    Raises:
        ValueError: JAX would round it.
    """
    if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
        raise ValueError(
            f"`{leaf.name}` was saved in {leaf.dtype}, which JAX would round: "
            'set `jax.config.update("jax_enable_x64", True)`, as it was when the run was saved'
        )
    if leaf.key is not None:
        return jax.random.wrap_key_data(jnp.asarray(array), impl=leaf.key)
    # A Python number is weakly typed, and holds any 0-d value of the default dtypes exactly.
    return jnp.asarray(array.item() if leaf.weak and not array.ndim else array)


def on_host(value: Any) -> np.ndarray:
    """The whole array in this process's memory."""
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        value = multihost_utils.process_allgather(value, tiled=True)
    return np.asarray(value)


def digest(array: np.ndarray) -> str:
    """SHA-256 of dtype, shape and bytes."""
    head = f"{array.dtype.name} {array.shape} ".encode()
    return hashlib.sha256(head + np.ascontiguousarray(array).tobytes()).hexdigest()


def encode(tree: Any, leaf: Callable[[Any], Json]) -> Json:
    """Dicts, lists, tuples and None as JSON, everything else by `leaf`."""
    if tree is None:
        return ["none"]
    if type(tree) is dict:
        for key in tree:
            if type(key) not in (str, int):
                raise ValueError(f"the dict key {key!r} can not be saved: use strings or ints")
        return ["dict", [[key, encode(value, leaf)] for key, value in tree.items()]]
    if type(tree) in (list, tuple):
        return [type(tree).__name__, [encode(value, leaf) for value in tree]]
    return ["leaf", leaf(tree)]


def decode(node: Json, leaf: Callable[[Json], Any]) -> Any:
    """Inverse of `encode`."""
    match node:
        case ["none"]:
            return None
        case ["dict", items]:
            return {key: decode(value, leaf) for key, value in items}
        case ["list", items]:
            return [decode(value, leaf) for value in items]
        case ["tuple", items]:
            return tuple(decode(value, leaf) for value in items)
        case ["leaf", value]:
            return leaf(value)
    raise ValueError(f"not part of a checkpoint: {node!r:.60}")


def inline(value: Any) -> Json:
    """A number, a string or a small array as JSON, exactly.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(value, (bool, int, float, str)) and not isinstance(value, np.generic):
        return value
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        record, array = pack("", value)
        if not array.dtype.hasobject:
            data = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
            return {"dtype": record.dtype, "shape": record.shape, "key": record.key, "data": data}
    raise ValueError(
        f"a {type(value).__name__} can not be saved: use dicts, lists, tuples, numbers, strings and arrays"
    )


def outline(node: Json) -> Any:
    """Inverse of `inline`; arrays come back as NumPy's, typed keys as JAX's."""
    if not isinstance(node, dict):
        return node
    dtype, shape = jnp.dtype(node["dtype"]), tuple(node["shape"])
    array = np.frombuffer(base64.b64decode(node["data"]), dtype, math.prod(shape)).reshape(shape).copy()
    return array if node["key"] is None else jax.random.wrap_key_data(jnp.asarray(array), impl=node["key"])
