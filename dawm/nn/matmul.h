/* Matmuls; `mlp.c` and `residual.c` build networks of them.
 *
 * Matrices are of single precision and row-major. B batch, and of one layer K inputs and N outputs:
 *
 *     forward    Y = X W^T + b         (B, K) (N, K) -> (B, N)
 *     backward   dX = dY W             (B, N) (N, K) -> (B, K)
 *                dW = dY^T X           (B, N) (B, K) -> (N, K)
 *
 * All three are one matmul C = A P, computed tile by tile: ROWS rows of A against a panel of up to VECTORS vectors of
 * columns of P, packed side by side, with the whole sum held in registers. What follows a matmul (`Finish`) is applied to
 * a tile before it is stored, so that no matrix is read again for it.
 *
 * Threads share the panels; none shares a sum, so that results do not depend on their number.
 *
 * With `half` the factors of all matmuls but the narrowest are rounded to bfloat16, two of which along the sum are
 * multiplied at once and added in single precision; a pair of them is kept as the bits of one float.
 */
#include "vector.h"

#define PANEL (VECTORS * VECTOR) /* columns packed at once */
#define FEW 8                    /* outputs that are summed one by one */

typedef struct { /* what happens to a tile before it is stored, in this order; NULL for what does not */
    const float *bias;  /* (N,), added; the matrices below are as C */
    const float *mask;  /* entries not above 0 set C's to 0: the gradient of ReLU */
    const float *slope; /* C is multiplied by SiLU's slope at it: the gradient of SiLU */
    const float *add;   /* added */
    float *before;      /* C is stored there, and SiLU of it in C */
    int relu;
} Finish;

/* a vector of numbers that lie side by side, `left` of them before the end, or with `half` of pairs of such numbers */
INLINE V side_by_side(const int half, const float *from, I left) {
    const V low = load(left, from);
    return half ? halved(low, left > VECTOR ? load(left - VECTOR, from + VECTOR) : zeros()) : low;
}

/* columns of row k of a matrix of `depth` rows, or with `half` of the rows 2 k and 2 k + 1 in pairs */
INLINE V one_below_other(const int half, const float *from, I width, I k, I depth, I in) {
    if (!half) return load(in, from + k * width);
    return paired(load(in, from + 2 * k * width), 2 * k + 1 < depth ? load(in, from + (2 * k + 1) * width) : zeros());
}

/* A (height, depth), or with `columns` (depth, height), in pairs along the sum */
static void halve(I height, I depth, const float *a, int columns, float *to) {
    const I pairs = (depth + 1) / 2;
    if (columns) {
        PARALLEL
        for (I k = 0; k < pairs; k++)
            for (I i = 0; i < height; i += VECTOR)
                store(height - i, to + k * height + i, one_below_other(1, a + i, height, k, depth, height - i));
    } else {
        PARALLEL
        for (I i = 0; i < height; i++)
            for (I k = 0; k < pairs; k += VECTOR)
                store(pairs - k, to + i * pairs + k, side_by_side(1, a + i * depth + 2 * k, depth - 2 * k));
    }
}

/* stores a tile of sums, finished, at c + at; the last vectors hold `last` columns */
static __attribute__((noinline)) void finish_tile(const V *sums, int rows, int vectors, float *c, I width, I last,
                                                  const Finish *finish, I at) {
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < vectors; j++) {
            const I in = j == vectors - 1 ? last : VECTOR, to = at + i * width + j * VECTOR;
            V y = sums[i * vectors + j];
            if (finish->relu) y = larger(zeros(), y);
            if (finish->mask) y = where_above_0(load(in, finish->mask + to), y);
            if (finish->slope) y = y * silu_slope(load(in, finish->slope + to));
            if (finish->add) y = y + load(in, finish->add + to);
            if (finish->before) {
                store(in, finish->before + to, y);
                y = y * sigmoid(y);
            }
            store(in, c + to, y);
        }
}

/* asks for a tile of a matrix, so that it is in the cache when the sums are done */
INLINE void fetch_ahead(const int rows, const int vectors, const float *from, I width) {
    UNROLL for (int i = 0; i < rows; i++)
        UNROLL for (int j = 0; j < vectors; j++) __builtin_prefetch(from + i * width + j * VECTOR);
}

/* rows x vectors of C; A's entry (i, k) lies at a[i * stride + k], or with `columns` at a[i + k * stride] */
INLINE void tile(const int half, const int rows, const int vectors, const int columns, I depth, const float *a, I stride,
                 const float *panel, float *c, I width, I last, Finish finish, I column, I at) {
    const float *bias = finish.bias + column;
    V sum[ROWS][VECTORS];
    fetch_ahead(rows, vectors, c + at, width);
    if (finish.mask) fetch_ahead(rows, vectors, finish.mask + at, width);
    UNROLL for (int i = 0; i < rows; i++)
        UNROLL for (int j = 0; j < vectors; j++)
            sum[i][j] = finish.bias ? load(j == vectors - 1 ? last : VECTOR, bias + j * VECTOR) : zeros();
    for (I k = 0; k < depth; k++) {
        V row[VECTORS];
        UNROLL for (int j = 0; j < vectors; j++) row[j] = load(VECTOR, panel + (k * vectors + j) * VECTOR);
        UNROLL for (int i = 0; i < rows; i++) {
            const V x = all(columns ? a[i + k * stride] : a[i * stride + k]);
            UNROLL for (int j = 0; j < vectors; j++)
                sum[i][j] = half ? add_products_of_pairs(sum[i][j], x, row[j]) : add_product(sum[i][j], x, row[j]);
        }
    }
    V sums[ROWS * VECTORS]; /* a second array, so that the first stays in registers */
    UNROLL for (int i = 0; i < rows; i++)
        UNROLL for (int j = 0; j < vectors; j++) sums[i * vectors + j] = sum[i][j];
    finish_tile(sums, rows, vectors, c, width, last, &finish, at);
}

INLINE void tiles(const int half, const int vectors, const int columns, I height, I depth, const float *a, I stride,
                  const float *panel, float *c, I width, I last, Finish finish, I column) {
    for (I i = 0; i < height;) {
        const float *from = a + i * (columns ? 1 : stride);
#define TILE(n) \
    tile(half, n, vectors, columns, depth, from, stride, panel, c, width, last, finish, column, i * width + column), i += n
        if (height - i >= ROWS) TILE(ROWS);
        else if (height - i >= 4) TILE(4);
        else TILE(1);
    }
}

/* a square block of P^T, rows `stride` apart, to VECTOR rows of a panel `step` apart; n of its rows and depth of its
 * numbers along the sum exist, the others are 0 */
INLINE void transpose(const int half, const float *from, I stride, I n, I depth, float *to, I step) {
    V r[VECTOR], t[VECTOR];
    UNROLL for (int i = 0; i < VECTOR; i++) r[i] = i < n ? side_by_side(half, from + i * stride, depth) : zeros();
    UNROLL for (int i = 0; i < VECTOR; i += 2) {
        t[i] = INTRINSIC(unpacklo_ps)(r[i], r[i + 1]);
        t[i + 1] = INTRINSIC(unpackhi_ps)(r[i], r[i + 1]);
    }
    UNROLL for (int i = 0; i < VECTOR; i += 4) {
        r[i] = INTRINSIC(shuffle_ps)(t[i], t[i + 2], 0x44);
        r[i + 1] = INTRINSIC(shuffle_ps)(t[i], t[i + 2], 0xee);
        r[i + 2] = INTRINSIC(shuffle_ps)(t[i + 1], t[i + 3], 0x44);
        r[i + 3] = INTRINSIC(shuffle_ps)(t[i + 1], t[i + 3], 0xee);
    }
    join_blocks(r, t);
    for (int i = 0; i < VECTOR && i * (1 + half) < depth; i++) store(VECTOR, to + i * step, t[i]);
}

/* the same for a P^T (width, depth) of few rows: sums along the rows of A, where tiles would be mostly empty */
static void dot_products(I height, I width, I depth, const float *a, const float *p, float *c, const float *bias) {
    for (I i = 0; i < height; i++)
        for (I j = 0; j < width; j++) {
            V sums[4] = {zeros(), zeros(), zeros(), zeros()};
            I k = 0;
            for (; k + 4 * VECTOR <= depth; k += 4 * VECTOR)
                UNROLL for (int q = 0; q < 4; q++)
                    sums[q] = add_product(sums[q], load(VECTOR, a + i * depth + k + q * VECTOR),
                                          load(VECTOR, p + j * depth + k + q * VECTOR));
            float sum = sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
            for (; k < depth; k++) sum += a[i * depth + k] * p[j * depth + k];
            c[i * width + j] = sum + bias[j];
        }
}

/* columns of C from `column` on, as many as fit a panel; A lies in rows of `steps` numbers, or with `half` of pairs */
INLINE void one_panel(const int half, I height, I width, I depth, const float *a, int a_columns, const float *p,
                      int transposed, float *c, Finish finish, float *panel, I column) {
    const I steps = half ? (depth + 1) / 2 : depth;
    const I left = width - column < PANEL ? width - column : PANEL;
    const int vectors = (left + VECTOR - 1) / VECTOR;
    const I last = left - (vectors - 1) * VECTOR, step = vectors * VECTOR;
    for (int j = 0; j < vectors; j++) {
        const float *from = p + (column + j * VECTOR) * (transposed ? depth : 1);
        if (transposed)
            for (I k = 0; k < steps; k += VECTOR)
                transpose(half, from + k * (1 + half), depth, left - j * VECTOR, depth - k * (1 + half),
                          panel + k * step + j * VECTOR, step);
        else
            for (I k = 0; k < steps; k++)
                store(VECTOR, panel + k * step + j * VECTOR,
                      one_below_other(half, from, width, k, depth, j == vectors - 1 ? last : VECTOR));
    }
#define TILES(v)                                                                                       \
    if (a_columns) tiles(half, v, 1, height, steps, a, height, panel, c, width, last, finish, column); \
    else tiles(half, v, 0, height, steps, a, steps, panel, c, width, last, finish, column)
    if (vectors == VECTORS) { TILES(VECTORS); }
    else if (vectors == 2) { TILES(2); }
    else { TILES(1); }
}

/* a function of its own for each precision, which threads call */
#define ONE_PANEL(name, half)                                                                                             \
    static __attribute__((noinline, noclone)) void name(I height, I width, I depth, const float *a, int a_columns,        \
                                                        const float *p, int transposed, float *c, const Finish *finish,   \
                                                        float *panel, I column) {                                         \
        one_panel(half, height, width, depth, a, a_columns, p, transposed, c, *finish, panel, column);                    \
    }
ONE_PANEL(single_panel, 0)
ONE_PANEL(half_panel, 1)

/* C (height, width) = A P; P is (depth, width), or with `transposed` given as (width, depth). `a_columns` says that A is
 * given as (depth, height). `panel` holds PANEL numbers for each of the sum and each thread, and `halves`, NULL in single
 * precision, A in pairs. */
static void matmul(I height, I width, I depth, const float *a, int a_columns, const float *p, int transposed, float *c,
                   Finish finish, float *panel, float *halves) {
    const I size = PANEL * depth;
    if (halves) halve(height, depth, a, a_columns, halves);
    PARALLEL
    for (I column = 0; column < width; column += PANEL)
        (halves ? half_panel : single_panel)(height, width, depth, halves ? halves : a, a_columns, p, transposed, c, &finish,
                                             panel + omp_get_thread_num() * size, column);
}

/* sums over the rows of y (height, width), to (width,) */
static void column_sums(I height, I width, const float *y, float *to) {
    memset(to, 0, width * sizeof(float));
    for (I i = 0; i < height; i++)
        for (I j = 0; j < width; j++) to[j] += y[i * width + j];
}

