/* Weight and bias gradient of a 1x1 convolution: dw = g^T x, db = sum g, on row-major float32 g (N, O) and x (N, C).
 *
 * Long and thin: N, the positions of all images, is thousands, O and C are tens or hundreds. A tile is ROWS x 2 vectors
 * of dw, which stay in registers over BLOCK positions, few enough for their g and x to stay in the nearest caches. Tiles
 * at the end overlap those before: the same values twice.
 *
 * N is cut into chunks by the shape alone, and their sums are added in order: the same bits at any number of threads. */
#include "lanes.h"

#define ROWS (VL / 2)
#define COLUMNS (2 * VL)
#define BLOCK 64       /* positions */
#define CHUNK 512      /* positions at least */
#define MAX_CHUNKS 32

typedef struct {
    const float *g, *x;
    float *sums; /* (chunks, tiles, ROWS, COLUMNS) and, at the end of each chunk, (O) */
    idx N, O, C, rows, columns, size, chunk, chunks;
} job_t;

/* The k-th tile's first row or column. */
static inline idx start(idx k, idx width, idx all) { return (k + 1) * width <= all ? k * width : all - width; }

static inline void tile(const float *g, const float *x, idx O, idx C, idx count, float *at) {
    vec sum[ROWS][2];
    UNROLL for (int r = 0; r < ROWS; r++) sum[r][0] = LOAD(at + r * COLUMNS), sum[r][1] = LOAD(at + r * COLUMNS + VL);
    for (idx n = 0; n < count; n++, g += O, x += C) {
        const vec a = LOAD(x), b = LOAD(x + VL);
        UNROLL for (int r = 0; r < ROWS; r++) sum[r][0] += g[r] * a, sum[r][1] += g[r] * b;
    }
    UNROLL for (int r = 0; r < ROWS; r++) STORE(at + r * COLUMNS, sum[r][0]), STORE(at + r * COLUMNS + VL, sum[r][1]);
}

static void piece(void *data, idx k, idx me) {
    const job_t *j = data;
    const idx last = (k + 1) * j->chunk < j->N ? (k + 1) * j->chunk : j->N;
    float *sums = j->sums + k * j->size, *bias = sums + j->size - j->O;
    memset(sums, 0, j->size * sizeof(float));
    for (idx n = k * j->chunk; n < last; n += BLOCK) {
        const idx count = n + BLOCK < last ? BLOCK : last - n;
        const float *g = j->g + n * j->O, *x = j->x + n * j->C;
        float *at = sums;
        for (idx r = 0; r < j->rows; r++)
            for (idx c = 0; c < j->columns; c++, at += ROWS * COLUMNS)
                tile(g + start(r, ROWS, j->O), x + start(c, COLUMNS, j->C), j->O, j->C, count, at);
        for (idx i = 0; i < count; i++, g += j->O) {
            idx o = 0;
            for (; o + VL <= j->O; o += VL) STORE(bias + o, LOAD(bias + o) + LOAD(g + o));
            for (; o < j->O; o++) bias[o] += g[o];
        }
    }
}

int pw_rows(void) { return ROWS; }       /* the least O */
int pw_columns(void) { return COLUMNS; } /* the least C */

/* db may be NULL. Returns 0, or 1 when out of memory. */
int pw_weight_gradient(const float *g, const float *x, float *dw, float *db, idx N, idx O, idx C, const pool_t *pool,
                       idx threads) {
    job_t j = {.g = g, .x = x, .N = N, .O = O, .C = C};
    j.rows = (O + ROWS - 1) / ROWS, j.columns = (C + COLUMNS - 1) / COLUMNS;
    j.size = j.rows * j.columns * ROWS * COLUMNS + O;
    j.chunk = (N + MAX_CHUNKS - 1) / MAX_CHUNKS;
    if (j.chunk < CHUNK) j.chunk = CHUNK;
    j.chunks = (N + j.chunk - 1) / j.chunk;
    j.sums = floats(j.size * j.chunks);
    if (!j.sums) return 1;
    side_by_side(piece, &j, j.chunks, pool, threads);
    for (idx k = 1; k < j.chunks; k++)
        for (idx i = 0; i < j.size; i++) j.sums[i] += j.sums[k * j.size + i];
    const float *at = j.sums;
    for (idx r = 0; r < j.rows; r++)
        for (idx c = 0; c < j.columns; c++)
            for (idx i = 0; i < ROWS; i++, at += COLUMNS)
                memcpy(dw + (start(r, ROWS, O) + i) * C + start(c, COLUMNS, C), at, COLUMNS * sizeof(float));
    if (db) memcpy(db, at, O * sizeof(float));
    free(j.sums);
    return 0;
}
