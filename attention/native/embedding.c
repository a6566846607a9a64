/* Rows of a table at given places. */
#include "vectors.h"

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
