/* Element-wise parts of a block on NHWC float32, each in one pass forward and one backward.
 *
 * A tensor is (B, P, C): B images of P = H * W positions; a (B, C) argument is one row per image. Work is cut into
 * pieces of at most `piece` positions of one image. A sum over positions is kept per piece, (B, pieces, sums, C), and
 * the pieces are added in order: the same bits at any number of threads, and image i is the same in any batch. Where
 * rows are `alike` there is one, of all images. */
#include "elements.h"
#include "entries.h"

#define SMALL (16 * 1024) /* fewer elements than this are not worth a second thread */

/* --- a job: the same function on every piece ------------------------------------------------------------------*/

typedef struct job {
    const float *in[5], *row[3]; /* (B, P, C) and (B, C), or (C) where `alike` */
    float *out[3];               /* (B, P, C) */
    float *sums;                 /* (B, pieces, kinds, C), or NULL */
    float *moments;              /* (B, P, 2): mean and 1 / standard deviation of AdaLN, or NULL */
    float eps;
    idx B, P, C, kinds, piece, pieces, alike;
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

#define TAIL idx B, idx P, idx C, idx length, RUN
#define SHAPE .B = B, .P = P, .C = C, .piece = length

/* --- y = (1 + scale) * LayerNorm(x) + shift, and the mean of y over positions ----------------------------------*/

/* row[0] is the scales and, beside them, the shifts, (B, 2 C) */

static void adaln_piece(const job_t *j, idx b, idx first, idx last, float *sums) {
    const idx at = b * j->P + first, C = j->C;
    adaln(last - first, C, j->in[0] + at * C, j->row[0] + (j->alike ? 0 : b * 2 * C), j->eps, j->out[0] + at * C,
          j->moments ? j->moments + at * 2 : NULL, sums);
}

/* in: the gradient of y, more of it, x, other; row[1], where there is one, is the gradient of the mean of y */
static void adaln_grad_piece(const job_t *j, idx b, idx first, idx last, float *sums) {
    const idx at = b * j->P + first, C = j->C;
    adaln_grad(last - first, C, j->in[0] + at * C, j->in[1] ? j->in[1] + at * C : NULL, j->in[2] + at * C,
               j->in[3] ? j->in[3] + at * C : NULL, j->row[0] + b * 2 * C, j->row[1] ? j->row[1] + b * C : NULL,
               1.0f / j->P, j->moments + at * 2, j->out[0] + at * C, sums);
}

void adaln_forward(const float *x, const float *modulation, float *y, float *moments, float *sums, float eps, idx alike,
                   TAIL) {
    job_t j = {.in = {x}, .row = {modulation}, .out = {y}, .moments = moments, .sums = sums, .kinds = 1, .eps = eps,
               .alike = alike, .body = adaln_piece, SHAPE};
    run(&j, pool, threads);
}

void adaln_backward(const float *g, const float *more, const float *x, const float *other, const float *modulation,
                    const float *pooled, const float *moments, float *dx, float *sums, TAIL) {
    job_t j = {.in = {g, more, x, other}, .row = {modulation, pooled}, .moments = (float *)moments, .out = {dx}, .sums = sums,
               .kinds = 2, .body = adaln_grad_piece, SHAPE};
    run(&j, pool, threads);
}

/* --- y = s g + (1 - s) h, s = sigmoid(a f - b) -----------------------------------------------------------------*/

static void gate_piece(const job_t *j, idx b, idx first, idx last, float *sums) {
    const idx C = j->C, at = (b * j->P + first) * C, row = j->alike ? 0 : b * C;
    gate(last - first, C, j->in[0] + at, j->in[1] + at, j->in[2] + at, j->row[0] + row, j->row[1] + row, j->out[0] + at);
}

static void gate_grad_piece(const job_t *j, idx b, idx first, idx last, float *sums) {
    const idx C = j->C, at = (b * j->P + first) * C;
    gate_grad(last - first, C, j->in[0] + at, j->in[1] + at, j->in[2] + at, j->in[3] + at, j->row[0] + b * C,
              j->row[1] + b * C, j->out[0] + at, j->out[1] + at, j->out[2] + at, sums);
}

void gate_forward(const float *f, const float *g, const float *h, const float *a, const float *b, float *y, idx alike, TAIL) {
    job_t j = {.in = {f, g, h}, .row = {a, b}, .out = {y}, .alike = alike, .body = gate_piece, SHAPE};
    run(&j, pool, threads);
}

void gate_backward(const float *grad, const float *f, const float *g, const float *h, const float *a, const float *b,
                   float *df, float *dg, float *dh, float *sums, TAIL) {
    job_t j = {.in = {grad, f, g, h}, .row = {a, b}, .out = {df, dg, dh}, .sums = sums, .kinds = 2, .body = gate_grad_piece,
               SHAPE};
    run(&j, pool, threads);
}

/* --- out = x + alpha n + (1 - alpha) y -------------------------------------------------------------------------*/

static void relax_piece(const job_t *j, idx b, idx first, idx last, float *sums) {
    const idx C = j->C, at = (b * j->P + first) * C;
    relax(last - first, C, j->in[0] + at, j->in[1] + at, j->in[2] + at, j->row[0] + (j->alike ? 0 : b * C), j->out[0] + at);
}

static void relax_grad_piece(const job_t *j, idx b, idx first, idx last, float *sums) {
    const idx C = j->C, at = (b * j->P + first) * C;
    relax_grad(last - first, C, j->in[0] + at, j->in[1] + at, j->in[2] + at, j->row[0] + b * C, j->out[0] + at,
               j->out[1] + at, sums);
}

void relax_forward(const float *x, const float *kept, const float *mixed, const float *alpha, float *out, idx alike, TAIL) {
    job_t j = {.in = {x, kept, mixed}, .row = {alpha}, .out = {out}, .alike = alike, .body = relax_piece, SHAPE};
    run(&j, pool, threads);
}

void relax_backward(const float *g, const float *kept, const float *mixed, const float *alpha, float *dkept,
                    float *dmixed, float *sums, TAIL) {
    job_t j = {.in = {g, kept, mixed}, .row = {alpha}, .out = {dkept, dmixed}, .sums = sums, .kinds = 1,
               .body = relax_grad_piece, SHAPE};
    run(&j, pool, threads);
}
