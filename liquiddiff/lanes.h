/* What the kernels share: VL float32 lanes (channels, as a rule), and torch's own pool of threads. */
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX__
#include <immintrin.h>
#endif

#ifdef __AVX512F__
#define VL 16
#else
#define VL 8
#endif

typedef float vec __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef int ivec __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef ptrdiff_t idx;

/* The OpenMP runtime that torch itself uses, so that both share one pool of threads. */
typedef struct {
    void (*parallel)(void (*)(void *), void *, unsigned, unsigned);
    int (*thread)(void);
} pool_t;

#define INLINE static inline __attribute__((always_inline))
#ifdef __clang__
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 32")
#endif
#define LOAD(p) (*(const vec *)(p))
#define STORE(p, v) (*(vec *)(p) = (v))

INLINE vec load(const float *p, idx n) { /* zero past the end */
    if (n == VL) return LOAD(p);
    float v[VL] = {0};
    for (idx i = 0; i < n; i++) v[i] = p[i];
    return LOAD(v);
}

INLINE void store(float *p, vec v, idx n) {
    if (n == VL) STORE(p, v);
    else for (idx i = 0; i < n; i++) p[i] = ((const float *)&v)[i];
}

INLINE void add(float *p, vec v, idx n) { store(p, load(p, n) + v, n); }

/* BODY sees c, the first channel, and n, the number of them: a constant VL but for the last few. */
#define CHANNELS(...)                                              \
    {                                                              \
        idx c = 0;                                                 \
        for (; c + VL <= C; c += VL) { const idx n = VL; __VA_ARGS__ } \
        if (c < C) { const idx n = C - c; __VA_ARGS__ }            \
    }

INLINE float total(vec v) {
#if defined __AVX512F__
    return _mm512_reduce_add_ps((__m512)v);
#elif defined __AVX__
    const __m256 w = (__m256)v;
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(w), _mm256_extractf128_ps(w, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
#else
    return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
#endif
}

INLINE vec choose(ivec where, vec yes, vec no) { return (vec)((where & (ivec)yes) | (~where & (ivec)no)); }

/* exp, within 2 ulp where the result is a normal number: 2^n times a polynomial (Cephes' expf) of the remainder. */
INLINE vec exponential(vec x) {
    const vec zero = {0}, top = zero + 88.0f, bottom = zero - 87.0f;
#ifdef __AVX512F__ /* of two of which one is NaN, max and min give the second */
    const vec z = (vec)_mm512_min_ps((__m512)top, _mm512_max_ps((__m512)bottom, (__m512)x));
#else
    const vec z = choose(x > top, top, choose(x < bottom, bottom, x));
#endif
    const vec shifted = z * 1.44269504088896341f + 12582912.0f; /* the nearest integer is in the low bits */
    const vec n = shifted - 12582912.0f;
    const vec r = (z - n * 0.693359375f) + n * 2.12194440e-4f;
    vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
#ifdef __AVX512F__
    return (vec)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    return choose(x == x, (vec)((ivec)p + ((ivec)shifted << 23)), x); /* NaN stays NaN */
#endif
}

INLINE vec sigmoid(vec x) { return 1.0f / (1.0f + exponential(-x)); }

#define MAX_THREADS 256

typedef struct {
    void (*piece)(void *job, idx k, idx me);
    void *job;
    const pool_t *pool;
    idx count, threads, next[MAX_THREADS][64 / sizeof(idx)]; /* a cache line each */
} work_t;

static void work(void *data) {
    work_t *w = data;
    const idx me = w->threads > 1 ? w->pool->thread() : 0;
    for (idx i = 0; i < w->threads; i++) {
        const idx t = (me + i) % w->threads, last = (t + 1) * w->count / w->threads;
        for (idx k; (k = __atomic_fetch_add(w->next[t], 1, __ATOMIC_RELAXED)) < last;) w->piece(w->job, k, me);
    }
}

/* How many threads `side_by_side` makes use of. */
INLINE idx parts(idx count, const pool_t *pool, idx threads) {
    if (threads > count) threads = count;
    if (threads > MAX_THREADS) threads = MAX_THREADS;
    return threads < 1 || !pool ? 1 : threads;
}

/* `piece(job, k, me)` for each k < count, on thread me < parts(...). A thread takes its own part first, in order, as
 * torch's operators and oneDNN cut their work: so it finds in its caches what it wrote there; then what others left. */
static void side_by_side(void (*piece)(void *, idx, idx), void *job, idx count, const pool_t *pool, idx threads) {
    work_t w;
    w.piece = piece, w.job = job, w.pool = pool, w.count = count, w.threads = parts(count, pool, threads);
    for (idx t = 0; t < w.threads; t++) w.next[t][0] = t * count / w.threads;
    if (w.threads > 1) pool->parallel(work, &w, (unsigned)w.threads, 0);
    else work(&w);
}

INLINE float *floats(idx n) { /* NULL: out of memory */
    void *p = NULL;
    return posix_memalign(&p, 64, (n ? n : 1) * sizeof(float)) ? NULL : p;
}
