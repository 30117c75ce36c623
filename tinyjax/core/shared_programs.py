"""Compiled programs that outlive the call that made them, so that the same call a second time compiles nothing.

`jax.jit` remembers by the function it is given, and a function made anew at every call is another one each time. Here a
program is remembered by what it was made of: functions as the same objects, as `jax.jit` takes them (what they read
besides their arguments must not change), data by value. Only the programs used last are kept.
"""

import functools
import types
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from threading import Lock
from typing import Any, TypeVar

import jax.numpy as jnp
from jax.core import Tracer

T = TypeVar("T")

MOST = 32
"""How many programs are kept; the one that was not used for longest goes first."""

_kept: OrderedDict[Hashable, Any] = OrderedDict()
_lock = Lock()


def shared(made_of: tuple[Any, ...], make: Callable[[], T]) -> T:
    """What `make` returned when it was last called for the same things; else, and for unhashable data, what it returns.

    Args:
        made_of: all that the result depends on, a name of the kind of program first.
        make: makes the program.
    """
    # Inside a trace functions may close over values of that trace, which nothing may keep.
    key = None if isinstance(jnp.zeros(()), Tracer) else _key_or_none(made_of)
    if key is None:
        return make()
    with _lock:
        if key in _kept:
            _kept.move_to_end(key)
            return _kept[key]
    made = make()
    with _lock:
        found = _kept.setdefault(key, made)
        _kept.move_to_end(key)
        while len(_kept) > MOST:
            _kept.popitem(last=False)
    return found


class _Identity:
    """Equal to another of the same object, which it keeps alive: an id is not given away again."""

    def __init__(self, value: Any):
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self._value is other._value

    def __hash__(self) -> int:
        return id(self._value)


def _key_or_none(value: Any) -> Hashable | None:
    try:
        key = _key(value)
        hash(key)
    except TypeError:
        return None
    return key


def _key(value: Any) -> Hashable:
    """Equal for the same callables and for equal data of the same types; unhashable for data that are."""
    if isinstance(value, functools.partial):
        return functools.partial, _key((value.func, value.args, value.keywords, vars(value)))
    if isinstance(value, types.MethodType):  # each look-up makes a new one
        return types.MethodType, _key(value.__func__), _Identity(value.__self__)
    if isinstance(value, tuple | list):
        return type(value), *map(_key, value)
    if isinstance(value, Mapping):
        return type(value), frozenset((name, _key(one)) for name, one in value.items())
    return _Identity(value) if callable(value) else (type(value), value)
