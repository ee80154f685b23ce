// A thread of a block as a fiber: its own stack, and a switch that saves what the calling convention says to save.
//
// swapcontext() would do, but it asks the kernel for the signal mask each time; a warp switches 32 times per shuffle.
#pragma once

#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

// Saves the running fiber's stack pointer in *from, and goes on where `to` was saved.
extern "C" __attribute__((visibility("hidden"))) void cierzo_switch_fiber(void** from, void* to)
    asm("cierzo_switch_fiber");

#if defined(__x86_64__)
asm(R"(
    .text
    .p2align 4
cierzo_switch_fiber:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");
#elif defined(__aarch64__)
asm(R"(
    .text
    .p2align 4
cierzo_switch_fiber:
    sub sp, sp, #160
    stp x19, x20, [sp]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
)");
#else
#error "the stand-in for a GPU switches fibers on x86-64 and 64-bit Arm alone"
#endif

namespace on_cpu {

// Memory between two stretches that may not be touched, so that what leaves it faults at once.
struct Guarded {
    u8* first = nullptr;  // of the part that may be touched
    u64 bytes = 0;
    u8* mapping = nullptr;
    u64 mapped = 0;

    bool map(u64 wanted, u64 guard) {
        const u64 page = u64(sysconf(_SC_PAGESIZE));
        guard = (guard + page - 1) / page * page;
        bytes = (wanted + page - 1) / page * page;
        mapped = bytes + 2 * guard;
        void* const got = mmap(nullptr, mapped, PROT_NONE, MAP_PRIVATE | MAP_ANON, -1, 0);
        if (got == MAP_FAILED) return false;
        mapping = static_cast<u8*>(got);
        first = mapping + guard;
        return bytes == 0 || mprotect(first, bytes, PROT_READ | PROT_WRITE) == 0;
    }
    void unmap() {
        if (mapping) munmap(mapping, mapped);
        *this = Guarded();
    }
    bool surrounds(const void* p) const {
        const u8* const byte = static_cast<const u8*>(p);
        return mapping && byte >= mapping && byte < mapping + mapped;
    }
};

// The stacks of a block's threads, each behind a guard page; kept for the next launch.
struct Stacks {
    static constexpr u64 stack_bytes = 128 << 10;
    Guarded* stacks = nullptr;
    u32 count = 0;

    bool provide(u32 wanted) {
        if (wanted <= count) return true;
        stacks = static_cast<Guarded*>(realloc(static_cast<void*>(stacks), wanted * sizeof(Guarded)));
        for (; count < wanted; count++) {
            stacks[count] = Guarded();
            if (!stacks[count].map(stack_bytes, 1)) return false;
        }
        return true;
    }
    // A stack pointer from which cierzo_switch_fiber starts `entry`, which must never return.
    void* start(u32 which, void (*entry)()) {
        u64* top = reinterpret_cast<u64*>(stacks[which].first + stacks[which].bytes);
#if defined(__x86_64__)
        top -= 2;  // as a call leaves it: a return address 8 bytes off a multiple of 16, once `ret` took entry's
        top[0] = u64(reinterpret_cast<uintptr_t>(entry));
        top[1] = 0;
        top -= 6;
        memset(top, 0, 6 * sizeof(u64));
#else
        top -= 20;
        memset(top, 0, 20 * sizeof(u64));
        top[11] = u64(reinterpret_cast<uintptr_t>(entry));  // x30, where `ret` goes
#endif
        return top;
    }
};

}  // namespace on_cpu
