"""A multilayer perceptron whose hidden widths are free."""

from collections.abc import Callable

import flax.linen as nn
from jaxtyping import Array, Float


class MLP(nn.Module):
    """Dense layers with an activation between them; inputs of any shape are flattened.

    Example:
        >>> model = models.MLP(widths=(64, 64), num_classes=10)
        >>> params = model.init(key, images)
        >>> model.apply(params, images).shape
        (64, 10)

    Attributes:
        widths: neurons of every hidden layer.
        num_classes: number of logits.
        activation: applied after every hidden layer.
    """

    widths: tuple[int, ...]
    num_classes: int
    activation: Callable[[Array], Array] = nn.relu

    @nn.compact
    def __call__(self, x: Float[Array, "n ..."]) -> Float[Array, "n classes"]:
        """Logits of a batch."""
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate(self.widths, start=1):
            x = self.activation(nn.Dense(width, kernel_init=nn.initializers.he_normal(), name=f"hidden_{i}")(x))
        return nn.Dense(self.num_classes, name="logits")(x)
