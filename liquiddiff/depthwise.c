/* Depthwise K x K convolution (K odd, stride 1, zero padding) on NHWC float32: forward, input, weight and bias gradient.
 * K is a compile-time constant: cc -DK=7.
 *
 * Lanes are channels, VL at a time. A tile is T neighbouring outputs of one image row: its T sums and the K taps of one
 * kernel row stay in registers (8 + 7 + 1 = the 16 of AVX2), each input is loaded once per kernel row and used K times.
 * Taps that fall outside the image are skipped, not multiplied by zero (the whole-row tiles of W = 4 and 8 know them at
 * compile time: 43 % and 21 % fewer products per row at K = 7). The input gradient is the same with the kernel flipped;
 * in the weight gradient sums and taps swap roles.
 *
 * The order of every sum is fixed, and work is cut in a way that changes no sum: the same bits at any number of threads,
 * and image i is the same in any batch. */
#include "lanes.h"

#define R (K / 2)
#define ROWS (K == 3 ? 3 : 1) /* kernel rows per pass of the weight gradient: 3 sums alone would wait for each other */
#define TERMS 1024            /* positions per running sum of the weight gradient, and per piece of work */
#define MAX_CHUNKS 64         /* ... unless that makes more partial sums than this */
#define BAND 32               /* positions per visit of the weight gradient to its sums */
#define FAR (64 * 1024)       /* an image of more bytes than this is prefetched a row ahead */

#define CHANNEL(k, C) ((k) * VL + VL <= (C) ? (k) * VL : (C) - VL) /* the last block overlaps: the same values twice */

enum { EDGE, WHOLE }; /* a tile that asks which inputs beside it exist (lo <= p < hi); a tile that is the whole row */
#define OUTSIDE(p) (((p) < R && (kind == WHOLE || (p) < lo)) || ((p) >= R + T && (kind == WHOLE || (p) >= hi)))

/* y[t] = bias + sum_ij x[i][t + j] * w[i][j] over the kernel rows that exist; other[t] for bias where there is one. */
INLINE void conv_tile(const int T, const int kind, idx lo, idx hi, idx rows, const float *x, idx xs, idx xrow, const float *w,
                      vec bias, const float *other, float *y) {
    vec sum[8], tap[K];
    UNROLL for (int t = 0; t < T; t++) sum[t] = other ? LOAD(other + t * xs) : bias;
    for (idx i = 0; i < rows; i++, x += xrow, w += K * VL) {
        const float *q = x;
        UNROLL for (int j = 0; j < K; j++) tap[j] = LOAD(w + j * VL);
        UNROLL for (int p = 0; p < T + K - 1; p++, q += xs) {
            if (OUTSIDE(p)) continue;
            const vec v = LOAD(q);
            UNROLL for (int t = 0; t < T; t++) if (p >= t && p - t < K) sum[t] += v * tap[p - t];
        }
    }
    UNROLL for (int t = 0; t < T; t++) STORE(y + t * xs, sum[t]);
}

/* sum[i][j] += sum_t x[i][t + j] * g[t] over ROWS kernel rows, of which i0 .. i1 exist. */
INLINE void grad_tile(const int T, const int kind, idx lo, idx hi, idx i0, idx i1, const float *x, idx xs, idx xrow,
                      const float *g, vec *sum) {
    vec out[8];
    UNROLL for (int t = 0; t < T; t++) out[t] = LOAD(g + t * xs);
    UNROLL for (int i = 0; i < ROWS; i++, x += xrow) {
        if (ROWS > 1 && (i < i0 || i >= i1)) continue;
        const float *q = x;
        UNROLL for (int p = 0; p < T + K - 1; p++, q += xs) {
            if (OUTSIDE(p)) continue;
            const vec v = LOAD(q);
            UNROLL for (int t = 0; t < T; t++) if (p >= t && p - t < K) sum[i * K + p - t] += v * out[t];
        }
    }
}

/* Cut outputs `from` to `to` of a row of W into tiles, u = the first output of each: CALL(T, kind, lo, hi). */
#define ROW_TILES(CALL, from, to)                                                \
    if (W == 8 && to - from == W) { const idx u = 0; CALL(8, WHOLE, 0, 0) }      \
    else if (W == 4 && to - from == W) { const idx u = 0; CALL(4, WHOLE, 0, 0) } \
    else {                                                                       \
        idx u = from;                                                            \
        for (; u + 8 <= to; u += 8) { CALL(8, EDGE, R - u, W + R - u) }          \
        for (; u + 4 <= to; u += 4) { CALL(4, EDGE, R - u, W + R - u) }          \
        for (; u < to; u++) { CALL(1, EDGE, R - u, W + R - u) }                  \
    }

/* Positions `first` to `last` of an image, channel blocks k0 .. k1 innermost, so that memory is read in order. y, and
 * other where there is one, begin at the first. ahead: prefetch a row ahead. */
INLINE void conv_span(idx H, idx W, idx C, idx k0, idx k1, idx first, idx last, const int ahead, const float *x,
                      const float *w, const float *bias, const float *other, float *y) {
    for (idx h = first / W; h * W < last; h++) {
        const idx from = h * W < first ? first - h * W : 0, to = last - h * W < W ? last - h * W : W;
        const idx i0 = h < R ? R - h : 0, i1 = h + R >= H ? H - h + R : K;
        const float *xr = x + (h - R + i0) * W * C, *next = x + (h + R + 1) * W * C;
        const idx row = (h * W - first) * C;
#define CALL(T, kind, lo, hi)                                                                                            \
        for (idx k = k0; k < k1; k++) {                                                                                  \
            const idx c = CHANNEL(k, C), at = row + u * C + c;                                                           \
            if (ahead) for (idx t = 0; t < T; t++) {                                                                     \
                __builtin_prefetch(next + (u + t) * C + c);                                                              \
                __builtin_prefetch(y + at + (t + W) * C, 1);                                                             \
            }                                                                                                            \
            conv_tile(T, kind, lo, hi, i1 - i0, xr + (u - R) * C + c, C, W * C, w + (k * K + i0) * K * VL,               \
                      bias ? LOAD(bias + c) : (vec){0}, other ? other + at : NULL, y + at);                              \
        }
        ROW_TILES(CALL, from, to)
#undef CALL
    }
}

/* Adds one image to sums: (blocks, K * K + 1, VL), the last row for the bias. */
static void grad_image(idx H, idx W, idx C, idx k0, idx k1, const float *x, const float *g, float *sums) {
    const int far = H * W * C * 4 > FAR;
    const idx band = W < BAND ? BAND / W : 1;
    for (idx first = 0; first < H; first += band)
        for (idx k = k0; k < k1; k++) {
            const idx stop = first + band < H ? first + band : H, c = CHANNEL(k, C);
            float *at = sums + k * (K * K + 1) * VL;
            if (far) for (idx p = first * W; p < stop * W; p++) {
                __builtin_prefetch(x + (p + (R + band) * W) * C + c);
                __builtin_prefetch(g + (p + band * W) * C + c);
            }
            for (int i = 0; i < K; i += ROWS, at += ROWS * K * VL) {
                vec sum[ROWS * K];
                UNROLL for (int j = 0; j < ROWS * K; j++) sum[j] = LOAD(at + j * VL);
                /* one kernel row at a time: only the image rows that it meets */
                idx h = ROWS == 1 && first < R - i ? R - i : first;
                const idx end = ROWS == 1 && stop > H + R - i ? H + R - i : stop;
                for (; h < end; h++) {
                    const idx i0 = h < R ? R - h : 0, i1 = h + R >= H ? H - h + R : K;
                    const float *gr = g + h * W * C + c, *xr = x + (h + i - R) * W * C + c;
#define CALL(T, kind, lo, hi) grad_tile(T, kind, lo, hi, i0, i1, xr + (u - R) * C, C, W * C, gr + u * C, sum);
                    ROW_TILES(CALL, 0, W)
#undef CALL
                }
                UNROLL for (int j = 0; j < ROWS * K; j++) STORE(at + j * VL, sum[j]);
            }
            vec even = LOAD(at), odd = {0};
            idx p = first * W;
            for (; p + 2 <= stop * W; p += 2) even += LOAD(g + p * C + c), odd += LOAD(g + (p + 1) * C + c);
            if (p < stop * W) even += LOAD(g + p * C + c);
            STORE(at, even + odd);
        }
}

typedef struct {
    const float *x, *w, *bias, *other; /* x: input of the convolution (backward: the output's gradient); w packed */
    float *y;                          /* output of the convolution, or NULL */
    const float *input, *g;            /* of the weight gradient */
    float *sums;                       /* (chunks, blocks, K * K + 1, VL), or NULL */
    idx B, H, W, C, blocks, chunk, chunks, group, groups;
} job_t;

static void piece(void *data, idx n, idx me) {
    const job_t *j = data;
    const idx chunk = n / j->groups, k0 = n % j->groups * j->group;
    const idx k1 = k0 + j->group < j->blocks ? k0 + j->group : j->blocks;
    for (idx b = chunk * j->chunk; b < (chunk + 1) * j->chunk && b < j->B; b++) {
        const idx P = j->H * j->W, at = b * P * j->C;
        const float *other = j->other ? j->other + at : NULL;
        if (j->y && P * j->C * 4 > FAR)
            conv_span(j->H, j->W, j->C, k0, k1, 0, P, 1, j->x + at, j->w, j->bias, other, j->y + at);
        else if (j->y) conv_span(j->H, j->W, j->C, k0, k1, 0, P, 0, j->x + at, j->w, j->bias, other, j->y + at);
        if (j->sums)
            grad_image(j->H, j->W, j->C, k0, k1, j->input + at, j->g + at, j->sums + chunk * j->blocks * (K * K + 1) * VL);
    }
}

static void cut(job_t *j, idx threads) {
    const idx n = j->H * j->W;
    j->blocks = (j->C + VL - 1) / VL;
    j->chunk = (TERMS + n - 1) / n; /* a function of the shape alone, because it decides the order of sums */
    if (j->chunk * MAX_CHUNKS < j->B) j->chunk = (j->B + MAX_CHUNKS - 1) / MAX_CHUNKS;
    j->chunks = (j->B + j->chunk - 1) / j->chunk;
    j->group = j->chunks < 2 * threads ? 32 / VL : j->blocks; /* few images: split channels too, which changes no sum */
    j->groups = (j->blocks + j->group - 1) / j->group;
}

static float *pack(const float *w, idx C, int flip) { /* (C, K * K) -> (blocks, K * K, VL) */
    float *to = floats((C + VL) * K * K);
    for (idx k = 0; to && k * VL < C; k++)
        for (idx i = 0; i < K * K; i++)
            for (idx l = 0; l < VL; l++)
                to[(k * K * K + i) * VL + l] = w[(CHANNEL(k, C) + l) * K * K + (flip ? K * K - 1 - i : i)];
    return to;
}

int dw_lanes(void) { return VL; } /* the least C */

/* y = conv(x, w) + bias, which may be NULL. No dimension is 0. Returns 0, or 1 when out of memory. */
int dw_forward(const float *x, const float *w, const float *bias, float *y, idx B, idx C, idx H, idx W, const pool_t *pool,
               idx threads) {
    float *packed = pack(w, C, 0);
    job_t j = {.x = x, .w = packed, .bias = bias, .y = y, .B = B, .H = H, .W = W, .C = C};
    if (!packed) return 1;
    cut(&j, threads);
    side_by_side(piece, &j, j.chunks * j.groups, pool, threads);
    free(packed);
    return 0;
}

/* For a pass of other kernels that goes on with what a convolution gives (product.h). */
float *dw_pack(const float *w, idx C) { return pack(w, C, 0); }

void dw_span(idx H, idx W, idx C, idx first, idx last, const float *x, const float *w, const float *bias, float *y) {
    conv_span(H, W, C, 0, (C + VL - 1) / VL, first, last, 0, x, w, bias, NULL, y);
}

/* dx, dw and db may each be NULL; other, which is added to dx, too. Returns 0, or 1 when out of memory. */
int dw_backward(const float *g, const float *x, const float *w, const float *other, float *dx, float *dw, float *db,
                idx B, idx C, idx H, idx W, const pool_t *pool, idx threads) {
    job_t j = {.x = g, .other = other, .y = dx, .input = x, .g = g, .B = B, .H = H, .W = W, .C = C};
    cut(&j, threads);
    const idx size = j.blocks * (K * K + 1) * VL;
    float *packed = dx ? pack(w, C, 1) : NULL;
    float *sums = dw || db ? floats(size * j.chunks) : NULL;
    const int failed = (dx && !packed) || ((dw || db) && !sums);
    if (sums) memset(sums, 0, size * j.chunks * sizeof(float));
    j.w = packed, j.sums = sums;
    if (!failed) side_by_side(piece, &j, j.chunks * j.groups, pool, threads);
    for (idx n = 1; sums && n < j.chunks; n++)
        for (idx i = 0; i < size; i++) sums[i] += sums[n * size + i];
    for (idx k = 0; sums && k < j.blocks; k++)
        for (idx l = 0; l < VL; l++) {
            const idx c = CHANNEL(k, C) + l;
            const float *from = sums + k * (K * K + 1) * VL + l;
            for (idx i = 0; dw && i < K * K; i++) dw[c * K * K + i] = from[i * VL];
            if (db) db[c] = from[K * K * VL];
        }
    free(packed), free(sums);
    return failed;
}
