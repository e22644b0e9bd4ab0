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

/* Keeps a product apart from a sum that follows: in one instruction they are rounded once, and compilers choose freely. */
#if defined __AVX512F__
#define APART(v) __asm__("" : "+v"(v))
#elif defined __AVX__
#define APART(v) __asm__("" : "+x"(v))
#else
#define APART(v) __asm__("" : "+m"(v))
#endif

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

/* exp, by a relative error of at most 1.1e-7 (2 + |x|) where the result is a normal number: 2^z = 2^n 2^f, |f| <= 1/2, the
 * latter by a polynomial of least relative error. */
INLINE vec exponential(vec x) {
#ifdef __AVX512DQ__
    const vec z = x * 1.44269504088896341f, f = (vec)_mm512_reduce_ps((__m512)z, 0), n = z - f;
#else
    const vec zero = {0}, top = zero + 127.0f, bottom = zero - 126.0f, all = x * 1.44269504088896341f;
    const vec z = choose(all > top, top, choose(all < bottom, bottom, all));
    const vec shifted = z + 12582912.0f, f = z - (shifted - 12582912.0f); /* the nearest integer is in the low bits */
#endif
    const vec f2 = f * f; /* three sums side by side: shorter than one after the other */
    const vec p = (f * 1.326472731e-3f + 9.671512991e-3f) * (f2 * f2) + ((f * 5.550733581e-2f + 2.402224243e-1f) * f2 +
                  (f * 6.931470037e-1f + 1.0f));
#ifdef __AVX512DQ__
    return (vec)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    return choose(x == x, (vec)((ivec)p + ((ivec)shifted << 23)), x); /* NaN stays NaN */
#endif
}

INLINE vec sigmoid(vec x) { return 1.0f / (1.0f + exponential(-x)); }

INLINE vec silu(vec x) { return x / (1.0f + exponential(-x)); }

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
