/* The update that follows a step's gradients, over all weights: their norm in one pass, then clipping, AdamW and the moving
 * average of the weights in another. Tensors are float32, dense, all of one weight in one order. Pieces are cut by the sizes
 * alone: the same bits at any number of threads. */
#include "lanes.h"

#define PIECE 16384 /* numbers */
#define TENSORS 4   /* of a weight: itself, both moments, and how many steps it has made, one number */

typedef struct {
    double lr, beta1, beta2, eps, decay, clip, follow; /* follow: how far the average goes to the weight; clip: 0 for none */
} rates_t;

typedef struct {
    const float *const *gradients;           /* (count) */
    float *const *tensors, *const *averages; /* (count, TENSORS); (count), or NULL */
    const idx *sizes;
    idx *first, count; /* the piece that a weight begins with, (count + 1) */
    double *squares;   /* of a piece */
    float scale;
    const rates_t *rates;
} job_t;

/* Which weight piece k is of; its numbers from *at on. */
static idx weight_of(const job_t *j, idx k, idx *at, idx *n) {
    idx low = 0, high = j->count;
    while (high - low > 1) {
        const idx middle = (low + high) / 2;
        if (j->first[middle] <= k) low = middle;
        else high = middle;
    }
    *at = (k - j->first[low]) * PIECE;
    *n = j->sizes[low] - *at < PIECE ? j->sizes[low] - *at : PIECE;
    return low;
}

static void squares(void *data, idx k, idx me) {
    const job_t *j = data;
    idx at, n;
    const float *whole = j->gradients[weight_of(j, k, &at, &n)], *g = whole + at;
    vec sum[4] = {0};
    idx i = 0;
    for (; i + 4 * VL <= n; i += 4 * VL)
        for (int u = 0; u < 4; u++) sum[u] += LOAD(g + i + u * VL) * LOAD(g + i + u * VL);
    for (; i < n; i += VL) {
        const vec x = load(g + i, n - i < VL ? n - i : VL);
        sum[0] += x * x;
    }
    j->squares[k] = total((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

INLINE vec root(vec x) {
#if defined __AVX512F__
    return (vec)_mm512_sqrt_ps((__m512)x);
#elif defined __AVX__
    return (vec)_mm256_sqrt_ps((__m256)x);
#else
    for (int i = 0; i < VL; i++) x[i] = sqrtf(x[i]);
    return x;
#endif
}

static void update(void *data, idx k, idx me) {
    const job_t *j = data;
    const rates_t *r = j->rates;
    idx at, size;
    const idx w = weight_of(j, k, &at, &size);
    const float *g = j->gradients[w] + at;
    float *const *t = j->tensors + w * TENSORS, *p = t[0] + at, *m = t[1] + at, *v = t[2] + at;
    float *const average = j->averages ? j->averages[w] + at : NULL;
    const double step = *t[3], bias1 = 1 - pow(r->beta1, step), bias2 = sqrt(1 - pow(r->beta2, step));
    const float scale = j->scale, keep = 1 - r->lr * r->decay, rate = r->lr / bias1, eps = r->eps, inverse = 1 / bias2;
    const float first = 1 - r->beta1, second = 1 - r->beta2, old = r->beta2, follow = r->follow, rest = 1 - r->follow;
    for (idx i = 0; i < size; i += VL) {
        const idx n = size - i < VL ? size - i : VL;
        const vec x = load(g + i, n) * scale, mean = load(m + i, n);
        const vec m1 = mean + first * (x - mean), v1 = load(v + i, n) * old + second * x * x;
        const vec p1 = load(p + i, n) * keep - rate * (m1 / (root(v1) * inverse + eps));
        store(m + i, m1, n), store(v + i, v1, n), store(p + i, p1, n);
        if (!average) continue;
        const vec a = load(average + i, n), d = p1 - a;
        store(average + i, follow < 0.5f ? a + follow * d : p1 - rest * d, n);
    }
}

/* averages may be NULL: then none follow. Returns 0, or 1 when out of memory, and then nothing has changed. */
int adamw(const float *const *gradients, float *const *tensors, float *const *averages, const idx *sizes, idx count,
          const rates_t *rates, const pool_t *pool, idx threads) {
    job_t j = {.gradients = gradients, .tensors = tensors, .averages = averages, .sizes = sizes, .count = count, .scale = 1,
               .rates = rates};
    j.first = malloc((count + 1) * sizeof(idx));
    if (!j.first) return 1;
    j.first[0] = 0;
    for (idx i = 0; i < count; i++) j.first[i + 1] = j.first[i] + (sizes[i] + PIECE - 1) / PIECE;
    const idx pieces = j.first[count];
    j.squares = rates->clip ? malloc(pieces * sizeof(double)) : NULL;
    if (rates->clip && !j.squares) return free(j.first), 1;
    if (rates->clip) {
        side_by_side(squares, &j, pieces, pool, threads);
        double sum = 0;
        for (idx k = 0; k < pieces; k++) sum += j.squares[k];
        const double scale = rates->clip / (sqrt(sum) + 1e-6);
        j.scale = scale > 1 ? 1 : scale; /* no number stays none */
    }
    for (idx i = 0; i < count; i++) *tensors[i * TENSORS + 3] += 1;
    side_by_side(update, &j, pieces, pool, threads);
    free(j.first), free(j.squares);
    return 0;
}
