/* Matrix products of one tile (product.c): some positions, few enough for what is made of them to stay in the nearest caches.
 *
 * Rows are positions, row-major; a weight W is (O, K). */
#include "lanes.h"

#define TILE 64   /* positions; also those between two visits of a weight gradient to its sums */
#define CHUNK 512 /* positions at least that share the sums of a weight gradient */
#define MAX_CHUNKS 32

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

/* --- products of a tile, and their gradients ------------------------------------------------------------------*/

#define INNER __attribute__((visibility("hidden"))) /* of this library alone: no other's function of the name */

/* What becomes of a sum: itself, + more, SiLU of it, times more. */
enum { PLAIN, ADD, SILU, TIMES };

typedef struct {
    const float *bias, *more; /* (O), (rows, O), or NULL */
    float *y, *before;        /* (rows, O); what SiLU is of, or NULL */
} out_t;

/* W as `product` reads it; NULL when out of memory. `back`: W^T. */
INNER float *packed(const float *w, idx O, idx K, int back, const pool_t *pool, idx threads);

/* y = x W^T + bias, x (rows, K), by the packed w, and then what `then` says. */
INNER void product(int then, idx rows, const float *x, idx K, const float *w, idx O, out_t out);

/* Floats of one chunk's sums of a weight gradient, and of the bias's. O >= product_least_outputs, K >= product_least_inputs. */
INNER idx sums_of(idx O, idx K);

/* dw = g^T x, db = sum g: adds those of a tile, g (rows, O) and x (rows, K), to a chunk's sums. */
INNER void weight_gradient(idx rows, const float *g, idx O, const float *x, idx K, float *sums);

/* The chunks' sums, each `size` after the one before, to dw (O, K) and db (O), which may be NULL. */
INNER void gather(float *sums, idx chunks, idx size, idx O, idx K, float *dw, float *db, const pool_t *pool, idx threads);
