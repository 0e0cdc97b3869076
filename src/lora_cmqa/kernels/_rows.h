/* The arithmetic of _rows.c for one instruction set. Included once for each, with
 *     ATTR       attributes of every function: the instruction set
 *     NAME(x)    x with the set's suffix
 * Vectors are the compilers' own (GCC and Clang); each becomes as many registers as the set needs. `bits` is 16 for
 * bfloat16 and 32 for float32; sums are float32. Every number of a row is summed in one written order, so it has the
 * same bits whatever stands beside it.
 */

/* bfloat16 is the upper half of a float32. */
ATTR INLINE vec NAME(wide)(half h)
{
    return (vec)(__builtin_convertvector(h, word) << 16);
}

/* Rounded to the nearest, ties to even, as torch does; a NaN stays one. */
ATTR INLINE half NAME(rounded)(vec v)
{
    word u = (word)v, number = (word)(v == v);
    u = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    return __builtin_convertvector((u & number) | (0x7fc0 & ~number), half);
}

ATTR INLINE vec NAME(load)(const void *p, int64_t at, const int bits)
{
    vec v;
    half h;
    if (bits == 32) {
        memcpy(&v, (const float *)p + at, sizeof v);
        return v;
    }
    memcpy(&h, (const uint16_t *)p + at, sizeof h);
    return NAME(wide)(h);
}

/* The first `count` of a vector, then zeros; all of it from LANES on. */
ATTR INLINE vec NAME(load_part)(const void *p, int64_t at, int64_t count, const int bits)
{
    if (count >= LANES)
        return NAME(load)(p, at, bits);
    uint8_t room[sizeof(vec)] = {0};
    int size = bits / 8;
    memcpy(room, (const uint8_t *)p + at * size, count * size);
    return NAME(load)(room, 0, bits);
}

ATTR INLINE void NAME(store)(void *p, int64_t at, vec v, const int bits)
{
    if (bits == 32) {
        memcpy((float *)p + at, &v, sizeof v);
        return;
    }
    half h = NAME(rounded)(v);
    memcpy((uint16_t *)p + at, &h, sizeof h);
}

ATTR INLINE void NAME(store_part)(void *p, int64_t at, int64_t count, vec v, const int bits)
{
    uint8_t room[sizeof(vec)];
    const int size = bits / 8;
    if (count >= LANES) {
        NAME(store)(p, at, v, bits);
        return;
    }
    NAME(store)(room, 0, v, bits);
    memcpy((uint8_t *)p + at * size, room, count * size);
}

ATTR INLINE float NAME(total)(vec v)
{
    float f[LANES];
    memcpy(f, &v, sizeof f);
    for (int step = LANES / 2; step; step /= 2)
        for (int i = 0; i < step; i++)
            f[i] += f[i + step];
    return f[0];
}

/* ---- adapters --------------------------------------------------------------------------------------------------- */

/* small[q, p] = a[p] . x[q] for `na` rows of A and `nx` of x, constants of the caller. */
ATTR INLINE void NAME(dots)(const void *a, const void *x, float *small, int64_t inner, int64_t units, const int na,
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

/* y[q, : count], at most a vector, += sum over j of small[q, j] b[j] for `nx` rows. */
ATTR INLINE void NAME(add_block)(void *y, const void *b, const float *small, int64_t rank, int64_t out, int64_t units,
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
    for (int q = 0; q < nx; q++)
        NAME(store_part)(y, q * out, count, NAME(load_part)(y, q * out, count, bits) + sum[q], bits);
}

/* Both products' share of thread `t` of `n`; all wait for each other between them. */
ATTR INLINE void NAME(adapters_share)(const struct adapters *job, int t, int n, const int bits)
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
            const int64_t count = job->outs[module] - at;
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

ATTR static void NAME(adapters)(const struct adapters *job, int t, int n)
{
    if (job->bits == 16)
        NAME(adapters_share)(job, t, n, 16);
    else
        NAME(adapters_share)(job, t, n, 32);
}

/* ---- norm, rotation, sum ---------------------------------------------------------------------------------------- */

ATTR INLINE void NAME(widen)(float *to, const void *from, int64_t at, int64_t width, const int bits)
{
    for (int64_t i = 0; i < width; i += LANES)
        NAME(store_part)(to, i, width - i, NAME(load_part)(from, at + i, width - i, bits), 32);
}

ATTR INLINE void NAME(narrow)(void *to, int64_t at, const float *from, int64_t width, const int bits)
{
    for (int64_t i = 0; i < width; i += LANES)
        NAME(store_part)(to, at + i, width - i, NAME(load_part)(from, i, width - i, 32), bits);
}

/* x / sqrt(mean(x^2) + eps) * gain, rounded to the tensors' type. `x` has room for whole vectors. */
ATTR INLINE void NAME(norm)(float *x, const float *gain, int64_t width, float eps, const int bits)
{
    vec sum = {0};
    for (int64_t i = 0; i < width; i += LANES) {
        vec v = NAME(load_part)(x, i, width - i, 32);
        sum += v * v;
    }
    const float inverse = 1.0f / sqrtf(NAME(total)(sum) / (float)width + eps);
    for (int64_t i = 0; i < width; i += LANES) {
        vec v = NAME(load)(x, i, 32) * inverse * NAME(load_part)(gain, i, width - i, 32);
        NAME(store)(x, i, bits == 16 ? NAME(wide)(NAME(rounded)(v)) : v, 32);
    }
}

/* Each head of each row: norm where there is a gain, rotation where there are angles, a sum where one is asked for. */
ATTR INLINE void NAME(pointwise_of)(const struct pointwise *job, float *room, const int bits)
{
    const int64_t width = job->width, pairs = width / 2;
    float *x = room, *more = x + width + LANES, *cosine = more + width, *sine = cosine + pairs;
    for (int64_t row = 0; row < job->rows; row++) {
        if (job->cosine) {
            NAME(widen)(cosine, job->cosine, row * job->angle_stride, pairs, bits);
            NAME(widen)(sine, job->sine, row * job->angle_stride, pairs, bits);
        }
        for (int64_t head = 0; head < job->heads; head++) {
            const int64_t at = (row * job->heads + head) * width;
            NAME(widen)(x, job->x, row * job->x_stride + head * width, width, bits);
            if (job->gain)
                NAME(norm)(x, job->gain + head * job->gain_stride, width, job->eps, bits);
            if (job->cosine)
                for (int64_t i = 0; i < pairs; i++) {
                    const float a = x[i], b = x[pairs + i];
                    x[i] = a * cosine[i] - b * sine[i];
                    x[pairs + i] = b * cosine[i] + a * sine[i];
                }
            if (job->added) {
                NAME(widen)(more, job->added, at, width, bits);
                for (int64_t i = 0; i < width; i++)
                    x[i] += more[i];
            }
            NAME(narrow)(job->y, at, x, width, bits);
        }
    }
}

ATTR static void NAME(pointwise)(const struct pointwise *job, float *room)
{
    if (job->bits == 16)
        NAME(pointwise_of)(job, room, 16);
    else
        NAME(pointwise_of)(job, room, 32);
}

/* ---- attention -------------------------------------------------------------------------------------------------- */

/* e^x for x <= 0, to 2 units in the last place: 2^n e^r, n whole, |r| <= log(2) / 2 (a Taylor polynomial of e^r). */
ATTR INLINE vec NAME(exponential)(vec x)
{
    const vec low = (vec){0} - 87.0f;
    const vec whole = (vec){0} + 12582912.0f; /* 1.5 * 2^23: adding it rounds to a whole number */
    x = (vec)(((word)x & (word)(x > low)) | ((word)low & ~(word)(x > low)));
    vec shifted = x * 1.44269504f + whole, n = shifted - whole;
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f; /* log(2) in two parts */
    vec sum = r * (1.0f / 5040) + 1.0f / 720;
    sum = sum * r + 1.0f / 120;
    sum = sum * r + 1.0f / 24;
    sum = sum * r + 1.0f / 6;
    sum = sum * r + 0.5f;
    sum = sum * r + 1.0f;
    sum = sum * r + 1.0f;
    return (vec)((word)sum + (((word)shifted - (word)whole) << 23));
}

/* Scores of `count` positions -> weights, not yet divided by their sum, which is returned. Room for whole vectors. */
ATTR INLINE float NAME(weights)(float *score, int64_t count, float scale)
{
    float most = score[0];
    for (int64_t i = 1; i < count; i++)
        most = score[i] > most ? score[i] : most;
    vec sum = {0};
    for (int64_t i = 0; i < count; i += LANES) {
        vec v = NAME(exponential)((NAME(load)(score, i, 32) - most) * scale);
        NAME(store)(score, i, v, 32);
        sum += NAME(load_part)(score, i, count - i, 32);
    }
    return NAME(total)(sum);
}

/* y[q] = sum over positions of weight[q] value / sum[q]; `nb` vectors of `nx` heads; a lone one may end after `last`.
 */
ATTR INLINE void NAME(weighted)(void *y, const void *value, const float *weight, const float *sum, int64_t count,
                                int64_t width, int64_t stride, int64_t last, const int nb, const int nx, const int bits)
{
    vec total[MOST][MOST];
    for (int b = 0; b < nb; b++)
        for (int q = 0; q < nx; q++)
            total[b][q] = (vec){0};
    for (int64_t i = 0; i < count; i++)
        for (int b = 0; b < nb; b++) {
            vec v = NAME(load_part)(value, i * width + b * LANES, last, bits);
            for (int q = 0; q < nx; q++)
                total[b][q] += weight[q * stride + i] * v;
        }
    for (int b = 0; b < nb; b++)
        for (int q = 0; q < nx; q++)
            NAME(store_part)(y, q * width + b * LANES, last, total[b][q] / sum[q], bits);
}

/* One row's heads that share keys, over the positions that it sees; its own key and value are written first. */
ATTR INLINE void NAME(attend_one)(const struct attention *job, int64_t row, int64_t kv, float *score, const int bits)
{
    const int64_t size = bits / 8, width = job->width, group = job->heads / job->kv_heads;
    const int64_t slot = job->place[2 * row], position = job->place[2 * row + 1];
    const int64_t first = job->window && position >= job->window ? position - job->window + 1 : 0;
    const int64_t count = position + 1 - first, stride = (count + LANES - 1) / LANES * LANES;
    const int64_t at = (slot * job->kv_heads + kv) * job->room * width;
    char *keys = (char *)job->keys + at * size, *values = (char *)job->values + at * size;
    memcpy(keys + position * width * size, (const char *)job->k + (row * job->k_stride + kv * width) * size,
           width * size);
    memcpy(values + position * width * size, (const char *)job->v + (row * job->v_stride + kv * width) * size,
           width * size);
    keys += first * width * size, values += first * width * size;
    for (int64_t h = 0; h < group; h += MOST) {
        const char *q = (const char *)job->q + (row * job->q_stride + (kv * group + h) * width) * size;
        char *y = (char *)job->y + ((row * job->heads + kv * group + h) * width) * size;
        int64_t i = 0;
        for (; i + MOST <= count; i += MOST)
            EACH_COUNT(group - h, NAME(dots)(keys + i * width * size, q, score + i, width, stride, MOST, COUNT, bits));
        for (; i < count; i++)
            EACH_COUNT(group - h, NAME(dots)(keys + i * width * size, q, score + i, width, stride, 1, COUNT, bits));
        float sum[MOST];
        for (int64_t g = 0; g < MOST && h + g < group; g++)
            sum[g] = NAME(weights)(score + g * stride, count, job->scale);
        for (i = 0; i + MOST * LANES <= width; i += MOST * LANES)
            EACH_COUNT(group - h, NAME(weighted)(y + i * size, values + i * size, score, sum, count, width, stride,
                                                 LANES, MOST, COUNT, bits));
        for (; i < width; i += LANES)
            EACH_COUNT(group - h, NAME(weighted)(y + i * size, values + i * size, score, sum, count, width, stride,
                                                 width - i, 1, COUNT, bits));
    }
}

ATTR static void NAME(attention)(struct attention *job, int t)
{
    const int64_t units = job->rows * job->kv_heads;
    for (int64_t u; (u = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED)) < units;)
        if (job->bits == 16)
            NAME(attend_one)(job, u / job->kv_heads, u % job->kv_heads, job->score + t * job->score_stride, 16);
        else
            NAME(attend_one)(job, u / job->kv_heads, u % job->kv_heads, job->score + t * job->score_stride, 32);
}

/* ---- the gate of the MLP ---------------------------------------------------------------------------------------- */

/* 1 / (1 + e^-z), by e^-|z|. */
ATTR INLINE vec NAME(sigmoid)(vec z)
{
    const word negative = (word)(z < 0.0f);
    const vec size = (vec)((word)z & 0x7fffffff), e = NAME(exponential)(-size);
    return (vec)(((word)(e / (1.0f + e)) & negative) | ((word)(1.0f / (1.0f + e)) & ~negative));
}

ATTR INLINE void NAME(gate_of)(const struct gate *job, int64_t first, int64_t stop, const int bits)
{
    for (int64_t row = first; row < stop; row++)
        for (int64_t i = 0; i < job->width; i += LANES) {
            const int64_t left = job->width - i, at = row * 2 * job->width + i;
            vec g = NAME(load_part)(job->x, at, left, bits), u = NAME(load_part)(job->x, at + job->width, left, bits);
            /* 2 sqrt(2 / pi), and 0.044715 of it */
            vec z = job->gelu ? g * (1.5957691216f + 0.0713548163f * g * g) : g;
            vec v = NAME(sigmoid)(z) * g;
            v = (bits == 16 ? NAME(wide)(NAME(rounded)(v)) : v) * u;
            NAME(store_part)(job->y, row * job->width + i, left, v, bits);
        }
}

ATTR static void NAME(gate)(const struct gate *job, int t, int n)
{
    if (job->bits == 16)
        NAME(gate_of)(job, job->rows * t / n, job->rows * (t + 1) / n, 16);
    else
        NAME(gate_of)(job, job->rows * t / n, job->rows * (t + 1) / n, 32);
}
