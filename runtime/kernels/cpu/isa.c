#include "isa.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

static const char *const NAMES[] = {"portable", "neon", "avx2", "avx512"};

const char *isa_name(Isa level) { return NAMES[level]; }

static Isa best_level(void) {
#if defined(CIERZO_X86)
    __builtin_cpu_init();
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    int avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                 __builtin_cpu_supports("avx512vnni");
    if (avx2 && avx512) return ISA_AVX512;
    return avx2 ? ISA_AVX2 : ISA_PORTABLE;
#elif defined(CIERZO_ARM)
    return ISA_NEON;
#else
    return ISA_PORTABLE;
#endif
}

static Isa chosen_level(void) {
    Isa level = best_level();
    const char *wanted = getenv("CIERZO_KERNELS");
    for (int lower = ISA_PORTABLE; wanted != NULL && lower < (int)level; lower++) {
        int there = lower != ISA_NEON; /* no machine with something better has NEON */
        if (there && strcmp(wanted, NAMES[lower]) == 0) return (Isa)lower;
    }
    return level;
}

Isa isa_level(void) {
    static atomic_int known = -1; /* two threads that find it out at once find the same */
    int level = atomic_load_explicit(&known, memory_order_relaxed);
    if (level < 0) {
        level = (int)chosen_level();
        atomic_store_explicit(&known, level, memory_order_relaxed);
    }
    return (Isa)level;
}
