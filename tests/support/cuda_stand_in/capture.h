// Streams and their capture into graphs. Work on a stream runs at once, as if the GPU were infinitely fast; during a
// capture it goes into the graph and runs with each launch of that.
#pragma once

#include <functional>

#include "declarations.h"

bool capture_is_on();

// Whether work on the stream goes into the graph that is being captured.
bool is_captured(Stream stream);

// Does the work or captures it. call: for the journal. Refuses work on the legacy stream during a capture.
Error enqueue(const char* call, Stream stream, std::function<void()> work);

// The error of a call that waits for the GPU, or that may do so, while a capture forbids it; spoils the capture.
Error refuse_during_capture(const char* call);
