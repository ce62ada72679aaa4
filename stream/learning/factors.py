"""The strongest singular vectors of a matrix, the same in every run."""

from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse.linalg import ArpackError, svds

from stream.core.formulas import Float64
from stream.errors import ItemSpaceError

#: Up to here a dense SVD is as quick, and exact for ranks that ARPACK can't handle.
_DENSE: Final = 400


class Factors(NamedTuple):
    """The rank-d approximation ``left @ diag(values) @ right.T`` of a matrix [n, n].

    Attributes:
        left: singular vectors [n, d], strongest first.
        values: singular values [d], 0 for those that are rounding noise.
        right: singular vectors of the other side [n, d].
    """

    left: Float64
    values: Float64
    right: Float64


def factorise(matrix: "Float64 | sparse.csr_array[Any]", dim: int, seed: int) -> Factors:
    """The `dim` strongest factors of a matrix [n, n].

    The sign of a pair of singular vectors is free; the largest entry on the left is made positive, so that every run
    agrees.

    Raises:
        ItemSpaceError: ARPACK finds no such dimensions.
    """
    n = int(matrix.shape[0])
    if n <= _DENSE or dim >= n - 1:
        u, s, vt = np.linalg.svd(matrix.toarray() if sparse.issparse(matrix) else matrix, full_matrices=False)
    else:
        v0: Float64 = np.random.default_rng(seed).uniform(-1.0, 1.0, size=n)  # ARPACK's own start is random
        try:
            u, s, vt = svds(matrix, k=dim, v0=v0)
        except ArpackError as exc:
            msg = f"the SVD found no {dim} dimensions in these interactions; lower the dimension"
            raise ItemSpaceError(msg) from exc
    strongest: NDArray[np.int64] = np.argsort(-s, kind="stable")[:dim]
    u, s, v = u[:, strongest], s[strongest], vt[strongest].T
    signs = np.where(u[np.abs(u).argmax(axis=0), np.arange(dim)] < 0, -1.0, 1.0)
    s = np.where(s > s.max() * n * np.finfo(np.float64).eps, s, 0.0)
    return Factors(np.asarray(u * signs), np.asarray(s), np.asarray(v * signs))
