#include "quantizer.h"

#include "isa.h"
#include "library.h"

#include <math.h>
#include <string.h>

uint16_t half_of_float(float value) {
    uint32_t bits, sign, result;
    memcpy(&bits, &value, sizeof bits);
    sign = bits >> 16 & 0x8000u;
    bits &= 0x7FFFFFFFu;
    if (bits > 0x7F800000u) return (uint16_t)(sign | 0x7E00u); /* not a number */
    if (bits >= 0x47800000u) return (uint16_t)(sign | 0x7C00u); /* from 65536 on: infinite */
    if (bits < 0x38800000u) { /* below 2^-14 halves are multiples of 2^-24, as floats from 0.5 to 1 are */
        float sum = 0.5f + fabsf(value);
        memcpy(&result, &sum, sizeof result);
        return (uint16_t)(sign | (result - 0x3F000000u));
    }
    return (uint16_t)(sign | (bits + 0xFFFu + (bits >> 13 & 1u) - 0x38000000u) >> 13);
}

float float_of_half(uint16_t half) {
    uint32_t magnitude = half & 0x7FFFu, bits;
    float value;
    if (magnitude < 0x400u) {
        value = (float)magnitude * 0x1p-24f;
        memcpy(&bits, &value, sizeof bits);
    } else {
        bits = (magnitude << 13) + (magnitude < 0x7C00u ? 0x38000000u : 0x70000000u);
    }
    bits |= (uint32_t)(half & 0x8000u) << 16;
    memcpy(&value, &bits, sizeof value);
    return value;
}

typedef int (*QuantizeGroup)(const Quantizer *, QuantizerGroup *);

typedef struct Rows {
    Quantizer job;
    const uint8_t *values;
    int64_t rows, columns, blocks, zero_bytes;
    uint8_t *packed, *zero;
    void *scale;
} Rows;

static void find_blocks(const Rows *all, int64_t first, int lanes, QuantizerGroup *group) {
    int64_t item = all->job.type == FROM_FLOAT ? 4 : 2;
    group->lanes = lanes;
    for (int lane = 0; lane < lanes; lane++) {
        int64_t row = (first + lane) / all->blocks, begin = (first + lane) % all->blocks * all->job.block;
        int64_t rest = all->columns - begin;
        group->count[lane] = rest < all->job.block ? (int)rest : all->job.block;
        group->from[lane] = all->values + (row * all->columns + begin) * item;
    }
}

static int store_blocks(const Rows *all, int64_t first, int stride, const QuantizerGroup *group) {
    int bits = all->job.bits, words = all->job.block * bits / 32, overflow = 0;
    for (int lane = 0; lane < group->lanes; lane++) {
        int64_t index = first + lane, row = index / all->blocks, block = index % all->blocks;
        uint8_t *to = all->packed + index * words * 4;
        for (int word = 0; word < words; word++) {
            uint32_t value = group->words[word * stride + lane];
            for (int byte = 0; byte < 4; byte++) to[4 * word + byte] = (uint8_t)(value >> 8 * byte);
        }
        if (isinf(group->scale[lane])) overflow = QUANTIZER_SCALE_OVERFLOW;
        if (all->job.half_scales)
            ((uint16_t *)all->scale)[index] = half_of_float(group->scale[lane]);
        else
            ((float *)all->scale)[index] = group->scale[lane];
        if (!all->job.zero_points) continue;
        uint8_t zero = (uint8_t)group->zero[lane], *at = all->zero + row * all->zero_bytes + block * bits / 8;
        if (bits == 8 || block % 2 == 0)
            *at = zero;
        else
            *at |= (uint8_t)(zero << 4);
    }
    return overflow;
}

int cierzo_quantize_rows(const void *values, int type, int64_t rows, int64_t columns, int bits, int block,
                         int zero_points, int half_scales, int search, uint8_t *packed, void *scale, uint8_t *zero) {
    int known = (bits == 4 || bits == 8) && block >= 16 && block <= LONGEST_BLOCK && (block & (block - 1)) == 0;
    if (!known || type < FROM_FLOAT || type > FROM_HALF || rows < 0 || columns < 1) return -1;
    int64_t blocks = (columns + block - 1) / block;
    Rows all = {
        .job = {bits, block, zero_points, half_scales, search, (QuantizerInput)type},
        .values = values, .rows = rows, .columns = columns, .blocks = blocks, .zero_bytes = (blocks * bits + 7) / 8,
        .packed = packed, .zero = zero, .scale = scale,
    };
    Isa level = isa_level();
    QuantizeGroup quantize = level == ISA_AVX512 ? quantize_group_avx512
                             : level == ISA_AVX2 ? quantize_group_avx2
                                                 : quantize_group_portable;
    int lanes = level == ISA_AVX512 ? 16 : level == ISA_AVX2 ? 8 : 1, answer = 0;
    QuantizerGroup group;
    for (int64_t first = 0; first < rows * blocks; first += lanes) {
        int64_t rest = rows * blocks - first;
        find_blocks(&all, first, rest < lanes ? (int)rest : lanes, &group);
        int fault = quantize(&all.job, &group);
        if (fault != 0) return answer | fault;
        answer |= store_blocks(&all, first, lanes, &group);
    }
    return answer;
}
