#include "shared_scratch.h"

#include <stdatomic.h>

enum { MOST_BLOCKS = 64 }; /* calls at once; further ones wait for a block to be given back */

static struct Block {
    Scratch scratch;
    atomic_flag taken;
} blocks[MOST_BLOCKS];
static atomic_int users;

Scratch *borrow(size_t bytes) {
    for (;;)
        for (int i = 0; i < MOST_BLOCKS; i++) {
            if (atomic_flag_test_and_set_explicit(&blocks[i].taken, memory_order_acquire)) continue;
            if (scratch(&blocks[i].scratch, bytes) != NULL) return &blocks[i].scratch;
            atomic_flag_clear_explicit(&blocks[i].taken, memory_order_release);
            return NULL;
        }
}

void give_back(Scratch *borrowed) {
    struct Block *block = (struct Block *)(void *)borrowed; /* its first member */
    atomic_flag_clear_explicit(&block->taken, memory_order_release);
}

void scratch_users(int more) {
    if (atomic_fetch_add(&users, more) + more > 0) return;
    for (int i = 0; i < MOST_BLOCKS; i++) {
        if (atomic_flag_test_and_set_explicit(&blocks[i].taken, memory_order_acquire)) continue;
        release_scratch(&blocks[i].scratch);
        atomic_flag_clear_explicit(&blocks[i].taken, memory_order_release);
    }
}
