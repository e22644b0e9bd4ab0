/* Element-wise parts of a block on NHWC float32, each in one pass forward and one backward.
 *
 * A tensor is (B, P, C): B images of P = H * W positions; a (B, C) argument is one row per image. Work is cut into
 * pieces of at most `piece` positions of one image. A sum over positions is kept per piece, (B, pieces, sums, C), and
 * the pieces are added in order: the same bits at any number of threads, and image i is the same in any batch. */
#include "lanes.h"

#define SMALL (16 * 1024) /* fewer elements than this are not worth a second thread */

/* BODY sees c, the first channel, and n, the number of them: a constant VL but for the last few. */
#define CHANNELS(...)                                              \
    {                                                              \
        idx c = 0;                                                 \
        for (; c + VL <= C; c += VL) { const idx n = VL; __VA_ARGS__ } \
        if (c < C) { const idx n = C - c; __VA_ARGS__ }            \
    }

INLINE vec existing(vec v, idx n) { /* zero past the end */
    for (idx i = n; i < VL; i++) v[i] = 0;
    return v;
}

/* --- a job: the same function on every piece ------------------------------------------------------------------*/

typedef struct job {
    const float *in[5], *row[3]; /* (B, P, C) and (B, C) */
    float *out[3];               /* (B, P, C) */
    float *sums;                 /* (B, pieces, kinds, C), or NULL */
    float *moments;              /* (B, P, 2): mean and 1 / standard deviation of AdaLN */
    float eps;
    idx B, P, C, kinds, piece, pieces;
    void (*body)(const struct job *, idx b, idx first, idx last, float *sums);
} job_t;

static void piece(void *data, idx k, idx me) {
    const job_t *j = data;
    const idx b = k / j->pieces, first = k % j->pieces * j->piece, last = first + j->piece;
    float *sums = j->sums ? j->sums + k * j->kinds * j->C : NULL;
    if (sums) memset(sums, 0, j->kinds * j->C * sizeof(float));
    j->body(j, b, first, last < j->P ? last : j->P, sums);
}

static void run(job_t *j, const pool_t *pool, idx threads) {
    j->pieces = (j->P + j->piece - 1) / j->piece;
    side_by_side(piece, j, j->B * j->pieces, pool, j->B * j->P * j->C >= SMALL ? threads : 1);
    const idx size = j->kinds * j->C;
    for (idx b = 0; j->sums && b < j->B; b++)
        for (idx k = 1; k < j->pieces; k++)
            for (idx i = 0; i < size; i++) j->sums[b * j->pieces * size + i] += j->sums[(b * j->pieces + k) * size + i];
}

#define TAIL idx B, idx P, idx C, idx length, const pool_t *pool, idx threads
#define SHAPE .B = B, .P = P, .C = C, .piece = length
#define UNPACK const idx C = j->C, from = (b * j->P + first) * C, to = (b * j->P + last) * C;

/* --- y = (1 + scale) * LayerNorm(x) + shift, and the mean of y over positions ----------------------------------*/

/* row[0] is the scales and, beside them, the shifts, (B, 2 C) */

static void adaln(const job_t *j, idx b, idx first, idx last, float *sums) {
    UNPACK
    const float *scale = j->row[0] + b * 2 * C, *shift = scale + C, each = 1.0f / C;
    float *moments = j->moments + (b * j->P + first) * 2;
    for (idx at = from; at < to; at += C) {
        const float *x = j->in[0] + at;
        float *y = j->out[0] + at;
        vec sum = {0}, squares = {0};
        CHANNELS(sum += load(x + c, n);)
        const float mean = total(sum) * each;
        CHANNELS(const vec d = existing(load(x + c, n) - mean, n); squares += d * d;)
        const float rstd = 1.0f / sqrtf(total(squares) * each + j->eps);
        CHANNELS(store(y + c, (load(x + c, n) - mean) * rstd * (1.0f + load(scale + c, n)) + load(shift + c, n), n);)
        if (sums) CHANNELS(add(sums + c, load(y + c, n), n);)
        *moments++ = mean, *moments++ = rstd;
    }
}

/* With n = LayerNorm(x) and d = (1 + scale) g: dx = rstd (d - mean(d) - n mean(d n)), dscale = sum g n, dshift = sum g;
 * row[1], where there is one, is the gradient of the mean of y; in[2], where there is one, is added to dx. */
static void adaln_grad(const job_t *j, idx b, idx first, idx last, float *sums) {
    UNPACK
    const float *scale = j->row[0] + b * 2 * C, *pooled = j->row[1] ? j->row[1] + b * C : NULL;
    const float share = 1.0f / j->P, each = 1.0f / C;
    const float *moments = j->moments + (b * j->P + first) * 2;
    for (idx at = from; at < to; at += C) {
        const float *g = j->in[0] + at, *x = j->in[1] + at, *other = j->in[2] ? j->in[2] + at : NULL;
        const float mean = *moments++, rstd = *moments++;
        float *dx = j->out[0] + at;
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

void adaln_forward(const float *x, const float *modulation, float *y, float *moments, float *sums, float eps, TAIL) {
    job_t j = {.in = {x}, .row = {modulation}, .out = {y}, .moments = moments, .sums = sums, .kinds = 1, .eps = eps,
               .body = adaln, SHAPE};
    run(&j, pool, threads);
}

void adaln_backward(const float *g, const float *x, const float *other, const float *modulation, const float *pooled,
                    const float *moments, float *dx, float *sums, TAIL) {
    job_t j = {.in = {g, x, other}, .row = {modulation, pooled}, .moments = (float *)moments, .out = {dx}, .sums = sums,
               .kinds = 2, .body = adaln_grad, SHAPE};
    run(&j, pool, threads);
}

/* --- y = s g + (1 - s) h, s = sigmoid(a f - b) -----------------------------------------------------------------*/

static void gate(const job_t *j, idx b, idx first, idx last, float *sums) {
    UNPACK
    const float *scale = j->row[0] + b * C, *offset = j->row[1] + b * C;
    for (idx at = from; at < to; at += C) {
        const float *f = j->in[0] + at, *g = j->in[1] + at, *h = j->in[2] + at;
        CHANNELS(
            const vec s = sigmoid(load(scale + c, n) * load(f + c, n) - load(offset + c, n)), low = load(h + c, n);
            store(j->out[0] + at + c, low + s * (load(g + c, n) - low), n);)
    }
}

static void gate_grad(const job_t *j, idx b, idx first, idx last, float *sums) {
    UNPACK
    const float *scale = j->row[0] + b * C, *offset = j->row[1] + b * C;
    for (idx at = from; at < to; at += C) {
        const float *f = j->in[1] + at, *g = j->in[2] + at, *h = j->in[3] + at;
        CHANNELS(
            const vec a = load(scale + c, n), v = load(f + c, n), grad = load(j->in[0] + at + c, n);
            const vec s = sigmoid(a * v - load(offset + c, n)), up = s * grad, low = grad - up;
            const vec d = up * (1.0f - s) * (load(g + c, n) - load(h + c, n));
            store(j->out[0] + at + c, a * d, n);
            store(j->out[1] + at + c, up, n);
            store(j->out[2] + at + c, low, n);
            add(sums + c, d * v, n);
            add(sums + C + c, -d, n);)
    }
}

void gate_forward(const float *f, const float *g, const float *h, const float *a, const float *b, float *y, TAIL) {
    job_t j = {.in = {f, g, h}, .row = {a, b}, .out = {y}, .body = gate, SHAPE};
    run(&j, pool, threads);
}

void gate_backward(const float *grad, const float *f, const float *g, const float *h, const float *a, const float *b,
                   float *df, float *dg, float *dh, float *sums, TAIL) {
    job_t j = {.in = {grad, f, g, h}, .row = {a, b}, .out = {df, dg, dh}, .sums = sums, .kinds = 2, .body = gate_grad,
               SHAPE};
    run(&j, pool, threads);
}

/* --- out = x + alpha n + (1 - alpha) y -------------------------------------------------------------------------*/

static void relax(const job_t *j, idx b, idx first, idx last, float *sums) {
    UNPACK
    const float *alpha = j->row[0] + b * C;
    for (idx at = from; at < to; at += C) {
        const float *x = j->in[0] + at, *kept = j->in[1] + at, *mixed = j->in[2] + at;
        CHANNELS(
            const vec y = load(mixed + c, n);
            store(j->out[0] + at + c, load(x + c, n) + (y + load(alpha + c, n) * (load(kept + c, n) - y)), n);)
    }
}

static void relax_grad(const job_t *j, idx b, idx first, idx last, float *sums) {
    UNPACK
    const float *alpha = j->row[0] + b * C;
    for (idx at = from; at < to; at += C) {
        const float *kept = j->in[1] + at, *mixed = j->in[2] + at;
        CHANNELS(
            const vec g = load(j->in[0] + at + c, n), up = g * load(alpha + c, n);
            store(j->out[0] + at + c, up, n);
            store(j->out[1] + at + c, g - up, n);
            if (sums) add(sums + c, g * (load(kept + c, n) - load(mixed + c, n)), n);)
    }
}

void relax_forward(const float *x, const float *kept, const float *mixed, const float *alpha, float *out, TAIL) {
    job_t j = {.in = {x, kept, mixed}, .row = {alpha}, .out = {out}, .body = relax, SHAPE};
    run(&j, pool, threads);
}

void relax_backward(const float *g, const float *kept, const float *mixed, const float *alpha, float *dkept,
                    float *dmixed, float *sums, TAIL) {
    job_t j = {.in = {g, kept, mixed}, .row = {alpha}, .out = {dkept, dmixed}, .sums = sums, .kinds = 1,
               .body = relax_grad, SHAPE};
    run(&j, pool, threads);
}

/* --- y = z sigmoid(z), z = x + v -------------------------------------------------------------------------------*/

static void silu(const job_t *j, idx b, idx first, idx last, float *sums) {
    UNPACK
    const float *v = j->row[0] + b * C;
    for (idx at = from; at < to; at += C)
        CHANNELS(
            const vec z = load(j->in[0] + at + c, n) + load(v + c, n);
            store(j->out[0] + at + c, z * sigmoid(z), n);)
}

static void silu_grad(const job_t *j, idx b, idx first, idx last, float *sums) {
    UNPACK
    const float *v = j->row[0] + b * C;
    for (idx at = from; at < to; at += C)
        CHANNELS(
            const vec z = load(j->in[1] + at + c, n) + load(v + c, n);
            const vec s = sigmoid(z), d = load(j->in[0] + at + c, n) * (s * (1.0f + z * (1.0f - s)));
            store(j->out[0] + at + c, d, n);
            add(sums + c, d, n);)
}

void silu_forward(const float *x, const float *v, float *y, TAIL) {
    job_t j = {.in = {x}, .row = {v}, .out = {y}, .body = silu, SHAPE};
    run(&j, pool, threads);
}

void silu_backward(const float *g, const float *x, const float *v, float *dx, float *sums, TAIL) {
    job_t j = {.in = {g, x}, .row = {v}, .out = {dx}, .sums = sums, .kinds = 1, .body = silu_grad, SHAPE};
    run(&j, pool, threads);
}
