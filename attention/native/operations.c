/* PyTorch's operations that stand between a model's larger parts. */
#include "vectors.h"

struct elementwise {
    const float *x, *other; /* [count]; `other` NULL for a function of one tensor */
    float *y;
    int64_t count;
};

#define ELEMENTWISE(name, expression)                                             \
    KERNEL void name(const struct elementwise *a) {                               \
        int64_t i = 0;                                                            \
        for (; i + WIDTH <= a->count; i += WIDTH) {                               \
            vec x = load(a->x + i), other = load((a->other ? a->other : a->x) + i); \
            store(a->y + i, expression);                                          \
        }                                                                         \
        for (; i < a->count; i++) {                                               \
            vec x = all(a->x[i]), other = all((a->other ? a->other : a->x)[i]);   \
            a->y[i] = (expression)[0];                                            \
        }                                                                         \
    }

ELEMENTWISE(add, x + other)
ELEMENTWISE(mul, x * other)
ELEMENTWISE(silu, other / (exponential(-x) + 1.0f)) /* `other` is x */

struct embedding {
    const char *table;
    const int64_t *places; /* [count], which are clamped to the table */
    char *rows;
    int64_t count, size, bytes; /* rows of the table, and bytes of a row */
};

KERNEL void embedding(const struct embedding *a) {
    for (int64_t i = 0; i < a->count; i++) {
        int64_t place = a->places[i] < 0 ? 0 : a->places[i] < a->size ? a->places[i] : a->size - 1;
        memcpy(a->rows + i * a->bytes, a->table + place * a->bytes, a->bytes);
    }
}
