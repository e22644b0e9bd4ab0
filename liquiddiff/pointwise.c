/* 1x1 convolution on row-major float32 (B, P, K) -> (B, P, O), P positions of each of B images: forward, and all
 * gradients in one pass. y = out(in(c) W^T + bias (+ more)), where c is x or a depthwise convolution of it, `in` is
 * nothing, or SiLU of c plus a row of each image, and `out` is nothing or SiLU.
 *
 * A tile of positions at a time: c, SiLU, its slope and the product's own gradient stay in the nearest caches. Tiles,
 * and the chunks of them that share sums, are cut by the shape alone: the same bits at any number of threads. */
#include "entries.h"

typedef struct {
    const float *x, *row, *w, *bias, *more, *before, *g; /* w: packed */
    float *y, *kept, *c, *dx, *sums, *rows, *room;       /* kept: what SiLU is of; rows: (tiles, K) */
    const depthwise_t *conv;                             /* or NULL */
    float *taps;
    cut_t cut;
    idx K, O, size, each; /* floats of a chunk's sums, of a thread's room */
    int in, out;
} job_t;

static void forward(void *data, idx k, idx me) {
    const job_t *j = data;
    const tile_t t = tile(j->cut, k);
    const idx at = t.at, rows = t.rows, K = j->K, O = j->O;
    const float *x = j->x + at * K;
    float *room = j->room + me * j->each;
    const out_t out = {j->bias, j->more ? j->more + at * O : NULL, j->y + at * O, j->kept ? j->kept + at * O : NULL};
    if (j->conv) {
        float *c = j->c ? j->c + at * K : room;
        convolve(j->conv, t, K, j->x, j->taps, c), x = c;
    }
    if (j->in) activate(rows, K, x, j->row ? j->row + t.b * K : NULL, room, NULL), x = room;
    if (j->out) product(SILU, rows, x, K, j->w, O, out);
    else if (j->more) product(ADD, rows, x, K, j->w, O, out);
    else product(PLAIN, rows, x, K, j->w, O, out);
}

static void backward_tile(const job_t *j, idx k, float *sums, float *room) {
    const tile_t t = tile(j->cut, k);
    const idx at = t.at, rows = t.rows, K = j->K, O = j->O;
    const float *g = j->g + at * O, *x = j->x + at * K;
    float *active = room, *slope = active + TILE * K, *own = slope + TILE * K, *dx = j->dx ? j->dx + at * K : NULL;
    if (j->out) { /* what the product itself gets */
        const float *before = j->before + at * O;
        for (idx i = 0; i < rows * O; i += VL) {
            const idx n = rows * O - i < VL ? rows * O - i : VL;
            const vec z = load(before + i, n), s = sigmoid(z);
            store(own + i, load(g + i, n) * (s * (1.0f + z * (1.0f - s))), n);
        }
        g = own;
    }
    if (j->in) activate(rows, K, x, j->row ? j->row + t.b * K : NULL, active, slope), x = active;
    if (sums) weight_gradient(rows, g, O, x, K, sums);
    if (!dx) return;
    if (j->in) product(TIMES, rows, g, O, j->w, K, (out_t){.more = slope, .y = dx});
    else product(PLAIN, rows, g, O, j->w, K, (out_t){.y = dx});
    if (j->rows) {
        float *row = j->rows + k * K;
        memset(row, 0, K * sizeof(float));
        for (idx r = 0; r < rows; r++, dx += K)
            for (idx c = 0; c < K; c += VL) add(row + c, load(dx + c, K - c < VL ? K - c : VL), K - c < VL ? K - c : VL);
    }
}

static void backward(void *data, idx k, idx me) {
    const job_t *j = data;
    float *sums = j->sums ? j->sums + k * j->size : NULL;
    if (sums) memset(sums, 0, j->size * sizeof(float));
    for (idx n = k * j->cut.chunk; n < (k + 1) * j->cut.chunk && n < j->cut.tiles; n++)
        backward_tile(j, n, sums, j->room + me * j->each);
}

/* conv, whose H W are P, may be NULL; so may row (B, K), which needs `in`, bias and more; before, what SiLU is of,
 * (B, P, O), and c, what conv gives, (B, P, K), are written where they are not NULL. No dimension is 0. Returns 0, or 1
 * when out of memory. */
int pw_forward(const float *x, const float *row, const float *w, const float *bias, const float *more, float *y,
               float *before, float *c, const depthwise_t *conv, idx B, idx P, idx K, idx O, int in, int out,
               const pool_t *pool, idx threads) {
    job_t j = {.x = x, .c = c, .conv = conv, .row = row, .w = packed(w, O, K, 0, pool, threads), .bias = bias,
               .more = more, .y = y, .kept = before, .cut = cut(B, P), .K = K, .O = O, .each = in || conv ? TILE * K : 0,
               .in = in, .out = out};
    j.taps = conv ? conv->pack(conv->w, K) : NULL;
    j.room = floats(j.each * parts(j.cut.tiles, pool, threads));
    const int failed = !j.w || !j.room || (conv && !j.taps);
    if (!failed) side_by_side(forward, &j, j.cut.tiles, pool, threads);
    free((void *)j.w), free(j.room), free(j.taps);
    return failed;
}

/* g (B, P, O): gradient of y; x: c, where there is a conv; `before` as kept by the forward pass, or NULL where out is 0.
 * drow, dx may be NULL; so may dw, and db with it; with dw, O >= product_least_outputs, K >= product_least_inputs.
 * Returns 0, or 1 when out of memory. */
int pw_backward(const float *g, const float *x, const float *row, const float *w, const float *before, float *dx, float *dw,
                float *db, float *drow, idx B, idx P, idx K, idx O, int in, int out, const pool_t *pool, idx threads) {
    job_t j = {.g = g, .x = x, .row = row, .before = before, .dx = dx, .cut = cut(B, P), .K = K, .O = O, .in = in, .out = out,
               .each = TILE * (2 * K + O), .size = dw ? sums_of(O, K) : 0};
    const idx chunks = j.cut.chunks;
    j.w = dx ? packed(w, O, K, 1, pool, threads) : NULL;
    j.sums = dw ? floats(j.size * chunks) : NULL;
    j.rows = drow ? floats(j.cut.tiles * K) : NULL;
    j.room = floats(j.each * parts(chunks, pool, threads));
    const int failed = (dx && !j.w) || (dw && !j.sums) || (drow && !j.rows) || !j.room;
    if (!failed) {
        side_by_side(backward, &j, chunks, pool, threads);
        if (dw) gather(j.sums, chunks, j.size, O, K, dw, db, pool, threads);
        if (drow) gather_rows(j.cut, j.rows, K, drow);
    }
    free((void *)j.w), free(j.sums), free(j.rows), free(j.room);
    return failed;
}
