"""The ResNet-18 of the paper (Table 3), thin or full, for small images.

Eight residual blocks of two 3x3 convolutions. What is free, and what grows, is the width *inside* each block; the width
of the residual stream stays. The stream changes its width and resolution in three plain stride-2 convolutions that
stand outside the blocks (conv 4, 7 and 10 of the table), so no shortcut carries parameters.
"""

from collections.abc import Callable

import flax.linen as nn
from jaxtyping import Array, Float

STREAM = (64, 128, 256, 512)
BLOCKS_PER_STAGE = 2


def inner_widths(s: float | int = 1) -> tuple[int, ...]:
    """Widths inside the eight blocks at a fraction `s` of the full network (Table 3).

    Example:
        >>> models.inner_widths(1 / 64)
        (1, 1, 2, 2, 4, 4, 8, 8)

    Args:
        s: 1 for the full network; the paper starts from 1/4 and from 1/64.

    Raises:
        ValueError: `s` times 64 is not a whole number of neurons, at least one.
    """
    narrowest = STREAM[0] * s
    if narrowest < 1 or narrowest != int(narrowest):
        raise ValueError(f"`s` must be a positive multiple of 1/{STREAM[0]}; got {s}")
    return tuple(int(width * s) for width in STREAM for _ in range(BLOCKS_PER_STAGE))


class ResNet18(nn.Module):
    """ResNet-18 with free widths inside its blocks (Table 3 of the paper), BatchNorm after every convolution.

    Layers carry the numbers of the table: `conv_1`, `conv_4`, `conv_7`, `conv_10` are convolutions, the other eight
    `conv_<i>` are blocks.

    Example:
        >>> model = models.ResNet18(widths=models.inner_widths(1 / 64), num_classes=100)
        >>> def forward(x):
        ...     variables = model.init(key, x, train=False)
        ...     return model.apply(variables, x, train=True, mutable=["batch_stats"])
        >>> logits, updates = jax.eval_shape(forward, jax.ShapeDtypeStruct((8, 32, 32, 3), jnp.float32))
        >>> logits.shape
        (8, 100)

    Attributes:
        widths: inner widths of the eight blocks, from the image on.
        num_classes: number of logits.
        activation: after the stem, inside the blocks and after each sum.
        stream: channels of the residual stream, by stage; narrower ones give a smaller network of the same shape.
    """

    widths: tuple[int, ...]
    num_classes: int
    activation: Callable[[Array], Array] = nn.relu
    stream: tuple[int, ...] = STREAM

    @nn.compact
    def __call__(self, x: Float[Array, "n height width channels"], *, train: bool) -> Float[Array, "n classes"]:
        """Logits of a batch; `train` normalises by the batch's own statistics."""
        blocks = len(self.stream) * BLOCKS_PER_STAGE
        if len(self.widths) != blocks:
            raise ValueError(
                f"`widths` must name the inner widths of {blocks} blocks; got {len(self.widths)}: {self.widths}"
            )
        layer = 1
        for stage, stream in enumerate(self.stream):
            x = self.activation(ConvNorm(stream, stride=1 if stage == 0 else 2, name=f"conv_{layer}")(x, train=train))
            for width in self.widths[BLOCKS_PER_STAGE * stage :][:BLOCKS_PER_STAGE]:
                layer += 1
                x = Block(width, self.activation, name=f"conv_{layer}")(x, train=train)
            layer += 1
        return nn.Dense(self.num_classes, name="logits")(x.mean((1, 2)))


class Block(nn.Module):
    """A residual block: x + conv(activation(conv(x))), each convolution normalised, then the activation.

    Attributes:
        width: channels between the two convolutions.
        activation: inside and after the sum.
    """

    width: int
    activation: Callable[[Array], Array] = nn.relu

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], *, train: bool) -> Float[Array, "n h w c"]:
        """The block's output, of the shape of its input."""
        inner = self.activation(ConvNorm(self.width, name="in")(x, train=train))
        return self.activation(x + ConvNorm(x.shape[-1], name="out")(inner, train=train))


class ConvNorm(nn.Module):
    """A 3x3 convolution without bias, then BatchNorm.

    Attributes:
        width: output channels.
        stride: of the convolution, in both directions.
    """

    width: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], *, train: bool) -> Float[Array, "n h2 w2 c2"]:
        """Normalised pre-activations."""
        x = nn.Conv(
            self.width,
            (3, 3),
            strides=self.stride,
            padding=1,
            use_bias=False,
            kernel_init=nn.initializers.he_normal(),
            name="conv",
        )(x)
        return nn.BatchNorm(use_running_average=not train, momentum=0.9, name="norm")(x)
