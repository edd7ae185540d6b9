/* The geometry of crops for x86-64 with AVX2: a halving, and a linear resize fused with the halving that follows it.
 *
 * The integer arithmetic is that of OpenCV's INTER_AREA (2 x 2) and INTER_LINEAR for uint8, so replay.py makes the same pixels
 * with either. Each row is resized horizontally with 11-bit weights into 16-bit values, two rows are blended, and the mean of
 * 2 x 2 of the resulting pixels is taken while they are in registers.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define AVX2 __attribute__((target("avx2")))

enum {
    GROUP = 4,  /* pixels per iteration */
    LANES = 4,  /* int16 values per pixel: R, G, B and an unused one */
    ALIGN = 32,
};

/* Index of the first of two neighbours, which may be outside by one, and the weights of both in 2048ths. */
typedef struct {
    int32_t first;
    int16_t weights[2];
} Taps;

static void find_taps(Taps *taps, Py_ssize_t size, Py_ssize_t count) {
    const double scale = 1.0 / ((double)count / (double)size);
    for (Py_ssize_t k = 0; k < count; k++) {
        const float position = (float)(((double)k + 0.5) * scale - 0.5);
        const float below = floorf(position), weight = position - below;
        taps[k].first = (int32_t)below;
        taps[k].weights[0] = (int16_t)lrintf((1 - weight) * 2048);
        taps[k].weights[1] = (int16_t)lrintf(weight * 2048);
    }
}

/* Where the pixels of a resized row come from. If the row is halved later, the even pixels come first, then the odd ones, and
 * each half is padded to whole groups. */
typedef struct {
    Py_ssize_t count;   /* a multiple of GROUP */
    int32_t *offsets;   /* of the first neighbour, in bytes; the second follows it, and two more bytes are read */
    __m128i *weights;   /* in the order in which `resize_row` reads the pixels of a group: 0, 2, 1, 3 */
} Row;

static void plan_row(Row *row, const Taps *taps, Py_ssize_t width, Py_ssize_t pixels, int finer) {
    const Py_ssize_t half = row->count / finer;
    for (Py_ssize_t k = 0; k < row->count; k++) {
        const Py_ssize_t pixel = k % half < pixels ? k % half : pixels - 1;
        Taps of = taps[pixel * finer + k / half];
        const int16_t both = (int16_t)(of.weights[0] + of.weights[1]);
        if (of.first < 0) {
            of = (Taps){0, {both, 0}};
        } else if (of.first > width - 2) {
            of = (Taps){(int32_t)(width - 2), {0, both}};
        }
        const Py_ssize_t place = (k & ~(Py_ssize_t)3) | (k & 1) << 1 | (k >> 1 & 1);
        row->offsets[k] = 3 * of.first;
        row->weights[place] = _mm_set1_epi32((int32_t)((uint32_t)(uint16_t)of.weights[1] << 16 | (uint16_t)of.weights[0]));
    }
}

AVX2 static inline __m256i load_pairs(const uint8_t *a, const uint8_t *b) {
    const __m128i low = _mm_loadl_epi64((const __m128i *)a), high = _mm_loadl_epi64((const __m128i *)b);
    return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
}

/* Resizes a row of a crop horizontally to int16 [count, LANES], in 128ths. */
AVX2 static void resize_row(int16_t *to, const uint8_t *from, const Row *row) {
    const __m256i channels = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1));
    for (Py_ssize_t k = 0; k < row->count; k += GROUP) {
        const int32_t *at = row->offsets + k;
        const __m256i *weights = (const __m256i *)(row->weights + k);
        const __m256i a = _mm256_shuffle_epi8(load_pairs(from + at[0], from + at[2]), channels);
        const __m256i b = _mm256_shuffle_epi8(load_pairs(from + at[1], from + at[3]), channels);
        const __m256i sums_a = _mm256_srai_epi32(_mm256_madd_epi16(a, _mm256_load_si256(weights)), 4);
        const __m256i sums_b = _mm256_srai_epi32(_mm256_madd_epi16(b, _mm256_load_si256(weights + 1)), 4);
        _mm256_store_si256((__m256i *)(to + LANES * k), _mm256_packs_epi32(sums_a, sums_b));
    }
}

/* Blends a group of pixels of two resized rows and rounds to whole grey levels. */
AVX2 static inline __m256i blend(const int16_t *upper, const int16_t *lower, __m256i above, __m256i below) {
    const __m256i a = _mm256_mulhi_epi16(_mm256_load_si256((const __m256i *)upper), above);
    const __m256i b = _mm256_mulhi_epi16(_mm256_load_si256((const __m256i *)lower), below);
    return _mm256_srai_epi16(_mm256_add_epi16(_mm256_add_epi16(a, b), _mm256_set1_epi16(2)), 2);
}

/* Writes the first `count` pixels of a group. */
AVX2 static inline void write_group(uint8_t *to, __m256i group, Py_ssize_t count) {
    uint8_t bytes[16];
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi16(group, group), 0x08);
    const __m128i dense = _mm_shuffle_epi8(
        _mm256_castsi256_si128(packed), _mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1));
    _mm_storeu_si128((__m128i *)bytes, dense);
    memcpy(to, bytes, count < GROUP ? 3 * (size_t)count : 3 * GROUP);
}

/* Resizes a crop of at least two columns linearly to `finer` times `pixels`, and halves the result if `finer` is 2. */
AVX2 static int resize(uint8_t *to, Py_ssize_t pixels, const Py_buffer *crop, int finer) {
    const Py_ssize_t height = crop->shape[0], width = crop->shape[1], fine = finer * pixels;
    const Py_ssize_t half = (pixels + GROUP - 1) / GROUP * GROUP;
    Row row = {.count = finer * half};
    const size_t lanes = sizeof(int16_t) * LANES * (size_t)row.count;
    const size_t weights = sizeof(__m128i) * (size_t)row.count, offsets = sizeof(int32_t) * (size_t)row.count;
    char *memory = malloc(ALIGN + weights + 3 * lanes + offsets + sizeof(Taps) * (size_t)fine + 3 * (size_t)width + 8);
    if (memory == NULL) {
        return -1;
    }
    char *aligned = memory + (ALIGN - (uintptr_t)memory % ALIGN);
    row.weights = (__m128i *)aligned;
    int16_t *rows[2] = {(int16_t *)(aligned + weights), (int16_t *)(aligned + weights + lanes)};
    int16_t *sums = (int16_t *)(aligned + weights + 2 * lanes);
    row.offsets = (int32_t *)(aligned + weights + 3 * lanes);
    Taps *taps = (Taps *)(aligned + weights + 3 * lanes + offsets);
    uint8_t *last = (uint8_t *)(taps + fine);
    memcpy(last, (const uint8_t *)crop->buf + (height - 1) * crop->strides[0], 3 * (size_t)width); /* as reads pass its end */

    find_taps(taps, width, fine);
    plan_row(&row, taps, width, pixels, finer);
    find_taps(taps, height, fine);
    Py_ssize_t held[2] = {-1, -1}; /* indices of the rows in `rows`: two neighbours are an even row and an odd one */
    for (Py_ssize_t y = 0; y < fine; y++) {
        const int16_t *near[2];
        for (int k = 0; k < 2; k++) {
            Py_ssize_t r = taps[y].first + k;
            r = r < 0 ? 0 : r > height - 1 ? height - 1 : r;
            if (held[r & 1] != r) {
                held[r & 1] = r;
                resize_row(rows[r & 1], r == height - 1 ? last : (const uint8_t *)crop->buf + r * crop->strides[0], &row);
            }
            near[k] = rows[r & 1];
        }
        const __m256i above = _mm256_set1_epi16(taps[y].weights[0]), below = _mm256_set1_epi16(taps[y].weights[1]);
        uint8_t *out = to + 3 * pixels * (y / finer);
        for (Py_ssize_t x = 0; x < pixels; x += GROUP) {
            const int16_t *upper = near[0] + LANES * x, *lower = near[1] + LANES * x;
            __m256i group = blend(upper, lower, above, below);
            if (finer == 2) {
                __m256i *sum = (__m256i *)(sums + LANES * x);
                group = _mm256_add_epi16(group, blend(upper + LANES * half, lower + LANES * half, above, below));
                if (y % 2 == 0) {
                    _mm256_store_si256(sum, group);
                    continue;
                }
                group = _mm256_add_epi16(_mm256_add_epi16(group, _mm256_load_si256(sum)), _mm256_set1_epi16(2));
                group = _mm256_srli_epi16(group, 2);
            }
            write_group(out + 3 * x, group, pixels - x);
        }
    }
    free(memory);
    return 0;
}

/* Writes the means of 2 x 2 pixels. An odd last row or column of the crop is dropped. */
AVX2 static void halve(uint8_t *to, const Py_buffer *crop, Py_ssize_t height, Py_ssize_t width) {
    const __m128i pairs = _mm_setr_epi8(0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11, -1, -1, -1, -1), ones = _mm_set1_epi8(1);
    for (Py_ssize_t y = 0; y < height; y++, to += 3 * width) {
        const uint8_t *upper = (const uint8_t *)crop->buf + 2 * y * crop->strides[0], *lower = upper + crop->strides[0];
        Py_ssize_t x = 0;
        for (; x + 4 <= width; x += 2) { /* reads 16 bytes and uses 12, writes 8 of which 6 are kept */
            const __m128i a = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)(upper + 6 * x)), pairs);
            const __m128i b = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)(lower + 6 * x)), pairs);
            __m128i sums = _mm_add_epi16(_mm_maddubs_epi16(a, ones), _mm_maddubs_epi16(b, ones));
            sums = _mm_srli_epi16(_mm_add_epi16(sums, _mm_set1_epi16(2)), 2);
            _mm_storel_epi64((__m128i *)(to + 3 * x), _mm_packus_epi16(sums, sums));
        }
        for (Py_ssize_t k = 3 * x; k < 3 * width; k++) {
            const Py_ssize_t left = k + k / 3 * 3;
            to[k] = (uint8_t)((upper[left] + upper[left + 3] + lower[left] + lower[left + 3] + 2) >> 2);
        }
    }
}

/* Gets the buffer of an array uint8 [height, width, 3] with contiguous pixels; an array to write to has contiguous rows too. */
static int get_array(PyObject *object, Py_buffer *array, int written) {
    if (PyObject_GetBuffer(object, array, PyBUF_STRIDES | PyBUF_FORMAT | (written ? PyBUF_WRITABLE : 0))) {
        return -1;
    }
    const Py_ssize_t *shape = array->shape, *strides = array->strides;
    int fits = array->format != NULL && strcmp(array->format, "B") == 0 && array->ndim == 3 && shape[2] == 3;
    fits = fits && strides[2] == 1 && strides[1] == 3;
    fits = fits && shape[0] >= 1 && shape[1] >= 1 && shape[0] < 1 << 24 && shape[1] < 1 << 24;
    if (!fits || (written ? strides[0] != 3 * shape[1] : strides[0] < 3 * shape[1])) {
        PyBuffer_Release(array);
        PyErr_SetString(PyExc_ValueError, "expected uint8 [height, width, 3] with contiguous pixels");
        return -1;
    }
    return 0;
}

static int get_arrays(PyObject *to, Py_buffer *view, PyObject *from, Py_buffer *crop) {
    if (get_array(to, view, 1)) {
        return -1;
    }
    if (get_array(from, crop, 0)) {
        PyBuffer_Release(view);
        return -1;
    }
    return 0;
}

static PyObject *py_resize(PyObject *module, PyObject *arguments) {
    PyObject *to, *from;
    Py_buffer view, crop;
    int finer, failed = 0;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "OOi", &to, &from, &finer) || get_arrays(to, &view, from, &crop)) {
        return NULL;
    }
    const int fits = view.shape[0] == view.shape[1] && crop.shape[1] >= 2 && (finer == 1 || finer == 2);
    if (fits) {
        Py_BEGIN_ALLOW_THREADS
        failed = resize(view.buf, view.shape[0], &crop, finer);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&view);
    PyBuffer_Release(&crop);
    if (!fits) {
        PyErr_SetString(PyExc_ValueError, "expected a square view, a crop of at least 2 columns, and a factor of 1 or 2");
        return NULL;
    }
    return failed ? PyErr_NoMemory() : Py_NewRef(Py_None);
}

static PyObject *py_halve(PyObject *module, PyObject *arguments) {
    PyObject *to, *from;
    Py_buffer view, crop;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "OO", &to, &from) || get_arrays(to, &view, from, &crop)) {
        return NULL;
    }
    const int fits = view.shape[0] == crop.shape[0] / 2 && view.shape[1] == crop.shape[1] / 2;
    if (fits) {
        Py_BEGIN_ALLOW_THREADS
        halve(view.buf, &crop, view.shape[0], view.shape[1]);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&view);
    PyBuffer_Release(&crop);
    if (!fits) {
        PyErr_SetString(PyExc_ValueError, "expected a view of half the crop's size");
        return NULL;
    }
    return Py_NewRef(Py_None);
}

static PyMethodDef methods[] = {
    {"resize", py_resize, METH_VARARGS, "Resizes a crop to 1 or 2 times the size of a square view, and halves the latter into the view."},
    {"halve", py_halve, METH_VARARGS, "Writes the means of 2 x 2 pixels of a crop into a view."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, .m_name = "_avx2", .m_doc = "The geometry of crops in AVX2.", .m_methods = methods,
};

PyMODINIT_FUNC PyInit__avx2(void) {
    if (!__builtin_cpu_supports("avx2")) {
        PyErr_SetString(PyExc_ImportError, "this processor has no AVX2");
        return NULL;
    }
    return PyModule_Create(&definition);
}
