"""The product basis of MACE: symmetric powers of node features, contracted with learned weights.

B_L = Σ_ν Σ_k w_ν[species, k, channel] · U_ν[k] (A ⊗ … ⊗ A)  (Batatia et al. 2022, Eq. 10-11)

All factors are the same features A, so only the part of a coupling that is symmetric in them
counts. Each order is therefore computed from the distinct monomials A_a A_b… (a <= b <= …), and
redundant couplings (as the published models carry) are merged into their weights first.
"""

from __future__ import annotations

import functools
import itertools
import math

import e3nn_jax as e3nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

MAX_TERMS = 1500
"""Coefficients of a coupling up to which it is written out term by term."""


@functools.lru_cache
def couplings(irreps: str, order: int, irrep_out: str, symmetric: bool) -> np.ndarray:
    """Couplings of ``order`` equal factors to one irrep, in the published order of paths.

    Args:
        irreps: the factors' irreps, each of multiplicity 1; d is their dimension.
        order: number of factors ν.
        irrep_out: irrep of the result.
        symmetric: keep the permutation-symmetric couplings only.

    Returns:
        float64 array (d, …, d, n_paths, 2L+1).
    """
    factors, keep = e3nn.Irreps(irreps), e3nn.Irreps(irrep_out)
    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        if symmetric:
            basis = e3nn.reduced_symmetric_tensor_product_basis(factors, order, keep_ir=keep)
        else:
            basis = e3nn.reduced_tensor_product_basis([factors] * order, keep_ir=keep)
        return np.asarray(basis.chunks[0], np.float64)


def monomial_indices(dimension: int, order: int) -> list[tuple[int, ...]]:
    """Ascending index tuples of all monomials of an order."""
    return list(itertools.combinations_with_replacement(range(dimension), order))


@functools.lru_cache
def reduced_couplings(
    irreps: str, order: int, irrep_out: str, symmetric: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Couplings on monomials, and how the paths' weights merge into them.

    The basis is a set of linearly independent paths as they are, because these are sparse.

    Returns:
        (basis, merge): basis float64 (n_monomials, rank, 2L+1) and merge float64
        (rank, n_paths), so that Σ_k w_k U_k = Σ_r (merge @ w)_r basis_r on symmetric powers.
    """
    tensor = couplings(irreps, order, irrep_out, symmetric)
    dimension, (n_paths, dim_out) = tensor.shape[0], tensor.shape[-2:]
    indices = monomial_indices(dimension, order)
    on_monomials = np.empty((len(indices), n_paths, dim_out))
    for row, index in enumerate(indices):
        on_monomials[row] = sum(tensor[p] for p in set(itertools.permutations(index)))
    columns = np.moveaxis(on_monomials, 1, 2).reshape(-1, n_paths)
    chosen: list[int] = []
    for k in range(n_paths):
        if np.linalg.matrix_rank(columns[:, [*chosen, k]], tol=1e-9) > len(chosen):
            chosen.append(k)
    merge = np.linalg.lstsq(columns[:, chosen], columns, rcond=None)[0]
    return on_monomials[:, chosen], np.where(np.abs(merge) > 1e-14, merge, 0.0)


def powers(x: jax.Array, order: int) -> jax.Array:
    """All distinct products of ``order`` components of x (d, n): (n_monomials, n)."""
    first, *rest = np.array(monomial_indices(x.shape[0], order)).T
    return functools.reduce(lambda product, index: product * x[index], rest, x[first])


def polynomials(x: jax.Array, basis: np.ndarray) -> list[jax.Array]:
    """Couplings of equal powers of x, Σ_p basis[p, r, m] · monomial_p(x).

    Few coefficients are written out, term by term: compilers fuse the sum into one pass over the
    channels, in which no monomial is ever stored. Many would take them minutes; those are a
    matrix product.

    Args:
        x: (d, n) components first.
        basis: (n_monomials, rank, 2L+1) coefficients on monomials of one order.

    Returns:
        For every r an array (2L+1, n).
    """
    n_monomials, rank, dim_out = basis.shape
    order = next(k for k in itertools.count(1) if _n_monomials(x.shape[0], k) == n_monomials)
    if np.count_nonzero(np.abs(basis) > 1e-12) > MAX_TERMS:
        matrix = jnp.asarray(basis.reshape(n_monomials, -1), x.dtype)
        return list((matrix.T @ powers(x, order)).reshape(rank, dim_out, -1))
    products = _Products(x)
    indices = monomial_indices(x.shape[0], order)

    def polynomial(coefficients: np.ndarray) -> jax.Array:
        terms = np.flatnonzero(np.abs(coefficients) > 1e-12)
        return sum(
            (products[indices[p]] * float(coefficients[p]) for p in terms),
            start=jnp.zeros(x.shape[1:], x.dtype),
        )

    return [jnp.stack([polynomial(basis[:, r, m]) for m in range(dim_out)]) for r in range(rank)]


class _Products(dict):
    """Products of components of x by ascending index tuple, each made once."""

    def __init__(self, x: jax.Array) -> None:
        super().__init__({(a,): x[a] for a in range(x.shape[0])})

    def __missing__(self, index: tuple[int, ...]) -> jax.Array:
        self[index] = product = self[index[:-1]] * self[index[-1:]]
        return product


def _n_monomials(dimension: int, order: int) -> int:
    return math.comb(dimension + order - 1, order)


class SymmetricContraction(nn.Module):
    """Powers of node features up to ``correlation`` with weights per species and channel.

    Attributes:
        irreps_in: irreps of the features, in the order of their components.
        irreps_out: irreps wanted.
        correlation: highest power.
        num_species: number of elements.
        symmetric: weights on permutation-symmetric couplings only.
    """

    irreps_in: tuple[str, ...]
    irreps_out: tuple[str, ...]
    correlation: int
    num_species: int
    symmetric: bool

    @nn.compact
    def __call__(self, x: jax.Array, species: jax.Array) -> dict[str, jax.Array]:
        """Contract.

        Args:
            x: (n_nodes, d, channels), components of all irreps one after the other.
            species: (n_nodes,) int.

        Returns:
            {irrep: (n_nodes, 2L+1, channels)}.
        """
        n_nodes, dimension, channels = x.shape
        components = jnp.moveaxis(x, 1, 0).reshape(dimension, -1)
        out: dict[str, jax.Array] = {}
        for order in range(self.correlation, 0, -1):
            for irrep in self.irreps_out:
                key = (" + ".join(self.irreps_in), order, irrep, self.symmetric)
                basis, merge = reduced_couplings(*key)
                rank, n_paths = merge.shape
                weights = self.param(
                    f"w{order}_{irrep}",
                    nn.initializers.normal(n_paths**-0.5),
                    (self.num_species, n_paths, channels),
                )
                merged = jnp.einsum("rk,skc->rsc", jnp.asarray(merge, x.dtype), weights)
                values = polynomials(components, basis)
                for r in range(rank):
                    value = values[r].reshape(-1, n_nodes, channels) * merged[r][species]
                    out[irrep] = out[irrep] + value if irrep in out else value
        return {irrep: jnp.moveaxis(value, 0, 1) for irrep, value in out.items()}
