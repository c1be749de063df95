/* Vectors of single precision as wide as the processor's registers, AVX-512's or AVX2's; the rest of the code is the same
 * for both. Vectors add and multiply with C's operators, and the compiler fuses a product with its sum.
 *
 * A count below VECTOR loads and stores that many numbers, and zeros for the rest; VECTOR or more is a whole vector.
 */
#include <immintrin.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

typedef int64_t I;

#ifdef __AVX512F__

#define VECTOR 16 /* floats of a vector */
#define VECTORS 3 /* of a panel */
#define ROWS 8    /* of a tile: 8 x 3 sums, which leaves registers for a row of the panel */
typedef __m512 V;
#define INTRINSIC(name) _mm512_##name
INLINE __mmask16 first(I count) { return (1u << count) - 1; }
INLINE V load_some(I count, const float *from) { return _mm512_maskz_loadu_ps(first(count), from); }
INLINE void store_some(I count, float *to, V y) { _mm512_mask_storeu_ps(to, first(count), y); }
INLINE V of_first(I count, V x) { return _mm512_maskz_mov_ps(first(count), x); }
INLINE V where_above_0(V x, V y) { return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_NLE_UQ), y); }
INLINE V rounded(V x) { return _mm512_roundscale_ps(x, 0); }
INLINE V times_power_of_2(V x, V n) { return _mm512_scalef_ps(x, n); }
INLINE float sum_of(V x) { return _mm512_reduce_add_ps(x); }

/* bfloat16, where the processor has it: two numbers in the place of one. Of two vectors, one after the other */
INLINE V halved(V low, V high) { return (V)_mm512_cvtne2ps_pbh(high, low); }
/* and in pairs: (low_0, high_0), (low_1, high_1), ... */
INLINE V paired(V low, V high) {
    const __m512i order = _mm512_add_epi32(_mm512_set1_epi32(0x00100000),
        _mm512_mullo_epi32(_mm512_set1_epi32(0x00010001),
                           _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)));
    return (V)_mm512_permutexvar_epi16(order, (__m512i)halved(low, high));
}
INLINE V add_products_of_pairs(V sum, V x, V y) { return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)y); }

/* blocks of 4 x 4 numbers, transposed within and side by side in 4 vectors for each 4 rows, to whole columns */
INLINE void join_blocks(const V *r, V *to) {
    V t[16];
    UNROLL for (int i = 0; i < 4; i++)
        UNROLL for (int q = 0; q < 2; q++) {
            t[i + 8 * q] = _mm512_shuffle_f32x4(r[i + 8 * q], r[i + 4 + 8 * q], 0x88);
            t[i + 4 + 8 * q] = _mm512_shuffle_f32x4(r[i + 8 * q], r[i + 4 + 8 * q], 0xdd);
        }
    UNROLL for (int i = 0; i < 4; i++) {
        to[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
        to[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
        to[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
        to[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

#else

#define VECTOR 8
#define VECTORS 2
#define ROWS 6
typedef __m256 V;
#define INTRINSIC(name) _mm256_##name
INLINE __m256i first(I count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
INLINE V load_some(I count, const float *from) { return _mm256_maskload_ps(from, first(count)); }
INLINE void store_some(I count, float *to, V y) { _mm256_maskstore_ps(to, first(count), y); }
INLINE V of_first(I count, V x) { return _mm256_and_ps((V)first(count), x); }
INLINE V where_above_0(V x, V y) { return _mm256_and_ps(_mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_NLE_UQ), y); }
INLINE V rounded(V x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE V times_power_of_2(V x, V n) { /* n from -126 to 127, as the exponent of a float */
    return x * (V)_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
}
INLINE float sum_of(V x) {
    const __m128 four = _mm256_castps256_ps128(x) + _mm256_extractf128_ps(x, 1), two = four + _mm_movehl_ps(four, four);
    return two[0] + two[1];
}

INLINE V halved(V low, V high) { return (void)high, low; } /* never asked: no processor has bfloat16 without AVX-512 */
INLINE V paired(V low, V high) { return halved(low, high); }
INLINE V add_products_of_pairs(V sum, V x, V y) { return (void)x, (void)y, sum; }

INLINE void join_blocks(const V *r, V *to) {
    UNROLL for (int i = 0; i < 4; i++) {
        to[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
        to[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
    }
}

#endif

INLINE V zeros(void) { return INTRINSIC(setzero_ps)(); }
INLINE V all(float x) { return INTRINSIC(set1_ps)(x); }
INLINE V larger(V x, V y) { return INTRINSIC(max_ps)(x, y); } /* y where one is not a number */
INLINE V smaller(V x, V y) { return INTRINSIC(min_ps)(x, y); }
INLINE V add_product(V sum, V x, V y) { return INTRINSIC(fmadd_ps)(x, y, sum); }
INLINE V load(I count, const float *from) {
    return count < VECTOR ? load_some(count, from) : INTRINSIC(loadu_ps)(from);
}
INLINE void store(I count, float *to, V y) {
    if (count < VECTOR) store_some(count, to, y);
    else INTRINSIC(storeu_ps)(to, y);
}

/* 1 / (1 + exp(-x)); exp2 by a power of 2 and Taylor's polynomial, whose error is 1e-7 */
INLINE V sigmoid(V x) {
    const V t = larger(all(-126), smaller(all(126), x * all(-1.44269504f))), n = rounded(t), f = t - n;
    V y = all(1.54035304e-4f);
    const float factors[] = {1.33335581e-3f, 9.61812911e-3f, 5.55041087e-2f, 2.40226507e-1f, 6.93147181e-1f, 1.0f};
    UNROLL for (int i = 0; i < 6; i++) y = y * f + all(factors[i]);
    return all(1) / (all(1) + times_power_of_2(y, n));
}

/* the derivative of SiLU, x sigmoid(x) */
INLINE V silu_slope(V x) {
    const V s = sigmoid(x);
    return s * (x - s * x) + s;
}

static _Thread_local int threads = 1; /* that share the loops marked PARALLEL; every call from Python sets it */
#define PARALLEL _Pragma("omp parallel for schedule(static) num_threads(threads) if (threads > 1)")
