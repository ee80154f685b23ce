#include "shared_scratch.h"

#include <stdatomic.h>

#include <stdlib.h>

enum { MOST_BLOCKS = 64 };

static struct Block {
    Scratch scratch;
    atomic_flag taken;
} blocks[MOST_BLOCKS];
static atomic_int users;

/* For more calls at once than there are blocks. Waiting for a block could be for ever: a call may hold one already and
 * be waited for by the others, and in a forked process those that were taken in the parent stay so. */
static Scratch *extra_block(size_t bytes) {
    Scratch *extra = calloc(1, sizeof *extra);
    if (extra == NULL || scratch(extra, bytes) != NULL) return extra;
    free(extra);
    return NULL;
}

Scratch *borrow(size_t bytes) {
    for (int i = 0; i < MOST_BLOCKS; i++) {
        if (atomic_flag_test_and_set_explicit(&blocks[i].taken, memory_order_acquire)) continue;
        if (scratch(&blocks[i].scratch, bytes) != NULL) return &blocks[i].scratch;
        atomic_flag_clear_explicit(&blocks[i].taken, memory_order_release);
        return NULL;
    }
    return extra_block(bytes);
}

void give_back(Scratch *borrowed) {
    for (int i = 0; i < MOST_BLOCKS; i++)
        if (borrowed == &blocks[i].scratch) {
            atomic_flag_clear_explicit(&blocks[i].taken, memory_order_release);
            return;
        }
    release_scratch(borrowed);
    free(borrowed);
}

void scratch_users(int more) {
    if (atomic_fetch_add(&users, more) + more > 0) return;
    for (int i = 0; i < MOST_BLOCKS; i++) {
        if (atomic_flag_test_and_set_explicit(&blocks[i].taken, memory_order_acquire)) continue;
        release_scratch(&blocks[i].scratch);
        atomic_flag_clear_explicit(&blocks[i].taken, memory_order_release);
    }
}

void leave_scratch(void *state) {
    (void)state;
    scratch_users(-1);
}
