/* What is element by element in a block, for some positions of one image, row-major (rows, C): see fused.c and chains.c. */
#include "lanes.h"

INLINE vec existing(vec v, idx n) { /* zero past the end */
    for (idx i = n; i < VL; i++) v[i] = 0;
    return v;
}

#define NORMS 8 /* rows together: the steps of one row's norm wait for each other, those of several do not */
#define GRADS 4
#define EACH_ROW UNROLL for (int r = 0; r < rows; r++)

INLINE void adaln_rows(const int rows, idx C, const float *x, const float *scale, float eps, float *y, float *moments,
                       float *sums) {
    const float *shift = scale + C, each = 1.0f / C;
    vec sum[NORMS] = {{0}}, squares[NORMS] = {{0}};
    float mean[NORMS], rstd[NORMS];
    CHANNELS(EACH_ROW sum[r] += load(x + r * C + c, n);)
    EACH_ROW mean[r] = total(sum[r]) * each;
    CHANNELS(EACH_ROW { const vec d = existing(load(x + r * C + c, n) - mean[r], n); squares[r] += d * d; })
    EACH_ROW rstd[r] = 1.0f / sqrtf(total(squares[r]) * each + eps);
    CHANNELS(
        const vec up = 1.0f + load(scale + c, n), low = load(shift + c, n);
        vec all = {0};
        if (sums) all = load(sums + c, n);
        EACH_ROW {
            const vec v = (load(x + r * C + c, n) - mean[r]) * rstd[r] * up + low;
            store(y + r * C + c, v, n), all += v;
        }
        if (sums) store(sums + c, all, n);)
    if (moments) EACH_ROW moments[2 * r] = mean[r], moments[2 * r + 1] = rstd[r];
}

/* y = (1 + scale) * LayerNorm(x) + shift; `scale` is the scales and, beside them, the shifts, (2 C). moments: mean and 1 /
 * standard deviation of each row, or NULL; sums (C), which y is added to, or NULL. */
static void adaln(idx rows, idx C, const float *x, const float *scale, float eps, float *y, float *moments, float *sums) {
    for (idx r = 0; r < rows;) {
        const idx all = r + NORMS <= rows;
        float *at = moments ? moments + 2 * r : NULL;
        if (all) adaln_rows(NORMS, C, x + r * C, scale, eps, y + r * C, at, sums);
        else adaln_rows(1, C, x + r * C, scale, eps, y + r * C, at, sums);
        r += all ? NORMS : 1;
    }
}

INLINE void adaln_grad_rows(const int rows, idx C, const float *g, const float *more, const float *x, const float *other,
                            const float *scale, const float *pooled, float share, const float *moments, float *dx,
                            float *sums) {
    const float each = 1.0f / C;
    vec sum[GRADS] = {{0}}, dot[GRADS] = {{0}};
    float mean_d[GRADS], mean_dot[GRADS];
    CHANNELS(
        const vec up = 1.0f + load(scale + c, n);
        vec of_scale = load(sums + c, n), of_shift = load(sums + C + c, n);
        EACH_ROW {
            const vec normed = (load(x + r * C + c, n) - moments[2 * r]) * moments[2 * r + 1];
            vec grad = load(g + r * C + c, n);
            if (more) grad += load(more + r * C + c, n);
            if (pooled) grad += load(pooled + c, n) * share;
            const vec d = grad * up;
            sum[r] += d, dot[r] += d * normed;
            of_scale += grad * normed, of_shift += grad;
            store(dx + r * C + c, d, n);
        }
        store(sums + c, of_scale, n), store(sums + C + c, of_shift, n);)
    EACH_ROW mean_d[r] = total(sum[r]) * each, mean_dot[r] = total(dot[r]) * each;
    CHANNELS(EACH_ROW {
        const vec normed = (load(x + r * C + c, n) - moments[2 * r]) * moments[2 * r + 1];
        vec d = moments[2 * r + 1] * (load(dx + r * C + c, n) - mean_d[r] - normed * mean_dot[r]);
        APART(d);
        if (other) d += load(other + r * C + c, n);
        store(dx + r * C + c, d, n);
    })
}

/* With n = LayerNorm(x) and d = (1 + scale) g: dx = rstd (d - mean(d) - n mean(d n)), to which `other` is added where there
 * is one; to sums (2, C) are added dscale = sum g n and dshift = sum g. more: added to g, or NULL; pooled: added to each row
 * of g, `share` of it. */
static void adaln_grad(idx rows, idx C, const float *g, const float *more, const float *x, const float *other,
                       const float *scale, const float *pooled, float share, const float *moments, float *dx, float *sums) {
    for (idx r = 0; r < rows;) {
        const idx all = r + GRADS <= rows, at = r * C;
        const float *m = more ? more + at : NULL, *o = other ? other + at : NULL;
        if (all) adaln_grad_rows(GRADS, C, g + at, m, x + at, o, scale, pooled, share, moments + 2 * r, dx + at, sums);
        else adaln_grad_rows(1, C, g + at, m, x + at, o, scale, pooled, share, moments + 2 * r, dx + at, sums);
        r += all ? GRADS : 1;
    }
}

/* y = s g + (1 - s) h, s = sigmoid(a f - b); a and b are (C). */
static void gate(idx rows, idx C, const float *f, const float *g, const float *h, const float *a, const float *b, float *y) {
    for (idx r = 0; r < rows; r++, f += C, g += C, h += C, y += C)
        CHANNELS(
            const vec s = sigmoid(load(a + c, n) * load(f + c, n) - load(b + c, n)), low = load(h + c, n);
            store(y + c, low + s * (load(g + c, n) - low), n);)
}

/* Its gradients; to sums (2, C) are added those of a and b. */
static void gate_grad(idx rows, idx C, const float *dy, const float *f, const float *g, const float *h, const float *a,
                      const float *b, float *df, float *dg, float *dh, float *sums) {
    for (idx r = 0; r < rows; r++, dy += C, f += C, g += C, h += C, df += C, dg += C, dh += C)
        CHANNELS(
            const vec scale = load(a + c, n), v = load(f + c, n), grad = load(dy + c, n);
            const vec s = sigmoid(scale * v - load(b + c, n)), up = s * grad, low = grad - up;
            const vec d = up * (1.0f - s) * (load(g + c, n) - load(h + c, n));
            store(df + c, scale * d, n);
            store(dg + c, up, n);
            store(dh + c, low, n);
            add(sums + c, d * v, n);
            add(sums + C + c, -d, n);)
}

/* y = x + mixed + alpha (kept - mixed); alpha is (C), or NULL: nothing is kept. Without x (NULL) it is not added. */
static void relax(idx rows, idx C, const float *x, const float *kept, const float *mixed, const float *alpha, float *y) {
    for (idx r = 0; r < rows; r++, mixed += C, y += C, kept += alpha ? C : 0, x += x ? C : 0)
        CHANNELS(
            vec v = load(mixed + c, n);
            if (alpha) v = v + load(alpha + c, n) * (load(kept + c, n) - v);
            if (x) v += load(x + c, n);
            store(y + c, v, n);)
}

/* Its gradients where there is an alpha, but x's, which is g; to sums (C), or NULL, is added alpha's. dmixed may be mixed. */
static void relax_grad(idx rows, idx C, const float *g, const float *kept, const float *mixed, const float *alpha,
                       float *dkept, float *dmixed, float *sums) {
    for (idx r = 0; r < rows; r++, g += C, kept += C, mixed += C, dkept += C, dmixed += C)
        CHANNELS(
            const vec grad = load(g + c, n), up = grad * load(alpha + c, n);
            if (sums) add(sums + c, grad * (load(kept + c, n) - load(mixed + c, n)), n);
            store(dkept + c, up, n);
            store(dmixed + c, grad - up, n);)
}
