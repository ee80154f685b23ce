/* Memory for the length of one call, shared by all operators of the process.
 *
 * A model has hundreds of nodes that each need a few megabytes while they run, and one runs at a time: what the nodes
 * kept for themselves would add up to more than the rest of a session. Here each call borrows a block and returns it,
 * so that there are as many blocks as calls at once, each as large as the largest call needed. */
#ifndef CIERZO_SHARED_SCRATCH_H
#define CIERZO_SHARED_SCRATCH_H

#include "op.h"

/* A block of at least `bytes`, aligned to 64; NULL when there is no memory. Give it back with `give_back`. */
Scratch *borrow(size_t bytes);
void give_back(Scratch *);

/* Every kernel that borrows says so when it is made and when it is destroyed: with the last one the memory goes. */
void scratch_users(int more);
void leave_scratch(void *state); /* one user less: `destroy_state` of an Op whose state holds nothing else */

#endif
