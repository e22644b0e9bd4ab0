/* Matrix products of one tile: some positions, few enough for what is made of them to stay in the nearest caches.
 *
 * Rows are positions, row-major; a weight W is (O, K). Outputs are summed over k in order, in registers: the same bits
 * in any tile. */
#include "lanes.h"

#define PANEL (2 * VL)            /* outputs, or columns of a weight gradient, that are in registers together */
#define HEIGHT (VL / 2)           /* rows, or those of a weight gradient, the same */
#define TILE 64                   /* positions; also those between two visits of a weight gradient to its sums */
#define CHUNK 512                 /* positions at least that share the sums of a weight gradient */
#define MAX_CHUNKS 32
#define GATHERED (32 * 1024)       /* fewer sums than this are not worth a second thread */

/* --- tiles ----------------------------------------------------------------------------------------------------*/

typedef struct {
    idx B, P, each, tiles, chunk, chunks; /* images, positions; tiles of an image, of all, of a chunk; chunks */
} cut_t;

typedef struct {
    idx b, first, rows, at; /* image, position in it, how many, position among all */
} tile_t;

INLINE idx count(idx width, idx all) { return (all + width - 1) / width; }

INLINE cut_t cut(idx B, idx P) {
    cut_t c = {.B = B, .P = P, .each = count(TILE, P)};
    const idx least = count(P < TILE ? P : TILE, CHUNK);
    c.tiles = B * c.each, c.chunk = count(MAX_CHUNKS, c.tiles);
    if (c.chunk < least) c.chunk = least;
    c.chunks = count(c.chunk, c.tiles);
    return c;
}

INLINE tile_t tile(cut_t c, idx k) {
    tile_t t = {.b = k / c.each, .first = k % c.each * TILE};
    t.rows = c.P - t.first < TILE ? c.P - t.first : TILE, t.at = t.b * c.P + t.first;
    return t;
}

/* Rows of each tile (tiles, C), those of an image added in order, to (B, C). */
static void gather_rows(cut_t c, const float *from, idx C, float *to) {
    for (idx k = 0; k < c.tiles; k++)
        for (idx i = 0; i < C; i++) to[k / c.each * C + i] = (k % c.each ? to[k / c.each * C + i] : 0) + from[k * C + i];
}

/* y = SiLU(x + row), and its slope there; row and slope may be NULL. */
static void activate(idx rows, idx C, const float *x, const float *row, float *y, float *slope) {
    for (idx r = 0; r < rows; r++, x += C, y += C, slope += slope ? C : 0)
        CHANNELS(
            const vec z = load(x + c, n) + (row ? load(row + c, n) : (vec){0});
            if (slope) {
                const vec s = sigmoid(z);
                store(y + c, z * s, n), store(slope + c, s * (1.0f + z * (1.0f - s)), n);
            } else store(y + c, silu(z), n);)
}

/* --- a depthwise convolution, whose output is what a product takes --------------------------------------------*/

typedef struct {
    float *(*pack)(const float *w, idx C); /* dw_pack, dw_span and dw_backward of depthwise.c, for this size of kernel */
    void (*span)(idx H, idx W, idx C, idx first, idx last, const float *x, const float *taps, const float *bias, float *y);
    int (*backward)(const float *g, const float *x, const float *w, const float *other, float *dx, float *dw, float *db, idx B,
                    idx C, idx H, idx W, const pool_t *pool, idx threads);
    const float *w, *bias; /* (C, k, k), and (C) or NULL */
    idx H, W;
} depthwise_t;

/* One tile of it, (rows, C): x (B, P, C); taps as `pack` gave them. */
static void convolve(const depthwise_t *d, tile_t t, idx C, const float *x, const float *taps, float *y) {
    d->span(d->H, d->W, C, t.first, t.first + t.rows, x + t.b * d->H * d->W * C, taps, d->bias, y);
}

/* --- y = x W^T ------------------------------------------------------------------------------------------------*/

typedef struct {
    const float *w;
    float *to;
    idx O, K;
    int back;
} pack_t;

/* VL x VL floats, rows `from` apart, to columns that are PANEL apart. */
static void transpose(const float *x, idx from, float *y) {
#if defined __AVX512F__ && !defined __clang__
    vec v[VL];
    UNROLL for (int r = 0; r < VL; r++) v[r] = LOAD(x + r * from);
    UNROLL for (int s = 1; s < VL; s *= 2) { /* swap what lies off the diagonal of each 2 s x 2 s square */
        ivec low, high;
        UNROLL for (int l = 0; l < VL; l++) low[l] = l & s ? VL + (l ^ s) : l, high[l] = l & s ? VL + l : l ^ s;
        UNROLL for (int r = 0; r < VL; r++) if (!(r & s)) {
            const vec a = v[r], b = v[r | s];
            v[r] = __builtin_shuffle(a, b, low), v[r | s] = __builtin_shuffle(a, b, high);
        }
    }
    UNROLL for (int r = 0; r < VL; r++) STORE(y + r * PANEL, v[r]);
#else
    for (int r = 0; r < VL; r++)
        for (int l = 0; l < VL; l++) y[l * PANEL + r] = x[r * from + l];
#endif
}

static void pack_panel(void *data, idx p, idx me) {
    const pack_t *j = data;
    const idx inputs = j->back ? j->O : j->K, outputs = j->back ? j->K : j->O, O = outputs - p * PANEL;
    float *to = j->to + p * inputs * PANEL;
    const idx n = O < PANEL ? O : PANEL, whole = n / VL * VL, blocks = inputs / VL * VL;
    if (n < PANEL) memset(to, 0, inputs * PANEL * sizeof(float));
    if (j->back) {
        for (idx k = 0; k < inputs; k++) memcpy(to + k * PANEL, j->w + k * j->K + p * PANEL, n * sizeof(float));
        return;
    }
    const float *w = j->w + p * PANEL * j->K;
    for (idx o = 0; o < whole; o += VL)
        for (idx k = 0; k < blocks; k += VL) transpose(w + o * j->K + k, j->K, to + k * PANEL + o);
    for (idx o = 0; o < n; o++)
        for (idx k = o < whole ? blocks : 0; k < inputs; k++) to[k * PANEL + o] = w[o * j->K + k];
}

/* W as `product` reads it, (panels, K, PANEL), zeros past the last output; NULL when out of memory. `back`: W^T. */
static float *packed(const float *w, idx O, idx K, int back, const pool_t *pool, idx threads) {
    const idx inputs = back ? O : K, panels = count(PANEL, back ? K : O);
    pack_t j = {.w = w, .to = floats(panels * PANEL * inputs), .O = O, .K = K, .back = back};
    if (j.to) side_by_side(pack_panel, &j, panels, pool, panels * inputs < 2048 ? 1 : threads);
    return j.to;
}

/* What becomes of a sum: itself, + more, SiLU of it, times more. */
enum { PLAIN, ADD, SILU, TIMES };

typedef struct {
    const float *bias, *more; /* (O), (rows, O), or NULL */
    float *y, *before;        /* (rows, O); what SiLU is of, or NULL */
} out_t;

INLINE void leave(const int then, vec sum, idx at, const idx n, out_t out) {
    if (then == ADD) sum += load(out.more + at, n);
    if (then == TIMES) sum *= load(out.more + at, n);
    if (then == SILU && out.before) store(out.before + at, sum, n);
    if (then == SILU) sum = silu(sum);
    store(out.y + at, sum, n);
}

/* Outputs `first` to first + n, which is PANEL but for the last ones, of `rows` positions. */
INLINE void rows_of(const idx rows, const int then, const float *x, idx K, const float *w, idx first, const idx n, idx O,
                    out_t out) {
    const vec zero = {0}, low = out.bias ? load(out.bias + first, n < VL ? n : VL) : zero;
    const vec high = out.bias && n > VL ? load(out.bias + first + VL, n - VL) : zero;
    vec sum[HEIGHT][2];
    UNROLL for (int r = 0; r < rows; r++) sum[r][0] = low, sum[r][1] = high;
    for (idx k = 0; k < K; k++, w += PANEL) {
        const vec a = LOAD(w), b = LOAD(w + VL);
        UNROLL for (int r = 0; r < rows; r++) sum[r][0] += x[r * K + k] * a, sum[r][1] += x[r * K + k] * b;
    }
    UNROLL for (int r = 0; r < rows; r++) {
        leave(then, sum[r][0], r * O + first, n < VL ? n : VL, out);
        if (n > VL) leave(then, sum[r][1], r * O + first + VL, n - VL, out);
    }
}

/* `rows` positions of x (rows, K) by the packed w. */
INLINE void product(const int then, idx rows, const float *x, idx K, const float *w, idx O, out_t out) {
    for (idx o = 0; o < O; o += PANEL, w += K * PANEL)
        for (idx r = 0; r < rows;) {
            const idx all = r + HEIGHT <= rows, n = O - o;
            const out_t at = {out.bias, out.more ? out.more + r * O : NULL, out.y + r * O,
                              out.before ? out.before + r * O : NULL};
            if (all && n >= PANEL) rows_of(HEIGHT, then, x + r * K, K, w, o, PANEL, O, at);
            else if (all) rows_of(HEIGHT, then, x + r * K, K, w, o, n, O, at);
            else rows_of(1, then, x + r * K, K, w, o, n < PANEL ? n : PANEL, O, at);
            r += all ? HEIGHT : 1;
        }
}

/* --- dw = g^T x, db = sum g -----------------------------------------------------------------------------------*/

/* Blocks of HEIGHT x PANEL weights; those at the end overlap those before: the same values twice. */

INLINE idx start(idx k, idx width, idx all) { return (k + 1) * width <= all ? k * width : all - width; }

/* Floats of one chunk's sums: (blocks, HEIGHT, PANEL), then (O) of the bias. O >= HEIGHT, K >= PANEL. */
INLINE idx sums_of(idx O, idx K) { return count(HEIGHT, O) * count(PANEL, K) * HEIGHT * PANEL + O; }

INLINE void weights_of(idx rows, const float *g, idx O, const float *x, idx K, float *at) {
    vec sum[HEIGHT][2];
    UNROLL for (int r = 0; r < HEIGHT; r++) sum[r][0] = LOAD(at + r * PANEL), sum[r][1] = LOAD(at + r * PANEL + VL);
    for (idx n = 0; n < rows; n++, g += O, x += K) {
        const vec a = LOAD(x), b = LOAD(x + VL);
        UNROLL for (int r = 0; r < HEIGHT; r++) sum[r][0] += g[r] * a, sum[r][1] += g[r] * b;
    }
    UNROLL for (int r = 0; r < HEIGHT; r++) STORE(at + r * PANEL, sum[r][0]), STORE(at + r * PANEL + VL, sum[r][1]);
}

/* Adds a tile, g (rows, O) and x (rows, K), to a chunk's sums. */
static void weight_gradient(idx rows, const float *g, idx O, const float *x, idx K, float *sums) {
    for (idx r = 0; r < count(HEIGHT, O); r++)
        for (idx c = 0; c < count(PANEL, K); c++, sums += HEIGHT * PANEL)
            weights_of(rows, g + start(r, HEIGHT, O), O, x + start(c, PANEL, K), K, sums);
    for (idx o = 0; o < O; o += VL) {
        const idx n = O - o < VL ? O - o : VL;
        vec even = load(sums + o, n), odd = {0};
        idx i = 0;
        for (; i + 2 <= rows; i += 2) even += load(g + i * O + o, n), odd += load(g + (i + 1) * O + o, n);
        if (i < rows) even += load(g + i * O + o, n);
        store(sums + o, even + odd, n);
    }
}

typedef struct {
    float *sums, *dw, *db;
    idx chunks, size, O, K;
} gather_t;

/* A row of blocks, or after them the bias. The last row may overlap the one before: its own weights alone are written. */
static void gather_part(void *data, idx r, idx me) {
    const gather_t *j = data;
    const idx O = j->O, K = j->K, rows = count(HEIGHT, O), width = count(PANEL, K) * HEIGHT * PANEL, n = r < rows ? width : O;
    float *sums = j->sums + r * width;
    for (idx k = 1; k < j->chunks; k++)
        for (idx i = 0; i < n; i++) sums[i] += sums[k * j->size + i];
    if (r == rows && j->db) memcpy(j->db, sums, O * sizeof(float));
    for (idx c = 0; r < rows && c < count(PANEL, K); c++, sums += HEIGHT * PANEL)
        for (idx i = r * HEIGHT - start(r, HEIGHT, O); i < HEIGHT; i++)
            memcpy(j->dw + (start(r, HEIGHT, O) + i) * K + start(c, PANEL, K), sums + i * PANEL, PANEL * sizeof(float));
}

/* The chunks' sums, each `size` after the one before, to dw (O, K) and db (O), which may be NULL. */
static void gather(float *sums, idx chunks, idx size, idx O, idx K, float *dw, float *db, const pool_t *pool, idx threads) {
    gather_t j = {sums, dw, db, chunks, size, O, K};
    side_by_side(gather_part, &j, count(HEIGHT, O) + 1, pool, chunks * size < GATHERED ? 1 : threads);
}
