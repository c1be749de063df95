/* Multi-layer perceptrons, forward and backward; `compiled.py` calls them. */
#include "norm.h"

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
            matmul(batch, n, k, x, 0, weights, 1, z, (Finish){.bias = bias}, panel, halves);
            norm_forward(1, batch, n, z, inverse, bias + n, bias + 2 * n, h, n);
            saved = inverse + batch;
        } else if (!hidden && n <= FEW) {
            dot_products(batch, n, k, x, weights, h, bias);
        } else {
            matmul(batch, n, k, x, 0, weights, 1, h, (Finish){.bias = bias, .relu = hidden}, panel, halves);
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
            matmul(n, k, batch, y, 1, input, 0, weight_gradient, (Finish){0}, panel, halves);
            column_sums(batch, n, y, after);
        }
        float *to = l ? scratch + (l & 1) * batch * widest : x_gradient;
        if (to) matmul(batch, k, n, y, 0, weights, 0, to, (Finish){.mask = l ? input : 0}, panel, halves);
        y = to;
    }
}

/* All networks, each input x serving `share` of them in a row. Networks lie the strides apart; `saved_stride` 0 keeps
 * nothing. `panel` is scratch, for each thread PANEL numbers for each of the widest layer or of the batch; `halves`, NULL in
 * single precision, is scratch of half the square of that. */
void mlp_forward(I parallel, I networks, I share, I layers, const I *sizes, I norm, I batch, const float *x,
                 const float *weights, I weights_stride, float *saved, I saved_stride, float *out, float *panel,
                 float *halves) {
    const Shape shape = {layers, norm, batch, sizes};
    threads = parallel;
    for (I m = 0; m < networks; m++)
        forward(shape, x + m / share * batch * sizes[0], weights + m * weights_stride, saved + m * saved_stride,
                out + m * batch * sizes[layers], panel, halves);
}

void mlp_backward(I parallel, I networks, I share, I layers, const I *sizes, I norm, I batch, const float *x,
                  const float *weights, I weights_stride, const float *saved, I saved_stride, const float *y,
                  float *weight_gradient, I gradient_stride, float *x_gradient, float *panel, float *halves,
                  float *scratch) {
    const Shape shape = {layers, norm, batch, sizes};
    threads = parallel;
    for (I m = 0; m < networks; m++)
        backward(shape, x + m / share * batch * sizes[0], weights + m * weights_stride, saved + m * saved_stride,
                 y + m * batch * sizes[layers], weight_gradient ? weight_gradient + m * gradient_stride : 0,
                 x_gradient ? x_gradient + m * batch * sizes[0] : 0, panel, halves, scratch);
}
