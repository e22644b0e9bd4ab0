/* What parts.c calls of fused.c, pointwise.c and chains.c, which say what each does. */
#include "product.h"

#define RUN const pool_t *pool, idx threads

/* y = x + m + alpha (kept - m) of a mixer's output m: see elements.h. x and alpha (B, C) may be NULL. dkept: in a backward
 * pass, room for the gradient of kept, where there is an alpha. */
typedef struct {
    const float *x, *kept, *alpha;
    float *dkept;
} relax_t;

void adaln_forward(const float *x, const float *modulation, float *y, float *moments, float *sums, float eps, idx alike,
                   idx B, idx P, idx C, idx length, RUN);
void adaln_backward(const float *g, const float *more, const float *x, const float *other, const float *modulation,
                    const float *pooled, const float *moments, float *dx, float *sums, idx B, idx P, idx C, idx length, RUN);
int pw_forward(const float *x, const float *row, const float *w, const float *bias, const float *more, float *y,
               float *before, float *c, const depthwise_t *conv, idx B, idx P, idx K, idx O, int in, int out, RUN);
int pw_backward(const float *g, const float *x, const float *row, const float *w, const float *before, float *dx, float *dw,
                float *db, float *drow, idx B, idx P, idx K, idx O, int in, int out, RUN);
int feed_forward_forward(const float *x, const float *modulation, const float *w1, const float *b1, const float *w2,
                         const float *b2, float *y, float *moments, float *z, float eps, idx alike, idx B, idx P, idx C,
                         idx M, RUN);
int feed_forward_backward(const float *g, const float *x, const float *modulation, const float *w1, const float *w2,
                          const float *moments, const float *z, float *dx, float *dmodulation, float *dw1, float *db1,
                          float *dw2, float *db2, float eps, idx B, idx P, idx C, idx M, RUN);
int separable_forward(const float *x, const float *scale, const float *w1, const float *b1, const float *w2, const float *b2,
                      float *y, float *z, float *c, float *m, const depthwise_t *conv, const relax_t *relax, idx alike, idx B,
                      idx P, idx C, idx M, RUN);
int separable_backward(const float *g, const float *c, const float *scale, const float *w1, const float *w2, const float *z,
                       const float *m, float *dc, float *drows, float *dw1, float *db1, float *dw2, float *db2,
                       const relax_t *relax, idx B, idx P, idx C, idx M, RUN);
int heads_forward(const float *z, const float *a, const float *b, const float *wf, const float *bf, const float *wg,
                  const float *bg, const float *wh, const float *bh, float *y, float *kf, float *kg, float *kh,
                  const depthwise_t *u, const depthwise_t *v, const relax_t *relax, idx alike, idx B, idx P, idx C, idx M,
                  RUN);
int heads_backward(const float *dy, const float *z, const float *a, const float *b, const float *wf, const float *wg,
                   const float *wh, const float *f, const float *g, const float *h, float *dz, float *du, float *dv,
                   float *drows, float *dwf, float *dbf, float *dwg, float *dbg, float *dwh, float *dbh, const depthwise_t *u,
                   const depthwise_t *v, const relax_t *relax, idx B, idx P, idx C, idx M, RUN);
