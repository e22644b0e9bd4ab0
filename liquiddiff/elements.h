/* What is element by element in a block, for some positions of one image, row-major (rows, C): see fused.c and chains.c. */
#include "lanes.h"

INLINE vec existing(vec v, idx n) { /* zero past the end */
    for (idx i = n; i < VL; i++) v[i] = 0;
    return v;
}

#define TOGETHER 4 /* rows: the steps of one row's norm wait for each other, those of several do not */
#define EACH_ROW UNROLL for (int r = 0; r < rows; r++)

INLINE void adaln_rows(const int rows, idx C, const float *x, const float *scale, float eps, float *y, float *moments,
                       float *sums) {
    const float *shift = scale + C, each = 1.0f / C;
    vec sum[TOGETHER] = {{0}}, squares[TOGETHER] = {{0}};
    float mean[TOGETHER], rstd[TOGETHER];
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
        const idx all = r + TOGETHER <= rows;
        float *at = moments ? moments + 2 * r : NULL;
        if (all) adaln_rows(TOGETHER, C, x + r * C, scale, eps, y + r * C, at, sums);
        else adaln_rows(1, C, x + r * C, scale, eps, y + r * C, at, sums);
        r += all ? TOGETHER : 1;
    }
}

/* With n = LayerNorm(x) and d = (1 + scale) g: dx = rstd (d - mean(d) - n mean(d n)), to which `other` is added where there
 * is one; to sums (2, C) are added dscale = sum g n and dshift = sum g. pooled: added to each row of g, `share` of it. */
static void adaln_grad(idx rows, idx C, const float *g, const float *x, const float *other, const float *scale,
                       const float *pooled, float share, const float *moments, float *dx, float *sums) {
    const float each = 1.0f / C;
    for (idx r = 0; r < rows; r++, g += C, x += C, dx += C, other += other ? C : 0) {
        const float mean = *moments++, rstd = *moments++;
        vec sum = {0}, dot = {0};
        CHANNELS(
            const vec normed = (load(x + c, n) - mean) * rstd;
            vec grad = load(g + c, n);
            if (pooled) grad += load(pooled + c, n) * share;
            const vec d = grad * (1.0f + load(scale + c, n));
            sum += d, dot += d * normed;
            add(sums + c, grad * normed, n);
            add(sums + C + c, grad, n);
            store(dx + c, d, n);)
        const float mean_d = total(sum) * each, mean_dot = total(dot) * each;
        CHANNELS(
            const vec normed = (load(x + c, n) - mean) * rstd;
            vec d = rstd * (load(dx + c, n) - mean_d - normed * mean_dot);
            if (other) d += load(other + c, n);
            store(dx + c, d, n);)
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
