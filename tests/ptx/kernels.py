"""Small Triton kernels, each for some instructions."""

import triton
import triton.language as tl


@triton.jit
def product_kernel(
    c,  # (M, N)
    a,  # (M, K)
    b,  # (K, N), or turned (N, K)
    m_size,
    n_size,
    k_size,
    TURNED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """c = a @ b, of any sizes."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), c.dtype.element_ty)
    for start in range(0, k_size, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(
            a + m[:, None] * k_size + k[None, :],
            mask=(m < m_size)[:, None] & (k < k_size)[None, :],
            other=0.0,
        )
        where = n[None, :] * k_size + k[:, None] if TURNED else k[:, None] * n_size + n[None, :]
        y = tl.load(b + where, mask=(k < k_size)[:, None] & (n < n_size)[None, :], other=0.0)
        total = tl.dot(x, y, total, input_precision=PRECISION, out_dtype=total.dtype)
    inside = (m < m_size)[:, None] & (n < n_size)[None, :]
    tl.store(c + m[:, None] * n_size + n[None, :], total, mask=inside)


@triton.jit
def functions_kernel(out, x, y, size, BLOCK: tl.constexpr):
    """out (7, size): what the layers compute of single numbers."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    a, b = tl.load(x + i, mask=inside), tl.load(y + i, mask=inside)
    tl.store(out + i, tl.exp(a), mask=inside)
    tl.store(out + size + i, tl.log(tl.abs(a)), mask=inside)
    tl.store(out + 2 * size + i, tl.sqrt(tl.abs(a)), mask=inside)
    tl.store(out + 3 * size + i, a / b, mask=inside)
    tl.store(out + 4 * size + i, tl.floor(a), mask=inside)
    tl.store(out + 5 * size + i, tl.fma(a, b, a), mask=inside)
    tl.store(out + 6 * size + i, tl.where(a < b, tl.minimum(a, b), -a), mask=inside)


@triton.jit
def integers_kernel(out, x, y, size, BLOCK: tl.constexpr):
    """out (8, size), as x."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    a, b = tl.load(x + i, mask=inside, other=1), tl.load(y + i, mask=inside, other=1)
    tl.store(out + i, a // b, mask=inside)
    tl.store(out + size + i, a % b, mask=inside)
    tl.store(out + 2 * size + i, a * b - b, mask=inside)
    tl.store(out + 3 * size + i, a << (b & 7), mask=inside)
    tl.store(out + 4 * size + i, a >> (b & 7), mask=inside)
    tl.store(out + 5 * size + i, (a & b) ^ (a | 3), mask=inside)
    tl.store(out + 6 * size + i, tl.maximum(a, b) // 7, mask=inside)
    tl.store(out + 7 * size + i, tl.minimum(a, b) % 7, mask=inside)


@triton.jit
def convert_kernel(out, x, size, BLOCK: tl.constexpr):
    """out = x in its own dtype."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, mask=i < size).to(out.dtype.element_ty), mask=i < size)


@triton.jit
def reduce_kernel(sums, largest, x, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sums over rows, (columns,), and the largest of each row, (rows,)."""
    i, j = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    inside = (i < rows)[:, None] & (j < columns)[None, :]
    values = tl.load(x + i[:, None] * columns + j[None, :], mask=inside, other=0)
    tl.store(sums + j, tl.sum(values, 0), mask=j < columns)
    tl.store(largest + i, tl.max(values, 1), mask=i < rows)


@triton.jit
def atomics_kernel(total, largest, count, x, size, BLOCK: tl.constexpr):
    """The sum of x, its largest, and how many are above 0: by all blocks at once."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + i, mask=i < size, other=0)
    tl.atomic_add(total, tl.sum(values, 0))
    tl.atomic_max(largest, tl.max(values, 0))
    tl.atomic_add(count + i * 0, tl.full((BLOCK,), 1, tl.int32), mask=values > 0)


@triton.jit
def last_block_kernel(
    out, partial, counter, x, size, blocks, SEM: tl.constexpr, BLOCK: tl.constexpr
):
    """The sum of x: the block that comes last adds what the others have found."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(partial + tl.program_id(0), tl.sum(tl.load(x + i, mask=i < size, other=0.0), 0))
    if tl.atomic_add(counter, 1, sem=SEM) == blocks - 1:
        j = tl.arange(0, 16)
        tl.store(out, tl.sum(tl.load(partial + j, mask=j < blocks, other=0.0), 0))


@triton.jit
def relay_kernel(out, turn, SPINNING: tl.constexpr):
    """Blocks write one after the other, each when the one before has."""
    block = tl.program_id(0)
    if SPINNING:
        while tl.atomic_add(turn, 0) != block:
            pass
    tl.store(out + block, block + tl.load(out + block - 1, mask=block > 0, other=0))
    tl.atomic_add(turn, 1)
