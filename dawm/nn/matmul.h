/* Matmuls and layer norm for processors with AVX-512; `mlp.c` and `residual.c` build networks of them.
 *
 * Matrices are of single precision and row-major. B batch, and of one layer K inputs and N outputs:
 *
 *     forward    Y = X W^T + b         (B, K) (N, K) -> (B, N)
 *     backward   dX = dY W             (B, N) (N, K) -> (B, K)
 *                dW = dY^T X           (B, N) (B, K) -> (N, K)
 *
 * All three are one matmul C = A P, computed tile by tile: ROWS rows of A against a panel of up to 3 vectors of columns
 * of P, packed side by side, with the whole sum held in registers. What follows a matmul (`Finish`) is applied to a tile
 * before it is stored, so that no matrix is read again for it.
 *
 * Threads share the panels, and the rows of a norm; none shares a sum, so that results do not depend on their number.
 *
 * With `half` the factors of all matmuls but the narrowest are rounded to bfloat16, two of which along the sum are
 * multiplied at once and added in single precision; a pair of them is kept as the bits of one float.
 */
#include <immintrin.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
#define VECTOR 16 /* floats of a vector */
#define VECTORS 3 /* of a panel */
#define FEW 8     /* outputs that are summed one by one */
#define ROWS 8    /* of a tile: 8 x 3 sums, which leaves registers for a row of the panel */

typedef int64_t I;

static _Thread_local int threads = 1; /* that share the loops marked PARALLEL; every call from Python sets it */
#define PARALLEL _Pragma("omp parallel for schedule(static) num_threads(threads) if (threads > 1)")

typedef struct { /* what happens to a tile before it is stored, in this order; NULL for what does not */
    const float *bias;  /* (N,), added; the matrices below are as C */
    const float *mask;  /* entries not above 0 set C's to 0: the gradient of ReLU */
    const float *slope; /* C is multiplied by SiLU's slope at it: the gradient of SiLU */
    const float *add;   /* added */
    float *before;      /* C is stored there, and SiLU of it in C */
    int relu;
} Finish;

/* 1 / (1 + exp(-x)); exp2 by a power of 2 and Taylor's polynomial, whose error is 1e-7 */
INLINE __m512 sigmoid(__m512 x) {
    const __m512 t = _mm512_mul_ps(_mm512_max_ps(_mm512_set1_ps(-126), _mm512_min_ps(_mm512_set1_ps(126), x)),
                                   _mm512_set1_ps(-1.44269504f));
    const __m512 n = _mm512_roundscale_ps(t, 0), f = _mm512_sub_ps(t, n);
    __m512 y = _mm512_set1_ps(1.54035304e-4f);
    const float factors[] = {1.33335581e-3f, 9.61812911e-3f, 5.55041087e-2f, 2.40226507e-1f, 6.93147181e-1f, 1.0f};
    UNROLL for (int i = 0; i < 6; i++) y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(factors[i]));
    return _mm512_div_ps(_mm512_set1_ps(1), _mm512_add_ps(_mm512_set1_ps(1), _mm512_scalef_ps(y, n)));
}

/* the derivative of SiLU, x sigmoid(x) */
INLINE __m512 silu_slope(__m512 x) {
    const __m512 s = sigmoid(x);
    return _mm512_fmadd_ps(s, _mm512_fnmadd_ps(s, x, x), s);
}

/* pairs of bfloat16 from two vectors: (low_0, high_0), (low_1, high_1), ... */
INLINE __m512 interleaved(__m512 low, __m512 high) {
    const __m512i order = _mm512_add_epi32(_mm512_set1_epi32(0x00100000),
        _mm512_mullo_epi32(_mm512_set1_epi32(0x00010001),
                           _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)));
    return (__m512)_mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

/* a vector of numbers that lie side by side, `left` of them before the end, or with `half` of pairs of such numbers */
INLINE __m512 side_by_side(const int half, const float *from, I left) {
    const __mmask16 low = left >= 16 ? 0xffff : (1u << left) - 1;
    if (!half) return _mm512_maskz_loadu_ps(low, from);
    const __mmask16 high = left >= 32 ? 0xffff : left <= 16 ? 0 : (1u << (left - 16)) - 1;
    return (__m512)_mm512_cvtne2ps_pbh(_mm512_maskz_loadu_ps(high, from + 16), _mm512_maskz_loadu_ps(low, from));
}

/* columns of row k of a matrix of `depth` rows, or with `half` of the rows 2 k and 2 k + 1 in pairs */
INLINE __m512 one_below_other(const int half, const float *from, I width, I k, I depth, __mmask16 in) {
    if (!half) return _mm512_maskz_loadu_ps(in, from + k * width);
    const __mmask16 second = 2 * k + 1 < depth ? in : 0;
    return interleaved(_mm512_maskz_loadu_ps(in, from + 2 * k * width),
                       _mm512_maskz_loadu_ps(second, from + (2 * k + 1) * width));
}

/* A (height, depth), or with `columns` (depth, height), in pairs along the sum */
static void halve(I height, I depth, const float *a, int columns, float *to) {
    const I pairs = (depth + 1) / 2;
    if (columns) {
        PARALLEL
        for (I k = 0; k < pairs; k++)
            for (I i = 0; i < height; i += VECTOR) {
                const __mmask16 in = height - i < VECTOR ? (1u << (height - i)) - 1 : 0xffff;
                _mm512_mask_storeu_ps(to + k * height + i, in, one_below_other(1, a + i, height, k, depth, in));
            }
    } else {
        PARALLEL
        for (I i = 0; i < height; i++)
            for (I k = 0; k < pairs; k += VECTOR) {
                const __mmask16 in = pairs - k < VECTOR ? (1u << (pairs - k)) - 1 : 0xffff;
                _mm512_mask_storeu_ps(to + i * pairs + k, in, side_by_side(1, a + i * depth + 2 * k, depth - 2 * k));
            }
    }
}

/* stores a tile of sums, finished, at c + at */
static __attribute__((noinline)) void store(const __m512 *sums, int rows, int vectors, float *c, I width, __mmask16 last,
                                            const Finish *finish, I at) {
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < vectors; j++) {
            const __mmask16 in = j == vectors - 1 ? last : 0xffff;
            const I to = at + i * width + j * VECTOR;
            __m512 y = sums[i * vectors + j];
            if (finish->relu) y = _mm512_max_ps(_mm512_setzero_ps(), y);
            if (finish->mask) {
                const __m512 h = _mm512_maskz_loadu_ps(in, finish->mask + to);
                y = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(h, _mm512_setzero_ps(), _CMP_NLE_UQ), y);
            }
            if (finish->slope) y = _mm512_mul_ps(y, silu_slope(_mm512_maskz_loadu_ps(in, finish->slope + to)));
            if (finish->add) y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(in, finish->add + to));
            if (finish->before) {
                _mm512_mask_storeu_ps(finish->before + to, in, y);
                y = _mm512_mul_ps(y, sigmoid(y));
            }
            _mm512_mask_storeu_ps(c + to, in, y);
        }
}

/* rows x vectors of C; A's entry (i, k) lies at a[i * stride + k], or with `columns` at a[i + k * stride] */
INLINE void tile(const int half, const int rows, const int vectors, const int columns, I depth, const float *a, I stride,
                 const float *panel, float *c, I width, __mmask16 last, Finish finish, I column, I at) {
    const float *bias = finish.bias + column;
    __m512 sum[ROWS][VECTORS];
    UNROLL for (int i = 0; i < rows; i++)
        UNROLL for (int j = 0; j < vectors; j++)
            sum[i][j] = finish.bias ? _mm512_maskz_loadu_ps(j == vectors - 1 ? last : 0xffff, bias + j * VECTOR)
                             : _mm512_setzero_ps();
    for (I k = 0; k < depth; k++) {
        __m512 row[VECTORS];
        UNROLL for (int j = 0; j < vectors; j++) row[j] = _mm512_load_ps(panel + (k * vectors + j) * VECTOR);
        UNROLL for (int i = 0; i < rows; i++) {
            const __m512 x = _mm512_set1_ps(columns ? a[i + k * stride] : a[i * stride + k]);
            UNROLL for (int j = 0; j < vectors; j++)
                sum[i][j] = half ? _mm512_dpbf16_ps(sum[i][j], (__m512bh)x, (__m512bh)row[j])
                                 : _mm512_fmadd_ps(x, row[j], sum[i][j]);
        }
    }
    __m512 sums[ROWS * VECTORS]; /* a second array, so that the first stays in registers */
    UNROLL for (int i = 0; i < rows; i++)
        UNROLL for (int j = 0; j < vectors; j++) sums[i * vectors + j] = sum[i][j];
    store(sums, rows, vectors, c, width, last, &finish, at);
}

INLINE void tiles(const int half, const int vectors, const int columns, I height, I depth, const float *a, I stride,
                  const float *panel, float *c, I width, __mmask16 last, Finish finish, I column) {
    for (I i = 0; i < height;) {
        const float *from = a + i * (columns ? 1 : stride);
#define TILE(n) \
    tile(half, n, vectors, columns, depth, from, stride, panel, c, width, last, finish, column, i * width + column), i += n
        if (height - i >= ROWS) TILE(ROWS);
        else if (height - i >= 4) TILE(4);
        else TILE(1);
    }
}

/* 16 x 16 block of P^T, rows `stride` apart, to 16 rows of a panel `step` apart; n of its rows and depth of its numbers
 * along the sum exist, the others are 0 */
INLINE void transpose(const int half, const float *from, I stride, I n, I depth, float *to, I step) {
    __m512 r[16], t[16];
    UNROLL for (int i = 0; i < 16; i++)
        r[i] = i < n ? side_by_side(half, from + i * stride, depth) : _mm512_setzero_ps();
    UNROLL for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
    UNROLL for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
        r[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
        r[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        r[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    UNROLL for (int i = 0; i < 4; i++)
        UNROLL for (int q = 0; q < 2; q++) {
            t[i + 8 * q] = _mm512_shuffle_f32x4(r[i + 8 * q], r[i + 4 + 8 * q], 0x88);
            t[i + 4 + 8 * q] = _mm512_shuffle_f32x4(r[i + 8 * q], r[i + 4 + 8 * q], 0xdd);
        }
    UNROLL for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
        r[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
        r[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd);
    }
    for (int i = 0; i < 16 && i * (1 + half) < depth; i++) _mm512_store_ps(to + i * step, r[i]);
}

/* the same for a P^T (width, depth) of few rows: sums along the rows of A, where tiles would be mostly empty */
static void dot_products(I height, I width, I depth, const float *a, const float *p, float *c, const float *bias) {
    for (I i = 0; i < height; i++)
        for (I j = 0; j < width; j++) {
            __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
            I k = 0;
            for (; k + 4 * VECTOR <= depth; k += 4 * VECTOR)
                UNROLL for (int q = 0; q < 4; q++)
                    sums[q] = _mm512_fmadd_ps(_mm512_loadu_ps(a + i * depth + k + q * VECTOR),
                                              _mm512_loadu_ps(p + j * depth + k + q * VECTOR), sums[q]);
            float sum = _mm512_reduce_add_ps(
                _mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3])));
            for (; k < depth; k++) sum += a[i * depth + k] * p[j * depth + k];
            c[i * width + j] = sum + bias[j];
        }
}

/* columns of C from `column` on, as many as fit a panel; A lies in rows of `steps` numbers, or with `half` of pairs */
INLINE void one_panel(const int half, I height, I width, I depth, const float *a, int a_columns, const float *p,
                      int transposed, float *c, Finish finish, float *panel, I column) {
    const I steps = half ? (depth + 1) / 2 : depth;
    const I left = width - column < VECTORS * VECTOR ? width - column : VECTORS * VECTOR;
    const int vectors = (left + VECTOR - 1) / VECTOR;
    const __mmask16 last = 0xffff >> (vectors * VECTOR - left);
    const I step = vectors * VECTOR;
    for (int j = 0; j < vectors; j++) {
        const float *from = p + (column + j * VECTOR) * (transposed ? depth : 1);
        if (transposed)
            for (I k = 0; k < steps; k += 16)
                transpose(half, from + k * (1 + half), depth, left - j * VECTOR, depth - k * (1 + half),
                          panel + k * step + j * VECTOR, step);
        else
            for (I k = 0; k < steps; k++)
                _mm512_store_ps(panel + k * step + j * VECTOR,
                                one_below_other(half, from, width, k, depth, j == vectors - 1 ? last : 0xffff));
    }
#define TILES(v)                                                                                       \
    if (a_columns) tiles(half, v, 1, height, steps, a, height, panel, c, width, last, finish, column); \
    else tiles(half, v, 0, height, steps, a, steps, panel, c, width, last, finish, column)
    if (vectors == 3) { TILES(3); }
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
 * given as (depth, height). `panel` holds 48 numbers for each of the sum and each thread, and `halves`, NULL in single
 * precision, A in pairs. */
static void matmul(I height, I width, I depth, const float *a, int a_columns, const float *p, int transposed, float *c,
                   Finish finish, float *panel, float *halves) {
    const I size = VECTORS * VECTOR * depth;
    if (halves) halve(height, depth, a, a_columns, halves);
    PARALLEL
    for (I column = 0; column < width; column += VECTORS * VECTOR)
        (halves ? half_panel : single_panel)(height, width, depth, halves ? halves : a, a_columns, p, transposed, c, &finish,
                                             panel + omp_get_thread_num() * size, column);
}

/* sums over the rows of y (height, width), to (width,) */
static void column_sums(I height, I width, const float *y, float *to) {
    memset(to, 0, width * sizeof(float));
    for (I i = 0; i < height; i++)
        for (I j = 0; j < width; j++) to[j] += y[i * width + j];
}

#define EPSILON 1e-5f /* torch.nn.functional.layer_norm's */

#define TOGETHER 4 /* rows normalised at once, so that the sums of one do not wait for those of another */
#define EACH(r) UNROLL for (int r = 0; r < rows; r++)
#define COLUMNS(j, n)                                                                  \
    for (I j = 0; j < n; j += VECTOR)                                                  \
        for (__mmask16 in = n - j < VECTOR ? (1u << (n - j)) - 1 : 0xffff, go = 1; go; go = 0)
#define LOAD(p) _mm512_maskz_loadu_ps(in, p)
#define STORE(p, y) _mm512_mask_storeu_ps(p, in, y)

/* some rows z become (z - mean) / std; h = scale z + shift, or ReLU of it, in rows of `width`; inverse = 1 / std */
INLINE void normalize(const int relu, const int rows, I n, float *z, float *inverse, const float *scale,
                      const float *shift, float *h, I width) {
    __m512 sum[TOGETHER], mean[TOGETHER], square[TOGETHER], r[TOGETHER];
    EACH(i) sum[i] = square[i] = _mm512_setzero_ps();
    COLUMNS(j, n) EACH(i) sum[i] = _mm512_add_ps(sum[i], LOAD(z + i * n + j));
    EACH(i) mean[i] = _mm512_set1_ps(_mm512_reduce_add_ps(sum[i]) / n);
    COLUMNS(j, n) EACH(i) {
        const __m512 d = _mm512_maskz_sub_ps(in, LOAD(z + i * n + j), mean[i]);
        square[i] = _mm512_fmadd_ps(d, d, square[i]);
    }
    EACH(i) r[i] = _mm512_set1_ps(inverse[i] = 1 / __builtin_sqrtf(_mm512_reduce_add_ps(square[i]) / n + EPSILON));
    COLUMNS(j, n) EACH(i) {
        const __m512 y = _mm512_mul_ps(_mm512_sub_ps(LOAD(z + i * n + j), mean[i]), r[i]);
        const __m512 x = _mm512_fmadd_ps(LOAD(scale + j), y, LOAD(shift + j));
        STORE(z + i * n + j, y);
        STORE(h + i * width + j, relu ? _mm512_max_ps(_mm512_setzero_ps(), x) : x);
    }
}

/* some rows of dY, already masked by the ReLU, become the gradient before the norm */
INLINE void normalize_backward(const int rows, I n, const float *z, const float *inverse, const float *scale, float *y) {
    __m512 mean[TOGETHER], along[TOGETHER];
    EACH(i) mean[i] = along[i] = _mm512_setzero_ps();
    COLUMNS(j, n) EACH(i) {
        const __m512 g = _mm512_mul_ps(LOAD(y + i * n + j), LOAD(scale + j));
        mean[i] = _mm512_add_ps(mean[i], g);
        along[i] = _mm512_fmadd_ps(g, LOAD(z + i * n + j), along[i]);
    }
    EACH(i) mean[i] = _mm512_set1_ps(_mm512_reduce_add_ps(mean[i]) / n);
    EACH(i) along[i] = _mm512_set1_ps(_mm512_reduce_add_ps(along[i]) / n);
    COLUMNS(j, n) EACH(i) {
        const __m512 g = _mm512_fmsub_ps(LOAD(y + i * n + j), LOAD(scale + j), mean[i]);
        const __m512 left = _mm512_fnmadd_ps(along[i], LOAD(z + i * n + j), g);
        STORE(y + i * n + j, _mm512_mul_ps(left, _mm512_set1_ps(inverse[i])));
    }
}

static void norm_forward(int relu, I batch, I n, float *z, float *inverse, const float *scale, const float *shift,
                         float *h, I width) {
    const I whole = batch - batch % TOGETHER;
    PARALLEL
    for (I i = 0; i < whole; i += TOGETHER)
        normalize(relu, TOGETHER, n, z + i * n, inverse + i, scale, shift, h + i * width, width);
    for (I i = whole; i < batch; i++) normalize(relu, 1, n, z + i * n, inverse + i, scale, shift, h + i * width, width);
}

static void norm_backward(I batch, I n, const float *z, const float *inverse, const float *scale, float *y,
                          float *scale_gradient, float *shift_gradient) {
    const I whole = batch - batch % TOGETHER;
    if (scale_gradient) {
        memset(scale_gradient, 0, n * sizeof(float)), memset(shift_gradient, 0, n * sizeof(float));
        for (I k = 0; k < batch; k++)
            for (I j = 0; j < n; j++)
                scale_gradient[j] += y[k * n + j] * z[k * n + j], shift_gradient[j] += y[k * n + j];
    }
    PARALLEL
    for (I i = 0; i < whole; i += TOGETHER)
        normalize_backward(TOGETHER, n, z + i * n, inverse + i, scale, y + i * n);
    for (I i = whole; i < batch; i++) normalize_backward(1, n, z + i * n, inverse + i, scale, y + i * n);
}
