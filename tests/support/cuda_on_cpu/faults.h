// Signals of a kernel's own making (bad addresses, what the compiler's checks trap) become the launch's error text.
#pragma once

#include <signal.h>

namespace on_cpu {

inline const void* faulting_instruction(void* context) {
    const ucontext_t* const at = static_cast<const ucontext_t*>(context);
#if defined(__linux__) && defined(__x86_64__)
    return reinterpret_cast<const void*>(at->uc_mcontext.gregs[REG_RIP]);
#elif defined(__linux__) && defined(__aarch64__)
    return reinterpret_cast<const void*>(at->uc_mcontext.pc);
#else
    (void)at;
    return nullptr;
#endif
}

static Guarded shared_mapping;
static const u8* library;  // any address of the library; the loader's base is found from outside

inline void on_fault(int number, siginfo_t* info, void* context) {
    const void* const instruction = faulting_instruction(context);
    const long long offset = instruction ? static_cast<const u8*>(instruction) - library : 0;
    const void* const address = info->si_addr;
    if (number == SIGILL || number == SIGTRAP)
        fail("a check failed: misaligned access, index outside an array, overflow or shift [at %lld]", offset);
    if (number == SIGFPE) fail("division by zero [at %lld]", offset);
    if (shared_mapping.surrounds(address))
        fail("byte %lld is outside the %llu bytes of shared memory [at %lld]",
             i64(static_cast<const u8*>(address) - block.shared), block.shared_bytes, offset);
    if (block.stacks.stacks[block.running].surrounds(address)) fail("its stack overflowed [at %lld]", offset);
    fail("address %p may not be touched [at %lld]", address, offset);
}

// Installs the handlers for as long as it lives; they run on a stack of their own and never return.
class Faults {
    static constexpr int numbers[] = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP, SIGFPE};
    struct sigaction before[5];
    stack_t stack_before;
    void* stack;

public:
    Faults() {
        stack_t own = {};
        own.ss_size = 64 << 10;
        own.ss_sp = stack = malloc(own.ss_size);
        sigaltstack(&own, &stack_before);
        struct sigaction action = {};
        action.sa_sigaction = on_fault;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;  // an abandoned handler leaves no mask
        for (int i = 0; i < 5; i++) sigaction(numbers[i], &action, &before[i]);
    }
    ~Faults() {
        for (int i = 0; i < 5; i++) sigaction(numbers[i], &before[i], nullptr);
        sigaltstack(&stack_before, nullptr);
        free(stack);
    }
    Faults(const Faults&) = delete;
    Faults& operator=(const Faults&) = delete;
};

}  // namespace on_cpu
