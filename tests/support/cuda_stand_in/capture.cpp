#include "capture.h"

#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "journal.h"

namespace {
using Graph = std::vector<std::function<void()>>;

struct StreamState {
    bool blocking;  // waits for the legacy stream and makes that wait
};

struct Capture {
    bool on = false;
    bool spoilt = false;
    Stream origin = nullptr;
    int mode = CAPTURE_GLOBAL;
    std::set<Stream> streams;  // the origin, and those that waited for an event of one
    std::set<Event> events;
    Graph graph;
};

Capture capture;
std::recursive_mutex guard;

#define LOCKED const std::lock_guard<std::recursive_mutex> locked(guard)
}  // namespace

bool capture_is_on() {
    LOCKED;
    return capture.on;
}

bool is_captured(Stream stream) {
    LOCKED;
    return capture.on && capture.streams.count(stream);
}

Error enqueue(const char* call, Stream stream, std::function<void()> work) {
    {
        LOCKED;
        if (is_captured(stream)) {
            if (capture.spoilt) return refuse(call, CAPTURE_INVALIDATED);
            capture.graph.push_back(std::move(work));
            return SUCCESS;
        }
        if (capture.on && !stream && static_cast<StreamState*>(capture.origin)->blocking) {
            capture.spoilt = true;
            return refuse((std::string(call) + " on the legacy stream during capture").c_str(), CAPTURE_IMPLICIT);
        }
        // Allowed by CUDA, but the graph will lack it.
        if (capture.on) write_down("violation", (std::string(call) + " on a stream outside the capture").c_str());
    }
    work();
    return SUCCESS;
}

Error refuse_during_capture(const char* call) {
    LOCKED;
    if (!capture.on || capture.mode == CAPTURE_RELAXED) return SUCCESS;
    capture.spoilt = true;
    return refuse((std::string(call) + " during capture").c_str(), CAPTURE_UNSUPPORTED);
}

CUDA_API Error cudaStreamCreateWithFlags(Stream* stream, unsigned flags) {
    *stream = new StreamState{!(flags & 1)};
    return SUCCESS;
}

CUDA_API Error cudaStreamCreate(Stream* stream) { return cudaStreamCreateWithFlags(stream, 0); }

CUDA_API Error cudaStreamDestroy(Stream stream) {
    delete static_cast<StreamState*>(stream);
    return SUCCESS;
}

CUDA_API Error cudaStreamSynchronize(Stream stream) {
    LOCKED;
    write_down("sync", "cudaStreamSynchronize");
    // Waiting for a captured stream is an error in every mode; for another one it is none.
    if (is_captured(stream)) {
        capture.spoilt = true;
        return refuse("cudaStreamSynchronize during capture", CAPTURE_UNSUPPORTED);
    }
    return SUCCESS;
}

CUDA_API Error cudaDeviceSynchronize() {
    write_down("sync", "cudaDeviceSynchronize");
    return refuse_during_capture("cudaDeviceSynchronize");
}

CUDA_API Error cudaStreamBeginCapture(Stream stream, CaptureMode mode) {
    LOCKED;
    if (capture.on || !stream) return refuse("cudaStreamBeginCapture", CAPTURE_UNSUPPORTED);
    capture = Capture{};
    capture.on = true;
    capture.origin = stream;
    capture.mode = mode;
    capture.streams.insert(stream);
    write_down("capture", "begin");
    return SUCCESS;
}

CUDA_API Error cudaStreamEndCapture(Stream stream, void** graph) {
    LOCKED;
    if (!capture.on || capture.origin != stream) return refuse("cudaStreamEndCapture", CAPTURE_UNMATCHED);
    capture.on = false;
    *graph = nullptr;
    if (capture.spoilt) {
        write_down("capture", "spoilt");
        return refuse("cudaStreamEndCapture of a spoilt capture", CAPTURE_INVALIDATED);
    }
    write_down("capture", "end");
    *graph = new Graph(std::move(capture.graph));
    return SUCCESS;
}

CUDA_API Error cudaStreamIsCapturing(Stream stream, int* status) {
    LOCKED;
    *status = is_captured(stream) ? (capture.spoilt ? 2 : 1) : 0;
    return SUCCESS;
}

CUDA_API Error cudaGraphInstantiate(void** executable, void* graph, unsigned long long) {
    *executable = new Graph(*static_cast<Graph*>(graph));
    return SUCCESS;
}

CUDA_API Error cudaGraphLaunch(void* executable, Stream) {
    write_down("graph", "launch");
    for (const auto& work : *static_cast<Graph*>(executable)) work();
    return SUCCESS;
}

CUDA_API Error cudaGraphDestroy(void* graph) {
    delete static_cast<Graph*>(graph);
    return SUCCESS;
}

CUDA_API Error cudaGraphExecDestroy(void* executable) { return cudaGraphDestroy(executable); }

CUDA_API Error cudaLaunchHostFunc(Stream stream, void (*function)(void*), void* argument) {
    return enqueue("cudaLaunchHostFunc", stream, [=] { function(argument); });
}

// Events: work runs at once, so that every event has happened. They carry a capture from one stream to another.

CUDA_API Error cudaEventCreateWithFlags(Event* event, unsigned) {
    *event = new char;
    return SUCCESS;
}

CUDA_API Error cudaEventCreate(Event* event) { return cudaEventCreateWithFlags(event, 0); }

CUDA_API Error cudaEventDestroy(Event event) {
    LOCKED;
    capture.events.erase(event);
    delete static_cast<char*>(event);
    return SUCCESS;
}

CUDA_API Error cudaEventRecord(Event event, Stream stream) {
    LOCKED;
    if (is_captured(stream)) capture.events.insert(event);
    return SUCCESS;
}

CUDA_API Error cudaEventRecordWithFlags(Event event, Stream stream, unsigned) { return cudaEventRecord(event, stream); }

CUDA_API Error cudaStreamWaitEvent(Stream stream, Event event, unsigned) {
    LOCKED;
    if (capture.on && capture.events.count(event)) capture.streams.insert(stream);
    return SUCCESS;
}

CUDA_API Error cudaEventSynchronize(Event event) {
    LOCKED;
    write_down("sync", "cudaEventSynchronize");
    if (capture.on && capture.events.count(event)) {
        capture.spoilt = true;
        return refuse("cudaEventSynchronize during capture", CAPTURE_UNSUPPORTED);
    }
    return SUCCESS;
}

CUDA_API Error cudaEventElapsedTime(float* milliseconds, Event, Event) {
    *milliseconds = 1;
    return SUCCESS;
}
