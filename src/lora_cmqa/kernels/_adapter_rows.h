/* The arithmetic of _adapter_rows.c for one instruction set. Included once for each, with
 *     ATTR       attributes of every function: the instruction set
 *     NAME(x)    x with the set's suffix
 * Vectors are the compilers' own (GCC and Clang); each becomes as many registers as the set needs. Every number of a row
 * is summed in one written order, so it has the same bits whatever stands beside it.
 */

ATTR static inline vec NAME(load)(const void *p, int64_t at, int bits)
{
    vec v;
    if (bits == 32) {
        memcpy(&v, (const float *)p + at, sizeof v);
        return v;
    }
    half h; /* bfloat16: the upper half of a float32 */
    memcpy(&h, (const uint16_t *)p + at, sizeof h);
    return (vec)(__builtin_convertvector(h, word) << 16);
}

/* The first `count` of a vector, then zeros. */
ATTR static inline vec NAME(load_part)(const void *p, int64_t at, int64_t count, int bits)
{
    uint8_t room[sizeof(vec)] = {0};
    int size = bits / 8;
    memcpy(room, (const uint8_t *)p + at * size, count * size);
    return NAME(load)(room, 0, bits);
}

/* To bfloat16 by rounding to the nearest, ties to even, as torch does; a NaN stays one. */
ATTR static inline void NAME(store_part)(void *p, int64_t at, int64_t count, vec v, int bits)
{
    if (bits == 32) {
        memcpy((float *)p + at, &v, count * sizeof(float));
        return;
    }
    word u = (word)v, number = (word)(v == v);
    u = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    half h = __builtin_convertvector((u & number) | (0x7fc0 & ~number), half);
    memcpy((uint16_t *)p + at, &h, count * sizeof(uint16_t));
}

ATTR static inline float NAME(total)(vec v)
{
    float f[LANES];
    memcpy(f, &v, sizeof f);
    for (int step = LANES / 2; step; step /= 2)
        for (int i = 0; i < step; i++)
            f[i] += f[i + step];
    return f[0];
}

/* small[q, p] = a[p] . x[q] for `na` rows of A and `nx` of x, constants of the caller. */
ATTR static inline void NAME(dots)(const void *a, const void *x, float *small, int64_t inner, int64_t units, const int na,
                                   const int nx, const int bits)
{
    vec sum[MOST][MOST], w[MOST], z[MOST];
    int64_t i = 0;
    for (int p = 0; p < na; p++)
        for (int q = 0; q < nx; q++)
            sum[p][q] = (vec){0};
    for (; i + LANES <= inner; i += LANES) {
        __builtin_prefetch((const char *)a + i * bits / 8 + AHEAD);
        for (int p = 0; p < na; p++)
            w[p] = NAME(load)(a, p * inner + i, bits);
        for (int q = 0; q < nx; q++)
            z[q] = NAME(load)(x, q * inner + i, bits);
        for (int p = 0; p < na; p++)
            for (int q = 0; q < nx; q++)
                sum[p][q] += w[p] * z[q];
    }
    if (i < inner) {
        for (int p = 0; p < na; p++)
            w[p] = NAME(load_part)(a, p * inner + i, inner - i, bits);
        for (int q = 0; q < nx; q++)
            z[q] = NAME(load_part)(x, q * inner + i, inner - i, bits);
        for (int p = 0; p < na; p++)
            for (int q = 0; q < nx; q++)
                sum[p][q] += w[p] * z[q];
    }
    for (int p = 0; p < na; p++)
        for (int q = 0; q < nx; q++)
            small[q * units + p] = NAME(total)(sum[p][q]);
}

/* y[q, : count] += sum over j of small[q, j] b[j] for `nx` rows. */
ATTR static inline void NAME(add_block)(void *y, const void *b, const float *small, int64_t rank, int64_t out, int64_t units,
                                        int64_t count, const int nx, const int bits)
{
    vec sum[MOST];
    for (int q = 0; q < nx; q++)
        sum[q] = (vec){0};
    for (int64_t j = 0; j < rank; j++) {
        __builtin_prefetch((const char *)b + (j * LANES) * bits / 8 + AHEAD);
        vec w = NAME(load)(b, j * LANES, bits);
        for (int q = 0; q < nx; q++)
            sum[q] += small[q * units + j] * w;
    }
    if (count == LANES) {
        for (int q = 0; q < nx; q++)
            NAME(store_part)(y, q * out, LANES, NAME(load)(y, q * out, bits) + sum[q], bits);
        return;
    }
    for (int q = 0; q < nx; q++)
        NAME(store_part)(y, q * out, count, NAME(load_part)(y, q * out, count, bits) + sum[q], bits);
}

/* Both products' share of thread `t` of `n`; all wait for each other between them. */
ATTR static inline void NAME(share)(const struct job *job, int t, int n, const int bits)
{
    const int64_t inner = job->inner, size = bits / 8;
    int64_t blocks = 0, out = 0, price = 0;
    for (int64_t k = 0; k < job->modules; k++) {
        blocks += (job->outs[k] + LANES - 1) / LANES;
        out += job->outs[k];
    }
    for (int64_t s = 0; s < job->segments; s++)
        price += PRICE(job->segment[s]);
    const int64_t from = price * t / n, to = price * (t + 1) / n;

    float *small = job->small;
    int64_t before = 0;
    for (int64_t s = 0; s < job->segments; s++) {
        const struct segment *g = job->segment + s;
        const int64_t units = job->modules * g->rank, cost = PRICE(*g);
        const int64_t stop = share_of(units, to - before, cost);
        const char *x = (const char *)job->x + g->first * inner * size;
        const int64_t rows = g->stop - g->first;
        for (int64_t u = share_of(units, from - before, cost); u < stop;) {
            const char *a = (const char *)g->a + u * inner * size;
            const int many = rows > 1 && stop - u >= MOST; /* one row reads A straight on: faster from memory */
            for (int64_t m = 0; m < rows; m += MOST) {
                const char *of = x + m * inner * size;
                float *to_small = small + m * units + u;
                if (many)
                    EACH_COUNT(rows - m, NAME(dots)(a, of, to_small, inner, units, MOST, COUNT, bits));
                else
                    EACH_COUNT(rows - m, NAME(dots)(a, of, to_small, inner, units, 1, COUNT, bits));
            }
            u += many ? MOST : 1;
        }
        small += (g->stop - g->first) * units;
        before += cost;
    }

    if (n > 1)
        GOMP_barrier();

    small = job->small;
    before = 0;
    for (int64_t s = 0; s < job->segments; s++) {
        const struct segment *g = job->segment + s;
        const int64_t units = job->modules * g->rank, cost = PRICE(*g);
        int64_t block = share_of(blocks, from - before, cost);
        const int64_t stop = share_of(blocks, to - before, cost);
        int64_t module = 0, column = 0, past = 0; /* columns and blocks before this module */
        for (; block < stop; block++) {
            while (block - past >= (job->outs[module] + LANES - 1) / LANES) {
                past += (job->outs[module] + LANES - 1) / LANES;
                column += job->outs[module++];
            }
            const int64_t at = (block - past) * LANES;
            const int64_t count = job->outs[module] - at < LANES ? job->outs[module] - at : LANES;
            const char *b = (const char *)g->b + block * g->rank * LANES * size;
            for (int64_t m = 0; m < g->stop - g->first; m += MOST) {
                char *y = (char *)job->y + ((g->first + m) * out + column + at) * size;
                const float *of = small + m * units + module * g->rank;
                EACH_COUNT(g->stop - g->first - m, NAME(add_block)(y, b, of, g->rank, out, units, count, COUNT, bits));
            }
        }
        small += (g->stop - g->first) * units;
        before += cost;
    }
}

ATTR static void NAME(run)(const struct job *job, int t, int n)
{
    if (job->bits == 16)
        NAME(share)(job, t, n, 16);
    else
        NAME(share)(job, t, n, 32);
}
