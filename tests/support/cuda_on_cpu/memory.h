// Global and shared memory: the same address space here, so what a GPU would fault on is checked.
#pragma once

struct alignas(16) Vector16 { u32 word[4]; };

namespace on_cpu {

inline bool is_shared(const void* p) {
    const u8* const byte = static_cast<const u8*>(p);
    return byte >= block.shared && byte < block.shared + block.shared_bytes;
}

inline void need_global(const char* what, const void* p, Site site) {
    note(what, site);
    if (reinterpret_cast<uintptr_t>(p) % 16) fail("%p is not aligned to 16 bytes", p);
    const i64 offset = static_cast<const u8*>(p) - block.shared;
    if (is_shared(p)) fail("byte %lld of shared memory where global memory belongs", offset);
}

inline void need_shared(const char* what, const void* p, Site site) {
    note(what, site);
    const i64 offset = static_cast<const u8*>(p) - block.shared;
    if (reinterpret_cast<uintptr_t>(p) % 16) fail("byte %lld of shared memory is not aligned to 16 bytes", offset);
    if (!is_shared(p) || offset + 16 > i64(block.shared_bytes))
        fail("byte %lld is outside the %llu bytes of shared memory", offset, block.shared_bytes);
}

}  // namespace on_cpu

#define CIERZO_SHARED(name) u8* const name = on_cpu::block.shared

inline Vector16 load_16(const void* from, ON_CPU_SITE) {
    on_cpu::need_global("load_16", from, site);
    return *static_cast<const Vector16*>(from);
}
inline Vector16 load_16_once(const void* from, ON_CPU_SITE) {
    on_cpu::need_global("load_16_once", from, site);
    return *static_cast<const Vector16*>(from);
}
inline void store_16(void* to, Vector16 v, ON_CPU_SITE) {
    on_cpu::need_global("store_16", to, site);
    *static_cast<Vector16*>(to) = v;
}
inline u32 shared_address(const void* p) { return u32(static_cast<const u8*>(p) - on_cpu::block.shared); }

// A copy lands when its thread waits for it, as late as a GPU may; until then what it overwrites is poison.
inline void copy_async_16(void* to_shared, const void* from_global, bool valid, ON_CPU_SITE) {
    using namespace on_cpu;
    need_shared("copy_async_16", to_shared, site);
    if (valid) need_global("copy_async_16", from_global, site);
    if (reinterpret_cast<uintptr_t>(from_global) % 16) fail("%p is not aligned to 16 bytes", from_global);
    Thread& thread = block.threads[block.running];
    if (thread.first_copy == thread.last_copy) thread.first_copy = thread.last_copy = 0;
    if (thread.last_copy == thread.copy_room) {
        thread.copy_room = thread.copy_room ? 2 * thread.copy_room : 64;
        thread.copies = static_cast<Copy*>(realloc(thread.copies, thread.copy_room * sizeof(Copy)));
    }
    for (u32 i = thread.first_copy; i < thread.last_copy; i++)
        if (thread.copies[i].to == to_shared) fail("a copy to the same bytes is under way: either may land last");
    memset(to_shared, 0xff, 16);
    thread.copies[thread.last_copy++] = {static_cast<u8*>(to_shared), static_cast<const u8*>(from_global), valid,
                                         thread.committed};
}
inline void copy_async_commit() { on_cpu::block.threads[on_cpu::block.running].committed++; }
template <int pending> inline void copy_async_wait(ON_CPU_SITE) {
    using namespace on_cpu;
    static_assert(pending >= 0, "a number of groups");
    note("copy_async_wait", site);
    Thread& thread = block.threads[block.running];
    for (; thread.first_copy < thread.last_copy; thread.first_copy++) {
        const Copy& copy = thread.copies[thread.first_copy];
        if (i64(copy.group) >= i64(thread.committed) - pending) break;
        if (copy.valid) memcpy(copy.to, copy.from, 16); else memset(copy.to, 0, 16);
    }
}

inline u32 atomic_add(u32* where, u32 x) {  // blocks run one after the other, and a thread until it waits
    const u32 before = *where;
    *where += x;
    return before;
}
inline u64 compare_and_swap(u64* where, u64 from, u64 to) {
    const u64 before = *where;
    if (before == from) *where = to;
    return before;
}
inline void memory_fence() {}
