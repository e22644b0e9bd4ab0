/* The products of product.h. Outputs are summed over k in order, in registers: the same bits in any tile. */
#include "product.h"

/* Registers hold sums of ROWS rows x PANEL outputs together, or of a weight gradient ROWS outputs x PANEL inputs; what is left
 * beside whole panels is in strips, of TALL rows. */
#ifdef __AVX512F__
#define PANEL (4 * VL)
#else
#define PANEL (2 * VL)
#endif
#define STRIP (2 * VL)
#define ROWS 6
#define TALL (VL / 2)
#define FEW 4 /* rows, where fewer than ROWS are left */
#define MOST (ROWS > TALL ? ROWS : TALL)
#define GATHERED (32 * 1024) /* fewer sums than this are not worth a second thread */

/* --- y = x W^T ------------------------------------------------------------------------------------------------*/

typedef struct {
    const float *w;
    float *to;
    idx O, K;
    int back;
} pack_t;

/* Panels first, then strips: how many strips `all` needs, where one of either begins, how wide it is. */
INLINE idx strips(idx all) { return count(STRIP, all % PANEL); }
INLINE idx panel_at(idx p, idx all) { return p * PANEL <= all ? p * PANEL : all / PANEL * PANEL + (p - all / PANEL) * STRIP; }
INLINE idx panel_width(idx first, idx all) { return first + PANEL <= all ? PANEL : STRIP; }

/* VL x VL floats, rows `from` apart, to columns that are `width` apart. */
static void transpose(const float *x, idx from, float *y, idx width) {
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
    UNROLL for (int r = 0; r < VL; r++) STORE(y + r * width, v[r]);
#else
    for (int r = 0; r < VL; r++)
        for (int l = 0; l < VL; l++) y[l * width + r] = x[r * from + l];
#endif
}

static void pack_panel(void *data, idx p, idx me) {
    const pack_t *j = data;
    const idx inputs = j->back ? j->O : j->K, all = j->back ? j->K : j->O, o = panel_at(p, all), width = panel_width(o, all);
    const idx n = all - o < width ? all - o : width, whole = n / VL * VL, blocks = inputs / VL * VL;
    float *to = j->to + o * inputs;
    if (n < width) memset(to, 0, inputs * width * sizeof(float));
    if (j->back) {
        for (idx k = 0; k < inputs; k++) memcpy(to + k * width, j->w + k * j->K + o, n * sizeof(float));
        return;
    }
    const float *w = j->w + o * j->K;
    for (idx r = 0; r < whole; r += VL)
        for (idx k = 0; k < blocks; k += VL) transpose(w + r * j->K + k, j->K, to + k * width + r, width);
    for (idx r = 0; r < n; r++)
        for (idx k = r < whole ? blocks : 0; k < inputs; k++) to[k * width + r] = w[r * j->K + k];
}

/* Each panel or strip is (K, width), zeros past the last output. */
float *packed(const float *w, idx O, idx K, int back, const pool_t *pool, idx threads) {
    const idx inputs = back ? O : K, all = back ? K : O;
    pack_t j = {.w = w, .to = floats(count(STRIP, all) * STRIP * inputs), .O = O, .K = K, .back = back};
    if (j.to) side_by_side(pack_panel, &j, all / PANEL + strips(all), pool, all * inputs < 65536 ? 1 : threads);
    return j.to;
}

INLINE void leave(const int then, vec sum, idx at, const idx n, out_t out) {
    if (then == ADD) sum += load(out.more + at, n);
    if (then == TIMES) sum *= load(out.more + at, n);
    store((then == SILU && out.before ? out.before : out.y) + at, sum, n);
}

/* Of `rows` sums as `leave` left them. Never inline: its constants would take the sums' registers, 1.5 times the time. */
static __attribute__((noinline)) void silu_of(idx rows, const float *x, idx C, idx O, float *y) {
    for (idx r = 0; r < rows; r++, x += O, y += O) CHANNELS(store(y + c, silu(load(x + c, n)), n);)
}

/* Of `rows` positions the n outputs from `first` on, at most `vectors` * VL, which is the width of their w. */
INLINE void rows_of(const idx rows, const int vectors, const int then, const float *x, idx K, const float *w, idx first,
                    const idx n, idx O, out_t out) {
    vec sum[MOST][PANEL / VL], of[PANEL / VL];
    UNROLL for (int v = 0; v < vectors; v++) {
        const idx left = n - v * VL, m = left < VL ? left : VL;
        const vec bias = out.bias && m > 0 ? load(out.bias + first + v * VL, m) : (vec){0};
        UNROLL for (int r = 0; r < rows; r++) sum[r][v] = bias;
    }
    for (idx k = 0; k < K; k++, w += vectors * VL) {
        UNROLL for (int v = 0; v < vectors; v++) of[v] = LOAD(w + v * VL);
        UNROLL for (int r = 0; r < rows; r++)
            UNROLL for (int v = 0; v < vectors; v++) sum[r][v] += x[r * K + k] * of[v];
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < vectors; v++) {
            const idx left = n - v * VL;
            if (left > 0) leave(then, sum[r][v], r * O + first + v * VL, left < VL ? left : VL, out);
        }
    if (then == SILU) silu_of(rows, (out.before ? out.before : out.y) + first, n, O, out.y + first);
}

INLINE void any_product(const int then, idx rows, const float *x, idx K, const float *w, idx O, out_t out) {
    for (idx o = 0; o < O;) {
        const idx width = panel_width(o, O), n = O - o < width ? O - o : width;
        for (idx r = 0; r < rows;) {
            const idx left = rows - r;
            const out_t at = {out.bias, out.more ? out.more + r * O : NULL, out.y + r * O,
                              out.before ? out.before + r * O : NULL};
#define SOME(HEIGHT, WIDTH, N) (rows_of(HEIGHT, (WIDTH) / VL, then, x + r * K, K, w, o, N, O, at), HEIGHT)
            if (n == PANEL && left >= ROWS) r += SOME(ROWS, PANEL, PANEL);
            else if (n == PANEL) r += left >= FEW ? SOME(FEW, PANEL, PANEL) : SOME(1, PANEL, PANEL);
            else if (n == STRIP) r += left >= TALL ? SOME(TALL, STRIP, STRIP) : SOME(1, STRIP, STRIP);
            else r += left >= TALL ? SOME(TALL, STRIP, n) : SOME(1, STRIP, n);
#undef SOME
        }
        o += width, w += K * width;
    }
}

void product(int then, idx rows, const float *x, idx K, const float *w, idx O, out_t out) {
    if (then == PLAIN) any_product(PLAIN, rows, x, K, w, O, out);
    else if (then == ADD) any_product(ADD, rows, x, K, w, O, out);
    else if (then == SILU) any_product(SILU, rows, x, K, w, O, out);
    else any_product(TIMES, rows, x, K, w, O, out);
}

/* --- dw = g^T x, db = sum g -----------------------------------------------------------------------------------*/

/* In blocks of ROWS x PANEL weights, and after whole panels of TALL x STRIP; those at the end overlap those before: the same
 * values twice. */

INLINE idx start(idx k, idx width, idx all) { return (k + 1) * width <= all ? k * width : all - width; }

int product_least_outputs(void) { return MOST; }
int product_least_inputs(void) { return STRIP; }

/* Of a weight gradient (O, K): panels and strips side by side, and rows of blocks in either. */
typedef struct {
    idx panels, strips, low, tall;
} blocks_t;

INLINE blocks_t blocks(idx O, idx K) {
    return (blocks_t){K / PANEL, strips(K), K < PANEL ? 0 : count(ROWS, O), strips(K) ? count(TALL, O) : 0};
}

/* Of the blocks one after the other, then (O) of the bias. */
idx sums_of(idx O, idx K) {
    const blocks_t b = blocks(O, K);
    return b.low * b.panels * ROWS * PANEL + b.tall * b.strips * TALL * STRIP + O;
}

INLINE void weights_of(const idx height, const int vectors, idx rows, const float *g, idx O, const float *x, idx K, float *at) {
    vec sum[MOST][PANEL / VL], of[PANEL / VL];
    UNROLL for (int r = 0; r < height; r++)
        UNROLL for (int v = 0; v < vectors; v++) sum[r][v] = LOAD(at + (r * vectors + v) * VL);
    for (idx n = 0; n < rows; n++, g += O, x += K) {
        UNROLL for (int v = 0; v < vectors; v++) of[v] = LOAD(x + v * VL);
        UNROLL for (int r = 0; r < height; r++)
            UNROLL for (int v = 0; v < vectors; v++) sum[r][v] += g[r] * of[v];
    }
    UNROLL for (int r = 0; r < height; r++)
        UNROLL for (int v = 0; v < vectors; v++) STORE(at + (r * vectors + v) * VL, sum[r][v]);
}

void weight_gradient(idx rows, const float *g, idx O, const float *x, idx K, float *sums) {
    const blocks_t b = blocks(O, K);
    for (idx r = 0; r < b.low; r++)
        for (idx c = 0; c < b.panels; c++, sums += ROWS * PANEL)
            weights_of(ROWS, PANEL / VL, rows, g + start(r, ROWS, O), O, x + c * PANEL, K, sums);
    for (idx r = 0; r < b.tall; r++)
        for (idx c = 0; c < b.strips; c++, sums += TALL * STRIP)
            weights_of(TALL, STRIP / VL, rows, g + start(r, TALL, O), O,
                       x + start(b.panels * (PANEL / STRIP) + c, STRIP, K), K, sums);
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

/* The chunks' sums, n from `sums` on of each, added to the first's. */
static void add_chunks(const gather_t *j, float *sums, idx n) {
    for (idx k = 1; k < j->chunks; k++)
        for (idx i = 0; i < n; i++) sums[i] += sums[k * j->size + i];
}

/* Row r of blocks, `height` x `width` each, of which the first begins at column `first`. Where they overlap what is before
 * them, their own weights alone are written: others may be writing those. */
static void gather_row(const gather_t *j, float *sums, idx r, idx height, idx first, idx width, idx n) {
    const idx top = start(r, height, j->O);
    add_chunks(j, sums, n * height * width);
    for (idx left = first; n--; left += width, sums += height * width) {
        const idx over = left + width <= j->K ? 0 : left + width - j->K;
        for (idx i = r * height - top; i < height; i++)
            memcpy(j->dw + (top + i) * j->K + left, sums + i * width + over, (width - over) * sizeof(float));
    }
}

/* A row of blocks, or after them the bias. */
static void gather_part(void *data, idx k, idx me) {
    const gather_t *j = data;
    const blocks_t b = blocks(j->O, j->K);
    const idx low = b.panels * ROWS * PANEL, tall = b.strips * TALL * STRIP;
    float *sums = j->sums + (k < b.low ? k * low : b.low * low + (k - b.low) * tall);
    if (k < b.low) gather_row(j, sums, k, ROWS, 0, PANEL, b.panels);
    else if (k < b.low + b.tall) gather_row(j, sums, k - b.low, TALL, b.panels * PANEL, STRIP, b.strips);
    else {
        sums = j->sums + j->size - j->O;
        add_chunks(j, sums, j->O);
        if (j->db) memcpy(j->db, sums, j->O * sizeof(float));
    }
}

void gather(float *sums, idx chunks, idx size, idx O, idx K, float *dw, float *db, const pool_t *pool, idx threads) {
    gather_t j = {sums, dw, db, chunks, size, O, K};
    side_by_side(gather_part, &j, blocks(O, K).low + blocks(O, K).tall + 1, pool, chunks * size < GATHERED ? 1 : threads);
}
