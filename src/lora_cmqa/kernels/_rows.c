/* What the engine does to the few rows of a step on a CPU, for adapter_rows.py and few_rows.py, which say what the
 * arguments are.
 *
 *     add         y[m] += B (A x[m]), each row with its own adapter's A and B, on torch's own threads
 *     pointwise   norm, rotation and sum of each row, in one pass of the calling thread
 *     attend      each row over its own slot of the cache, as far as it is written
 *     gated       activation(gate) * up
 *
 * Arguments are integers, addresses of tensors among them; the arithmetic is in _rows.h, once for each instruction set.
 *
 * Threads come from the OpenMP runtime that torch has loaded, by the calls that GCC makes for "#pragma omp parallel"
 * (libgomp has them, and so do libomp and libiomp5): a second runtime's threads would spin against torch's. Nothing is
 * linked; where torch brings no such runtime, this module does not load and the engine takes its other ways.
 */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

extern void GOMP_parallel(void (*run)(void *), void *data, unsigned threads, unsigned flags);
extern void GOMP_barrier(void);
extern int omp_get_thread_num(void);
extern int omp_get_num_threads(void);

#define LANES 16   /* outputs in a block of B, and float32 in a vector */
#define MOST 4     /* rows of A and of x multiplied at once */
#define AHEAD 2048 /* bytes fetched in advance */

/* Always, or constants of the caller would not become the ends of loops. */
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef uint32_t word __attribute__((vector_size(4 * LANES)));
typedef uint16_t half __attribute__((vector_size(2 * LANES)));

/* One adapter and the rows [first, stop) that it answers; as adapter_rows.py writes it. */
struct segment {
    const void *a, *b;
    int64_t first, stop, rank;
};

struct adapters {
    void *y;
    const void *x;
    const struct segment *segment;
    int64_t segments;
    const int64_t *outs;
    int64_t modules, inner, bits;
    float *small;
};

/* Addresses that are 0 are left out. Strides in elements; each head's numbers lie together. */
struct pointwise {
    void *y;
    const void *x, *added, *cosine, *sine;
    const float *gain;
    int64_t rows, heads, width, x_stride, gain_stride, angle_stride, bits;
    float eps;
};

/* Queries, keys and values of a step's rows, strides in elements; the caches are [slots, kv_heads, room, width]. */
struct attention {
    void *y, *keys, *values;
    const void *q, *k, *v;
    const int64_t *place; /* slot and position of each row */
    int64_t rows, heads, kv_heads, width, room, q_stride, k_stride, v_stride;
    int64_t window; /* positions seen, 0: all */
    int64_t bits;
    float scale;
    float *score; /* of each thread */
    int64_t score_stride, next;
};

struct gate {
    void *y;
    const void *x; /* [rows, 2 width] */
    int64_t rows, width, gelu, bits;
};

/* What a segment costs: reading a weight takes about as long as multiplying it by four rows. */
#define PRICE(s) ((s).rank * ((s).stop - (s).first + 4))

/* How many of `units` a share that ends `part` into a segment of `cost` includes. */
static inline int64_t share_of(int64_t units, int64_t part, int64_t cost)
{
    if (part <= 0)
        return 0;
    return part >= cost ? units : (units * part + cost - 1) / cost;
}

/* `call` with COUNT a constant, the smaller of `left` and MOST, so that its loops become registers. */
#define EACH_COUNT(left, call)                                                                                         \
    do {                                                                                                               \
        if ((left) >= 4) {                                                                                             \
            enum { COUNT = 4 };                                                                                        \
            call;                                                                                                      \
        } else if ((left) == 3) {                                                                                      \
            enum { COUNT = 3 };                                                                                        \
            call;                                                                                                      \
        } else if ((left) == 2) {                                                                                      \
            enum { COUNT = 2 };                                                                                        \
            call;                                                                                                      \
        } else {                                                                                                       \
            enum { COUNT = 1 };                                                                                        \
            call;                                                                                                      \
        }                                                                                                              \
    } while (0)

#define ATTR
#define NAME(x) x##_any
#include "_rows.h"
#undef ATTR
#undef NAME

#if defined(__x86_64__)
#define ATTR __attribute__((target("avx2,fma")))
#define NAME(x) x##_avx2
#include "_rows.h"
#undef ATTR
#undef NAME

#define ATTR __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma")))
#define NAME(x) x##_avx512
#include "_rows.h"
#undef ATTR
#undef NAME
#endif

/* What runs: one instruction set's. */
static struct {
    void (*adapters)(const struct adapters *, int, int);
    void (*pointwise)(const struct pointwise *, float *);
    void (*attention)(struct attention *, int);
    void (*gate)(const struct gate *, int, int);
} run;

#define TAKE(set)                                                                                                      \
    (run.adapters = adapters_##set, run.pointwise = pointwise_##set, run.attention = attention_##set,                  \
     run.gate = gate_##set)

/* use(level) -> the level taken, at most `level` and what the processor has: 0 any, 1 AVX2, 2 AVX-512. */
static PyObject *use(PyObject *self, PyObject *level)
{
    long most = PyLong_AsLong(level), taken = 0;
    if (most == -1 && PyErr_Occurred())
        return NULL;
    TAKE(any);
#if defined(__x86_64__)
    __builtin_cpu_init();
    const int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const int avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                       __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    taken = avx512 ? 2 : avx2;
    taken = taken < most ? taken : most;
    if (taken == 1)
        TAKE(avx2);
    if (taken >= 2)
        TAKE(avx512);
#endif
    return PyLong_FromLong(taken);
}

/* `count` integers of Python's; 0 and an exception where they are not that. */
static int integers(PyObject *const *args, Py_ssize_t given, long long *v, Py_ssize_t count)
{
    if (given != count) {
        PyErr_Format(PyExc_TypeError, "%zd integers are wanted, not %zd", count, given);
        return 0;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        v[i] = PyLong_AsLongLong(args[i]);
        if (v[i] == -1 && PyErr_Occurred())
            return 0;
    }
    return 1;
}

static void add_in_thread(void *data)
{
    run.adapters((const struct adapters *)data, omp_get_thread_num(), omp_get_num_threads());
}

static PyObject *add(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    enum { Y, X, SEGMENT, SEGMENTS, OUTS, MODULES, INNER, BITS, SMALL, THREADS, ARGUMENTS };
    long long v[ARGUMENTS];
    if (!integers(args, count, v, ARGUMENTS))
        return NULL;
    struct adapters job = {.y = (void *)v[Y],
                           .x = (const void *)v[X],
                           .segment = (const struct segment *)v[SEGMENT],
                           .segments = v[SEGMENTS],
                           .outs = (const int64_t *)v[OUTS],
                           .modules = v[MODULES],
                           .inner = v[INNER],
                           .bits = v[BITS],
                           .small = (float *)v[SMALL]};
    Py_BEGIN_ALLOW_THREADS if (v[THREADS] > 1) GOMP_parallel(add_in_thread, &job, (unsigned)v[THREADS], 0);
    else run.adapters(&job, 0, 1);
    Py_END_ALLOW_THREADS Py_RETURN_NONE;
}

/* The last argument is a float. */
static PyObject *pointwise(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    enum { Y, X, ADDED, GAIN, COSINE, SINE, ROWS, HEADS, WIDTH, X_STRIDE, GAIN_STRIDE, ANGLE_STRIDE, BITS, EPS };
    long long v[EPS];
    if (!integers(args, count - 1, v, EPS))
        return NULL;
    const double eps = PyFloat_AsDouble(args[EPS]);
    if (eps == -1.0 && PyErr_Occurred())
        return NULL;
    const struct pointwise job = {.y = (void *)v[Y],
                                  .x = (const void *)v[X],
                                  .added = (const void *)v[ADDED],
                                  .gain = (const float *)v[GAIN],
                                  .cosine = (const void *)v[COSINE],
                                  .sine = (const void *)v[SINE],
                                  .rows = v[ROWS],
                                  .heads = v[HEADS],
                                  .width = v[WIDTH],
                                  .x_stride = v[X_STRIDE],
                                  .gain_stride = v[GAIN_STRIDE],
                                  .angle_stride = v[ANGLE_STRIDE],
                                  .bits = v[BITS],
                                  .eps = (float)eps};
    float *room = calloc(3 * v[WIDTH] + LANES, sizeof(float)); /* a row, what is added, its angles */
    if (room == NULL)
        return PyErr_NoMemory();
    Py_BEGIN_ALLOW_THREADS run.pointwise(&job, room);
    Py_END_ALLOW_THREADS free(room);
    Py_RETURN_NONE;
}

static void attend_in_thread(void *data)
{
    run.attention((struct attention *)data, omp_get_thread_num());
}

/* The last argument is a float. */
static PyObject *attend(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    enum { OUT, Q, K, V, KEYS, VALUES, PLACE, ROWS, HEADS, KV_HEADS, WIDTH, ROOM, Q_STRIDE, K_STRIDE, V_STRIDE };
    enum { WINDOW = V_STRIDE + 1, SEEN, BITS, THREADS, SCALE };
    long long v[SCALE];
    if (!integers(args, count - 1, v, SCALE))
        return NULL;
    const double scale = PyFloat_AsDouble(args[SCALE]);
    if (scale == -1.0 && PyErr_Occurred())
        return NULL;
    struct attention job = {.y = (void *)v[OUT],
                            .q = (const void *)v[Q],
                            .k = (const void *)v[K],
                            .v = (const void *)v[V],
                            .keys = (void *)v[KEYS],
                            .values = (void *)v[VALUES],
                            .place = (const int64_t *)v[PLACE],
                            .rows = v[ROWS],
                            .heads = v[HEADS],
                            .kv_heads = v[KV_HEADS],
                            .width = v[WIDTH],
                            .room = v[ROOM],
                            .q_stride = v[Q_STRIDE],
                            .k_stride = v[K_STRIDE],
                            .v_stride = v[V_STRIDE],
                            .window = v[WINDOW],
                            .bits = v[BITS],
                            .scale = (float)scale,
                            .score_stride = MOST * (v[SEEN] + 2 * LANES)};
    job.score = malloc(v[THREADS] * job.score_stride * sizeof(float));
    if (job.score == NULL)
        return PyErr_NoMemory();
    Py_BEGIN_ALLOW_THREADS if (v[THREADS] > 1) GOMP_parallel(attend_in_thread, &job, (unsigned)v[THREADS], 0);
    else run.attention(&job, 0);
    Py_END_ALLOW_THREADS free(job.score);
    Py_RETURN_NONE;
}

static void gate_in_thread(void *data)
{
    run.gate((const struct gate *)data, omp_get_thread_num(), omp_get_num_threads());
}

/* y, x, rows, width, gelu, bits, threads */
static PyObject *gated(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    long long v[7];
    if (!integers(args, count, v, 7))
        return NULL;
    struct gate job = {(void *)v[0], (const void *)v[1], v[2], v[3], v[4], v[5]};
    Py_BEGIN_ALLOW_THREADS if (v[6] > 1) GOMP_parallel(gate_in_thread, &job, (unsigned)v[6], 0);
    else run.gate(&job, 0, 1);
    Py_END_ALLOW_THREADS Py_RETURN_NONE;
}

#define FAST(name) {#name, (PyCFunction)(void (*)(void))name, METH_FASTCALL, NULL}
static PyMethodDef methods[] = {
    FAST(add), FAST(pointwise), FAST(attend), FAST(gated), {"use", use, METH_O, NULL}, {NULL, NULL, 0, NULL}};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_rows", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__rows(void)
{
    TAKE(any);
    return PyModule_Create(&module);
}
