/* Rounds rows of weights to blocks of 4-bit or 8-bit numbers, in the layout of quantized_matmul.h.
 *
 * value = scale * (q - zero). A block of `block` weights has one scale, rounded to its stored type before the numbers
 * are chosen for it. Two methods:
 *
 *   nearest  the scale that maps the weight of largest magnitude to the far end of the range (-8, -128; hence a scale may
 *            be negative), or with zero points the block's range, 0 included, to all of it.
 *   search   the scale, and zero point, of least squared error among: that of each candidate range, after the scale was
 *            fitted by least squares to the numbers that this range gives; the best is fitted again twice. Never worse
 *            than nearest, block by block.
 *
 * Every instruction level computes one block in a lane and adds in the order of the elements, with one rounding an
 * operation, so that all levels, and exporter/quantize/blocks.py, give the same bits. The files that include
 * quantizer_blocks.h must therefore not let the compiler contract a product and a sum.
 */
#ifndef CIERZO_QUANTIZER_H
#define CIERZO_QUANTIZER_H

#include <stdint.h>

enum { LONGEST_BLOCK = 256, MOST_LANES = 16 };

typedef enum { FROM_FLOAT = 0, FROM_BFLOAT16 = 1, FROM_HALF = 2 } QuantizerInput;

/* What stands above zero in the answer of cierzo_quantize_rows. */
enum { QUANTIZER_NOT_FINITE = 1, QUANTIZER_SCALE_OVERFLOW = 2 };

typedef struct Quantizer {
    int bits, block;
    int zero_points, half_scales, search;
    QuantizerInput type;
} Quantizer;

/* One group of blocks, one a lane, on its way through a level's function; the second index is the lane.
 *
 * count, from: elements of each lane's block that exist, and where they lie. The others are zero.
 * scale: rounded to its stored type. words: the packed numbers, 32 bits at a time, the first lowest.
 */
typedef struct QuantizerGroup {
    int lanes;
    const void *from[MOST_LANES];
    int count[MOST_LANES];
    float x[LONGEST_BLOCK * MOST_LANES];
    float scale[MOST_LANES];
    int32_t zero[MOST_LANES];
    uint32_t words[LONGEST_BLOCK / 4 * MOST_LANES];
} QuantizerGroup;

/* Fills in scale, zero and words; QUANTIZER_NOT_FINITE where a weight is infinite or not a number, else 0. */
int quantize_group_portable(const Quantizer *, QuantizerGroup *);
int quantize_group_avx2(const Quantizer *, QuantizerGroup *);
int quantize_group_avx512(const Quantizer *, QuantizerGroup *);

/* float32 to float16, to nearest, ties to even, and back. */
uint16_t half_of_float(float);
float float_of_half(uint16_t);

#endif
