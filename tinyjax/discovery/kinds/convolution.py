"""Convolutions: a dimension whose rows are the pixels of images, written or read through windows or poolings."""

import dataclasses
from collections.abc import Callable

from tinyjax.core.kinds import CONVOLUTION
from tinyjax.discovery.dimensions.dimensions import Dimensions
from tinyjax.discovery.dimensions.products import Product
from tinyjax.discovery.dimensions.unification import Atom
from tinyjax.discovery.paths.flow import Flow
from tinyjax.discovery.paths.image_geometry import Geometry, lay_out
from tinyjax.discovery.paths.path import Path
from tinyjax.discovery.paths.refusals import CannotGrow


@dataclasses.dataclass(frozen=True)
class ConvolutionPath(Path):
    """A path over the pixels of images.

    Attributes:
        geometry: how rows are pixels.
        measure: the slope, see `slope_at_empty`.
    """

    geometry: Geometry
    measure: Callable[[], float | None]

    kind = CONVOLUTION
    between = "a convolution or a pooling"

    def slope(self) -> float | None:
        """See `Path`."""
        return self.measure()


def find_convolution_path(
    model: Dimensions,
    producer: Product,
    consumers: tuple[Product, ...],
    flow: Flow,
    dimension: Atom,
    slope: Callable[[], float | None],
) -> ConvolutionPath:
    """The path over the pixels of images.

    Raises:
        CannotGrow: with the reason.
    """
    pools, weights = flow.poolings.before[consumers[0].input_value], flow.factors.of[consumers[0].input_value]
    if weights:
        ops = ", ".join(f"`{weight.op.name}`" for weight in weights)
        raise CannotGrow(f"its rows are weighted one by one in {ops}, between convolutions or poolings")
    geometry, producer, consumers = lay_out(model.axes, producer, consumers, pools, dimension)
    return ConvolutionPath(producer, consumers, geometry, slope)
