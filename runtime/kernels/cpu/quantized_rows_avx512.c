/* The product for few tokens with AVX-512: the weights stream by once, in file order, and meet all tokens.
 *
 * 64 bytes of a row are 128 numbers of 4 bits or 64 of 8 bits: an int32 lane sums 8 or 4 products, all of one block,
 * and one multiplication by the lanes' scales takes them to float. */
#include "isa.h"
#include "quantized_rows.h"

#if defined(CIERZO_X86)
#include <immintrin.h>

#include "unroll.h"

CIERZO_BEGIN_AVX512
#include "lanes_avx512.h"

/* How the 64 bytes of a step share out into blocks. */
typedef struct Step {
    int64_t count;                  /* steps of a row */
    int64_t blocks_of_a_step;       /* at least 1 */
    int shift;                      /* block of a step's first number: step << shift, or step >> -shift */
    __mmask64 bytes, last_bytes;    /* of weights, and of the last step's */
    __mmask16 scales, last_scales;
    __m512i lane_block;             /* block of each lane, counted from the step's first */
} Step;

static Step step_of(const QuantizedWeight *w) {
    Step s = {0};
    int64_t numbers = 512 / w->bits, row = packed_stride(w);
    s.count = (row + 63) / 64;
    s.blocks_of_a_step = numbers > w->block ? numbers / w->block : 1;
    for (int64_t n = numbers; n > w->block; n /= 2) s.shift++;
    for (int64_t n = w->block; n > numbers; n /= 2) s.shift--;
    int64_t before = s.count - 1, rest = row - before * 64;
    int64_t first = s.shift >= 0 ? before << s.shift : before >> -s.shift;
    s.bytes = ~(__mmask64)0;
    s.last_bytes = rest == 64 ? s.bytes : ((__mmask64)1 << rest) - 1;
    s.scales = (__mmask16)((1 << s.blocks_of_a_step) - 1);
    int64_t left = w->blocks - first;
    s.last_scales = left < s.blocks_of_a_step ? (__mmask16)((1 << left) - 1) : s.scales;
    int32_t lanes[LANES];
    for (int i = 0; i < LANES; i++) lanes[i] = (int32_t)(i * (32 / w->bits) / w->block);
    s.lane_block = _mm512_loadu_si512(lanes);
    return s;
}

static inline __attribute__((always_inline)) __m512 weight_scales(const QuantizedWeight *w, int64_t at, __mmask16 mask,
                                                                  __m512i lane_block) {
    __m256 scales = w->scale_is_half
                        ? _mm256_cvtph_ps(_mm_maskz_loadu_epi16((__mmask8)mask, (const uint16_t *)w->scale + at))
                        : _mm256_maskz_loadu_ps((__mmask8)mask, (const float *)w->scale + at);
    return _mm512_permutexvar_ps(lane_block, _mm512_castps256_ps512(scales));
}

/* The zeros of a step's blocks, from block `first` of row n on, each in its lanes. */
static inline __attribute__((always_inline)) __m512i weight_zeros(const QuantizedWeight *w, const int bits, int64_t n,
                                                                  int64_t first, __mmask16 scales, __m512i lane_block) {
    int64_t bit = first * bits;
    /* As many bytes as the blocks that there are need, so that nothing past the last zero is touched. */
    int count = (__builtin_popcount(scales) * bits + (int)(bit & 7) + 7) / 8;
    __m128i bytes = _mm_maskz_loadu_epi8((__mmask16)((1 << count) - 1), w->zero + n * zero_stride(w) + bit / 8);
    __m512i word = _mm512_broadcastd_epi32(_mm_srl_epi32(bytes, _mm_cvtsi32_si128((int)(bit & 7))));
    __m512i shifted = _mm512_srlv_epi32(word, _mm512_slli_epi32(lane_block, bits == 4 ? 2 : 3));
    return _mm512_and_si512(shifted, _mm512_set1_epi32((1 << bits) - 1));
}

/* R columns of y from column n on (those from `end` on repeat the last) for T tokens. */
static inline __attribute__((always_inline)) void tile(const Rows *rows, const QuantizedWeight *w, const Step *step,
                                                       int64_t n, int64_t end, float *y, int64_t y_stride,
                                                       const int R, const int T, const int bits, const int given_zero) {
    const __m512i low = _mm512_set1_epi8(15), lane_block = step->lane_block;
    const int64_t stride = packed_stride(w), numbers = 512 / bits;
    const int64_t scale_bytes = w->scale_is_half ? 2 : 4;
    int64_t row[4];
    const uint8_t *packed[4];
    __m512 sum[4 * MOST_FEW];
    for (int r = 0; r < R; r++) {
        row[r] = n + r < end ? n + r : end - 1;
        packed[r] = w->packed + row[r] * stride;
    }
    UNROLL for (int i = 0; i < 16; i++) sum[i] = _mm512_setzero_ps();
    for (int64_t c = 0; c < step->count; c++) {
        const int last = c + 1 == step->count;
        const __mmask64 bytes = last ? step->last_bytes : step->bytes;
        const __mmask16 scales = last ? step->last_scales : step->scales;
        const int64_t first = step->shift >= 0 ? c << step->shift : c >> -step->shift;
        __m512i even[4], odd[4], zero[4];
        __m512 scale[4];
        UNROLL for (int r = 0; r < R; r++) {
            __m512i v = _mm512_maskz_loadu_epi8(bytes, packed[r] + c * 64);
            _mm_prefetch((const char *)(packed[r] + c * 64 + R * stride), _MM_HINT_T0);
            even[r] = bits == 4 ? _mm512_and_si512(v, low) : v;
            odd[r] = bits == 4 ? _mm512_and_si512(_mm512_srli_epi16(v, 4), low) : v;
            scale[r] = weight_scales(w, row[r] * w->blocks + first, scales, lane_block);
            _mm_prefetch((const char *)w->scale + ((row[r] + R) * w->blocks + first) * scale_bytes, _MM_HINT_T0);
            zero[r] = given_zero ? weight_zeros(w, bits, row[r], first, scales, lane_block) : v;
        }
        UNROLL for (int t = 0; t < T; t++) {
            const int8_t *values = rows->values + t * rows->width + c * numbers;
            const __m512i x_even = _mm512_loadu_si512(values);
            const __m512i x_odd = bits == 4 ? _mm512_loadu_si512(values + 64) : x_even;
            const __m512i start = _mm512_loadu_si512(rows->start + t * rows->starts + c * LANES);
            const __m512i minus_sum = _mm512_srai_epi32(start, bits == 4 ? 3 : 7);
            const __m256 scale_256 = _mm256_loadu_ps(rows->scale + t * rows->blocks + first);
            const __m512 x_scale = _mm512_permutexvar_ps(lane_block, _mm512_castps256_ps512(scale_256));
            UNROLL for (int r = 0; r < R; r++) {
                __m512i dot = start;
                if (given_zero) dot = _mm512_dpwssd_epi32(_mm512_setzero_si512(), minus_sum, zero[r]);
                dot = _mm512_dpbusd_epi32(dot, even[r], x_even);
                if (bits == 4) dot = _mm512_dpbusd_epi32(dot, odd[r], x_odd);
                const __m512 both = _mm512_mul_ps(scale[r], x_scale);
                sum[r * T + t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), both, sum[r * T + t]);
            }
        }
    }
    _Alignas(64) float sums[LANES];
    _mm512_store_ps(sums, sums_of_lanes(sum, R * T <= 4 ? 4 : R * T <= 8 ? 8 : 16));
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++) y[t * y_stride + row[r]] = sums[r * T + t];
}

/* All columns for T tokens. */
#define COLUMNS(R, T)                                                                                                 \
    static void columns_of_##T(const Rows *rows, const QuantizedWeight *w, const Step *step, int64_t begin,           \
                               int64_t end, float *y, int64_t y_stride) {                                             \
        const int kind = (w->bits == 8) * 2 + (w->zero != NULL);                                                      \
        for (int64_t n = begin; n < end; n += R) {                                                                    \
            if (kind == 0) tile(rows, w, step, n, end, y, y_stride, R, T, 4, 0);                                   \
            else if (kind == 1) tile(rows, w, step, n, end, y, y_stride, R, T, 4, 1);                              \
            else if (kind == 2) tile(rows, w, step, n, end, y, y_stride, R, T, 8, 0);                              \
            else tile(rows, w, step, n, end, y, y_stride, R, T, 8, 1);                                             \
        }                                                                                                             \
    }
COLUMNS(4, 1)
COLUMNS(4, 2)
COLUMNS(4, 3)
COLUMNS(4, 4)
COLUMNS(2, 5)
COLUMNS(2, 6)
COLUMNS(2, 7)
COLUMNS(2, 8)

void multiply_rows_avx512(const Rows *rows, const QuantizedWeight *w, int64_t begin, int64_t end, float *y,
                          int64_t y_stride) {
    typedef void (*Columns)(const Rows *, const QuantizedWeight *, const Step *, int64_t, int64_t, float *, int64_t);
    static const Columns COLUMNS_OF[MOST_FEW] = {columns_of_1, columns_of_2, columns_of_3, columns_of_4,
                                                 columns_of_5, columns_of_6, columns_of_7, columns_of_8};
    const Step step = step_of(w);
    COLUMNS_OF[rows->M - 1](rows, w, &step, begin, end, y, y_stride);
}
CIERZO_END_ISA
#endif
