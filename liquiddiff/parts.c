/* Parts of a block, each forward and backward in one call, by the kernels of fused.c, pointwise.c, depthwise.c and chains.c one
 * after the other: what layers make of the time embedding, a CfC cell, and what follows a mixer. Images are row-major
 * float32 (B, P, C). */
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

/* count > 0; B, D, O are not 0. Returns 0, or 1 when out of memory; so do all below. */
int rows_forward(const float *temb, float *const *tensors, const idx *O, idx count, idx B, idx D, RUN) {
    return all_rows(row_forward, temb, NULL, tensors, O, count, B, D, pool, threads);
}

/* dtemb (count, B, D) is room; the gradient of temb is the first (B, D). */
int rows_backward(const float *temb, float *dtemb, float *const *tensors, const idx *O, idx count, idx B, idx D, RUN) {
    if (all_rows(row_backward, temb, dtemb, tensors, O, count, B, D, pool, threads)) return 1;
    for (idx k = 1; k < count; k++)
        for (idx i = 0; i < B * D; i++) dtemb[i] += dtemb[k * B * D + i];
    return 0;
}

#define SHAPE idx B, idx P, idx C, idx M, idx piece, RUN

/* --- a CfC cell: z = SiLU(W conv(x) + bias), y = heads(z) of chains.c -------------------------------------------*/

/* a, b (B, C), or (C) where `alike`; z (B, P, M) is written as well. For the backward pass, or NULL all: before, what SiLU is
 * of, (B, P, M), c = conv(x) and kf, kg, kh, (B, P, C). No dimension is 0. */
int cell_forward(const float *x, const float *w, const float *bias, const float *wf, const float *bf, const float *wg,
                 const float *bg, const float *wh, const float *bh, const float *a, const float *b, float *z, float *y,
                 float *before, float *c, float *kf, float *kg, float *kh, const depthwise_t *conv, const depthwise_t *u,
                 const depthwise_t *v, idx alike, SHAPE) {
    return pw_forward(x, NULL, w, bias, NULL, z, before, c, conv, B, P, C, M, 0, 1, pool, threads) ||
           heads_forward(z, a, b, wf, bf, wg, bg, wh, bh, y, kf, kg, kh, u, v, alike, B, P, C, M, pool, threads);
}

/* dz, more, du, dv (B, P, M) and dc (B, P, C) are room. k and s: kernel and bias of a convolution. dab: of a and, beside
 * it, b. */
int cell_backward(const float *dy, const float *x, const float *w, const float *wf, const float *wg, const float *wh,
                  const float *a, const float *b, const float *z, const float *before, const float *c, const float *f,
                  const float *g, const float *h, float *dz, float *more, float *du, float *dv, float *dc, float *dx, float *dw,
                  float *dbias, float *dwf, float *dbf, float *dwg, float *dbg, float *dwh, float *dbh, float *dab,
                  float *dk, float *ds, float *dku, float *dsu, float *dkv, float *dsv, const depthwise_t *conv,
                  const depthwise_t *u, const depthwise_t *v, SHAPE) {
    const idx H = conv->H, W = conv->W;
    return heads_backward(dy, z, a, b, wf, wg, wh, f, g, h, dz, du, dv, dab, dwf, dbf, dwg, dbg, dwh, dbh, u, v, B, P, C, M,
                          pool, threads) ||
           u->backward(du, z, u->w, dz, more, dku, dsu, B, M, H, W, pool, threads) ||
           v->backward(dv, z, v->w, more, dz, dkv, dsv, B, M, H, W, pool, threads) ||
           pw_backward(dz, c, NULL, w, before, dc, dw, dbias, NULL, 1, B * P, C, M, 0, 1, pool, threads) ||
           conv->backward(dc, x, conv->w, NULL, dx, dk, ds, B, C, H, W, pool, threads);
}

/* --- what follows a mixer ---------------------------------------------------------------------------------------*/

#define MAX_SCALES 8

typedef struct {
    idx count, size;                         /* of kernels; of the largest */
    float *w[MAX_SCALES], *bias[MAX_SCALES]; /* (C, k, k) and (C) of each */
    idx k[MAX_SCALES];
} scales_t;

/* Parallel convolutions as one: kernels padded with zeros to the largest, w (C, size, size), and added; biases (C) too. Or,
 * `back`: each its part of the gradient, w and bias. */
static void merge(const scales_t *s, idx C, float *w, float *bias, const int back) {
    const idx K = s->size;
    if (!back) memset(w, 0, C * K * K * sizeof(float)), memset(bias, 0, C * sizeof(float));
    for (idx n = 0; n < s->count; n++) {
        const idx k = s->k[n], edge = (K - k) / 2;
        for (idx r = 0; r < C * k; r++) {
            float *part = s->w[n] + r * k, *whole = w + (r / k * K + edge + r % k) * K + edge;
            if (back) memcpy(part, whole, k * sizeof(float));
            else for (idx i = 0; i < k; i++) whole[i] += part[i];
        }
        if (back) memcpy(s->bias[n], bias, C * sizeof(float));
        else for (idx i = 0; i < C; i++) bias[i] += s->bias[n][i];
    }
}

/* n = AdaLN(x), mixed = x + Wo SiLU(conv(n) + row) + bo, row = Wp mean(n) + bp, y = mixed + FeedForward(mixed).
 *
 * norm and feed: scales and shifts of both norms, (B, 2 C), or (2 C) where `alike`. wp and bp may be NULL: then there is no
 * row. n, mixed (B, P, C), sums (B, pieces, C), mean and row (B, C) are written as well. For the backward pass, or NULL all:
 * moments and feed_moments (B, P, 2), c = conv(n), and z, what SiLU is of in the feed-forward, (B, P, M). conv's weight and
 * bias are made here, of `scales`. */
int tail_forward(const float *x, const float *norm, const float *wp, const float *bp, const float *wo, const float *bo,
                 const float *feed, const float *w1, const float *b1, const float *w2, const float *b2, float *n, float *sums,
                 float *mean, float *row, float *mixed, float *y, float *moments, float *c, float *feed_moments, float *z,
                 const depthwise_t *conv, const scales_t *scales, float eps, idx alike, SHAPE) {
    const idx pieces = count(piece, P);
    merge(scales, C, (float *)conv->w, (float *)conv->bias, 0);
    adaln_forward(x, norm, n, moments, wp ? sums : NULL, eps, alike, B, P, C, piece, pool, threads);
    for (idx b = 0; wp && b < B; b++)
        for (idx i = 0; i < C; i++) mean[b * C + i] = sums[b * pieces * C + i] / P;
    return (wp && pw_forward(mean, NULL, wp, bp, NULL, row, NULL, NULL, NULL, 1, B, C, C, 0, 0, pool, threads)) ||
           pw_forward(n, wp ? row : NULL, wo, bo, x, mixed, NULL, c, conv, B, P, C, C, 1, 0, pool, threads) ||
           feed_forward_forward(mixed, feed, w1, b1, w2, b2, y, feed_moments, z, eps, alike, B, P, C, M, pool, threads);
}

/* g: gradient of y. dmixed, dc, dn (B, P, C), dmean, drow (B, C), dkernel and dshift, of conv, are room. sums (B, pieces, 2,
 * C): the gradient of norm is in piece 0. scales: gradients. */
int tail_backward(const float *g, const float *x, const float *norm, const float *wp, const float *wo, const float *feed,
                  const float *w1, const float *w2, const float *n, const float *mean, const float *row, const float *mixed,
                  const float *moments, const float *c, const float *feed_moments, const float *z, float *dmixed, float *dc,
                  float *dn, float *dmean, float *drow, float *dx, float *sums, float *dwp, float *dbp, float *dwo,
                  float *dbo, float *dfeed, float *dw1, float *db1, float *dw2, float *db2, float *dkernel, float *dshift,
                  const depthwise_t *conv, const scales_t *scales, float eps, SHAPE) {
    if (feed_forward_backward(g, mixed, feed, w1, w2, feed_moments, z, dmixed, dfeed, dw1, db1, dw2, db2, eps, B, P, C, M, pool,
                              threads) ||
        pw_backward(dmixed, c, wp ? row : NULL, wo, NULL, dc, dwo, dbo, wp ? drow : NULL, wp ? B : 1, wp ? P : B * P, C, C, 1,
                    0, pool, threads) ||
        (wp && pw_backward(drow, mean, NULL, wp, NULL, dmean, dwp, dbp, NULL, 1, B, C, C, 0, 0, pool, threads)) ||
        conv->backward(dc, n, conv->w, NULL, dn, dkernel, dshift, B, C, conv->H, conv->W, pool, threads))
        return 1;
    merge(scales, C, dkernel, dshift, 1);
    adaln_backward(dn, x, dmixed, norm, wp ? dmean : NULL, moments, dx, sums, B, P, C, piece, pool, threads);
    return 0;
}
