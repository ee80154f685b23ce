/* Which instructions this machine has, found out once. */
#ifndef CIERZO_ISA_H
#define CIERZO_ISA_H

/* Each level has everything that the ones before it have, except NEON, which stands for itself.
 *
 * ISA_PORTABLE  plain C
 * ISA_NEON      64-bit Arm
 * ISA_AVX2      with FMA and F16C
 * ISA_AVX512    F, BW, DQ, VL and VNNI
 */
typedef enum { ISA_PORTABLE = 0, ISA_NEON = 1, ISA_AVX2 = 2, ISA_AVX512 = 3 } Isa;

/* The best level of this machine, or the lower one that the environment variable CIERZO_KERNELS names. */
Isa isa_level(void);
const char *isa_name(Isa);

#if defined(__x86_64__)
#define CIERZO_X86 1
#endif
#if defined(__aarch64__)
#define CIERZO_ARM 1
#endif

/* Put after the includes of a file whose functions all need more than the compiler's default. */
#if defined(__clang__)
#define CIERZO_PRAGMA(text) _Pragma(#text)
#define CIERZO_BEGIN_AVX2 CIERZO_PRAGMA(clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function))
#define CIERZO_BEGIN_AVX512                                                                                           \
    CIERZO_PRAGMA(clang attribute push(                                                                               \
        __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c"))), apply_to = function))
#define CIERZO_BEGIN_AVX512_BF16                                                                                      \
    CIERZO_PRAGMA(clang attribute push(                                                                               \
        __attribute__((target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c"))),            \
        apply_to = function))
#define CIERZO_END_ISA CIERZO_PRAGMA(clang attribute pop)
#elif defined(__GNUC__)
#define CIERZO_PRAGMA(text) _Pragma(#text)
#define CIERZO_BEGIN_AVX2 CIERZO_PRAGMA(GCC push_options) CIERZO_PRAGMA(GCC target("avx2,fma,f16c"))
#define CIERZO_BEGIN_AVX512                                                                                           \
    CIERZO_PRAGMA(GCC push_options) CIERZO_PRAGMA(GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c"))
#define CIERZO_BEGIN_AVX512_BF16                                                                                      \
    CIERZO_PRAGMA(GCC push_options)                                                                                   \
    CIERZO_PRAGMA(GCC target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c"))
#define CIERZO_END_ISA CIERZO_PRAGMA(GCC pop_options)
#endif

#endif
