/* Products of a few rows with a matrix stored by rows: each weight is read once. */
#include "vectors.h"

enum { WORTH_THREADS = 1 << 16 }; /* weights of a product that several threads share */

struct skinny_linear {
    const float *x;         /* [rows, in] */
    const void *weight;     /* [out, in], floats or, if `half`, bfloat16 */
    const void *bias;       /* [out] or NULL */
    const void *added;      /* [rows, out] or NULL */
    void *y;                /* [rows, out] */
    float *wide;            /* [most, in], room for rows of 16-bit numbers */
    int64_t rows, in, out;
    int64_t x_row, weight_row, added_row, y_row, half, most;
};

INLINE float number(const void *p, int64_t i, int64_t half) {
    return half ? from_half(((const uint16_t *)p)[i]) : ((const float *)p)[i];
}

/* T rows from `t` on, O outputs from `o` on. */
INLINE void part(const int T, const int O, const int half, const struct skinny_linear *a, const float *x, int64_t x_row,
                 int64_t t, int64_t o) {
    float y[MOST][MOST];
    const void *w = (const char *)a->weight + o * a->weight_row * (half ? 2 : 4);
    tile(T, O, half, x + t * x_row, x_row, w, a->weight_row, a->in, y);
    for (int i = 0; i < T; i++)
        for (int j = 0; j < O; j++) {
            float sum = y[i][j];
            if (a->bias) sum += number(a->bias, o + j, half);
            int64_t place = (t + i) * a->y_row + o + j;
            if (half) {
                sum = from_half(to_half(sum)); /* a sum that follows sees the rounded product */
                if (a->added) sum += number(a->added, (t + i) * a->added_row + o + j, half);
                ((uint16_t *)a->y)[place] = to_half(sum);
            } else {
                if (a->added) sum += number(a->added, (t + i) * a->added_row + o + j, half);
                ((float *)a->y)[place] = sum;
            }
        }
}

/* All rows, O outputs from `o` on, in pieces of at most T rows. */
INLINE void columns(const int T, const int O, const int half, const struct skinny_linear *a, const float *x,
                    int64_t x_row, int64_t o) {
    int64_t t = 0;
    for (; t + T <= a->rows; t += T) part(T, O, half, a, x, x_row, t, o);
    switch (a->rows - t) {
    case 5: part(5, O, half, a, x, x_row, t, o); break;
    case 4: part(4, O, half, a, x, x_row, t, o); break;
    case 3: part(3, O, half, a, x, x_row, t, o); break;
    case 2: part(2, O, half, a, x, x_row, t, o); break;
    case 1: part(1, O, half, a, x, x_row, t, o); break;
    }
}

/* The outputs from `o` to `end`; T and O fit the number of rows. */
INLINE void outputs(const int T, const int O, const int half, const struct skinny_linear *a, const float *x,
                    int64_t x_row, int64_t o, int64_t end) {
    for (; o + O <= end; o += O) columns(T, O, half, a, x, x_row, o);
    for (; o < end; o++) columns(T, 1, half, a, x, x_row, o);
}

INLINE void share(const int half, const struct skinny_linear *a, const float *x, int64_t x_row, int64_t o, int64_t end) {
    switch (a->rows) {
    case 1: outputs(1, 4, half, a, x, x_row, o, end); break;
    case 2: outputs(2, 4, half, a, x, x_row, o, end); break;
    case 3: case 4: case 7: case 8: outputs(4, 4, half, a, x, x_row, o, end); break;
    default: outputs(6, 4, half, a, x, x_row, o, end);
    }
}

INLINE void product(const int half, const struct skinny_linear *a, const float *x, int64_t x_row) {
#ifdef _OPENMP
    if (a->in * a->out >= WORTH_THREADS && omp_get_max_threads() > 1) {
#pragma omp parallel
        {
            int64_t threads = omp_get_num_threads(), each = (a->out / 8 + threads - 1) / threads * 8;
            int64_t first = omp_get_thread_num() * each, last = first + each;
            if (omp_get_thread_num() == threads - 1 || last > a->out) last = a->out;
            share(half, a, x, x_row, first, last);
        }
        return;
    }
#endif
    share(half, a, x, x_row, 0, a->out);
}

/* In pieces whose rows stay in the cache next to the core; rows of 16-bit numbers are widened first. */
KERNEL void skinny_linear(const struct skinny_linear *a) {
    int64_t size = a->half ? 2 : 4;
    for (int64_t t = 0; t < a->rows; t += a->most) {
        struct skinny_linear piece = *a;
        piece.rows = a->rows - t < a->most ? a->rows - t : a->most;
        piece.x = (const float *)((const char *)a->x + t * a->x_row * size);
        piece.y = (char *)a->y + t * a->y_row * size;
        if (a->added) piece.added = (const char *)a->added + t * a->added_row * size;
        if (!a->half) {
            product(0, &piece, piece.x, a->x_row);
            continue;
        }
        const uint16_t *x = (const uint16_t *)piece.x;
        for (int64_t r = 0; r < piece.rows; r++)
            for (int64_t i = 0; i < a->in; i++) a->wide[r * a->in + i] = from_half(x[r * a->x_row + i]);
        product(1, &piece, a->wide, a->in);
    }
}
