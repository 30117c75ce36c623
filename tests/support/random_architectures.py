"""Random architectures, one a seed: what nobody thought of writing down by hand.

A model is a chain of random steps on vectors, sequences or images, with residual branches, concatenations, gates,
norms, poolings, scans and shared weights among them, in the various ways one can write each in JAX. Steps never know a
width: they run with wider leaves as they are.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

Step = Callable[[Any, Any, Any], Any]


class Generated(NamedTuple):
    """A random model.

    Attributes:
        loss_fn: `loss_fn(params, batch)`.
        params: float64.
        batch: what it takes.
        story: the steps in words.
        slope: the product of all slopes at 0 between two layers: 1 where every activation has slope 1; None where it is
            another, 0 where the activations have none.
        penalty: the part of the loss that reads parameters only.
    """

    loss_fn: Callable[..., Any]
    params: dict[str, Any]
    batch: dict[str, Any]
    story: tuple[str, ...]
    slope: float | None
    penalty: Callable[[Any], Any]


SMOOTH = {
    "tanh": jnp.tanh,
    "sin": jnp.sin,
    "arctan": jnp.arctan,
    "softsign": jax.nn.soft_sign,
    "linear": lambda x: x,
    "asinh": jnp.arcsinh,
    "rational": lambda x: x / (1 + x**2),
    "scaled_tanh": lambda x: 2 * jnp.tanh(x / 2),
    "tanh_twice": lambda x: jnp.tanh(jnp.tanh(x)),
    "sigmoid_centred": lambda x: 4 * (jax.nn.sigmoid(x) - 0.5),
    "named": jax.jit(lambda x: jnp.sinh(x) / jnp.cosh(x)),
}
OTHERS = {
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
    "exact_gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "silu": jax.nn.silu,
    "elu": jax.nn.elu,
    "leaky": jax.nn.leaky_relu,
    "relu6": jax.nn.relu6,
    "hard_tanh": jax.nn.hard_tanh,
    "mish": jax.nn.mish,
    "selu": jax.nn.selu,
    "hard_swish": jax.nn.hard_swish,
    "square": jnp.square,
    "abs": jnp.abs,
    "relu_squared": lambda x: jax.nn.relu(x) ** 2,
    "where": lambda x: jnp.where(x > 0, x, 0.1 * jnp.sin(x)),
    "maximum": lambda x: jnp.maximum(x, 0.2 * x),
    "power": lambda x: x * jnp.abs(x) ** 0.5,
    "log1p": lambda x: jnp.log1p(jax.nn.relu(x)),
    "clip": lambda x: jnp.clip(x, -1, 1),
    "sigmoid": jax.nn.sigmoid,
    "softplus": jax.nn.softplus,
    "cos": jnp.cos,
    "exp": lambda x: jnp.exp(-(x**2)),
    "shifted": lambda x: jax.nn.relu(x + 0.5),
    "log_sigmoid": jax.nn.log_sigmoid,
    "hard_sigmoid": jax.nn.hard_sigmoid,
    "threshold": lambda x: jnp.where(x > -0.3, x, -0.3),
    "round": lambda x: x + lax.stop_gradient(jnp.round(x) - x),
    "erf": jax.scipy.special.erf,
    "xlogx": lambda x: jnp.where(x == 0, 0, x * jnp.log(jnp.where(x == 0, 1, jnp.abs(x)))),
    "recip": lambda x: 1 / (1 + x**2),
    "xlogx_nan": lambda x: x * jnp.log(jnp.abs(x)),
    "signed_root": lambda x: jnp.sign(x) * jnp.sqrt(jnp.abs(x)),
    "unit_sphere": lambda x: x / jnp.sqrt((x**2).sum(0, keepdims=True)),
    "sign": lambda x: x / jnp.abs(x),
}
STEEP = {"xlogx", "power", "signed_root"}  # no slope at 0


def generate(seed: int) -> Generated:
    """The model of a seed."""
    return _Draft(np.random.default_rng(seed)).model()


class _Draft:
    """A model in the making: parameters so far, the shape of the current tensor, what was done."""

    def __init__(self, rng: np.random.Generator):
        self.rng = rng
        self.params: dict[str, Any] = {}
        self.story: list[str] = []
        self.smooth, self.steep = True, False
        self.only_smooth = rng.random() < 0.5
        self.plain = rng.random() < 0.35  # few quirks: deep chains of sites that can grow
        self.n = int(rng.integers(4, 8))
        self.batch: dict[str, Any] = {}

    # Randomness

    def coin(self, p: float) -> bool:
        return bool(self.rng.random() < p)

    def pick(self, *options: Any) -> Any:
        return options[self.rng.integers(len(options))]

    def integer(self, low: int, high: int) -> int:
        return int(self.rng.integers(low, high + 1))

    def leaf(self, kind: str, *shape: int, scale: float | None = None) -> str:
        name = f"{kind}{len(self.params)}"
        fan_in = np.prod(shape[:-1]) if len(shape) > 1 else 4
        scale = fan_in**-0.5 if scale is None else scale
        self.params[name] = self.rng.normal(size=shape) * scale
        return name

    def shape(self, step: Step, shape: tuple[int, ...]) -> tuple[int, ...]:
        return jax.eval_shape(step, self.params, jax.ShapeDtypeStruct(shape, jnp.float64), self.batch).shape

    # The whole

    def model(self) -> Generated:
        kind = self.pick("vector", "sequence", "image", "image")
        lengths = {"vector": [self.integer(3, 5)], "sequence": [self.integer(2, 4), self.integer(2, 5)],
                   "image": [self.integer(4, 6), self.integer(4, 6), self.integer(1, 3)]}[kind]  # fmt: skip
        shape = (self.n, *lengths)
        self.batch["x"] = self.rng.normal(size=shape)
        if self.coin(0.5):
            self.batch["key"] = jax.random.key(self.integer(0, 9))
        self.batch["label"] = self.rng.integers(3, size=self.n)
        steps, shape = self.chain(shape, self.integer(3, 9))
        last, shape = self.head(shape)
        loss = self.loss(shape)
        body = _compose([*steps, last])
        wrap = self.pick("plain", "plain", "jit", "remat", "vmap")
        if wrap == "jit":
            body = jax.jit(body)
        elif wrap == "remat":
            body = jax.checkpoint(body)
        elif wrap == "vmap":
            body = _per_sample(body)
        self.story.append(wrap)
        penalty = self.penalty()

        def loss_fn(params: Any, batch: Any) -> Any:
            return loss(body(params, batch["x"], batch), batch) + penalty(params)

        slope = 0.0 if self.steep else 1.0 if self.smooth else None
        return Generated(loss_fn, self.params, self.batch, tuple(self.story), slope, penalty)

    def chain(self, shape: tuple[int, ...], length: int) -> tuple[list[Step], tuple[int, ...]]:
        steps = []
        for _ in range(length):
            step = self.step(shape)
            shape = self.shape(step, shape)
            steps.append(step)
        return steps, shape

    def tell(self, name: str, step: Step) -> Step:
        self.story.append(name)
        return step

    def step(self, shape: tuple[int, ...]) -> Step:
        rank = len(shape)
        products: dict[int, list[Any]] = {
            2: [self.dense],
            3: [self.dense, self.conv1d],
            4: [self.conv, self.conv, self.dense],
        }
        common = [self.product_then_activation] * 5 + [self.activation]
        if self.plain:
            quirks = [self.scale_and_shift, self.batch_norm, self.inner_block]
        else:
            quirks = [
                self.scale_and_shift, self.batch_norm, self.running_norm, self.layer_norm, self.group_norm,
                self.residual, self.inner_block, self.concatenate, self.gate, self.glu, self.dropout, self.shared,
                self.scan_block, self.mask, self.normed_weight, self.noise, self.centring, self.permute_units,
                self.stack_of_kernels, self.low_rank, self.maxout, self.cast, self.constant_scale,
            ]  # fmt: skip
        if rank == 3 and not self.plain:
            quirks += [
                self.attention,
                self.token_mixing,
                self.position,
                self.pool_time,
                self.shift_time,
                self.recurrence,
            ]
        if rank == 4:
            quirks += [self.pool, self.pool, self.pad]
            if not self.plain:
                quirks += [self.squeeze_excite, self.upsample, self.flip, self.depthwise, self.transposed_conv,
                           self.pixel_shuffle, self.instance_norm]  # fmt: skip
        if rank > 2 and self.coin(0.12):
            return self.flatten(shape)
        self.products = products[rank]
        return self.pick(*common, *quirks)(shape)

    # Products

    def width(self) -> int:
        return self.integer(2, 5)

    def product(self, shape: tuple[int, ...]) -> Step:
        options: dict[int, list[Any]] = {
            2: [self.dense], 3: [self.dense, self.dense, self.conv1d], 4: [self.conv, self.conv, self.dense],
        }  # fmt: skip
        return self.pick(*options[len(shape)])(shape, self.width())

    def product_then_activation(self, shape: tuple[int, ...]) -> Step:
        first = self.product(shape)
        return _compose([first, self.activation(shape)])

    def dense(self, shape: tuple[int, ...], out: int) -> Step:
        d = shape[-1]
        form = self.pick("matmul", "einsum", "transposed", "dot_general", "vmap", "tensordot", "jit", "cast")
        bias = self.leaf("b", out, scale=0.4) if self.coin(0.7) else None
        w = self.leaf("w", *((out, d) if form == "transposed" else (d, out)))
        forms: dict[str, Callable[[Any, Any], Any]] = {
            "matmul": lambda w, x: x @ w,
            "einsum": lambda w, x: jnp.einsum("...i,io->...o", x, w),
            "transposed": lambda w, x: x @ w.T,
            "dot_general": lambda w, x: lax.dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ()))),
            "vmap": lambda w, x: jax.vmap(lambda row: jnp.tensordot(row, w, 1))(x),
            "tensordot": lambda w, x: jnp.moveaxis(jnp.tensordot(w, x, ((0,), (x.ndim - 1,))), 0, -1),
            "jit": jax.jit(lambda w, x: jnp.dot(x, w)),
            "cast": lambda w, x: (x @ w.astype(x.dtype)).astype(x.dtype),
        }
        multiply = forms[form]
        placed = self.pick("add", "add", "reshaped", "late")

        def step(p: Any, x: Any, batch: Any) -> Any:
            y = multiply(p[w], x)
            if bias is None:
                return y
            b = p[bias].reshape((1,) * (y.ndim - 1) + (-1,)) if placed == "reshaped" else p[bias]
            return b + y if placed == "late" else y + b

        return self.tell(f"dense[{form}{'' if bias is None else ', bias'}] {out}", step)

    def conv1d(self, shape: tuple[int, ...], out: int) -> Step:
        size = self.integer(1, min(3, shape[1]))
        w = self.leaf("k", size, shape[-1], out)
        bias = self.leaf("b", out, scale=0.4) if self.coin(0.5) else None
        padding = self.pick("SAME", "VALID", ((size - 1, 0),))
        stride, dilation = self.integer(1, 2), 1

        def step(p: Any, x: Any, batch: Any) -> Any:
            y = lax.conv_general_dilated(
                x, p[w], (stride,), padding, rhs_dilation=(dilation,), dimension_numbers=("NWC", "WIO", "NWC")
            )
            return y if bias is None else y + p[bias]

        return self.tell(f"conv1d[{size}, {padding}, {stride}] {out}", step)

    def conv(self, shape: tuple[int, ...], out: int) -> Step:
        h, w = shape[1:3]
        size = self.integer(1, min(3, h)), self.integer(1, min(3, w))
        dilation = tuple(self.integer(1, 2) if 2 * (k - 1) < n else 1 for k, n in zip(size, (h, w)))
        padding = self.pick("SAME", "SAME", "VALID", ((1, 0), (0, 2)))
        strides = (self.integer(1, 2), self.integer(1, 2)) if self.coin(0.4) else (1, 1)
        groups = 1
        if not self.plain and self.coin(0.1) and shape[-1] % 2 == 0:
            groups, out = 2, out + out % 2
        first = self.coin(0.2)  # channels first inside
        numbers = ("NCHW", "OIHW", "NCHW") if first else ("NHWC", "HWIO", "NHWC")
        c = shape[-1] // groups
        leaf = self.leaf("k", *((out, c, *size) if first else (*size, c, out)), scale=(c * size[0] * size[1]) ** -0.5)
        bias = self.leaf("b", out, scale=0.4) if self.coin(0.6) else None

        def step(p: Any, x: Any, batch: Any) -> Any:
            x = x.transpose(0, 3, 1, 2) if first else x
            y = lax.conv_general_dilated(
                x, p[leaf], strides, padding, rhs_dilation=dilation, dimension_numbers=numbers,
                feature_group_count=groups,
            )  # fmt: skip
            if bias is not None:
                y = y + (p[bias][:, None, None] if first else p[bias])
            return y.transpose(0, 2, 3, 1) if first else y

        return self.tell(f"conv[{size}, {padding}, {strides}, {dilation}, {groups}, {numbers[0]}] {out}", step)

    # Slot by slot

    def activation(self, shape: tuple[int, ...]) -> Step:
        table = SMOOTH if self.only_smooth or (self.plain and self.coin(0.7)) else {**OTHERS, **SMOOTH}
        name = self.pick(*table)
        self.smooth &= name in SMOOTH
        self.steep |= name in STEEP
        function = table[name]
        return self.tell(name, lambda p, x, batch: function(x))

    def scale_and_shift(self, shape: tuple[int, ...]) -> Step:
        g = self.leaf("g", shape[-1], scale=1.0)
        s = self.leaf("s", shape[-1])
        form = self.pick("gx+s", "gx", "x-s", "x/g", "(1+g)x", "exp(g)x", "s+x", "g[0]x")
        forms: dict[str, Callable[[Any, Any, Any], Any]] = {
            "gx+s": lambda x, g, s: g * x + s,
            "gx": lambda x, g, s: x * g,
            "x-s": lambda x, g, s: x - s,
            "x/g": lambda x, g, s: x / g,
            "(1+g)x": lambda x, g, s: (1 + g) * x,
            "exp(g)x": lambda x, g, s: jnp.exp(g) * x,
            "s+x": lambda x, g, s: s + x,
            "g[0]x": lambda x, g, s: g[0] * x,
        }
        self.smooth = False
        return self.tell(form, lambda p, x, batch: forms[form](x, p[g], p[s]))

    def constant_scale(self, shape: tuple[int, ...]) -> Step:
        c, form = self.pick(-1.0, 0.5, 2.0), self.pick("mul", "div", "neg", "sub", "select", "add")
        self.smooth = False
        forms: dict[str, Callable[[Any], Any]] = {
            "mul": lambda x: c * x, "div": lambda x: x / c, "neg": jnp.negative, "sub": lambda x: x - 0.0,
            "select": lambda x: jnp.where(jnp.isnan(x), 0.0, x), "add": lambda x: x + c,
        }  # fmt: skip
        return self.tell(f"constant {form}", lambda p, x, batch: forms[form](x))

    def cast(self, shape: tuple[int, ...]) -> Step:
        how = self.pick("f32", "stop_gradient", "name", "barrier", "nan_to_num")
        hows: dict[str, Callable[[Any], Any]] = {
            "f32": lambda x: x.astype(jnp.float64),
            "stop_gradient": lambda x: x + 0 * lax.stop_gradient(x),
            "name": lambda x: checkpoint_name(x, "h"),
            "barrier": lax.optimization_barrier,
            "nan_to_num": jnp.nan_to_num,
        }
        return self.tell(how, lambda p, x, batch: hows[how](x))

    def dropout(self, shape: tuple[int, ...]) -> Step:
        form = self.pick("unit", "sample", "fixed")
        if "key" not in self.batch:
            form = "fixed"
        self.smooth = False  # a slope of 1 / 0.7

        def step(p: Any, x: Any, batch: Any) -> Any:
            key = jax.random.key(0) if form == "fixed" else batch["key"]
            drawn = (x.shape[0], *(1,) * (x.ndim - 1)) if form == "sample" else x.shape
            return x * jax.random.bernoulli(key, 0.7, drawn) / 0.7

        return self.tell(f"dropout[{form}]", step)

    def noise(self, shape: tuple[int, ...]) -> Step:
        return self.tell(
            "noise", lambda p, x, batch: x + 0.1 * jax.random.normal(batch.get("key", jax.random.key(1)), x.shape)
        )

    def mask(self, shape: tuple[int, ...]) -> Step:
        form = self.pick("label", "where", "divide", "input")
        extra = (1,) * (len(shape) - 1)

        def step(p: Any, x: Any, batch: Any) -> Any:
            keep = (batch["label"] > 0).reshape(-1, *extra)
            if form == "where":
                return jnp.where(keep, x, 0)
            if form == "divide":
                return x / (1.0 + keep)
            if form == "input":
                return x * jnp.tanh(batch["x"].reshape(x.shape[0], -1)[:, :1].reshape(-1, *extra))
            return x * keep

        return self.tell(f"mask[{form}]", step)

    # Norms

    def batch_norm(self, shape: tuple[int, ...]) -> Step:
        g, s = self.leaf("g", shape[-1], scale=1.0), self.leaf("s", shape[-1])
        form = self.pick("var", "rsqrt", "no_scale", "squares") if not self.plain else self.pick("var", "rsqrt")
        self.smooth = False

        def step(p: Any, x: Any, batch: Any) -> Any:
            over = tuple(range(x.ndim - 1))
            mean = x.mean(over)
            var = x.var(over) if form != "squares" else (x**2).mean(over) - mean**2
            y = (x - mean) / jnp.sqrt(var + 1e-3) if form == "var" else (x - mean) * lax.rsqrt(var + 1e-3)
            return y if form == "no_scale" else y * p[g] + p[s]

        return self.tell(f"batch_norm[{form}]", step)

    def running_norm(self, shape: tuple[int, ...]) -> Step:
        g, s, m = (self.leaf(k, shape[-1]) for k in "gsm")
        v = self.leaf("v", shape[-1])
        self.params[v] = np.abs(self.params[v]) + 0.5
        self.smooth = False
        return self.tell("running_norm", lambda p, x, batch: (x - p[m]) * lax.rsqrt(p[v] + 1e-5) * p[g] + p[s])

    def layer_norm(self, shape: tuple[int, ...]) -> Step:
        g = self.leaf("g", shape[-1], scale=1.0)
        rms = self.coin(0.4)
        self.smooth = False

        def step(p: Any, x: Any, batch: Any) -> Any:
            y = x if rms else x - x.mean(-1, keepdims=True)
            return p[g] * y * lax.rsqrt((y**2).mean(-1, keepdims=True) + 1e-3)

        return self.tell("rms_norm" if rms else "layer_norm", step)

    def group_norm(self, shape: tuple[int, ...]) -> Step:
        if shape[-1] % 2:
            return self.layer_norm(shape)
        self.smooth = False

        def step(p: Any, x: Any, batch: Any) -> Any:
            y = x.reshape(*x.shape[:-1], 2, -1)
            y = (y - y.mean(-1, keepdims=True)) * lax.rsqrt(y.var(-1, keepdims=True) + 1e-3)
            return y.reshape(x.shape)

        return self.tell("group_norm", step)

    def instance_norm(self, shape: tuple[int, ...]) -> Step:
        self.smooth = False

        def step(p: Any, x: Any, batch: Any) -> Any:
            return (x - x.mean((1, 2), keepdims=True)) * lax.rsqrt(x.var((1, 2), keepdims=True) + 1e-3)

        return self.tell("instance_norm", step)

    def centring(self, shape: tuple[int, ...]) -> Step:
        axis = self.pick(0, -1)
        return self.tell(f"centring[{axis}]", lambda p, x, batch: x - x.mean(axis, keepdims=True))

    # Wiring

    def branch(self, shape: tuple[int, ...], out: int | None = None) -> Step:
        """A hidden layer and back to the shape of its input."""
        first, act = self.dense_or_pointwise(shape, self.width()), self.activation(shape)
        inside = self.shape(first, shape)
        return _compose([first, act, self.dense_or_pointwise(inside, shape[-1] if out is None else out)])

    def dense_or_pointwise(self, shape: tuple[int, ...], out: int) -> Step:
        if len(shape) != 4 or self.coin(0.3):
            return self.dense(shape, out)
        size = self.pick((1, 1), (3, 3), (2, 3))
        leaf = self.leaf("k", *size, shape[-1], out, scale=(shape[-1] * size[0] * size[1]) ** -0.5)
        bias = self.leaf("b", out, scale=0.4) if self.coin(0.5) else None

        def step(p: Any, x: Any, batch: Any) -> Any:
            y = lax.conv_general_dilated(x, p[leaf], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
            return y if bias is None else y + p[bias]

        return self.tell(f"same_conv{size} {out}", step)

    def inner_block(self, shape: tuple[int, ...]) -> Step:
        return self.tell("^ block", self.branch(shape))

    def residual(self, shape: tuple[int, ...]) -> Step:
        inner = self.branch(shape)
        form = self.pick("x+f", "f+x", "x+0.5f", "x-f", "pre_act", "projected", "twice")
        if form == "projected":
            width = self.width()
            inner, skip = self.branch(shape, width), self.dense(shape, width)
            return self.tell("^ residual[projected]", lambda p, x, b: inner(p, x, b) + skip(p, x, b))
        forms: dict[str, Step] = {
            "x+f": lambda p, x, b: x + inner(p, x, b),
            "f+x": lambda p, x, b: inner(p, x, b) + x,
            "x+0.5f": lambda p, x, b: x + 0.5 * inner(p, x, b),
            "x-f": lambda p, x, b: x - inner(p, x, b),
            "pre_act": lambda p, x, b: x + inner(p, jnp.tanh(x), b),
            "twice": lambda p, x, b: (lambda y: y + inner(p, y, b))(x + inner(p, x, b)),
        }
        return self.tell(f"^ residual[{form}]", forms[form])

    def concatenate(self, shape: tuple[int, ...]) -> Step:
        inner = self.branch(shape, self.width())
        form = self.pick("dense", "twice", "stack")
        forms: dict[str, Step] = {
            "dense": lambda p, x, b: jnp.concatenate([x, inner(p, x, b)], -1),
            "twice": lambda p, x, b: jnp.concatenate([x, jnp.tanh(x)], -1),
            "stack": lambda p, x, b: jnp.stack([x, jnp.sin(x)], -1).reshape(*x.shape[:-1], -1),
        }
        return self.tell(f"^ concatenate[{form}]", forms[form])

    def gate(self, shape: tuple[int, ...]) -> Step:
        r = self.leaf("r", shape[-1], shape[-1])
        form = self.pick("self", "scalar", "highway")
        v = self.leaf("q", shape[-1])
        forms: dict[str, Step] = {
            "self": lambda p, x, b: x * jax.nn.sigmoid(x @ p[r]),
            "scalar": lambda p, x, b: x * jax.nn.sigmoid(x @ p[v])[..., None],
            "highway": lambda p, x, b: (lambda t: t * jnp.tanh(x) + (1 - t) * x)(jax.nn.sigmoid(x @ p[r])),
        }
        self.smooth = False
        return self.tell(f"gate[{form}]", forms[form])

    def glu(self, shape: tuple[int, ...]) -> Step:
        width = self.width()
        form = self.pick("split", "two", "swiglu")
        w = self.leaf("w", shape[-1], 2 * width)
        a, g = self.leaf("w", shape[-1], width), self.leaf("w", shape[-1], width)
        o = self.leaf("w", width, self.width())

        def step(p: Any, x: Any, batch: Any) -> Any:
            if form == "split":
                left, right = jnp.split(x @ p[w], 2, -1)
                return left * jax.nn.sigmoid(right)
            gate = jax.nn.silu if form == "swiglu" else jnp.tanh
            return (x @ p[a] * gate(x @ p[g])) @ p[o]

        self.smooth = False
        return self.tell(f"glu[{form}]", step)

    def maxout(self, shape: tuple[int, ...]) -> Step:
        w = self.leaf("w", shape[-1], 2 * self.width())
        self.steep = True  # no slope where both halves are zero, as behind dead neurons
        return self.tell("maxout", lambda p, x, b: (x @ p[w]).reshape(*x.shape[:-1], -1, 2).max(-1))

    def shared(self, shape: tuple[int, ...]) -> Step:
        inner = self.branch(shape)
        form = self.pick("in_a_row", "siamese", "tied", "map")
        if form == "tied":
            w = self.leaf("w", shape[-1], self.width())
            return self.tell("tied", lambda p, x, b: jnp.tanh(x @ p[w]) @ p[w].T)
        forms: dict[str, Step] = {
            "in_a_row": lambda p, x, b: inner(p, inner(p, x, b), b),
            "siamese": lambda p, x, b: inner(p, x, b) - inner(p, jnp.flip(x, 0), b),
            "map": lambda p, x, b: lax.map(lambda row: inner(p, row[None], b)[0], x),
        }
        return self.tell(f"^ shared[{form}]", forms[form])

    def scan_block(self, shape: tuple[int, ...]) -> Step:
        layers, width = self.integer(2, 3), self.width()
        w = self.leaf("w", layers, shape[-1], width, scale=0.5)
        b = self.leaf("b", layers, width)
        u = self.leaf("u", layers, width, shape[-1], scale=0.5)
        form = self.pick("residual", "chain", "remat", "unrolled", "reverse")
        name = self.pick("tanh", "sin")

        def block(x: Any, q: Any) -> Any:
            y = SMOOTH[name](x @ q[0] + q[1]) @ q[2]
            return (y if form == "chain" else x + y), None

        def step(p: Any, x: Any, batch: Any) -> Any:
            one = jax.checkpoint(block) if form == "remat" else block
            leaves = (p[w], p[b], p[u])
            if form == "unrolled":
                for i in range(layers):
                    x, _ = block(x, jax.tree.map(lambda q, i=i: q[i], leaves))
                return x
            return lax.scan(one, x, leaves, reverse=form == "reverse")[0]

        return self.tell(f"scan[{form}] {width}", step)

    def stack_of_kernels(self, shape: tuple[int, ...]) -> Step:
        experts, width = 2, self.width()
        w, u = self.leaf("w", experts, shape[-1], width), self.leaf("u", experts, width, shape[-1])
        form = self.pick("experts", "heads")

        def step(p: Any, x: Any, batch: Any) -> Any:
            if form == "heads":
                h = jnp.tanh(jnp.einsum("...i,eio->...eo", x, p[w]))
                return jnp.einsum("...eo,eoi->...i", h, p[u])
            return sum(jnp.tanh(x @ p[w][e]) @ p[u][e] for e in range(experts))

        return self.tell(f"stack_of_kernels[{form}]", step)

    def normed_weight(self, shape: tuple[int, ...]) -> Step:
        w, u = self.leaf("w", shape[-1], self.width()), None
        form = self.pick("weight_norm", "standardised", "pruned", "scaled", "symmetric", "softmax", "clipped")
        width = self.params[w].shape[1]
        u = self.leaf("u", width, self.width())
        fixed = jnp.asarray(self.rng.random(self.params[w].shape) > 0.3)

        def step(p: Any, x: Any, batch: Any) -> Any:
            k = p[w]
            if form == "weight_norm":
                k = k / jnp.linalg.norm(k, axis=0, keepdims=True)
            elif form == "standardised":
                k = (k - k.mean(0)) / (k.std(0) + 1e-3)
            elif form == "pruned":
                k = k * jnp.pad(fixed, [(0, a - b) for a, b in zip(k.shape, fixed.shape)])
            elif form == "scaled":
                k = 0.7 * k
            elif form == "symmetric":
                k = k - 0.1 * k.mean()
            elif form == "softmax":
                k = jax.nn.softmax(k, 0)
            elif form == "clipped":
                k = jnp.clip(k, -1, 1)
            return jnp.tanh(x @ k) @ p[u]

        return self.tell(f"kernel[{form}]", step)

    def low_rank(self, shape: tuple[int, ...]) -> Step:
        w, a = self.leaf("w", shape[-1], self.width()), self.leaf("w", shape[-1], 2)
        width = self.params[w].shape[1]
        b, u = self.leaf("w", 2, width), self.leaf("w", width, self.width())
        form = self.pick("lora", "product")

        def step(p: Any, x: Any, batch: Any) -> Any:
            kernel = x @ p[w] + (x @ p[a]) @ p[b] if form == "lora" else x @ (p[a] @ p[b])
            return jnp.tanh(kernel) @ p[u]

        return self.tell(f"low_rank[{form}]", step)

    def permute_units(self, shape: tuple[int, ...]) -> Step:
        form = self.pick("roll", "flip", "sort", "cumsum", "half", "softmax", "top", "repeat", "first")
        forms: dict[str, Callable[[Any], Any]] = {
            "roll": lambda x: jnp.roll(x, 1, -1), "flip": lambda x: x[..., ::-1], "sort": lambda x: jnp.sort(x, -1),
            "cumsum": lambda x: jnp.cumsum(x, -1), "half": lambda x: x[..., : (x.shape[-1] + 1) // 2],
            "softmax": lambda x: jax.nn.softmax(x, -1), "top": lambda x: x * (x == x.max(-1, keepdims=True)),
            "repeat": lambda x: jnp.repeat(x, 2, -1), "first": lambda x: x.at[..., 0].multiply(2.0),
        }  # fmt: skip
        return self.tell(f"units[{form}]", lambda p, x, b: forms[form](x))

    # Sequences

    def attention(self, shape: tuple[int, ...]) -> Step:
        d, h = shape[-1], self.width()
        q, k, v, o = (self.leaf("w", *s) for s in ((d, h), (d, h), (d, self.width()), (1, 1)))
        o = self.leaf("w", self.params[v].shape[1], d)

        def step(p: Any, x: Any, batch: Any) -> Any:
            scores = jax.nn.softmax(jnp.einsum("nqd,nkd->nqk", x @ p[q], x @ p[k]))
            return x + jnp.einsum("nqk,nkd->nqd", scores, x @ p[v]) @ p[o]

        return self.tell("attention", step)

    def token_mixing(self, shape: tuple[int, ...]) -> Step:
        w, u = self.leaf("w", shape[1], self.width()), None
        u = self.leaf("u", self.params[w].shape[1], shape[1])

        def step(p: Any, x: Any, batch: Any) -> Any:
            return jnp.einsum("nhd,ht->ntd", jnp.tanh(jnp.einsum("ntd,th->nhd", x, p[w])), p[u])

        return self.tell("token_mixing", step)

    def position(self, shape: tuple[int, ...]) -> Step:
        e = self.leaf("e", *shape[1:])
        form = self.pick("add", "mul")
        return self.tell(f"position[{form}]", lambda p, x, b: x + p[e] if form == "add" else x * p[e])

    def pool_time(self, shape: tuple[int, ...]) -> Step:
        form = self.pick("mean", "max", "last", "sum", "weighted", "pairs")
        forms: dict[str, Callable[[Any], Any]] = {
            "mean": lambda x: x.mean(1), "max": lambda x: x.max(1), "last": lambda x: x[:, -1],
            "sum": lambda x: x.sum(1),
            "weighted": lambda x: jnp.einsum("ntd,t->nd", x, jnp.arange(1.0, x.shape[1] + 1)),
            "pairs": lambda x: x[:, ::2],
        }  # fmt: skip
        self.smooth &= form not in ("max", "sum")
        return self.tell(f"pool_time[{form}]", lambda p, x, b: forms[form](x))

    def shift_time(self, shape: tuple[int, ...]) -> Step:
        form = self.pick("roll", "causal", "flip", "cumsum", "difference", "swap", "pad")
        forms: dict[str, Callable[[Any], Any]] = {
            "roll": lambda x: jnp.roll(x, 1, 1), "causal": lambda x: jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1],
            "flip": lambda x: x[:, ::-1], "cumsum": lambda x: jnp.cumsum(x, 1),
            "difference": lambda x: x[:, 1:] - x[:, :-1] if x.shape[1] > 2 else x, "swap": lambda x: x + x[::-1],
            "pad": lambda x: jnp.pad(x, ((0, 0), (1, 1), (0, 0))),
        }  # fmt: skip
        return self.tell(f"time[{form}]", lambda p, x, b: forms[form](x))

    def recurrence(self, shape: tuple[int, ...]) -> Step:
        h = self.width()
        w, r = self.leaf("w", shape[-1], h), self.leaf("r", h, h)
        form = self.pick("rnn", "gru", "inner")
        z = self.leaf("w", shape[-1], h)

        def cell(p: Any, s: Any, x: Any) -> Any:
            new = jnp.tanh(x @ p[w] + s @ p[r])
            if form == "gru":
                gate = jax.nn.sigmoid(x @ p[z])
                new = gate * s + (1 - gate) * new
            return new

        def step(p: Any, x: Any, batch: Any) -> Any:
            if form == "inner":
                return lax.scan(lambda c, row: (c, jnp.tanh(row @ p[w])), 0.0, x.swapaxes(0, 1))[1].swapaxes(0, 1)
            zero = jnp.zeros((x.shape[0], p[w].shape[1]), x.dtype)
            return lax.scan(lambda s, row: (cell(p, s, row),) * 2, zero, x.swapaxes(0, 1))[1].swapaxes(0, 1)

        return self.tell(f"recurrence[{form}] {h}", step)

    # Images

    def pool(self, shape: tuple[int, ...]) -> Step:
        window = tuple(self.integer(1, min(2, n)) for n in shape[1:3])
        form = self.pick("average", "sum", "counted", "max", "lp") if not self.plain else self.pick("average", "sum")
        padding = self.pick("SAME", "VALID")
        strides = self.pick(window, (1, 1))
        self.smooth &= form not in ("max", "lp", "sum")  # a sum counts as a mean

        def step(p: Any, x: Any, batch: Any) -> Any:
            args = (1, *window, 1), (1, *strides, 1), padding
            if form == "max":
                return lax.reduce_window(x, -jnp.inf, lax.max, *args)
            total = lax.reduce_window(jnp.abs(x) if form == "lp" else x, 0.0, lax.add, *args)
            if form == "counted":
                return total / lax.reduce_window(jnp.ones_like(x), 0.0, lax.add, *args)
            return total / (window[0] * window[1]) if form == "average" else total

        return self.tell(f"pool[{form}, {window}, {strides}, {padding}]", step)

    def pad(self, shape: tuple[int, ...]) -> Step:
        form = self.pick("constant", "constant", "edge", "reflect", "crop") if not self.plain else "constant"
        if form == "crop":
            return self.tell("crop", lambda p, x, b: x[:, 1:, :-1] if min(x.shape[1:3]) > 2 else x)
        return self.tell(f"pad[{form}]", lambda p, x, b: jnp.pad(x, ((0, 0), (1, 0), (0, 1), (0, 0)), mode=form))

    def squeeze_excite(self, shape: tuple[int, ...]) -> Step:
        c, h = shape[-1], self.width()
        w, u = self.leaf("w", c, h), self.leaf("u", h, c)
        self.smooth = False
        return self.tell(
            "squeeze_excite",
            lambda p, x, b: x * jax.nn.sigmoid(jax.nn.relu(x.mean((1, 2)) @ p[w]) @ p[u])[:, None, None],
        )

    def upsample(self, shape: tuple[int, ...]) -> Step:
        form = self.pick("repeat", "resize", "broadcast")

        def step(p: Any, x: Any, batch: Any) -> Any:
            n, h, w, c = x.shape
            if form == "repeat":
                return jnp.repeat(x, 2, 1)
            if form == "resize":
                return jax.image.resize(x, (n, h + 1, w, c), "bilinear")
            return jnp.broadcast_to(x[:, :, None], (n, h, 2, w, c)).reshape(n, 2 * h, w, c)

        return self.tell(f"upsample[{form}]", step)

    def flip(self, shape: tuple[int, ...]) -> Step:
        form = self.pick("flip", "swap", "roll", "samples")
        forms: dict[str, Callable[[Any], Any]] = {
            "flip": lambda x: x[:, ::-1], "swap": lambda x: x.swapaxes(1, 2), "roll": lambda x: jnp.roll(x, 1, 2),
            "samples": lambda x: x + jnp.roll(x, 1, 0),
        }  # fmt: skip
        return self.tell(f"pixels[{form}]", lambda p, x, b: forms[form](x))

    def depthwise(self, shape: tuple[int, ...]) -> Step:
        k = self.leaf("k", 2, 2, 1, shape[-1])
        return self.tell(
            "depthwise",
            lambda p, x, b: lax.conv_general_dilated(
                x, p[k], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=x.shape[-1]
            ),
        )

    def transposed_conv(self, shape: tuple[int, ...]) -> Step:
        k = self.leaf("k", 2, 2, shape[-1], self.width())
        stride = self.integer(1, 2)
        return self.tell(
            f"transposed_conv[{stride}]", lambda p, x, b: lax.conv_transpose(x, p[k], (stride, stride), "SAME")
        )

    def pixel_shuffle(self, shape: tuple[int, ...]) -> Step:
        k = self.leaf("k", shape[-1], 4 * self.integer(1, 2))

        def step(p: Any, x: Any, batch: Any) -> Any:
            y = x @ p[k]
            n, h, w, c = y.shape
            return y.reshape(n, h, w, 2, 2, c // 4).transpose(0, 1, 3, 2, 4, 5).reshape(n, 2 * h, 2 * w, c // 4)

        return self.tell("pixel_shuffle", step)

    def flatten(self, shape: tuple[int, ...]) -> Step:
        form = self.pick("reshape", "mean", "transposed", "keepdims", "sum", "ravel", "fortran")
        forms: dict[str, Callable[[Any], Any]] = {
            "reshape": lambda x: x.reshape(x.shape[0], -1), "mean": lambda x: x.mean(tuple(range(1, x.ndim - 1))),
            "transposed": lambda x: jnp.moveaxis(x, -1, 1).reshape(x.shape[0], -1),
            "keepdims": lambda x: x.mean(tuple(range(1, x.ndim - 1)), keepdims=True).reshape(x.shape[0], -1),
            "sum": lambda x: x.sum(tuple(range(1, x.ndim - 1))), "ravel": lambda x: jax.vmap(jnp.ravel)(x),
            "fortran": lambda x: x.reshape(x.shape[0], -1, order="F"),
        }  # fmt: skip
        self.smooth &= form != "sum"
        return self.tell(f"flatten[{form}]", lambda p, x, b: forms[form](x))

    # Ends

    def head(self, shape: tuple[int, ...]) -> tuple[Step, tuple[int, ...]]:
        steps = []
        if len(shape) > 2 and self.coin(0.8):
            steps.append(self.flatten(shape))
            shape = self.shape(steps[0], shape)
        steps.append(self.dense(shape, 3))
        return _compose(steps), self.shape(steps[-1], shape)

    def loss(self, shape: tuple[int, ...]) -> Callable[[Any, Any], Any]:
        form = self.pick("mse", "softmax", "huber", "sum")
        self.story.append(form)

        def loss(y: Any, batch: Any) -> Any:
            y = y.reshape(y.shape[0], -1, 3).sum(1)
            if form == "softmax":
                return -jnp.mean(jax.nn.log_softmax(y)[jnp.arange(len(y)), batch["label"]])
            if form == "huber":
                return jnp.mean(jnp.sqrt(1 + (y - batch["label"][:, None]) ** 2))
            per_sample = jnp.sum((y - batch["label"][:, None]) ** 2, 1)
            return per_sample.sum() / len(y) if form == "sum" else per_sample.mean()

        return loss

    def penalty(self) -> Callable[[Any], Any]:
        form = "none" if self.plain else self.pick(*["none"] * 8, "l2", "l1", "norm", "mean")
        self.story.append(f"penalty {form}")
        self.smooth &= form == "none"
        forms: dict[str, Callable[[Any], Any]] = {
            "none": lambda p: 0.0, "l2": lambda p: 0.1 * sum(jnp.sum(x**2) for x in p.values()),
            "l1": lambda p: 0.1 * sum(jnp.sum(jnp.abs(x)) for x in p.values()),
            "norm": lambda p: 0.1 * sum(jnp.linalg.norm(x) for x in p.values()),
            "mean": lambda p: 0.1 * sum(jnp.mean(x**2) for x in p.values()),
        }  # fmt: skip
        return forms[form]


def _compose(steps: list[Step]) -> Step:
    def step(p: Any, x: Any, batch: Any) -> Any:
        for one in steps:
            x = one(p, x, batch)
        return x

    return step


def _per_sample(body: Step) -> Step:
    """The whole network written for one sample."""

    def step(p: Any, x: Any, batch: Any) -> Any:
        key = {name: leaf for name, leaf in batch.items() if name == "key"}
        rest = {name: leaf for name, leaf in batch.items() if name != "key"}

        def one(x: Any, rest: Any) -> Any:
            return body(p, x[None], jax.tree.map(lambda leaf: leaf[None], rest) | key)[0]

        return jax.vmap(one)(x, rest)

    return step
