/* Vectors of floats for the kernels of a CPU, in the vector extensions of GCC and Clang. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef _OPENMP
#include <omp.h>
#endif

#if defined(__AVX512F__)
#define WIDTH 16
#else
#define WIDTH 8
#endif
#define INLINE static inline __attribute__((always_inline))
#define KERNEL __attribute__((visibility("default")))
#define MOST 8     /* rows and columns of a tile */
#define AHEAD 12288 /* bytes that are fetched before they are needed */

typedef float vec __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef uint16_t halves __attribute__((vector_size(2 * WIDTH), aligned(2), may_alias));

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ints){__VA_ARGS__})
#endif

INLINE vec load(const float *p) { return *(const vec *)p; }
INLINE void store(float *p, vec x) { *(vec *)p = x; }
INLINE vec all(float x) { return (vec){0} + x; }
INLINE vec select(ints condition, vec a, vec b) { return (vec)(((ints)a & condition) | ((ints)b & ~condition)); }

/* Numbers in 16 bits, bfloat16, are the upper halves of floats. */
INLINE vec load_half(const uint16_t *p) {
    return (vec)(__builtin_convertvector(*(const halves *)p, ints) << 16);
}
INLINE float from_half(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}
INLINE uint16_t to_half(float f) { /* to the nearest, ties to even */
    uint32_t bits;
    memcpy(&bits, &f, 4);
    if (f != f) return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

/* The sums of the lanes of four vectors. */
INLINE void totals(vec a, vec b, vec c, vec d, float sums[4]) {
#if WIDTH == 16
    vec ab = SHUFFLE(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
             SHUFFLE(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    vec cd = SHUFFLE(c, d, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
             SHUFFLE(c, d, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    vec r = SHUFFLE(ab, cd, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
            SHUFFLE(ab, cd, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    r += SHUFFLE(r, r, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    r += SHUFFLE(r, r, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
    for (int i = 0; i < 4; i++) sums[i] = r[4 * i];
#else
    vec ab = SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11) + SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
    vec cd = SHUFFLE(c, d, 0, 1, 2, 3, 8, 9, 10, 11) + SHUFFLE(c, d, 4, 5, 6, 7, 12, 13, 14, 15);
    vec r = SHUFFLE(ab, cd, 0, 1, 4, 5, 8, 9, 12, 13) + SHUFFLE(ab, cd, 2, 3, 6, 7, 10, 11, 14, 15);
    r += SHUFFLE(r, r, 1, 0, 3, 2, 5, 4, 7, 6);
    for (int i = 0; i < 4; i++) sums[i] = r[2 * i];
#endif
}

INLINE float total(vec a) {
    float sums[4];
    totals(a, a, a, a, sums);
    return sums[0];
}

/* exp(x) of each lane, to about a rounding; x below -87 gives exp(-87), above 88 exp(88).
   2^n exp(r) with |r| <= ln 2 / 2, by the Taylor series of exp. NaN stays NaN. */
INLINE vec exponential(vec given) {
    vec x = select(given < -87.0f, all(-87.0f), given);
    x = select(x > 88.0f, all(88.0f), x);
    vec n = x * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    ints exponent = (ints)n << 23;
    n -= 12582912.0f;
    vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f; /* ln 2 in two parts */
    vec sum = all(1.0f / 5040.0f);
    sum = sum * r + 1.0f / 720.0f;
    sum = sum * r + 1.0f / 120.0f;
    sum = sum * r + 1.0f / 24.0f;
    sum = sum * r + 1.0f / 6.0f;
    sum = sum * r + 0.5f;
    sum = sum * r + 1.0f;
    sum = sum * r + 1.0f;
    return select(given != given, given, (vec)((ints)sum + exponent));
}

/* y[t][o] = <x[t], w[o]> for T rows of x and O rows of w, of n numbers each. T and O are constants at each call, so
   that all sums stay in registers. The order of a sum depends on n alone: a row's result is the same with others beside
   it. `half`: w holds 16-bit numbers. */
INLINE void tile(const int T, const int O, const int half, const float *x, int64_t x_row, const void *w, int64_t w_row,
                 int64_t n, float y[MOST][MOST]) {
    const float *floats = w;
    const uint16_t *short_floats = w;
    vec sums[MOST][MOST];
    int64_t i = 0;
    for (int t = 0; t < T; t++)
        for (int o = 0; o < O; o++) sums[t][o] = all(0.0f);
    for (; i + WIDTH <= n; i += WIDTH) {
        vec column[MOST];
        for (int o = 0; o < O; o++) {
            if (half) {
                column[o] = load_half(short_floats + o * w_row + i);
                __builtin_prefetch((const char *)(short_floats + o * w_row + i) + AHEAD);
            } else {
                column[o] = load(floats + o * w_row + i);
                __builtin_prefetch((const char *)(floats + o * w_row + i) + AHEAD);
            }
        }
        for (int t = 0; t < T; t++) {
            vec row = load(x + t * x_row + i);
            for (int o = 0; o < O; o++) sums[t][o] += row * column[o];
        }
    }
    for (int t = 0; t < T; t++) {
        float four[4];
        for (int o = 0; o < O; o += 4) {
            if (O - o >= 4) {
                totals(sums[t][o], sums[t][o + 1], sums[t][o + 2], sums[t][o + 3], four);
                for (int k = 0; k < 4; k++) y[t][o + k] = four[k];
            } else {
                for (int k = 0; k < O - o; k++) y[t][o + k] = total(sums[t][o + k]);
            }
        }
        for (int o = 0; o < O; o++)
            for (int64_t j = i; j < n; j++)
                y[t][o] += x[t * x_row + j] * (half ? from_half(short_floats[o * w_row + j]) : floats[o * w_row + j]);
    }
}
