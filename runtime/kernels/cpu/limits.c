/* The rate of 8-bit products in registers: the limit that `cierzo bench` compares quantised products with.
 *
 * Sums of products of unsigned and signed bytes, in the instructions that the kernels of each level use. The operands
 * are hidden from the compiler, so that it can neither leave work out nor do it ahead of time.
 */
#include "isa.h"
#include "library.h"
#include "unroll.h"

enum { CHAINS = 12 }; /* independent sums: more than latency times units of any processor of these levels */

#if defined(CIERZO_X86)
#include <immintrin.h>

CIERZO_BEGIN_AVX512
static uint64_t int8_avx512(uint64_t rounds) {
    __m512i sum[CHAINS], a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(5);
    UNROLL
    for (int i = 0; i < CHAINS; i++) sum[i] = _mm512_setzero_si512();
    for (uint64_t round = 0; round < rounds; round++)
        UNROLL
        for (int i = 0; i < CHAINS; i++) {
            sum[i] = _mm512_dpbusd_epi32(sum[i], a, b);
            __asm__ volatile("" : "+v"(sum[i]));
        }
    return rounds * CHAINS * 64 * 2;
}
CIERZO_END_ISA

CIERZO_BEGIN_AVX2
static uint64_t int8_avx2(uint64_t rounds) {
    __m256i sum[CHAINS], a = _mm256_set1_epi8(3), b = _mm256_set1_epi8(5), ones = _mm256_set1_epi16(1);
    UNROLL
    for (int i = 0; i < CHAINS; i++) sum[i] = _mm256_setzero_si256();
    for (uint64_t round = 0; round < rounds; round++)
        UNROLL
        for (int i = 0; i < CHAINS; i++) {
            __m256i pairs = _mm256_maddubs_epi16(a, b);
            __asm__ volatile("" : "+x"(pairs));
            sum[i] = _mm256_add_epi32(sum[i], _mm256_madd_epi16(pairs, ones));
            __asm__ volatile("" : "+x"(sum[i]));
        }
    return rounds * CHAINS * 32 * 2;
}
CIERZO_END_ISA
#endif

uint64_t cierzo_int8_operations(uint64_t rounds) {
#if defined(CIERZO_X86)
    if (isa_level() == ISA_AVX512) return int8_avx512(rounds);
    if (isa_level() == ISA_AVX2) return int8_avx2(rounds);
#endif
    (void)rounds;
    return 0;
}
