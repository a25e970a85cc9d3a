"""The product basis of MACE: symmetric powers of node features, contracted with learned weights.

B_L = Σ_ν Σ_k w_ν[species, k, channel] · U_ν[k] (A ⊗ … ⊗ A)  (Batatia et al. 2022, Eq. 10-11)

All factors are the same features A, so only the part of a coupling that is symmetric in them
counts. Each order is therefore computed from the distinct monomials A_a A_b… (a <= b <= …), and
redundant couplings (as the published models carry) are merged into their weights first.
"""

from __future__ import annotations

import functools
import itertools

import e3nn_jax as e3nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn


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
    """Ascending index tuples of all monomials of an order, as ``monomials`` lists them."""
    return list(itertools.combinations_with_replacement(range(dimension), order))


def monomials(x: jax.Array, order: int) -> jax.Array:
    """All distinct products of ``order`` components of x (n, d, c): (n, n_monomials, c)."""
    dimension = x.shape[1]
    result = x
    for lower in range(1, order):
        # Monomials are sorted, so those whose first index is >= a are the last of the list.
        starts = _first_positions(dimension, lower)
        parts = [x[:, a : a + 1] * result[:, starts[a] :] for a in range(dimension)]
        result = jnp.concatenate(parts, axis=1)
    return result


def _first_positions(dimension: int, order: int) -> list[int]:
    firsts = [index[0] for index in monomial_indices(dimension, order)]
    return [firsts.index(a) for a in range(dimension)]


@functools.lru_cache
def reduced_couplings(
    irreps: str, order: int, irrep_out: str, symmetric: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Couplings on monomials, and how the paths' weights merge into them.

    Returns:
        (basis, merge): basis float64 (n_monomials, rank, 2L+1), orthonormal; merge float64
        (rank, n_paths), so that Σ_k w_k U_k = Σ_r (merge @ w)_r basis_r on symmetric powers.
    """
    tensor = couplings(irreps, order, irrep_out, symmetric)
    dimension, (n_paths, dim_out) = tensor.shape[0], tensor.shape[-2:]
    on_monomials = np.empty((len(monomial_indices(dimension, order)), n_paths, dim_out))
    for row, index in enumerate(monomial_indices(dimension, order)):
        on_monomials[row] = sum(tensor[p] for p in set(itertools.permutations(index)))
    columns = np.moveaxis(on_monomials, 1, 2).reshape(-1, n_paths)
    u, s, vt = np.linalg.svd(columns, full_matrices=False)
    rank = int(np.sum(s > 1e-9 * max(s[0], 1.0)))
    basis = np.moveaxis(u[:, :rank].reshape(-1, dim_out, rank), 1, 2)
    return basis, s[:rank, None] * vt[:rank]


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
        out = {irrep: jnp.zeros((), x.dtype) for irrep in self.irreps_out}
        for order in range(self.correlation, 0, -1):
            powers = monomials(x, order)
            for irrep in self.irreps_out:
                key = (" + ".join(self.irreps_in), order, irrep, self.symmetric)
                basis, merge = reduced_couplings(*key)
                n_paths = merge.shape[1]
                weights = self.param(
                    f"w{order}_{irrep}",
                    nn.initializers.normal(n_paths**-0.5),
                    (self.num_species, n_paths, x.shape[-1]),
                )
                merged = jnp.einsum("rk,skc->src", jnp.asarray(merge, x.dtype), weights)
                terms = jnp.einsum("npc,prm->nrmc", powers, jnp.asarray(basis, x.dtype))
                out[irrep] += jnp.einsum("nrmc,nrc->nmc", terms, merged[species])
        return out
