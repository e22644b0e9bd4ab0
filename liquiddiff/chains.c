/* Chains of products on row-major float32 (B, P, C), each one pass forward and one backward, a tile of positions at a time:
 * what lies between two products stays in the nearest caches. Weights are (O, K). Tiles, and the chunks of them that share
 * sums, are cut by the shape alone: the same bits at any number of threads. */
#include "elements.h"
#include "entries.h"

/* --- a product with its gradients -----------------------------------------------------------------------------*/

typedef struct {
    const float *w, *bias;
    float *packed, *back, *sums, *dw, *db; /* for the product, for its input's gradient; sums of all chunks */
    idx O, K, size;
} layer_t;

/* Returns whether memory is out. */
static int prepare(layer_t *l, int forward, cut_t cut, const pool_t *pool, idx threads) {
    l->size = sums_of(l->O, l->K);
    if (forward) l->packed = packed(l->w, l->O, l->K, 0, pool, threads);
    else l->back = packed(l->w, l->O, l->K, 1, pool, threads), l->sums = floats(l->size * cut.chunks);
    return forward ? !l->packed : !l->back || !l->sums;
}

static void finish(layer_t *l, int failed, int forward, cut_t cut, const pool_t *pool, idx threads) {
    if (!failed && !forward) gather(l->sums, cut.chunks, l->size, l->O, l->K, l->dw, l->db, pool, threads);
    free(l->packed), free(l->back), free(l->sums);
}

/* Of chunk `chunk`: adds to the weight's gradient, and gives the input's, times `slope` where that is not NULL. */
static void layer_grad(const layer_t *l, idx chunk, idx rows, const float *g, const float *x, const float *slope, float *dx) {
    weight_gradient(rows, g, l->O, x, l->K, l->sums + chunk * l->size);
    if (slope) product(TIMES, rows, g, l->O, l->back, l->K, (out_t){.more = slope, .y = dx});
    else product(PLAIN, rows, g, l->O, l->back, l->K, (out_t){.y = dx});
}

#define MAX_LAYERS 3

typedef struct job {
    const float *x, *row[2], *in[4];
    float *y, *out[3], *moments, *rows, *room; /* rows: (tiles, wide), gradients of what is one row for an image */
    const relax_t *relax;
    const depthwise_t *conv[2];                /* or NULL */
    float *taps[2], eps;
    cut_t cut;
    layer_t layer[MAX_LAYERS];
    idx layers, C, M, wide, each, alike; /* each: floats of a thread's room; alike: a row is one, of all images */
    void (*body)(const struct job *, tile_t, idx k, idx chunk, float *room);
} job_t;

INLINE const float *row(const job_t *j, int i, tile_t t, idx width) { return j->row[i] + (j->alike ? 0 : t.b * width); }

static void forward(void *data, idx k, idx me) {
    const job_t *j = data;
    j->body(j, tile(j->cut, k), k, 0, j->room + me * j->each);
}

static void backward(void *data, idx chunk, idx me) {
    const job_t *j = data;
    for (idx i = 0; i < j->layers; i++)
        memset(j->layer[i].sums + chunk * j->layer[i].size, 0, j->layer[i].size * sizeof(float));
    for (idx k = chunk * j->cut.chunk; k < (chunk + 1) * j->cut.chunk && k < j->cut.tiles; k++) {
        memset(j->rows + k * j->wide, 0, j->wide * sizeof(float));
        j->body(j, tile(j->cut, k), k, chunk, j->room + me * j->each);
    }
}

/* drows, (B, wide), where it is a backward pass. Returns 0, or 1 when out of memory. */
static int run(job_t *j, float *drows, const pool_t *pool, idx threads) {
    const int ahead = !drows;
    const idx pieces = ahead ? j->cut.tiles : j->cut.chunks;
    int failed = 0;
    for (idx i = 0; i < j->layers; i++) failed |= prepare(&j->layer[i], ahead, j->cut, pool, threads);
    j->room = floats(j->each * parts(pieces, pool, threads));
    j->rows = ahead ? NULL : floats(j->cut.tiles * j->wide);
    failed |= !j->room || (!ahead && !j->rows);
    for (int i = 0; i < 2; i++)
        if (j->conv[i]) failed |= !(j->taps[i] = j->conv[i]->pack(j->conv[i]->w, j->layer[i].K));
    if (!failed) side_by_side(ahead ? forward : backward, j, pieces, pool, threads);
    if (!failed && !ahead) gather_rows(j->cut, j->rows, j->wide, drows);
    for (idx i = 0; i < j->layers; i++) finish(&j->layer[i], failed, ahead, j->cut, pool, threads);
    free(j->room), free(j->rows), free(j->taps[0]), free(j->taps[1]);
    return failed;
}

/* --- feed-forward: y = x + W2 SiLU(z) + b2, z = W1 AdaLN(x) + b1 ------------------------------------------------*/

static void feed_forward(const job_t *j, tile_t t, idx k, idx chunk, float *room) {
    const idx C = j->C, M = j->M;
    float *normed = room, *active = room + TILE * C;
    adaln(t.rows, C, j->x + t.at * C, row(j, 0, t, 2 * C), j->eps, normed, j->moments ? j->moments + t.at * 2 : NULL, NULL);
    product(SILU, t.rows, normed, C, j->layer[0].packed, M,
            (out_t){.bias = j->layer[0].bias, .y = active, .before = j->out[0] ? j->out[0] + t.at * M : NULL});
    product(ADD, t.rows, active, M, j->layer[1].packed, C,
            (out_t){.bias = j->layer[1].bias, .more = j->x + t.at * C, .y = j->y + t.at * C});
}

static void feed_forward_grad(const job_t *j, tile_t t, idx k, idx chunk, float *room) {
    const idx C = j->C, M = j->M;
    float *active = room, *slope = active + TILE * M, *dz = slope + TILE * M, *normed = dz + TILE * M, *dn = normed + TILE * C;
    const float *g = j->in[0] + t.at * C, *x = j->x + t.at * C, *scale = j->row[0] + t.b * 2 * C;
    activate(t.rows, M, j->in[1] + t.at * M, NULL, active, slope);
    layer_grad(&j->layer[1], chunk, t.rows, g, active, slope, dz);
    adaln(t.rows, C, x, scale, j->eps, normed, NULL, NULL);
    layer_grad(&j->layer[0], chunk, t.rows, dz, normed, NULL, dn);
    adaln_grad(t.rows, C, dn, NULL, x, g, scale, NULL, 0, j->moments + t.at * 2, j->y + t.at * C, j->rows + k * 2 * C);
}

/* --- a mixer's output on the residual, relaxed: y = x + m + alpha (kept - m) -------------------------------------*/

/* m: one tile of it */
static void relaxed(const job_t *j, tile_t t, const float *m) {
    const relax_t *r = j->relax;
    const idx at = t.at * j->C;
    relax(t.rows, j->C, r->x ? r->x + at : NULL, r->alpha ? r->kept + at : NULL, m,
          r->alpha ? r->alpha + (j->alike ? 0 : t.b * j->C) : NULL, j->y + at);
}

/* The gradient of m, which is dm, room for it, or that of y; alpha's is added to `sums`. */
static const float *relaxed_grad(const job_t *j, tile_t t, const float *m, float *dm, float *sums) {
    const relax_t *r = j->relax;
    const idx at = t.at * j->C;
    const float *g = j->in[0] + at;
    if (!r || !r->alpha) return g;
    relax_grad(t.rows, j->C, g, r->kept + at, m, r->alpha + t.b * j->C, r->dkept + at, dm, sums);
    return dm;
}

/* --- depthwise-separable: m = W2 ((1 + scale) SiLU(z)) + b2, z = W1 c + b1, c = x or a depthwise convolution of it --*/

/* out: z, c and m kept, or NULL */
static void separable(const job_t *j, tile_t t, idx k, idx chunk, float *room) {
    const idx C = j->C, M = j->M, at = t.at * C;
    const float *scale = row(j, 0, t, M), *x = j->x + at;
    float *active = room, *c = j->out[1] ? j->out[1] + at : room + TILE * M;
    float *m = !j->relax ? j->y + at : j->out[2] ? j->out[2] + at : room + TILE * (M + C);
    if (j->conv[0]) convolve(j->conv[0], t, C, j->x, j->taps[0], c), x = c;
    product(SILU, t.rows, x, C, j->layer[0].packed, M,
            (out_t){.bias = j->layer[0].bias, .y = active, .before = j->out[0] ? j->out[0] + t.at * M : NULL});
    for (idx r = 0; r < t.rows * M; r += M) {
        const idx C = M;
        CHANNELS(store(active + r + c, load(active + r + c, n) * (1.0f + load(scale + c, n)), n);)
    }
    product(PLAIN, t.rows, active, M, j->layer[1].packed, C, (out_t){.bias = j->layer[1].bias, .y = m});
    if (j->relax) relaxed(j, t, m);
}

/* x: c; in: the gradient of y, z, m; y: the gradient of c */
static void separable_grad(const job_t *j, tile_t t, idx k, idx chunk, float *room) {
    const idx C = j->C, M = j->M;
    const layer_t *contract = &j->layer[1];
    const float *scale = j->row[0] + t.b * M;
    float *active = room, *slope = active + TILE * M, *dz = slope + TILE * M, *dscale = j->rows + k * j->wide;
    const float *g = relaxed_grad(j, t, j->in[2] ? j->in[2] + t.at * C : NULL, dz + TILE * M, dscale + M);
    activate(t.rows, M, j->in[1] + t.at * M, NULL, active, slope);
    product(PLAIN, t.rows, g, C, contract->back, M, (out_t){.y = dz});
    for (idx r = 0; r < t.rows * M; r += M) {
        const idx C = M;
        CHANNELS(
            const vec up = 1.0f + load(scale + c, n), a = load(active + r + c, n), d = load(dz + r + c, n);
            add(dscale + c, d * a, n);
            store(dz + r + c, d * up * load(slope + r + c, n), n);
            store(active + r + c, a * up, n);)
    }
    weight_gradient(t.rows, g, C, active, M, contract->sums + chunk * contract->size);
    layer_grad(&j->layer[0], chunk, t.rows, dz, j->x + t.at * C, NULL, j->y + t.at * C);
}

/* --- heads of a CfC cell: m = s g + (1 - s) h, s = sigmoid(a f - b), f = Wf z, g = Wg SiLU(u), h = Wh SiLU(v), u and v
 * depthwise convolutions of z ----------------------------------------------------------------------------------*/

/* layers f, g, h; x: z, (B, P, M); conv: u, v; row: a, b; out: f, g, h kept, or NULL */
static void heads(const job_t *j, tile_t t, idx k, idx chunk, float *room) {
    const idx C = j->C, M = j->M;
    float *active = room, *m = room + TILE * M, *to[3];
    for (int i = 0; i < 3; i++) {
        to[i] = j->out[0] ? j->out[i] + t.at * C : m + TILE * (1 + i) * C;
        if (i) convolve(j->conv[i - 1], t, M, j->x, j->taps[i - 1], active), activate(t.rows, M, active, NULL, active, NULL);
        product(PLAIN, t.rows, i ? active : j->x + t.at * M, M, j->layer[i].packed, C,
                (out_t){.bias = j->layer[i].bias, .y = to[i]});
    }
    gate(t.rows, C, to[0], to[1], to[2], row(j, 0, t, C), row(j, 1, t, C), m);
    relaxed(j, t, m);
}

/* in: the gradient of y, f, g, h; out: gradients of what the products take: z (from f alone), u, v */
static void heads_grad(const job_t *j, tile_t t, idx k, idx chunk, float *room) {
    const idx C = j->C, M = j->M, at = t.at * C;
    const float *f = j->in[1] + at, *g = j->in[2] + at, *h = j->in[3] + at, *a = j->row[0] + t.b * C, *b = j->row[1] + t.b * C;
    float *active = room, *slope = active + TILE * M, *d = slope + TILE * M, *each[3] = {d, d + TILE * C, d + 2 * TILE * C};
    float *m = d + 3 * TILE * C, *sums = j->rows + k * j->wide;
    if (j->relax->alpha) gate(t.rows, C, f, g, h, a, b, m);
    gate_grad(t.rows, C, relaxed_grad(j, t, m, m, sums + 2 * C), f, g, h, a, b, each[0], each[1], each[2], sums);
    for (int i = 0; i < 3; i++) {
        if (i) convolve(j->conv[i - 1], t, M, j->x, j->taps[i - 1], active), activate(t.rows, M, active, NULL, active, slope);
        layer_grad(&j->layer[i], chunk, t.rows, each[i], i ? active : j->x + t.at * M, i ? slope : NULL, j->out[i] + t.at * M);
    }
}

/* --- entries --------------------------------------------------------------------------------------------------*/

#define SHAPE idx B, idx P, idx C, idx M, RUN
#define JOB .cut = cut(B, P), .C = C, .M = M

/* C and M >= product_least_inputs, here and below. modulation: scales and shifts, (B, 2 C); where `alike`, a row is one of all
 * images. moments (B, P, 2) and z (B, P, M) are for the backward pass, or NULL both. No dimension is 0. Returns 0, or 1 when
 * out of memory. */
int feed_forward_forward(const float *x, const float *modulation, const float *w1, const float *b1, const float *w2,
                         const float *b2, float *y, float *moments, float *z, float eps, idx alike, SHAPE) {
    job_t j = {JOB, .alike = alike, .x = x, .row = {modulation}, .y = y, .moments = moments, .out = {z}, .eps = eps,
               .layers = 2, .layer = {{.w = w1, .bias = b1, .O = M, .K = C}, {.w = w2, .bias = b2, .O = C, .K = M}},
               .each = TILE * (C + M), .body = feed_forward};
    return run(&j, NULL, pool, threads);
}

int feed_forward_backward(const float *g, const float *x, const float *modulation, const float *w1, const float *w2,
                          const float *moments, const float *z, float *dx, float *dmodulation, float *dw1, float *db1,
                          float *dw2, float *db2, float eps, SHAPE) {
    job_t j = {JOB, .x = x, .row = {modulation}, .in = {g, z}, .y = dx, .moments = (float *)moments, .eps = eps, .layers = 2,
               .layer = {{.w = w1, .dw = dw1, .db = db1, .O = M, .K = C}, {.w = w2, .dw = dw2, .db = db2, .O = C, .K = M}},
               .wide = 2 * C, .each = TILE * (3 * M + 2 * C), .body = feed_forward_grad};
    return run(&j, dmodulation, pool, threads);
}

/* scale (B, M); conv, whose H W are P, may be NULL; relax too: then y is m. z (B, P, M), what conv gives, c (B, P, C), and
 * m, which is needed where there is an alpha, are for the backward pass, or NULL. */
int separable_forward(const float *x, const float *scale, const float *w1, const float *b1, const float *w2, const float *b2,
                      float *y, float *z, float *c, float *m, const depthwise_t *conv, const relax_t *relax, idx alike,
                      SHAPE) {
    job_t j = {JOB, .alike = alike, .x = x, .row = {scale}, .y = y, .out = {z, c, m}, .conv = {conv}, .relax = relax,
               .layers = 2, .layer = {{.w = w1, .bias = b1, .O = M, .K = C}, {.w = w2, .bias = b2, .O = C, .K = M}},
               .each = TILE * (2 * C + M), .body = separable};
    return run(&j, NULL, pool, threads);
}

/* c: x, where there is no conv. drows: of scale and, beside it, of alpha where there is one, (B, M + C). */
int separable_backward(const float *g, const float *c, const float *scale, const float *w1, const float *w2, const float *z,
                       const float *m, float *dc, float *drows, float *dw1, float *db1, float *dw2, float *db2,
                       const relax_t *relax, SHAPE) {
    job_t j = {JOB, .x = c, .row = {scale}, .in = {g, z, m}, .y = dc, .relax = relax, .layers = 2,
               .layer = {{.w = w1, .dw = dw1, .db = db1, .O = M, .K = C}, {.w = w2, .dw = dw2, .db = db2, .O = C, .K = M}},
               .wide = relax && relax->alpha ? M + C : M, .each = TILE * (3 * M + C), .body = separable_grad};
    return run(&j, drows, pool, threads);
}

/* kf, kg, kh: f, g, h, (B, P, C), for the backward pass, or NULL all. */
int heads_forward(const float *z, const float *a, const float *b, const float *wf, const float *bf, const float *wg,
                  const float *bg, const float *wh, const float *bh, float *y, float *kf, float *kg, float *kh,
                  const depthwise_t *u, const depthwise_t *v, const relax_t *relax, idx alike, SHAPE) {
    job_t j = {JOB, .alike = alike, .x = z, .row = {a, b}, .y = y, .out = {kf, kg, kh}, .conv = {u, v}, .relax = relax,
               .layers = 3,
               .layer = {{.w = wf, .bias = bf, .O = C, .K = M}, {.w = wg, .bias = bg, .O = C, .K = M},
                         {.w = wh, .bias = bh, .O = C, .K = M}},
               .each = TILE * (M + 4 * C), .body = heads};
    return run(&j, NULL, pool, threads);
}

/* dz is f's share alone. drows: of a, b and, where there is one, alpha, side by side, (B, 3 C) */
int heads_backward(const float *dy, const float *z, const float *a, const float *b, const float *wf, const float *wg,
                   const float *wh, const float *f, const float *g, const float *h, float *dz, float *du, float *dv,
                   float *drows, float *dwf, float *dbf, float *dwg, float *dbg, float *dwh, float *dbh, const depthwise_t *u,
                   const depthwise_t *v, const relax_t *relax, SHAPE) {
    job_t j = {JOB, .x = z, .in = {dy, f, g, h}, .row = {a, b}, .out = {dz, du, dv}, .conv = {u, v}, .relax = relax,
               .layers = 3, .wide = relax->alpha ? 3 * C : 2 * C,
               .layer = {{.w = wf, .dw = dwf, .db = dbf, .O = C, .K = M}, {.w = wg, .dw = dwg, .db = dbg, .O = C, .K = M},
                         {.w = wh, .dw = dwh, .db = dbh, .O = C, .K = M}},
               .each = TILE * (2 * M + 4 * C), .body = heads_grad};
    return run(&j, drows, pool, threads);
}
