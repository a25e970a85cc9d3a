"""The product basis of MACE: symmetric powers of node features, contracted with learned weights.

B_L = Σ_ν Σ_k w_ν[species, k, channel] · U_ν[k] (A ⊗ … ⊗ A)  (Batatia et al. 2022, Eq. 10-11)

All factors are the same features A, so only the part of a coupling that is symmetric in them
counts. Each order is therefore computed from the distinct monomials A_a A_b… (a <= b <= …), and
redundant couplings (as the published models carry) are merged into their weights first.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import e3nn_jax as e3nn
import jax
import jax.numpy as jnp
import numpy as np
from e3nn_jax import Irrep
from flax import linen as nn

from mlip_md.networks import layers

MAX_TERMS = 1500
"""Coefficients of a coupling up to which it is written out term by term."""


Reduced = tuple[np.ndarray, np.ndarray]
"""Couplings of equal factors to one irrep, on monomials, and how paths merge into them.

(basis, merge): basis float64 (n_monomials, rank, 2L+1) and merge float64 (rank, n_paths), so that
Σ_k w_k U_k = Σ_r (merge @ w)_r basis_r on symmetric powers.
"""


def monomial_indices(dimension: int, order: int) -> list[tuple[int, ...]]:
    """Ascending index tuples of all monomials of an order."""
    return list(itertools.combinations_with_replacement(range(dimension), order))


def reduced_couplings(
    factors: tuple[Irrep, ...], order: int, irrep_out: Irrep, symmetric: bool
) -> Reduced:
    """Couplings of ``order`` equal factors to one irrep, in the published order of paths.

    The basis is a set of linearly independent paths as they are, because these are sparse.

    Args:
        factors: the factors' irreps, ascending, each of multiplicity 1.
        order: number of factors ν.
        irrep_out: irrep of the result.
        symmetric: paths are the permutation-symmetric couplings only, not all successive ones.

    Returns:
        The couplings, reduced.
    """
    couplings = _symmetric_couplings if symmetric else _successive_couplings
    return couplings(factors, order, irrep_out)


@functools.lru_cache
def _symmetric_couplings(factors: tuple[Irrep, ...], order: int, irrep_out: Irrep) -> Reduced:
    """e3nn's orthonormal basis of the symmetric power; its paths are independent."""
    irreps = e3nn.Irreps([(1, ir) for ir in factors])
    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        tensor = e3nn.reduced_symmetric_tensor_product_basis(irreps, order, keep_ir=[irrep_out])
        tensor = np.asarray(tensor.chunks[0], np.float64)
    indices = monomial_indices(irreps.dim, order)
    basis = np.stack([sum(tensor[p] for p in set(itertools.permutations(i))) for i in indices])
    return basis, np.eye(basis.shape[1])


@functools.lru_cache
def _successive_couplings(factors: tuple[Irrep, ...], order: int, irrep_out: Irrep) -> Reduced:
    """Pairs of lower powers coupled: order 2 = 1 x 1, 3 = 2 x 1, 4 = 2 x 2 (as e3nn does)."""
    dimension = sum(ir.dim for ir in factors)
    if order == 1:
        start = sum(ir.dim for ir in factors[: factors.index(irrep_out)])
        rows = np.eye(dimension)[:, None, start : start + irrep_out.dim]
        return rows, np.eye(1)
    halves = (order + 1) // 2, order // 2
    left, right = (
        [(ir, _successive_couplings(factors, half, ir)) for ir in _irreps_of_power(factors, half)]
        for half in halves
    )
    target = _products_of_monomials(dimension, *halves)
    bases, merges = [], []
    for (ir1, (basis1, merge1)), (ir2, (basis2, merge2)) in itertools.product(left, right):
        if irrep_out in ir1 * ir2:
            coupling = layers.coupling(ir1.l, ir2.l, irrep_out.l)
            bases.append(_multiply(basis1, basis2, coupling, target))
            merges.append(np.kron(merge1, merge2))
    basis, merge = np.concatenate(bases, axis=1), _block_diagonal(merges)
    # Equivariant maps are independent where one of their components is.
    chosen, dependence = _independent(basis[:, :, 0])
    return basis[:, chosen], dependence @ merge


def _irreps_of_power(factors: tuple[Irrep, ...], order: int) -> list[Irrep]:
    """Irreps of the tensor product of ``order`` factors, ascending."""
    irreps = set(factors)
    for _ in range(order - 1):
        irreps = {ir for a in irreps for b in factors for ir in a * b}
    return sorted(irreps)


def _products_of_monomials(dimension: int, order1: int, order2: int) -> np.ndarray:
    """Index of the product of every two monomials (n_monomials1 · n_monomials2,)."""
    index = {m: i for i, m in enumerate(monomial_indices(dimension, order1 + order2))}
    factors = (monomial_indices(dimension, order) for order in (order1, order2))
    return np.array([index[tuple(sorted(a + b))] for a, b in itertools.product(*factors)])


def _multiply(
    basis1: np.ndarray, basis2: np.ndarray, coupling: np.ndarray, target: np.ndarray
) -> np.ndarray:
    """Couple every polynomial of one basis with every one of another: (n, rank1 · rank2, 2L+1)."""
    rotated = np.einsum("aui,ijk->aujk", basis1, coupling)
    products = np.einsum("aujk,bvj->abuvk", rotated, basis2, optimize=True)
    order = np.argsort(target, kind="stable")
    starts = np.flatnonzero(np.diff(target[order], prepend=-1))
    rows = products.reshape(len(target), -1, coupling.shape[2])[order]
    return np.add.reduceat(rows, starts, axis=0)


def _block_diagonal(blocks: list[np.ndarray]) -> np.ndarray:
    out = np.zeros(np.sum([block.shape for block in blocks], axis=0))
    row = column = 0
    for block in blocks:
        out[row : row + block.shape[0], column : column + block.shape[1]] = block
        row, column = row + block.shape[0], column + block.shape[1]
    return out


def _independent(columns: np.ndarray) -> tuple[list[int], np.ndarray]:
    """Indices of the first independent columns, and all columns as combinations of them."""
    chosen: list[int] = []
    directions = np.zeros((len(columns), 0))
    for k, column in enumerate(columns.T):
        rest = column
        for _ in range(2):  # once more against rounding
            rest = rest - directions @ (directions.T @ rest)
        if np.linalg.norm(rest) > 1e-9:
            chosen.append(k)
            directions = np.column_stack([directions, rest / np.linalg.norm(rest)])
    combinations = np.linalg.lstsq(columns[:, chosen], columns, rcond=None)[0]
    return chosen, np.where(np.abs(combinations) > 1e-12, combinations, 0.0)


class Monomials(dict):
    """Products of components by ascending index tuple, each made once.

    Args:
        components: arrays of one shape.
    """

    def __init__(self, components: Sequence[jax.Array]) -> None:
        super().__init__({(a,): component for a, component in enumerate(components)})

    def __missing__(self, index: tuple[int, ...]) -> jax.Array:
        self[index] = product = self[index[:-1]] * self[index[-1:]]
        return product


def polynomials(x: Monomials, order: int, basis: np.ndarray) -> list[list[jax.Array]]:
    """Couplings of equal powers of x, Σ_p basis[p, r, m] · monomial_p(x).

    Few coefficients are written out, term by term: compilers fuse the sum into one pass over the
    channels, in which no monomial is ever stored. Many would take them minutes; those are a
    matrix product.

    Args:
        x: components and their products.
        order: of the powers.
        basis: (n_monomials, rank, 2L+1) coefficients on monomials of that order.

    Returns:
        Arrays in the shape of a component, by r and m.
    """
    n_monomials, rank, dim_out = basis.shape
    dimension = sum(len(index) == 1 for index in x)
    indices = monomial_indices(dimension, order)
    if np.count_nonzero(np.abs(basis) > 1e-12) > MAX_TERMS:
        components = jnp.stack([x[a,] for a in range(dimension)])
        first, *rest = np.array(indices).T
        powers = functools.reduce(lambda p, a: p * components[a], rest, components[first])
        matrix = jnp.asarray(basis.reshape(n_monomials, -1), powers.dtype)
        values = jnp.tensordot(matrix, powers, axes=(0, 0))
        return [list(part) for part in values.reshape(rank, dim_out, *values.shape[1:])]

    def polynomial(coefficients: np.ndarray) -> jax.Array:
        terms = np.flatnonzero(np.abs(coefficients) > 1e-12)
        return sum(
            (x[indices[p]] * float(coefficients[p]) for p in terms), start=jnp.zeros_like(x[0,])
        )

    return [[polynomial(basis[:, r, m]) for m in range(dim_out)] for r in range(rank)]


class SymmetricContraction(nn.Module):
    """Powers of node features up to ``correlation`` with weights per species and channel.

    Attributes:
        irreps_in: irreps of the features, in the order of their components.
        irreps_out: irreps wanted.
        correlation: highest power.
        num_species: number of elements.
        symmetric: weights on permutation-symmetric couplings only.
    """

    irreps_in: tuple[Irrep, ...]
    irreps_out: tuple[Irrep, ...]
    correlation: int
    num_species: int
    symmetric: bool

    @nn.compact
    def __call__(self, x: jax.Array, species: jax.Array) -> dict[Irrep, jax.Array]:
        """Contract.

        Args:
            x: (n_nodes, d, channels), components of all irreps one after the other.
            species: (n_nodes,) int.

        Returns:
            {irrep: (n_nodes, 2L+1, channels)}.
        """
        couplings = [
            (order, irrep, *reduced_couplings(self.irreps_in, order, irrep, self.symmetric))
            for order in range(self.correlation, 0, -1)
            for irrep in self.irreps_out
        ]
        weights = iter(self._weights(x, species, couplings))
        monomials = Monomials(jnp.split(x, x.shape[1], axis=1))
        out: dict[Irrep, list[jax.Array]] = {}
        for order, irrep, basis, _ in couplings:
            for values in polynomials(monomials, order, basis):
                weight = next(weights)
                rows = [value * weight for value in values]
                if irrep in out:
                    rows = [a + b for a, b in zip(out[irrep], rows, strict=True)]
                out[irrep] = rows
        return {irrep: jnp.concatenate(rows, axis=1) for irrep, rows in out.items()}

    def _weights(
        self, x: jax.Array, species: jax.Array, couplings: Sequence[tuple[int, Irrep, Any, Any]]
    ) -> list[jax.Array]:
        """Weights (n_nodes, 1, channels) of every row of every coupling: read once per node."""
        rows = []
        for order, irrep, _, merge in couplings:
            shape = self.num_species, merge.shape[1], x.shape[-1]
            init = nn.initializers.normal(merge.shape[1] ** -0.5)
            weights = self.param(f"w{order}_{irrep}", init, shape)
            rows.append(jnp.einsum("rk,skc->src", jnp.asarray(merge, x.dtype), weights))
        table = jnp.concatenate(rows, axis=1)
        return jnp.split(table[species], table.shape[1], axis=1)
