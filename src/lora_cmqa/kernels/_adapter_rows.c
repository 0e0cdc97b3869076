/* y[m] += B (A x[m]), each row with its own adapter's A and B, for adapter_rows.py, which says what the arguments are.
 *
 *     add        arguments as integers, the addresses of tensors among them -> a job -> torch's own threads
 *     share      one thread's part: dot products with rows of A; a barrier; blocks of B's outputs (_adapter_rows.h)
 *
 * Threads come from the OpenMP runtime that torch has loaded, by the calls that GCC makes for "#pragma omp parallel" (libgomp
 * has them, and so do libomp and libiomp5): a second runtime's threads would spin against torch's. Nothing is linked; where
 * torch brings no such runtime, this module does not load and the engine adds adapters another way.
 */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <stdint.h>
#include <string.h>

extern void GOMP_parallel(void (*run)(void *), void *data, unsigned threads, unsigned flags);
extern void GOMP_barrier(void);
extern int omp_get_thread_num(void);
extern int omp_get_num_threads(void);

#define LANES 16   /* outputs in a block of B, and float32 in a vector */
#define MOST 4     /* rows of A and of x multiplied at once */
#define AHEAD 2048 /* bytes fetched in advance */

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef uint32_t word __attribute__((vector_size(4 * LANES)));
typedef uint16_t half __attribute__((vector_size(2 * LANES)));

/* One adapter and the rows [first, stop) that it answers; as adapter_rows.py writes it. */
struct segment {
    const void *a, *b;
    int64_t first, stop, rank;
};

struct job {
    void *y;
    const void *x;
    const struct segment *segment;
    int64_t segments;
    const int64_t *outs;
    int64_t modules, inner, bits;
    float *small;
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
#define EACH_COUNT(left, call) \
    do { \
        if ((left) >= 4) { enum { COUNT = 4 }; call; } \
        else if ((left) == 3) { enum { COUNT = 3 }; call; } \
        else if ((left) == 2) { enum { COUNT = 2 }; call; } \
        else { enum { COUNT = 1 }; call; } \
    } while (0)

#define ATTR
#define NAME(x) x##_any
#include "_adapter_rows.h"
#undef ATTR
#undef NAME

#if defined(__x86_64__)
#define ATTR __attribute__((target("avx2,fma")))
#define NAME(x) x##_avx2
#include "_adapter_rows.h"
#undef ATTR
#undef NAME

#define ATTR __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma")))
#define NAME(x) x##_avx512
#include "_adapter_rows.h"
#undef ATTR
#undef NAME
#endif

static void (*run)(const struct job *, int, int) = run_any;

/* use(level) -> the level taken, at most `level` and what the processor has: 0 any, 1 AVX2, 2 AVX-512. */
static PyObject *use(PyObject *self, PyObject *level)
{
    long most = PyLong_AsLong(level), taken = 0;
    if (most == -1 && PyErr_Occurred())
        return NULL;
    run = run_any;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const int avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                       __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    taken = avx512 ? 2 : avx2;
    taken = taken < most ? taken : most;
    run = taken >= 2 ? run_avx512 : taken == 1 ? run_avx2 : run_any;
#endif
    return PyLong_FromLong(taken);
}

static void in_thread(void *data)
{
    run((const struct job *)data, omp_get_thread_num(), omp_get_num_threads());
}

enum { Y, X, SEGMENT, SEGMENTS, OUTS, MODULES, INNER, BITS, SMALL, THREADS, ARGUMENTS };

static PyObject *add(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    long long v[ARGUMENTS];
    if (count != ARGUMENTS) {
        PyErr_SetString(PyExc_TypeError, "add takes ten integers");
        return NULL;
    }
    for (int i = 0; i < ARGUMENTS; i++) {
        v[i] = PyLong_AsLongLong(args[i]);
        if (v[i] == -1 && PyErr_Occurred())
            return NULL;
    }
    struct job job = {.y = (void *)v[Y],
                      .x = (const void *)v[X],
                      .segment = (const struct segment *)v[SEGMENT],
                      .segments = v[SEGMENTS],
                      .outs = (const int64_t *)v[OUTS],
                      .modules = v[MODULES],
                      .inner = v[INNER],
                      .bits = v[BITS],
                      .small = (float *)v[SMALL]};
    Py_BEGIN_ALLOW_THREADS
    if (v[THREADS] > 1)
        GOMP_parallel(in_thread, &job, (unsigned)v[THREADS], 0);
    else
        run(&job, 0, 1);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {{"add", (PyCFunction)(void (*)(void))add, METH_FASTCALL, NULL},
                                {"use", use, METH_O, NULL},
                                {NULL, NULL, 0, NULL}};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_adapter_rows", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__adapter_rows(void)
{
    return PyModule_Create(&module);
}
