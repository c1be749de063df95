/* A multi-layer perceptron, forward and backward, for processors with AVX-512; `kernel.py` calls it.
 *
 * Matrices are of single precision and row-major. B batch, and of one layer K inputs and N outputs:
 *
 *     forward    Y = X W^T + b         (B, K) (N, K) -> (B, N)
 *     backward   dX = dY W             (B, N) (N, K) -> (B, K)
 *                dW = dY^T X           (B, N) (B, K) -> (N, K)
 *
 * All three are one matmul C = A P, computed tile by tile: ROWS rows of A against a panel of up to 3 vectors of columns
 * of P, packed side by side, with the whole sum held in registers. Bias, ReLU and its gradient's mask are applied to a
 * tile before it is stored, so that no activation is read again for them.
 *
 * With `half` the factors of all matmuls but the narrowest are rounded to bfloat16, two of which along the sum are
 * multiplied at once and added in single precision; a pair of them is kept as the bits of one float.
 */
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
#define VECTOR 16 /* floats of a vector */
#define VECTORS 3 /* of a panel */
#define FEW 8     /* outputs that are summed one by one */
#define ROWS 8    /* of a tile: 8 x 3 sums, which leaves registers for a row of the panel */

typedef int64_t I;

typedef struct { /* what happens to a tile before it is stored */
    const float *bias; /* (N,), added; or NULL */
    const float *mask; /* (M, N), as C: entries not above 0 set C's to 0; or NULL */
    int relu;
} Finish;

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
        for (I k = 0; k < pairs; k++)
            for (I i = 0; i < height; i += VECTOR) {
                const __mmask16 in = height - i < VECTOR ? (1u << (height - i)) - 1 : 0xffff;
                _mm512_mask_storeu_ps(to + k * height + i, in, one_below_other(1, a + i, height, k, depth, in));
            }
    } else {
        for (I i = 0; i < height; i++)
            for (I k = 0; k < pairs; k += VECTOR) {
                const __mmask16 in = pairs - k < VECTOR ? (1u << (pairs - k)) - 1 : 0xffff;
                _mm512_mask_storeu_ps(to + i * pairs + k, in, side_by_side(1, a + i * depth + 2 * k, depth - 2 * k));
            }
    }
}

/* rows x vectors of C; A's entry (i, k) lies at a[i * stride + k], or with `columns` at a[i + k * stride] */
INLINE void tile(const int half, const int rows, const int vectors, const int columns, I depth, const float *a, I stride,
                 const float *panel, float *c, I width, __mmask16 last, Finish finish, const float *bias,
                 const float *mask) {
    __m512 sum[ROWS][VECTORS];
    UNROLL for (int i = 0; i < rows; i++)
        UNROLL for (int j = 0; j < vectors; j++)
            sum[i][j] = bias ? _mm512_maskz_loadu_ps(j == vectors - 1 ? last : 0xffff, bias + j * VECTOR)
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
    UNROLL for (int i = 0; i < rows; i++)
        UNROLL for (int j = 0; j < vectors; j++) {
            const __mmask16 in = j == vectors - 1 ? last : 0xffff;
            __m512 y = sum[i][j];
            if (finish.relu) y = _mm512_max_ps(_mm512_setzero_ps(), y);
            if (mask) {
                const __m512 h = _mm512_maskz_loadu_ps(in, mask + i * width + j * VECTOR);
                y = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(h, _mm512_setzero_ps(), _CMP_NLE_UQ), y);
            }
            _mm512_mask_storeu_ps(c + i * width + j * VECTOR, in, y);
        }
}

INLINE void tiles(const int half, const int vectors, const int columns, I height, I depth, const float *a, I stride,
                  const float *panel, float *c, I width, __mmask16 last, Finish finish, I column) {
    const float *bias = finish.bias ? finish.bias + column : 0;
    for (I i = 0; i < height;) {
        const float *from = a + i * (columns ? 1 : stride), *mask = finish.mask ? finish.mask + i * width + column : 0;
        float *to = c + i * width + column;
#define TILE(n) tile(half, n, vectors, columns, depth, from, stride, panel, to, width, last, finish, bias, mask), i += n
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

INLINE void panels(const int half, I height, I width, I depth, const float *a, int a_columns, const float *p,
                   int transposed, float *c, Finish finish, float *panel) {
    const I steps = half ? (depth + 1) / 2 : depth;
    for (I column = 0; column < width; column += VECTORS * VECTOR) {
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
}

/* C (height, width) = A P; P is (depth, width), or with `transposed` given as (width, depth). `a_columns` says that A is
 * given as (depth, height). `panel` holds 48 numbers for each of the sum, and with `half` behind `halves` A in pairs. */
static void matmul(I height, I width, I depth, const float *a, int a_columns, const float *p, int transposed, float *c,
                    Finish finish, float *panel, float *halves) {
    if (halves) {
        halve(height, depth, a, a_columns, halves);
        panels(1, height, width, depth, halves, a_columns, p, transposed, c, finish, panel);
    } else {
        panels(0, height, width, depth, a, a_columns, p, transposed, c, finish, panel);
    }
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

/* some rows z become (z - mean) / std; h = ReLU(scale z + shift); inverse = 1 / std */
INLINE void normalize(const int rows, I n, float *z, float *inverse, const float *scale, const float *shift, float *h) {
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
        STORE(z + i * n + j, y);
        STORE(h + i * n + j, _mm512_max_ps(_mm512_setzero_ps(), _mm512_fmadd_ps(LOAD(scale + j), y, LOAD(shift + j))));
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

static void norm_forward(I batch, I n, float *z, float *inverse, const float *scale, const float *shift, float *h) {
    I i = 0;
    for (; i + TOGETHER <= batch; i += TOGETHER)
        normalize(TOGETHER, n, z + i * n, inverse + i, scale, shift, h + i * n);
    for (; i < batch; i++) normalize(1, n, z + i * n, inverse + i, scale, shift, h + i * n);
}

static void norm_backward(I batch, I n, const float *z, const float *inverse, const float *scale, float *y,
                          float *scale_gradient, float *shift_gradient) {
    I i = 0;
    if (scale_gradient) {
        memset(scale_gradient, 0, n * sizeof(float)), memset(shift_gradient, 0, n * sizeof(float));
        for (I k = 0; k < batch; k++)
            for (I j = 0; j < n; j++)
                scale_gradient[j] += y[k * n + j] * z[k * n + j], shift_gradient[j] += y[k * n + j];
    }
    for (; i + TOGETHER <= batch; i += TOGETHER)
        normalize_backward(TOGETHER, n, z + i * n, inverse + i, scale, y + i * n);
    for (; i < batch; i++) normalize_backward(1, n, z + i * n, inverse + i, scale, y + i * n);
}

typedef struct { /* networks of equal shape; `sizes` are those of input, hidden layers and output */
    I layers, norm, batch;
    const I *sizes;
} Shape;

/* One network. `weights` lie as in BatchedMLP. `saved` takes of each hidden layer its activations (batch, n) and with
 * `norm` the normalised inputs (batch, n) and 1 / std (batch,). */
static void forward(Shape shape, const float *x, const float *weights, float *saved, float *out, float *panel,
                    float *halves) {
    const I layers = shape.layers, norm = shape.norm, batch = shape.batch, *sizes = shape.sizes;
    for (I l = 0; l < layers; l++) {
        const I k = sizes[l], n = sizes[l + 1];
        const float *bias = weights + n * k;
        const int hidden = l < layers - 1;
        float *h = hidden ? saved : out;
        if (hidden && norm) {
            float *z = saved + batch * n, *inverse = z + batch * n;
            matmul(batch, n, k, x, 0, weights, 1, z, (Finish){bias, 0, 0}, panel, halves);
            norm_forward(batch, n, z, inverse, bias + n, bias + 2 * n, h);
            saved = inverse + batch;
        } else if (!hidden && n <= FEW) {
            dot_products(batch, n, k, x, weights, h, bias);
        } else {
            matmul(batch, n, k, x, 0, weights, 1, h, (Finish){bias, 0, hidden}, panel, halves);
            saved += batch * n;
        }
        weights = bias + n + (hidden && norm ? 2 * n : 0);
        x = h;
    }
}

/* Gradients of the weights (as BatchedMLP's) and of x, each if not NULL, from that of the outputs `y`. `scratch` holds
 * two matrices (batch, widest layer). */
static void backward(Shape shape, const float *x, const float *weights, const float *saved, const float *y,
                     float *weight_gradient, float *x_gradient, float *panel, float *halves, float *scratch) {
    const I layers = shape.layers, norm = shape.norm, batch = shape.batch, *sizes = shape.sizes;
    I widest = 0;
    for (I l = 0; l < layers; l++) { /* to the ends of weights and saved */
        const I k = sizes[l], n = sizes[l + 1], hidden = l < layers - 1;
        const I count = n * k + n + (hidden && norm ? 2 * n : 0);
        weights += count;
        if (weight_gradient) weight_gradient += count;
        if (hidden) saved += batch * (norm ? 2 * n + 1 : n);
        if (k > widest) widest = k;
    }
    for (I l = layers - 1; l >= 0; l--) {
        const I k = sizes[l], n = sizes[l + 1], hidden = l < layers - 1;
        const I count = n * k + n + (hidden && norm ? 2 * n : 0);
        weights -= count;
        if (weight_gradient) weight_gradient -= count;
        float *after = weight_gradient ? weight_gradient + n * k : 0; /* gradients of bias, scale and shift */
        if (hidden && norm) { /* saved points behind this layer's */
            const float *inverse = saved - batch, *z = inverse - batch * n;
            norm_backward(batch, n, z, inverse, weights + n * k + n, (float *)y, after ? after + n : 0,
                          after ? after + 2 * n : 0);
        }
        if (hidden) saved -= batch * (norm ? 2 * n + 1 : n);
        const float *input = l ? saved - batch * (norm ? 2 * k + 1 : k) : x;
        if (weight_gradient) {
            matmul(n, k, batch, y, 1, input, 0, weight_gradient, (Finish){0, 0, 0}, panel, halves);
            column_sums(batch, n, y, after);
        }
        float *to = l ? scratch + (l & 1) * batch * widest : x_gradient;
        if (to) matmul(batch, k, n, y, 0, weights, 0, to, (Finish){0, l ? input : 0, 0}, panel, halves);
        y = to;
    }
}

/* The networks from `first` to before `stop`, each input x serving `share` of them in a row. Networks lie the strides
 * apart; `saved_stride` 0 keeps nothing. `panel` is scratch, 48 numbers for each of the widest layer or of
 * the batch; `halves`, NULL in single precision, is scratch of half the square of that. */
void mlp_forward(I first, I stop, I share, I layers, const I *sizes, I norm, I batch, const float *x,
                 const float *weights, I weights_stride, float *saved, I saved_stride, float *out, float *panel, float *halves) {
    const Shape shape = {layers, norm, batch, sizes};
    for (I m = first; m < stop; m++)
        forward(shape, x + m / share * batch * sizes[0], weights + m * weights_stride, saved + m * saved_stride,
                out + m * batch * sizes[layers], panel, halves);
}

void mlp_backward(I first, I stop, I share, I layers, const I *sizes, I norm, I batch, const float *x,
                  const float *weights, I weights_stride, const float *saved, I saved_stride, const float *y,
                  float *weight_gradient, I gradient_stride, float *x_gradient, float *panel, float *halves,
                  float *scratch) {
    const Shape shape = {layers, norm, batch, sizes};
    for (I m = first; m < stop; m++)
        backward(shape, x + m / share * batch * sizes[0], weights + m * weights_stride, saved + m * saved_stride,
                 y + m * batch * sizes[layers], weight_gradient ? weight_gradient + m * gradient_stride : 0,
                 x_gradient ? x_gradient + m * batch * sizes[0] : 0, panel, halves, scratch);
}
