/* Norms, rotations and gates of a few rows; `pointwise_reference` specifies them. Numbers of a row lie side by side. */
#include "vectors.h"

struct rms_norm {
    const float *x, *weight;
    float *y;                  /* [outer, inner, width] without gaps */
    int64_t outer, inner, width, x_outer, x_inner, offset; /* with `offset` the weight is 1 + weight */
    double eps;
};

KERNEL void rms_norm(const struct rms_norm *a) {
    float *y = a->y, one = a->offset ? 1.0f : 0.0f;
    int64_t width = a->width;
    for (int64_t o = 0; o < a->outer; o++)
        for (int64_t r = 0; r < a->inner; r++, y += width) {
            const float *x = a->x + o * a->x_outer + r * a->x_inner;
            vec squares = all(0.0f);
            int64_t i = 0;
            for (; i + WIDTH <= width; i += WIDTH) squares += load(x + i) * load(x + i);
            float sum = total(squares);
            for (; i < width; i++) sum += x[i] * x[i];
            float scale = 1.0f / sqrtf(sum / (float)width + (float)a->eps);
            for (i = 0; i + WIDTH <= width; i += WIDTH) store(y + i, load(x + i) * scale * (load(a->weight + i) + one));
            for (; i < width; i++) y[i] = x[i] * scale * (a->weight[i] + one);
        }
}

struct rotate {
    const float *x, *cos, *sin;
    float *y;                  /* [heads, tokens, width] without gaps */
    int64_t heads, tokens, width, x_head, x_token, cos_token, sin_token;
};

/* y[i] = x[i] cos[i] - x[i + half] sin[i] in the first half of a head, y[i] = x[i] cos[i] + x[i - half] sin[i] in the
   second. */
KERNEL void rotate(const struct rotate *a) {
    float *y = a->y;
    int64_t half = a->width / 2;
    for (int64_t h = 0; h < a->heads; h++)
        for (int64_t t = 0; t < a->tokens; t++, y += a->width) {
            const float *x = a->x + h * a->x_head + t * a->x_token;
            const float *cos = a->cos + t * a->cos_token, *sin = a->sin + t * a->sin_token;
            for (int64_t i = 0; i < half; i++) {
                float first = x[i], second = x[i + half];
                y[i] = first * cos[i] - second * sin[i];
                y[i + half] = second * cos[i + half] + first * sin[i + half];
            }
        }
}

struct gate {
    const float *x;            /* [rows, 2 width] */
    float *y;                  /* [rows, width] */
    int64_t rows, width, x_row, gelu;
};

/* silu(x) = x / (1 + exp(-x)); the tanh form of gelu is x / (1 + exp(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3). */
INLINE vec activate(vec x, int64_t gelu) {
    vec u = x;
    if (gelu) u *= x * x * 0.07135481282f + 1.595769122f;
    return x / (exponential(-u) + 1.0f);
}

KERNEL void gate(const struct gate *a) {
    for (int64_t t = 0; t < a->rows; t++) {
        const float *x = a->x + t * a->x_row, *up = x + a->width;
        float *y = a->y + t * a->width;
        int64_t i = 0;
        for (; i + WIDTH <= a->width; i += WIDTH) store(y + i, activate(load(x + i), a->gelu) * load(up + i));
        if (i < a->width) {
            float last[WIDTH] = {0};
            memcpy(last, x + i, (a->width - i) * sizeof(float));
            vec v = activate(load(last), a->gelu);
            for (int64_t j = i; j < a->width; j++) y[j] = v[j - i] * up[j];
        }
    }
}
