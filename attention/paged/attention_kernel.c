/* Paged attention of a few tokens a sequence, and the writes before it; `reference.py` specifies it.

   The R query heads of a group of key and value heads and the sequence's new tokens are the rows of a product with the
   group's keys, a page after the other, with a running softmax. A row's result does not depend on others beside it. */
#include "vectors.h"

enum { BLOCK = 64, CHUNK = 48 }; /* keys between two updates of the running softmax; rows at a time */

struct attention {
    const float *query, *key, *value; /* [T, H, D], [T, G, D], [T, G, Dv]; no value where values are in keys */
    float *out;                       /* [T, H, Dv] without gaps */
    float *key_pages, *value_pages;   /* of this layer: [pages, page size, G, D] and Dv */
    const int64_t *block_tables, *kv_lengths, *cu_seqlens, *positions;
    const int64_t *slots; /* NULL where key and value are in the pages already */
    const int64_t *tree_bits, *cu_tree_sizes, *tree_positions; /* NULL without trees */
    const float *sinks;                                        /* [H] or NULL */
    int64_t value_row; /* numbers from a token's values to the next one's in the pages; D where values are in keys */
    int64_t tokens, sequences, heads, groups, width, value_width, page_size, table_width, words;
    int64_t query_token, query_head, key_token, key_head, value_token, value_head;
    int64_t window, first_tokens; /* 0: none; how many keys no window hides */
    double scale, softcap; /* softcap 0: none */
};

/* What a sequence's tokens see: all keys up to themselves, of its tree their ancestors, within the window. */
struct sequence {
    int64_t length, first_token, count, tree, tree_size;
    const int64_t *pages, *tree_positions;
};

INLINE struct sequence sequence_of(const struct attention *a, int64_t b) {
    struct sequence s = {.length = a->kv_lengths[b], .first_token = a->cu_seqlens[b],
                         .count = a->cu_seqlens[b + 1] - a->cu_seqlens[b],
                         .pages = a->block_tables + b * a->table_width};
    if (a->tree_bits) {
        s.tree_size = a->cu_tree_sizes[b + 1] - a->cu_tree_sizes[b];
        s.tree_positions = a->tree_positions + a->cu_tree_sizes[b];
    }
    s.tree = s.length - s.tree_size; /* place of the tree's root */
    return s;
}

/* Whether token `t` of the batch, at `place` in its sequence, sees key `j`. */
INLINE int sees(const struct attention *a, const struct sequence *s, int64_t t, int64_t place, int64_t j) {
    int64_t position = j;
    if (s->tree_size && j >= s->tree) {
        int64_t node = j - s->tree;
        position = s->tree_positions[node];
        if (place >= s->tree) {
            if (!(a->tree_bits[t * a->words + node / 64] >> (node % 64) & 1)) return 0;
        } else if (j > place) {
            return 0;
        }
    } else if (j > place) {
        return 0;
    }
    return !a->window || a->positions[t] - position < a->window || position < a->first_tokens;
}

static void write_new(const struct attention *a) {
    for (int64_t t = 0; t < a->tokens; t++) {
        int64_t slot = a->slots[t];
        if (slot < 0) continue;
        for (int64_t g = 0; g < a->groups; g++) {
            memcpy(a->key_pages + (slot * a->groups + g) * a->width,
                   a->key + t * a->key_token + g * a->key_head, a->width * sizeof(float));
            if (a->value)
                memcpy(a->value_pages + slot * a->value_row + g * a->value_width,
                       a->value + t * a->value_token + g * a->value_head, a->value_width * sizeof(float));
        }
    }
}

/* scores[t][j] of T rows and `count` keys */
INLINE void score(const int T, const struct attention *a, const float *q, const float *k, int64_t count,
                  float *scores) {
    float four[MOST][MOST];
    int64_t j = 0, row = a->groups * a->width;
    for (; j + 4 <= count; j += 4) {
        tile(T, 4, 0, q, a->width, k + j * row, row, a->width, four);
        for (int t = 0; t < T; t++) memcpy(scores + t * BLOCK + j, four[t], 4 * sizeof(float));
    }
    for (; j < count; j++) {
        tile(T, 1, 0, q, a->width, k + j * row, row, a->width, four);
        for (int t = 0; t < T; t++) scores[t * BLOCK + j] = four[t][0];
    }
}

/* out[t] = out[t] * keep[t] + sum over j of weights[t][j] v[j] */
INLINE void add_values(const int T, const struct attention *a, const float *weights, const float *keep, const float *v,
                       int64_t count, float *out) {
    int64_t row = a->value_row, width = a->value_width, i = 0;
    for (; i + 2 * WIDTH <= width; i += 2 * WIDTH) {
        vec sums[MOST][2];
        for (int t = 0; t < T; t++)
            for (int n = 0; n < 2; n++) sums[t][n] = load(out + t * width + i + n * WIDTH) * keep[t];
        for (int64_t j = 0; j < count; j++) {
            vec first = load(v + j * row + i), second = load(v + j * row + i + WIDTH);
            for (int t = 0; t < T; t++) {
                sums[t][0] += first * weights[t * BLOCK + j];
                sums[t][1] += second * weights[t * BLOCK + j];
            }
        }
        for (int t = 0; t < T; t++)
            for (int n = 0; n < 2; n++) store(out + t * width + i + n * WIDTH, sums[t][n]);
    }
    for (; i < width; i++)
        for (int t = 0; t < T; t++) {
            float sum = out[t * width + i] * keep[t];
            for (int64_t j = 0; j < count; j++) sum += v[j * row + i] * weights[t * BLOCK + j];
            out[t * width + i] = sum;
        }
}

/* Scores of one row -> weights exp(score - largest so far), with zeros up to a whole vector; returns the factor for
   what was summed before. */
INLINE float soften(float *scores, int64_t count, float *largest, float *mass) {
    float top = *largest;
    for (int64_t j = count; j % WIDTH; j++) scores[j] = -INFINITY;
    vec tops = load(scores);
    for (int64_t j = WIDTH; j < count; j += WIDTH) tops = select(load(scores + j) > tops, load(scores + j), tops);
    for (int i = 0; i < WIDTH; i++) top = tops[i] > top ? tops[i] : top;
    if (top == -INFINITY) {
        memset(scores, 0, count * sizeof(float));
        return 1.0f;
    }
    vec sum = all(0.0f);
    for (int64_t j = 0; j < count; j += WIDTH) {
        vec x = load(scores + j);
        vec e = select(x == -INFINITY, all(0.0f), exponential(x - top));
        store(scores + j, e);
        sum += e;
    }
    float factor = *largest == -INFINITY ? 0.0f : expf(*largest - top);
    *largest = top;
    *mass = *mass * factor + total(sum);
    return factor;
}

INLINE void block(const int T, const struct attention *a, const struct sequence *s, int64_t row, const float *q,
                  const float *k, const float *v, int64_t first, int64_t count, int64_t sure, float *state,
                  float *out) {
    float scores[MOST * BLOCK], keep[MOST];
    score(T, a, q, k, count, scores);
    for (int t = 0; t < T; t++) {
        int64_t token = s->first_token + (row + t) % s->count, place = s->length - s->count + (row + t) % s->count;
        float *mine = scores + t * BLOCK;
        if (a->softcap)
            for (int64_t j = 0; j < count; j++) mine[j] = (float)a->softcap * tanhf(mine[j] / (float)a->softcap);
        for (int64_t j = first < sure ? sure - first : 0; j < count; j++)
            if (!sees(a, s, token, place, first + j)) mine[j] = -INFINITY;
        keep[t] = soften(mine, count, state + 2 * t, state + 2 * t + 1);
    }
    add_values(T, a, scores, keep, v, count, out);
}

/* The place in the sequence of the last of the tokens that rows from `row` on stand for. */
INLINE int64_t last_place(const struct sequence *s, int64_t row, int64_t rows) {
    int64_t token = row % s->count + rows - 1; /* past the end: rows of the next head follow */
    return s->length - s->count + (token < s->count ? token : s->count - 1);
}

/* `count` rows from `first` on of one group of heads of one sequence. */
static void attend(const struct attention *a, const struct sequence *s, int64_t g, int64_t first, int64_t count) {
    int64_t repeats = a->heads / a->groups, held = a->table_width * a->page_size;
    int64_t keys = s->length < held ? s->length : held, begin = 0;
    int64_t sure = s->tree < s->length - s->count + 1 ? s->tree : s->length - s->count + 1; /* keys all rows see */
    float q[count * a->width], out[count * a->value_width], state[2 * count];
    memset(out, 0, sizeof out);
    for (int64_t r = 0; r < count; r++) {
        int64_t head = g * repeats + (first + r) / s->count, t = s->first_token + (first + r) % s->count;
        const float *from = a->query + t * a->query_token + head * a->query_head;
        for (int64_t i = 0; i < a->width; i++) q[r * a->width + i] = from[i] * (float)a->scale;
        state[2 * r] = a->sinks ? a->sinks[head] : -INFINITY;
        state[2 * r + 1] = a->sinks ? 1.0f : 0.0f;
    }
    if (a->window) {
        sure = 0;
        int64_t outside = s->length - s->count - s->tree_size - a->window; /* keys before it are in no window */
        if (outside > 0) begin = outside / BLOCK * BLOCK;
    }
    for (int64_t j = a->first_tokens ? 0 : begin; j < keys;) {
        if (j >= a->first_tokens && j < begin) j = begin;
        int64_t within = j % a->page_size, n = keys - j;
        if (n > a->page_size - within) n = a->page_size - within;
        if (n > BLOCK) n = BLOCK;
        int64_t slot = s->pages[j / a->page_size] * a->page_size + within;
        const float *k = a->key_pages + (slot * a->groups + g) * a->width;
        const float *v = a->value_pages + slot * a->value_row + g * a->value_width;
        for (int64_t r = 0; r < count;) {
            int64_t left = count - r, row = first + r, taken = left >= 6 ? 6 : left >= 3 ? 3 : 1;
            if (!a->tree_bits && j > last_place(s, row, taken)) { /* all keys come after these rows */
                r += taken;
                continue;
            }
            float *o = out + r * a->value_width, *x = q + r * a->width, *st = state + 2 * r;
            switch (taken) {
            case 6: block(6, a, s, row, x, k, v, j, n, sure, st, o); break;
            case 3: block(3, a, s, row, x, k, v, j, n, sure, st, o); break;
            default: block(1, a, s, row, x, k, v, j, n, sure, st, o);
            }
            r += taken;
        }
        j += n;
    }
    for (int64_t r = 0; r < count; r++) {
        int64_t head = g * repeats + (first + r) / s->count, t = s->first_token + (first + r) % s->count;
        float *to = a->out + (t * a->heads + head) * a->value_width;
        for (int64_t i = 0; i < a->value_width; i++) to[i] = out[r * a->value_width + i] / state[2 * r + 1];
    }
}

/* Part `i` of the work: a group of heads of a sequence, and at most CHUNK of its rows. */
static void attend_part(const struct attention *a, int64_t chunks, int64_t i) {
    struct sequence s = sequence_of(a, i / chunks / a->groups);
    int64_t rows = a->heads / a->groups * s.count, first = i % chunks * CHUNK;
    if (first < rows) attend(a, &s, i / chunks % a->groups, first, rows - first < CHUNK ? rows - first : CHUNK);
}

KERNEL void paged_attention(const struct attention *a) {
    int64_t most = 0;
    for (int64_t b = 0; b < a->sequences; b++) {
        int64_t rows = a->heads / a->groups * (a->cu_seqlens[b + 1] - a->cu_seqlens[b]);
        if (rows > most) most = rows;
    }
    int64_t chunks = (most + CHUNK - 1) / CHUNK, parts = a->sequences * a->groups * chunks;
    if (a->slots) write_new(a);
#ifdef _OPENMP
    if (parts > 1 && omp_get_max_threads() > 1) {
#pragma omp parallel for schedule(dynamic)
        for (int64_t i = 0; i < parts; i++) attend_part(a, chunks, i);
        return;
    }
#endif
    for (int64_t i = 0; i < parts; i++) attend_part(a, chunks, i);
}
