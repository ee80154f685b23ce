// The GPU that is stood in for: the environment's CIERZO_CUDA_CAPABILITY names it, "none" for a machine without one.
#pragma once

#include "declarations.h"

struct Device {
    const char* capability;
    const char* name;
    uint64_t memory_bytes;
    int multiprocessors;
    int multiprocessor_threads;
    int multiprocessor_shared_bytes;
    int optin_shared_bytes;  // the most that a block can have, if it asks
    int l2_bytes;
    int memory_bus_bits;
};

// 9.0 if the environment does not say. Ends the process for a capability that is not in the table.
const Device& device();
