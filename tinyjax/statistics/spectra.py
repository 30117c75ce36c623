"""S of an input that never changes, decomposed once for every ridge.

The layer that reads the data sees the same inputs at every growth on the same samples. With the eigenvectors of S and
of its halves kept, choosing a ridge and fitting neurons take products instead of factorisations.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tinyjax.core.linalg import Root, correlation, matmul


class Spectrum(NamedTuple):
    """C = U diag(values) U', C being S on the correlation scale, S_ij = C_ij / (inverse_scale_i inverse_scale_j).

    Attributes:
        values: (D,) eigenvalues.
        vectors: (D, D) U, in columns.
        inverse_scale: (D, 1) 1 / standard deviation, 0 where the input never varies.
    """

    values: Array
    vectors: Array
    inverse_scale: Array

    def turn(self, x: Array) -> Array:
        """X (D, q) on the correlation scale and in the eigenbasis, U' (scale X)."""
        return matmul(self.vectors.T, x * self.inverse_scale)

    def root(self, ridge: Array | float) -> Root:
        """A root of S + ridge diag(S), as `linalg.root_of` gives for a positive ridge."""
        inverse_root = (1 / jnp.sqrt(self.shifted(ridge)))[:, None]
        return Root(
            whiten=lambda x: inverse_root * self.turn(x),
            unwhiten=lambda u: matmul(self.vectors, inverse_root * u) * self.inverse_scale,
            rank=jnp.sum(self.inverse_scale != 0),
        )

    def shifted(self, ridge: Array | float) -> Array:
        """The eigenvalues of C + ridge I, (D,), with a ridge of at least the rounding error of the dtype."""
        dtype = self.values.dtype
        least = len(self.values) * jnp.finfo(dtype).eps
        return jnp.maximum(self.values, 0) + jnp.maximum(jnp.asarray(ridge, dtype), least)


class Spectra(NamedTuple):
    """The spectra of the even samples, of the odd ones and of all, stacked in this order.

    Attributes:
        spectrum: of the means, every field with a leading axis of 3.
        other: (2, D, D) for either half, the mean of the other half in its eigenbasis.
    """

    spectrum: Spectrum
    other: Array

    def of(self, part: int | Array) -> Spectrum:
        """The spectrum of the even (0) or the odd (1) samples, or of all (2)."""
        return jax.tree.map(lambda x: x[part], self.spectrum)


def decompose(gram: Array, count: Array) -> Spectra:
    """The spectra of S from its raw sums.

    Args:
        gram: (2, D, D) sums over the even and the odd samples.
        count: (2,) numbers of samples.
    """
    means = jnp.stack([gram[0] / count[0], gram[1] / count[1], (gram[0] + gram[1]) / (count[0] + count[1])])

    def spectrum(mean: Array) -> Spectrum:
        scaled, inverse_scale = correlation(mean)
        values, vectors = jnp.linalg.eigh(scaled, symmetrize_input=False)
        return Spectrum(values, vectors, inverse_scale)

    # One call each, which run side by side: a batched LAPACK call may lock up, see `methods.ridge.choose`.
    spectra = jax.tree.map(lambda *each: jnp.stack(each), *map(spectrum, means))
    turned = [
        matmul(vectors.T * scale.T, matmul(mean, scale * vectors))
        for vectors, scale, mean in zip(spectra.vectors, spectra.inverse_scale, means[1::-1])
    ]
    return Spectra(spectra, jnp.stack(turned))
