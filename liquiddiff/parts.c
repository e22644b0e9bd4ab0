/* What layers make of the time embedding, and a block, each forward and backward in one call, by the kernels of fused.c,
 * pointwise.c, depthwise.c and chains.c one after the other. Images are row-major float32 (B, P, C). */
#include "entries.h"

/* --- rows: y = W SiLU(temb) + bias, of several layers side by side, temb (B, D), W (O, D) ------------------------*/

typedef struct {
    const float *temb;
    float *const *tensors, *dtemb; /* of each layer: w, bias, y; or w, g, dw, dbias */
    const idx *O;
    idx B, D;
    int *failed;
} rows_t;

static void row_forward(void *data, idx k, idx me) {
    const rows_t *j = data;
    float *const *t = j->tensors + 3 * k;
    j->failed[k] = pw_forward(j->temb, NULL, t[0], t[1], NULL, t[2], NULL, NULL, NULL, 1, j->B, j->D, j->O[k], 1, 0, NULL, 1);
}

static void row_backward(void *data, idx k, idx me) {
    const rows_t *j = data;
    float *const *t = j->tensors + 4 * k;
    j->failed[k] = pw_backward(t[1], j->temb, NULL, t[0], NULL, j->dtemb + k * j->B * j->D, t[2], t[3], NULL, 1, j->B, j->D,
                               j->O[k], 1, 0, NULL, 1);
}

static int all_rows(void (*layer)(void *, idx, idx), const float *temb, float *dtemb, float *const *tensors, const idx *O,
                    idx count, idx B, idx D, RUN) {
    int failed[count], any = 0;
    rows_t j = {temb, tensors, dtemb, O, B, D, failed};
    side_by_side(layer, &j, count, pool, threads);
    for (idx k = 0; k < count; k++) any |= failed[k];
    return any;
}

/* count > 0; B, D, O are not 0. Returns 0, or 1 when out of memory; so do the others. */
int rows_forward(const float *temb, float *const *tensors, const idx *O, idx count, idx B, idx D, RUN) {
    return all_rows(row_forward, temb, NULL, tensors, O, count, B, D, pool, threads);
}

static void add_all(float *to, const float *from, idx n) {
    for (idx i = 0; i < n; i++) to[i] += from[i];
}

/* dtemb (count, B, D) is room; the gradient of temb is the first (B, D). Groups of `sizes` layers are added in order within,
 * the last of them first: as autograd would, had each been a call of its own. */
int rows_backward(const float *temb, float *dtemb, float *const *tensors, const idx *O, const idx *sizes, idx groups, idx count,
                  idx B, idx D, RUN) {
    if (all_rows(row_backward, temb, dtemb, tensors, O, count, B, D, pool, threads)) return 1;
    float *all = NULL;
    for (idx at = count; groups--;) {
        float *sum = dtemb + (at -= sizes[groups]) * B * D;
        for (idx k = 1; k < sizes[groups]; k++) add_all(sum, sum + k * B * D, B * D);
        if (all) add_all(all, sum, B * D);
        else all = sum;
    }
    if (all != dtemb) memcpy(dtemb, all, B * D * sizeof(float));
    return 0;
}

/* --- a block: a mixer under its relaxation, the spatial mix, the feed-forward ------------------------------------*/

enum { NONE, CELL, SEPARABLE }; /* the mixer: none, or elsewhere; CfC's; Conv's */
#define MAX_SCALES 8

typedef struct { /* `_Shape` of parts.py */
    idx B, H, W, C, M, N; /* M, N: hidden widths of the mixer and of the feed-forward */
    idx mixer, relaxed;   /* relaxed: there is an alpha */
    idx replaces;         /* alpha blends with x, not with AdaLN(x), and x is not added */
    idx pool, alike;      /* pool: the spatial mix has the mean; alike: rows are one, of all images */
    idx piece, size;      /* positions of a running sum (fused.c); size of the largest of the parallel convolutions */
    idx scales, k[MAX_SCALES];
    const depthwise_t *kind[4]; /* of the mixer's convolution, of the two of a cell's heads, of the spatial mix; no weights */
    float eps;
} shape_t;

typedef struct {
    float *w, *bias;
} weights_t;

/* Layers, in the order of their weights; the mixer's own; then the parallel convolutions. */
enum { POOL, OUT, EXPAND, CONTRACT, CONTEXT, BACKBONE, F, G_CONV, G, H_CONV, H, FIRST = BACKBONE, SECOND };
static const idx SCALES[] = {[NONE] = CONTEXT, [CELL] = H + 1, [SEPARABLE] = SECOND + 1};

/* Rows of each image: scales and shifts of the norms, (B, 2 C); a and b of a cell, (B, C), or a scale, (B, M). */
enum { MIX_NORM, FEED_NORM, NORM, A, B_, SCALE = A };

/* What a forward pass makes; NULL: not needed, or not kept. */
typedef struct {
    float *n, *moments, *c, *before, *z, *f, *g, *h, *m, *x; /* of the mixer: x is what the block goes on with */
    float *mix_n, *mix_moments, *mix_c, *sums, *mean, *row, *mixed, *feed_moments, *expanded, *kernel, *shift;
} made_t;

/* What a backward pass makes on its way. */
typedef struct {
    float *sums, *dx, *dmixed, *mix_dc, *mix_dn, *dmean, *drow, *dkernel, *dshift;
    float *dz, *more, *du, *dv, *dc, *dn, *dkept, *drows; /* of the mixer */
} grads_t;

/* The next region of a room; all are a little apart, since those alike in size would meet in the same sets of a cache. */
static float *take(float *room, idx *at, idx floats) {
    const idx from = *at;
    *at += count(16, floats) * 16 + 48;
    return room ? room + from : NULL;
}
#define TAKE(n) take(room, &at, n)
#define UNPACK                                                              \
    const idx P = s->H * s->W, all = s->B * P, C = s->C, M = s->M, N = s->N; \
    const idx pieces = count(s->piece, P)

/* Returns the floats of the room; so does the next. keep: for the backward pass. */
static idx lay_out(const shape_t *s, int keep, float *room, made_t *r) {
    UNPACK;
    idx at = 0;
    *r = (made_t){0};
    r->kernel = TAKE(C * s->size * s->size), r->shift = TAKE(C), r->mix_n = TAKE(all * C);
    if (s->pool) r->sums = TAKE(s->B * pieces * C), r->mean = TAKE(s->B * C), r->row = TAKE(s->B * C);
    if (s->mixer) r->x = TAKE(all * C), r->n = keep ? TAKE(all * C) : r->mix_n;
    if (s->mixer == CELL) r->z = TAKE(all * M);
    r->mixed = s->mixer == CELL && !keep && M >= C ? r->z : TAKE(all * C);
    if (!keep) return at;
    r->mix_moments = TAKE(all * 2), r->mix_c = TAKE(all * C), r->feed_moments = TAKE(all * 2), r->expanded = TAKE(all * N);
    if (s->mixer) r->moments = TAKE(all * 2), r->c = TAKE(all * C), r->before = TAKE(all * M);
    if (s->mixer == CELL) r->f = TAKE(all * C), r->g = TAKE(all * C), r->h = TAKE(all * C);
    if (s->mixer == SEPARABLE && s->relaxed) r->m = TAKE(all * C);
    return at;
}

static idx lay_out_grads(const shape_t *s, float *room, grads_t *r) {
    UNPACK;
    idx at = 0;
    *r = (grads_t){0};
    r->sums = TAKE(s->B * pieces * 2 * C);
    if (s->mixer) r->dx = TAKE(all * C);
    const idx before = at; /* what the mixer needs comes when the rest is done */
    r->dmixed = TAKE(all * C), r->mix_dc = TAKE(all * C), r->mix_dn = TAKE(all * C);
    r->dmean = TAKE(s->B * C), r->drow = TAKE(s->B * C), r->dkernel = TAKE(C * s->size * s->size), r->dshift = TAKE(C);
    const idx end = at;
    at = before;
    if (s->mixer) r->dc = TAKE(all * C), r->dn = TAKE(all * C), r->drows = TAKE(s->B * (M + 3 * C));
    if (s->mixer == CELL) r->dz = TAKE(all * M), r->more = TAKE(all * M), r->du = TAKE(all * M), r->dv = TAKE(all * M);
    if (s->mixer && s->relaxed) r->dkept = TAKE(all * C);
    return at > end ? at : end;
}

idx block_room(const shape_t *s, int keep) { return lay_out(s, keep, NULL, &(made_t){0}); }
idx block_backward_room(const shape_t *s) { return lay_out_grads(s, NULL, &(grads_t){0}); }

static depthwise_t convolution(const shape_t *s, int which, const float *w, const float *bias) {
    const depthwise_t *of = s->kind[which];
    return (depthwise_t){of->pack, of->span, of->backward, w, bias, s->H, s->W};
}
#define CONV(which, layer) convolution(s, which, w[layer].w, w[layer].bias)

/* Parallel convolutions as one: kernels padded with zeros to the largest, (C, size, size), and added; biases (C) too. Or,
 * `back`: each its part of the gradient, kernel and shift. */
static void merge(const shape_t *s, const weights_t *scales, float *kernel, float *shift, const int back) {
    const idx C = s->C, K = s->size;
    if (!back) memset(kernel, 0, C * K * K * sizeof(float)), memset(shift, 0, C * sizeof(float));
    for (idx n = 0; n < s->scales; n++) {
        const idx k = s->k[n], edge = (K - k) / 2;
        for (idx r = 0; r < C * k; r++) {
            float *part = scales[n].w + r * k, *whole = kernel + (r / k * K + edge + r % k) * K + edge;
            if (back) memcpy(part, whole, k * sizeof(float));
            else for (idx i = 0; i < k; i++) whole[i] += part[i];
        }
        if (back) memcpy(scales[n].bias, shift, C * sizeof(float));
        else for (idx i = 0; i < C; i++) shift[i] += scales[n].bias[i];
    }
}

static relax_t relaxation(const shape_t *s, const float *x, const float *n, const float *alpha, float *dkept) {
    return (relax_t){.x = s->replaces ? NULL : x, .kept = s->replaces ? x : n, .alpha = alpha, .dkept = dkept};
}

/* r->x = x + m + alpha (n - m), n = AdaLN(x), m a CfC cell or a depthwise-separable convolution (chains.c) of n. */
static int mix(const shape_t *s, const weights_t *w, const float *x, const float *const *rows, const float *alpha,
               const made_t *r, RUN) {
    UNPACK;
    const relax_t relax = relaxation(s, x, r->n, alpha, NULL);
    const depthwise_t context = CONV(0, CONTEXT);
    adaln_forward(x, rows[NORM], r->n, r->moments, NULL, s->eps, s->alike, s->B, P, C, s->piece, pool, threads);
    if (s->mixer == SEPARABLE)
        return separable_forward(r->n, rows[SCALE], w[FIRST].w, w[FIRST].bias, w[SECOND].w, w[SECOND].bias, r->x, r->before,
                                 r->c, r->m, &context, &relax, s->alike, s->B, P, C, M, pool, threads);
    const depthwise_t u = CONV(1, G_CONV), v = CONV(2, H_CONV);
    return pw_forward(r->n, NULL, w[BACKBONE].w, w[BACKBONE].bias, NULL, r->z, r->before, r->c, &context, s->B, P, C, M, 0, 1,
                      pool, threads) ||
           heads_forward(r->z, rows[A], rows[B_], w[F].w, w[F].bias, w[G].w, w[G].bias, w[H].w, w[H].bias, r->x, r->f, r->g,
                         r->h, &u, &v, &relax, s->alike, s->B, P, C, M, pool, threads);
}

/* y = mixed + FeedForward(mixed), mixed = x + out(SiLU(conv(n) + row)), row = pool(mean(n)), n = AdaLN(x). */
static int tail(const shape_t *s, const weights_t *w, const float *x, const float *const *rows, float *y, const made_t *r,
                RUN) {
    UNPACK;
    merge(s, w + SCALES[s->mixer], r->kernel, r->shift, 0);
    const depthwise_t conv = convolution(s, 3, r->kernel, r->shift);
    adaln_forward(x, rows[MIX_NORM], r->mix_n, r->mix_moments, r->sums, s->eps, s->alike, s->B, P, C, s->piece, pool, threads);
    for (idx b = 0; s->pool && b < s->B; b++)
        for (idx i = 0; i < C; i++) r->mean[b * C + i] = r->sums[b * pieces * C + i] / P;
    return (s->pool && pw_forward(r->mean, NULL, w[POOL].w, w[POOL].bias, NULL, r->row, NULL, NULL, NULL, 1, s->B, C, C, 0, 0,
                                  pool, threads)) ||
           pw_forward(r->mix_n, r->row, w[OUT].w, w[OUT].bias, x, r->mixed, NULL, r->mix_c, &conv, s->B, P, C, C, 1, 0, pool,
                      threads) ||
           feed_forward_forward(r->mixed, rows[FEED_NORM], w[EXPAND].w, w[EXPAND].bias, w[CONTRACT].w, w[CONTRACT].bias, y,
                                r->feed_moments, r->expanded, s->eps, s->alike, s->B, P, C, N, pool, threads);
}

/* alpha (B, C), or NULL where it is not relaxed. keep: what block_backward needs is left in the room. No dimension is 0. */
int block_forward(const shape_t *s, int keep, const weights_t *w, const float *x, const float *const *rows, const float *alpha,
                  float *y, float *room, RUN) {
    made_t r;
    lay_out(s, keep, room, &r);
    if (s->mixer && mix(s, w, x, rows, alpha, &r, pool, threads)) return 1;
    return tail(s, w, s->mixer ? r.x : x, rows, y, &r, pool, threads);
}

/* Part of each row of (B, wide), from `at`: to (B, width). */
static void part(const float *from, idx B, idx wide, idx at, idx width, float *to) {
    for (idx b = 0; b < B; b++) memcpy(to + b * width, from + b * wide + at, width * sizeof(float));
}

/* Gradients of x and of what else `tail` takes, that of y being g. */
static int tail_grad(const shape_t *s, const weights_t *w, const weights_t *dw, const float *g, const float *x,
                     const float *const *rows, const made_t *r, const grads_t *d, float *dx, float *const *drows, RUN) {
    UNPACK;
    const depthwise_t conv = convolution(s, 3, r->kernel, NULL);
    if (feed_forward_backward(g, r->mixed, rows[FEED_NORM], w[EXPAND].w, w[CONTRACT].w, r->feed_moments, r->expanded, d->dmixed,
                              drows[FEED_NORM], dw[EXPAND].w, dw[EXPAND].bias, dw[CONTRACT].w, dw[CONTRACT].bias, s->eps, s->B,
                              P, C, N, pool, threads) ||
        pw_backward(d->dmixed, r->mix_c, r->row, w[OUT].w, NULL, d->mix_dc, dw[OUT].w, dw[OUT].bias, s->pool ? d->drow : NULL,
                    s->pool ? s->B : 1, s->pool ? P : all, C, C, 1, 0, pool, threads) ||
        (s->pool && pw_backward(d->drow, r->mean, NULL, w[POOL].w, NULL, d->dmean, dw[POOL].w, dw[POOL].bias, NULL, 1, s->B, C,
                                C, 0, 0, pool, threads)) ||
        conv.backward(d->mix_dc, r->mix_n, conv.w, NULL, d->mix_dn, d->dkernel, d->dshift, s->B, C, s->H, s->W, pool, threads))
        return 1;
    merge(s, dw + SCALES[s->mixer], d->dkernel, d->dshift, 1);
    adaln_backward(d->mix_dn, NULL, x, d->dmixed, rows[MIX_NORM], s->pool ? d->dmean : NULL, r->mix_moments, dx, d->sums, s->B,
                   P, C, s->piece, pool, threads);
    part(d->sums, s->B, pieces * 2 * C, 0, 2 * C, drows[MIX_NORM]);
    return 0;
}

/* The same of `mix`, g being the gradient of r->x. */
static int mix_grad(const shape_t *s, const weights_t *w, const weights_t *dw, const float *g, const float *x,
                    const float *const *rows, const float *alpha, const made_t *r, const grads_t *d, float *dx,
                    float *const *drows, float *dalpha, RUN) {
    UNPACK;
    const relax_t relax = relaxation(s, x, r->n, alpha, d->dkept);
    const depthwise_t context = CONV(0, CONTEXT);
    const idx own = s->mixer == CELL ? 2 * C : M, wide = own + (alpha ? C : 0);
    if (s->mixer == CELL) {
        const depthwise_t u = CONV(1, G_CONV), v = CONV(2, H_CONV);
        if (heads_backward(g, r->z, rows[A], rows[B_], w[F].w, w[G].w, w[H].w, r->f, r->g, r->h, d->dz, d->du, d->dv, d->drows,
                           dw[F].w, dw[F].bias, dw[G].w, dw[G].bias, dw[H].w, dw[H].bias, &u, &v, &relax, s->B, P, C, M, pool,
                           threads) ||
            u.backward(d->du, r->z, u.w, d->dz, d->more, dw[G_CONV].w, dw[G_CONV].bias, s->B, M, s->H, s->W, pool, threads) ||
            v.backward(d->dv, r->z, v.w, d->more, d->dz, dw[H_CONV].w, dw[H_CONV].bias, s->B, M, s->H, s->W, pool, threads) ||
            pw_backward(d->dz, r->c, NULL, w[BACKBONE].w, r->before, d->dc, dw[BACKBONE].w, dw[BACKBONE].bias, NULL, 1, all, C,
                        M, 0, 1, pool, threads))
            return 1;
        part(d->drows, s->B, wide, 0, C, drows[A]), part(d->drows, s->B, wide, C, C, drows[B_]);
    } else {
        if (separable_backward(g, r->c, rows[SCALE], w[FIRST].w, w[SECOND].w, r->before, r->m, d->dc, d->drows, dw[FIRST].w,
                               dw[FIRST].bias, dw[SECOND].w, dw[SECOND].bias, &relax, s->B, P, C, M, pool, threads))
            return 1;
        part(d->drows, s->B, wide, 0, M, drows[SCALE]);
    }
    if (alpha) part(d->drows, s->B, wide, own, C, dalpha);
    if (context.backward(d->dc, r->n, context.w, NULL, d->dn, dw[CONTEXT].w, dw[CONTEXT].bias, s->B, C, s->H, s->W, pool,
                         threads))
        return 1;
    adaln_backward(d->dn, alpha && !s->replaces ? d->dkept : NULL, x, s->replaces ? d->dkept : g, rows[NORM], NULL, r->moments,
                   dx, d->sums, s->B, P, C, s->piece, pool, threads);
    part(d->sums, s->B, pieces * 2 * C, 0, 2 * C, drows[NORM]);
    return 0;
}

/* g: gradient of y; made: the room of the forward pass; dw, drows, dalpha: as w, rows and alpha. */
int block_backward(const shape_t *s, const weights_t *w, const weights_t *dw, const float *g, const float *x,
                   const float *const *rows, const float *alpha, float *made, float *dx, float *const *drows, float *dalpha,
                   float *room, RUN) {
    made_t r;
    grads_t d;
    lay_out(s, 1, made, &r), lay_out_grads(s, room, &d);
    if (tail_grad(s, w, dw, g, s->mixer ? r.x : x, rows, &r, &d, s->mixer ? d.dx : dx, drows, pool, threads)) return 1;
    return s->mixer && mix_grad(s, w, dw, d.dx, x, rows, alpha, &r, &d, dx, drows, dalpha, pool, threads);
}
