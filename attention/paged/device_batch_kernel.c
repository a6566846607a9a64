/* `device_batch.place_tokens` specifies it. */
#include "vectors.h"

struct place_tokens {
    int64_t *lengths;            /* [rows], which grow by `count` */
    const uint8_t *alive;        /* [rows] */
    const int64_t *table;        /* [rows, table_width], the slot of every position */
    int64_t *kv_lengths;         /* [rows] */
    int64_t *positions, *slots;  /* [rows, count] */
    int64_t rows, table_width, count;
};

KERNEL void place_tokens(const struct place_tokens *a) {
    for (int64_t b = 0; b < a->rows; b++) {
        int64_t length = a->lengths[b] += a->count;
        a->kv_lengths[b] = a->alive[b] && length > a->count ? length : a->count;
        for (int64_t i = 0; i < a->count; i++) {
            int64_t place = length - a->count + i, inside = place < a->table_width ? place : a->table_width - 1;
            a->positions[b * a->count + i] = place > 0 ? place : 0;
            a->slots[b * a->count + i] = a->alive[b] && place >= 0 ? a->table[b * a->table_width + inside] : -1;
        }
    }
}
