/* The residual MLP of `dawm/diffusion/denoisers.py`, forward and backward; `compiled.py` calls it.
 *
 * With f the features of noise level and condition, w the width, and SiLU and layer norm as there:
 *
 *     e = SiLU(W2 SiLU(W1 f))        h_0 = W3 [x, e]        h_(b+1) = h_b + Wo SiLU(Wi [norm(h_b), e])        y = W h
 *
 * `p` are its parameters in the order of the module, of each layer the weight and then the bias, of a norm scale and
 * shift: those of W1, W2, W3, of each block the norm, Wi and Wo, and W.
 */
#include "norm.h"

typedef struct { /* sizes of batch, x, f, w, and the number of blocks */
    I batch, in, features, width, blocks;
} Sizes;

typedef struct { /* what the forward pass keeps, matrices of B rows */
    float *before1, *one, *before2, *e, *joined; /* (w), (w), (w), (w), (in + w): before a SiLU and after; [x, e] */
} Start;

typedef struct {
    float *h, *z, *inverse, *joined, *before, *after; /* (w), (w), (1), (2 w), (w), (w) */
} Block;

static I start_size(Sizes s) { return s.batch * (5 * s.width + s.in); }
static I block_size(Sizes s) { return s.batch * (6 * s.width + 1); }

/* how many numbers a forward pass keeps: the last is h, the input of the last layer */
I residual_saved(I batch, I in, I features, I width, I blocks) {
    const Sizes s = {batch, in, features, width, blocks};
    return start_size(s) + blocks * block_size(s) + batch * width;
}

static Start start_at(Sizes s, float *m) {
    const I n = s.batch * s.width;
    return (Start){m, m + n, m + 2 * n, m + 3 * n, m + 4 * n};
}

static Block block_at(Sizes s, float *saved, I b) {
    const I n = s.batch * s.width;
    float *m = saved + start_size(s) + b * block_size(s);
    return (Block){m, m + n, m + 2 * n, m + 2 * n + s.batch, m + 4 * n + s.batch, m + 5 * n + s.batch};
}

/* columns of a matrix of `rows` rows that are `from_width` apart, added to or put into others */
static void copy(I rows, I columns, const float *from, I from_width, float *to, I to_width, int add) {
    for (I i = 0; i < rows; i++)
        for (I j = 0; j < columns; j++)
            to[i * to_width + j] = from[i * from_width + j] + (add ? to[i * to_width + j] : 0);
}

void residual_forward(I parallel, I batch, I in, I features, I width, I blocks, const float *x, const float *f,
                      const float *const *p, float *saved, float *y, float *panel, float *halves) {
    const Sizes s = {batch, in, features, width, blocks};
    const Start a = start_at(s, saved);
    threads = parallel;
    matmul(batch, width, features, f, 0, p[0], 1, a.one, (Finish){.bias = p[1], .before = a.before1}, panel, halves);
    matmul(batch, width, width, a.one, 0, p[2], 1, a.e, (Finish){.bias = p[3], .before = a.before2}, panel, halves);
    copy(batch, in, x, in, a.joined, in + width, 0);
    copy(batch, width, a.e, width, a.joined + in, in + width, 0);
    float *h = block_at(s, saved, 0).h;
    matmul(batch, width, in + width, a.joined, 0, p[4], 1, h, (Finish){.bias = p[5]}, panel, halves);
    p += 6;
    for (I b = 0; b < blocks; b++, p += 6) {
        const Block k = block_at(s, saved, b);
        copy(batch, width, k.h, width, k.z, width, 0);
        norm_forward(0, batch, width, k.z, k.inverse, p[0], p[1], k.joined, 2 * width);
        copy(batch, width, a.e, width, k.joined + width, 2 * width, 0);
        matmul(batch, width, 2 * width, k.joined, 0, p[2], 1, k.after, (Finish){.bias = p[3], .before = k.before}, panel,
               halves);
        h = block_at(s, saved, b + 1).h;
        matmul(batch, width, width, k.after, 0, p[4], 1, h, (Finish){.bias = p[5], .add = k.h}, panel, halves);
    }
    matmul(batch, in, width, h, 0, p[0], 1, y, (Finish){.bias = p[1]}, panel, halves);
}

/* gradients of a layer's weight (N, K) and bias from that of its outputs `y` (B, N) and its inputs (B, K) */
static void layer_gradients(I batch, I n, I k, const float *y, const float *inputs, float **g, float *panel,
                            float *halves) {
    matmul(n, k, batch, y, 1, inputs, 0, g[0], (Finish){0}, panel, halves);
    column_sums(batch, n, y, g[1]);
}

/* Gradients `g` of all parameters, in their order, from that of the outputs `y`. `scratch` holds (B, 6 w + in). */
void residual_backward(I parallel, I batch, I in, I features, I width, I blocks, const float *f, const float *const *p,
                       float *saved, const float *y, float **g, float *panel, float *halves, float *scratch) {
    const Sizes s = {batch, in, features, width, blocks};
    const Start a = start_at(s, saved);
    const I n = batch * width;
    threads = parallel;
    float *dh = scratch, *de = dh + n, *one = de + n, *two = one + n, *joined = two + n; /* the last one (2 w + in) */
    p += 6 + 6 * blocks, g += 6 + 6 * blocks;
    layer_gradients(batch, in, width, y, block_at(s, saved, blocks).h, g, panel, halves);
    matmul(batch, width, in, y, 0, p[0], 0, dh, (Finish){0}, panel, halves);
    memset(de, 0, n * sizeof(float));
    for (I b = blocks - 1; b >= 0; b--) {
        const Block k = block_at(s, saved, b);
        p -= 6, g -= 6;
        layer_gradients(batch, width, width, dh, k.after, g + 4, panel, halves);
        matmul(batch, width, width, dh, 0, p[4], 0, one, (Finish){.slope = k.before}, panel, halves);
        layer_gradients(batch, width, 2 * width, one, k.joined, g + 2, panel, halves);
        matmul(batch, 2 * width, width, one, 0, p[2], 0, joined, (Finish){0}, panel, halves);
        copy(batch, width, joined, 2 * width, two, width, 0);
        copy(batch, width, joined + width, 2 * width, de, width, 1);
        norm_backward(batch, width, k.z, k.inverse, p[0], two, g[0], g[1]);
        copy(batch, width, two, width, dh, width, 1);
    }
    p -= 6, g -= 6;
    layer_gradients(batch, width, in + width, dh, a.joined, g + 4, panel, halves);
    matmul(batch, in + width, width, dh, 0, p[4], 0, joined, (Finish){0}, panel, halves);
    copy(batch, width, joined + in, in + width, de, width, 1);
    for (I i = 0; i < n; i += VECTOR)
        store(n - i, one + i, silu_slope(load(n - i, a.before2 + i)) * load(n - i, de + i));
    layer_gradients(batch, width, width, one, a.one, g + 2, panel, halves);
    matmul(batch, width, width, one, 0, p[2], 0, two, (Finish){.slope = a.before1}, panel, halves);
    layer_gradients(batch, width, features, two, f, g, panel, halves);
}
