"""VGG-11 and VGG-16 for small images, every width free."""

from collections.abc import Callable

import flax.linen as nn
from jaxtyping import Array, Float

from tinyjax.models.resnet import ConvNorm

VGG11 = ((64,), (128,), (256, 256), (512, 512), (512, 512))
VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG(nn.Module):
    """Stages of 3x3 convolutions with BatchNorm, each ended by 2x2 max-pooling; then dense layers on the mean pixel.

    The configurations `VGG11` and `VGG16` are those of Simonyan and Zisserman (2015, columns A and D); as is usual for
    small images, one dense layer of 512 takes the place of their two of 4096.

    Example:
        >>> model = models.VGG(stages=models.VGG11, num_classes=10)
        >>> image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
        >>> variables = jax.eval_shape(lambda x: model.init(key, x, train=False), image)

    Attributes:
        stages: channels of every convolution, stage by stage.
        num_classes: number of logits.
        dense: neurons of the hidden dense layers.
        activation: after every hidden layer.
    """

    stages: tuple[tuple[int, ...], ...]
    num_classes: int
    dense: tuple[int, ...] = (512,)
    activation: Callable[[Array], Array] = nn.relu

    @nn.compact
    def __call__(self, x: Float[Array, "n height width channels"], *, train: bool) -> Float[Array, "n classes"]:
        """Logits of a batch; `train` normalises by the batch's own statistics."""
        for s, stage in enumerate(self.stages, start=1):
            for i, width in enumerate(stage, start=1):
                x = self.activation(ConvNorm(width, name=f"conv_{s}_{i}")(x, train=train))
            # SAME rounds up, so images of 28 or 8 pixels survive five poolings.
            x = nn.max_pool(x, (2, 2), strides=(2, 2), padding="SAME")
        x = x.mean((1, 2))
        for i, width in enumerate(self.dense, start=1):
            x = self.activation(nn.Dense(width, kernel_init=nn.initializers.he_normal(), name=f"dense_{i}")(x))
        return nn.Dense(self.num_classes, name="logits")(x)
