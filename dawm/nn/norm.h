/* Layer norm, forward and backward. Threads share the rows. */
#include "matmul.h"

#define EPSILON 1e-5f /* torch.nn.functional.layer_norm's */

#define TOGETHER 4 /* rows normalised at once, so that the sums of one do not wait for those of another */
#define EACH(r) UNROLL for (int r = 0; r < rows; r++)
#define COLUMNS(j, n) for (I j = 0; j < n; j += VECTOR)

/* some rows z become (z - mean) / std; h = scale z + shift, or ReLU of it, in rows of `width`; inverse = 1 / std */
INLINE void normalize(const int relu, const int rows, I n, float *z, float *inverse, const float *scale,
                      const float *shift, float *h, I width) {
    V sum[TOGETHER], mean[TOGETHER], square[TOGETHER], r[TOGETHER];
    EACH(i) sum[i] = square[i] = zeros();
    COLUMNS(j, n) EACH(i) sum[i] = sum[i] + load(n - j, z + i * n + j);
    EACH(i) mean[i] = all(sum_of(sum[i]) / n);
    COLUMNS(j, n) EACH(i) {
        const V d = load(n - j, z + i * n + j) - (n - j < VECTOR ? of_first(n - j, mean[i]) : mean[i]);
        square[i] = d * d + square[i];
    }
    EACH(i) r[i] = all(inverse[i] = 1 / __builtin_sqrtf(sum_of(square[i]) / n + EPSILON));
    COLUMNS(j, n) EACH(i) {
        const V y = (load(n - j, z + i * n + j) - mean[i]) * r[i];
        const V x = load(n - j, scale + j) * y + load(n - j, shift + j);
        store(n - j, z + i * n + j, y);
        store(n - j, h + i * width + j, relu ? larger(zeros(), x) : x);
    }
}

/* some rows of dY, already masked by the ReLU, become the gradient before the norm */
INLINE void normalize_backward(const int rows, I n, const float *z, const float *inverse, const float *scale, float *y) {
    V mean[TOGETHER], along[TOGETHER];
    EACH(i) mean[i] = along[i] = zeros();
    COLUMNS(j, n) EACH(i) {
        const V g = load(n - j, y + i * n + j) * load(n - j, scale + j);
        mean[i] = mean[i] + g;
        along[i] = g * load(n - j, z + i * n + j) + along[i];
    }
    EACH(i) mean[i] = all(sum_of(mean[i]) / n);
    EACH(i) along[i] = all(sum_of(along[i]) / n);
    COLUMNS(j, n) EACH(i) {
        const V g = load(n - j, y + i * n + j) * load(n - j, scale + j) - mean[i];
        store(n - j, y + i * n + j, (g - along[i] * load(n - j, z + i * n + j)) * all(inverse[i]));
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
