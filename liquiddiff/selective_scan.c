/* Mamba's selective scan on row-major float32, and its gradients; N states a channel, a compile-time constant: cc -DN=8.
 *
 *     h_l = exp(dt_l A) h_{l-1} + dt_l u_l B_l,   y_l = C_l . h_l + D u_l
 *
 * u, dt, y (G, L, M); B, C (G, L, N); A (K, N, M), D (K, M) of direction k = g % K. Lanes are channels, and all states of a
 * lane stay in registers. The backward pass computes the states again, keeping one sequence's, so that a training step
 * keeps nothing of size L M N. One sequence is one piece of work: the same bits at any number of threads. */
#include "lanes.h"

typedef struct {
    const float *u, *dt, *A, *B, *C, *D, *g;
    float *y, *du, *ddt, *dA, *dB, *dC, *dD; /* dA (G, N, M), dD (G, M): to be added up over images */
    float *room;                             /* backward: states and decays of one sequence, for each thread */
    idx G, K, L, M;
} job_t;

#define SLOT(l, n) (((l) * N + (n)) * VL)

/* The channels from m on, n lanes of them, of sequence s; `states` and `decays`, (L, N, VL), may be NULL. */
INLINE void ahead(const job_t *j, idx s, idx m, const idx lanes, float *states, float *decays) {
    const idx L = j->L, M = j->M, k = s % j->K;
    const float *u = j->u + s * L * M + m, *dt = j->dt + s * L * M + m, *B = j->B + s * L * N, *C = j->C + s * L * N;
    const vec D = load(j->D + k * M + m, lanes);
    vec A[N], h[N];
    UNROLL for (int n = 0; n < N; n++) A[n] = load(j->A + (k * N + n) * M + m, lanes), h[n] = (vec){0};
    for (idx l = 0; l < L; l++, u += M, dt += M, B += N, C += N) {
        const vec in = load(u, lanes), step = load(dt, lanes), drive = in * step;
        vec y = D * in;
        UNROLL for (int n = 0; n < N; n++) {
            const vec decay = exponential(step * A[n]);
            h[n] = decay * h[n] + drive * B[n];
            y += h[n] * C[n];
            if (states) STORE(states + SLOT(l, n), h[n]), STORE(decays + SLOT(l, n), decay);
        }
        if (!states) store(j->y + (s * L + l) * M + m, y, lanes);
    }
}

INLINE void back(const job_t *j, idx s, idx m, const idx lanes, const float *states, const float *decays) {
    const idx L = j->L, M = j->M, k = s % j->K;
    const vec D = load(j->D + k * M + m, lanes);
    vec A[N], carry[N], dA[N], dD = {0};
    UNROLL for (int n = 0; n < N; n++)
        A[n] = load(j->A + (k * N + n) * M + m, lanes), carry[n] = dA[n] = (vec){0};
    for (idx l = L - 1; l >= 0; l--) {
        const idx at = (s * L + l) * M + m, row = (s * L + l) * N;
        const vec g = load(j->g + at, lanes), in = load(j->u + at, lanes), step = load(j->dt + at, lanes);
        const vec drive = in * step;
        vec d_drive = {0}, d_step = {0};
        UNROLL for (int n = 0; n < N; n++) {
            const vec d = carry[n] + g * j->C[row + n], before = l ? LOAD(states + SLOT(l - 1, n)) : (vec){0};
            carry[n] = d * LOAD(decays + SLOT(l, n));
            const vec d_exponent = carry[n] * before;
            j->dC[row + n] += total(g * LOAD(states + SLOT(l, n)));
            j->dB[row + n] += total(d * drive);
            d_drive += d * j->B[row + n];
            d_step += d_exponent * A[n];
            dA[n] += d_exponent * step;
        }
        dD += g * in;
        store(j->du + at, g * D + d_drive * step, lanes);
        store(j->ddt + at, d_step + d_drive * in, lanes);
    }
    UNROLL for (int n = 0; n < N; n++) store(j->dA + (s * N + n) * M + m, dA[n], lanes);
    store(j->dD + s * M + m, dD, lanes);
}

static void piece(void *data, idx s, idx me) {
    const job_t *j = data;
    const idx size = SLOT(j->L, 0);
    float *states = j->room ? j->room + 2 * size * me : NULL, *decays = states ? states + size : NULL;
    if (states) {
        memset(j->dB + s * j->L * N, 0, j->L * N * sizeof(float));
        memset(j->dC + s * j->L * N, 0, j->L * N * sizeof(float));
    }
    idx m = 0;
    for (; m + VL <= j->M; m += VL) {
        ahead(j, s, m, VL, states, decays);
        if (states) back(j, s, m, VL, states, decays);
    }
    if (m < j->M) {
        ahead(j, s, m, j->M - m, states, decays);
        if (states) back(j, s, m, j->M - m, states, decays);
    }
}

/* Returns 0. */
int scan_forward(const float *u, const float *dt, const float *A, const float *B, const float *C, const float *D, float *y,
                 idx G, idx K, idx L, idx M, const pool_t *pool, idx threads) {
    job_t j = {.u = u, .dt = dt, .A = A, .B = B, .C = C, .D = D, .y = y, .G = G, .K = K, .L = L, .M = M};
    side_by_side(piece, &j, G, pool, threads);
    return 0;
}

/* Returns 0, or 1 when out of memory. */
int scan_backward(const float *u, const float *dt, const float *A, const float *B, const float *C, const float *D,
                  const float *g, float *du, float *ddt, float *dA, float *dB, float *dC, float *dD, idx G, idx K, idx L,
                  idx M, const pool_t *pool, idx threads) {
    job_t j = {.u = u, .dt = dt, .A = A, .B = B, .C = C, .D = D, .g = g, .du = du, .ddt = ddt, .dA = dA, .dB = dB, .dC = dC,
               .dD = dD, .G = G, .K = K, .L = L, .M = M, .room = floats(2 * SLOT(L, 0) * parts(G, pool, threads))};
    if (!j.room) return 1;
    side_by_side(piece, &j, G, pool, threads);
    free(j.room);
    return 0;
}
