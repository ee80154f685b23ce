// The threads of one block: who runs next, where warps and the block meet, and what is wrong with how they do.
//
// A thread runs until it has to wait for others. Then a seeded choice takes the next: mostly of the same warp, so that
// one warp gets as far ahead as barriers let it, in another order between any two barriers. A barrier that is missing
// then shows in the numbers. What CUDA leaves undefined is refused: lanes that meet at different operations, a thread
// that left before the others' barrier.
#pragma once

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include "fibers.h"

namespace on_cpu {

struct Site { const char* file; int line; };
// As a default argument it is the line of the call.
#define ON_CPU_SITE on_cpu::Site site = {__builtin_FILE(), __builtin_LINE()}

struct Copy { u8* to; const u8* from; bool valid; u32 group; };

enum class Waits { nothing, warp, block, left };

struct Thread {
    void* stack_pointer;  // while it does not run
    Waits waits;
    const char* what;     // the last operation, and where
    Site site;
    Copy* copies;         // those issued and not landed yet are [first, last)
    u32 first_copy, last_copy, copy_room, committed;
};

struct Warp {
    u32 runnable;  // one bit per lane
    u32 arrived;
    const char* what;
    Site site;
    void* operands[32];
};

struct Block {
    Thread threads[1024];
    Warp warps[32];
    u32 thread_count, running, at_barrier, left;
    u32 runnable_warps;  // one bit per warp
    Site barrier;
    u32 hurry;           // a warp is left after about this many picks even if it could go on; 0: never
    u64 random;
    u32 index[3], grid[3];
    u8* shared;
    u64 shared_bytes;
    Stacks stacks;
    void* outside;       // the stack pointer of whoever launched
    void (*body)(const void*);
    const void* params;
    const char* kernel;
    char* error;
    u64 error_bytes;
};
static Block block;

inline u32 draw() {  // xorshift64*
    block.random ^= block.random >> 12;
    block.random ^= block.random << 25;
    block.random ^= block.random >> 27;
    return u32((block.random * 0x2545f4914f6cdd1dull) >> 32);
}

inline u32 draw_bit(u32 mask) {
    const u32 by = draw() & 31;
    const u32 turned = by ? (mask >> by) | (mask << (32 - by)) : mask;
    return (u32(__builtin_ctz(turned)) + by) & 31;
}

inline const char* base_name(const char* path) {
    const char* const slash = path ? strrchr(path, '/') : nullptr;
    return slash ? slash + 1 : path ? path : "?";
}

inline void leave_for(void* where, void** keep) {
    cierzo_switch_fiber(keep, where);
    asm volatile("" : : "r"(&block) : "memory");  // others ran meanwhile
}

// Ends the launch with a message that names kernel, block and thread; the fibers are abandoned where they are.
[[noreturn]] inline void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
inline void fail(const char* format, ...) {
    const Thread& thread = block.threads[block.running];
    int used = snprintf(block.error, block.error_bytes, "%s, block (%u, %u, %u), thread %u, ", block.kernel,
                        block.index[0], block.index[1], block.index[2], block.running);
    if (thread.what && used >= 0 && u64(used) < block.error_bytes)
        used += snprintf(block.error + used, block.error_bytes - u64(used), "last at %s in %s:%d: ", thread.what,
                         base_name(thread.site.file), thread.site.line);
    if (used >= 0 && u64(used) < block.error_bytes) {
        va_list arguments;
        va_start(arguments, format);
        vsnprintf(block.error + used, block.error_bytes - u64(used), format, arguments);
        va_end(arguments);
    }
    void* abandoned;
    cierzo_switch_fiber(&abandoned, block.outside);
    __builtin_unreachable();
}

[[noreturn]] inline void fail_stuck() {
    for (u32 t = 0; t < block.thread_count; t++) {
        const Thread& thread = block.threads[t];
        if (thread.waits != Waits::warp) continue;
        const u32 arrived = block.warps[t / 32].arrived;
        block.running = t;
        fail("waits for the other lanes for ever (%d of 32 are there): not all lanes of warp %u take part",
             __builtin_popcount(arrived), t / 32);
    }
    for (u32 t = 0; t < block.thread_count; t++) {
        if (block.threads[t].waits != Waits::block) continue;
        block.running = t;
        fail("waits at block_sync for ever: %u of %u threads are there, %u have left", block.at_barrier,
             block.thread_count, block.left);
    }
    fail("no thread can run");
}

// Gives the processor to the next thread, or back to the launch when all have left.
inline void run_another() {
    void** const keep = &block.threads[block.running].stack_pointer;
    if (!block.runnable_warps) {
        if (block.left != block.thread_count) fail_stuck();
        leave_for(block.outside, keep);
        return;
    }
    u32 warp = block.running / 32;
    const bool stay = block.warps[warp].runnable && !(block.hurry && draw() % block.hurry == 0);
    if (!stay) warp = draw_bit(block.runnable_warps);
    const u32 lane = draw_bit(block.warps[warp].runnable);
    const u32 next = warp * 32 + lane;
    if (next == block.running) return;
    block.running = next;
    leave_for(block.threads[next].stack_pointer, keep);
}

inline void stop(Waits why) {
    Warp& warp = block.warps[block.running / 32];
    block.threads[block.running].waits = why;
    warp.runnable &= ~(1u << (block.running & 31));
    if (!warp.runnable) block.runnable_warps &= ~(1u << (block.running / 32));
}

inline void wake_warp(u32 which) {
    for (u32 lane = 0; lane < 32; lane++) block.threads[which * 32 + lane].waits = Waits::nothing;
    block.warps[which].runnable = ~0u;
    block.runnable_warps |= 1u << which;
}

inline void note(const char* what, Site site) {
    block.threads[block.running].what = what;
    block.threads[block.running].site = site;
}

// All 32 lanes meet; the last to come computes for all, as `together` says, from what each lane handed over.
inline void meet_warp(const char* what, Site site, void* operands, void (*together)(void* const (&operands)[32])) {
    const u32 which = block.running / 32;
    Warp& warp = block.warps[which];
    note(what, site);
    if (warp.arrived && (warp.what != what || warp.site.line != site.line || warp.site.file != site.file))
        fail("other lanes of the warp are at %s in %s:%d: the warp has diverged", warp.what,
             base_name(warp.site.file), warp.site.line);
    warp.what = what;
    warp.site = site;
    warp.operands[block.running & 31] = operands;
    warp.arrived |= 1u << (block.running & 31);
    stop(Waits::warp);
    if (warp.arrived == ~0u) {
        together(warp.operands);
        warp.arrived = 0;
        wake_warp(which);
    }
    run_another();
}

inline void meet_block(Site site) {
    note("block_sync", site);
    if (block.left) fail("%u threads have left the kernel before this barrier", block.left);
    if (block.at_barrier && (block.barrier.line != site.line || block.barrier.file != site.file))
        fail("other threads of the block are at the barrier in %s:%d", base_name(block.barrier.file),
             block.barrier.line);
    block.barrier = site;
    stop(Waits::block);
    if (++block.at_barrier == block.thread_count) {
        block.at_barrier = 0;
        for (u32 which = 0; which < block.thread_count / 32; which++) wake_warp(which);
    }
    run_another();
}

[[noreturn]] inline void run_thread() {
    block.body(block.params);
    if (block.at_barrier) {
        fail("leaves the kernel while others wait at block_sync in %s:%d", base_name(block.barrier.file),
             block.barrier.line);
    }
    stop(Waits::left);
    block.left++;
    run_another();
    __builtin_unreachable();
}

// Runs the block that `index` names from its first instruction to its last.
inline void run_block() {
    for (u32 t = 0; t < block.thread_count; t++) {
        Thread& thread = block.threads[t];
        thread.stack_pointer = block.stacks.start(t, run_thread);
        thread.waits = Waits::nothing;
        thread.what = nullptr;
        thread.first_copy = thread.last_copy = thread.committed = 0;
    }
    block.runnable_warps = 0;
    for (u32 which = 0; which < block.thread_count / 32; which++) {
        block.warps[which].arrived = 0;
        wake_warp(which);
    }
    block.at_barrier = block.left = 0;
    block.hurry = draw() & 1 ? 0 : 64;
    block.running = draw() % block.thread_count;
    leave_for(block.threads[block.running].stack_pointer, &block.outside);
}

}  // namespace on_cpu
