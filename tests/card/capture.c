/* Captures of graphs: what they forbid, and to whom. No graph is made of what they see. */

#include "driver.h"

#include <stdlib.h>

struct capture {
    uint64_t id;
    int thread; /* that began it */
    CUstreamCaptureMode mode;
    bool spoilt;
    stream *origin;
    stream **streams; /* those that capture: the origin, and who waited for it */
    size_t num_streams;
    capture *next;
};

static capture *captures;
static uint64_t captures_begun;

static _Thread_local CUstreamCaptureMode own_mode = CU_STREAM_CAPTURE_MODE_GLOBAL;

static void free_capture(capture *each) {
    free(each->streams);
    free(each);
}

void captures_reset(void) {
    while (captures) {
        capture *each = captures;
        captures = each->next;
        free_capture(each);
    }
}

bool is_capturing(const stream *which) { return which->captured_by != NULL; }

uint64_t capture_id(const stream *which) {
    return which->captured_by ? which->captured_by->id : 0;
}

static CUresult spoil(capture *which, CUresult error, const char *why) {
    which->spoilt = true;
    return complain(error, "%s; the capture that thread %d began is void", why, which->thread);
}

static bool forbids(const capture *each) {
    bool mine = each->thread == current_thread();
    switch (own_mode) {
    case CU_STREAM_CAPTURE_MODE_GLOBAL:
        return mine ? each->mode != CU_STREAM_CAPTURE_MODE_RELAXED
                    : each->mode == CU_STREAM_CAPTURE_MODE_GLOBAL;
    case CU_STREAM_CAPTURE_MODE_THREAD_LOCAL:
        return mine && each->mode != CU_STREAM_CAPTURE_MODE_RELAXED;
    default:
        return false;
    }
}

CUresult refused_by_capture(void) {
    for (capture *each = captures; each; each = each->next)
        if (forbids(each))
            return spoil(each, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,
                         "not permitted while a graph is captured");
    return CUDA_SUCCESS;
}

/* The legacy stream stands for every blocking stream of its context. */
static capture *implicit_capture(const stream *on) {
    if (on != on->of->legacy)
        return NULL;
    for (capture *each = captures; each; each = each->next)
        for (size_t i = 0; i < each->num_streams; i++)
            if (each->streams[i]->of == on->of &&
                !(each->streams[i]->flags & CU_STREAM_NON_BLOCKING))
                return each;
    return NULL;
}

CUresult refused_while_capturing(const stream *which) {
    if (which->captured_by)
        return spoil(which->captured_by, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,
                     "the stream captures a graph");
    capture *implicit = implicit_capture(which);
    if (implicit)
        return spoil(implicit, CUDA_ERROR_STREAM_CAPTURE_IMPLICIT,
                     "the legacy stream waits for a stream that captures");
    return refused_by_capture();
}

CUresult check_queueing(const stream *on) {
    if (on->captured_by && on->captured_by->spoilt)
        return complain(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, "the capture is void");
    capture *implicit = implicit_capture(on);
    if (implicit)
        return spoil(implicit, CUDA_ERROR_STREAM_CAPTURE_IMPLICIT,
                     "the legacy stream waits for a stream that captures");
    return CUDA_SUCCESS;
}

static void add_to_capture(capture *to, stream *which) {
    to->streams = realloc(to->streams, (to->num_streams + 1) * sizeof *to->streams);
    if (!to->streams)
        abort();
    to->streams[to->num_streams++] = which;
    which->captured_by = to;
}

CUresult join_capture(stream *which, uint64_t id) {
    if (which->captured_by && which->captured_by->id == id)
        return check_queueing(which);
    for (capture *each = captures; each; each = each->next) {
        if (each->id != id)
            continue;
        if (which->captured_by)
            return spoil(which->captured_by, CUDA_ERROR_STREAM_CAPTURE_MERGE,
                         "an event of another capture");
        add_to_capture(each, which);
        return check_queueing(which);
    }
    return complain(CUDA_ERROR_CAPTURED_EVENT, "the event was recorded in a capture that is over");
}

CUresult refuse_isolated(stream *which) {
    return spoil(which->captured_by, CUDA_ERROR_STREAM_CAPTURE_ISOLATION,
                 "the event was recorded outside of the capture");
}

/* -- entry points -- */

ENTRY(NEEDS_CONTEXT, cuStreamBeginCapture_v2, handle, (CUstream handle, CUstreamCaptureMode mode),
      (handle, mode)) {
    stream *which;
    CUresult error = find_stream(handle, false, &which);
    if (error)
        return error;
    if (which == which->of->legacy)
        return complain(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "the legacy stream can't capture");
    if (which->captured_by)
        return complain(CUDA_ERROR_ILLEGAL_STATE, "the stream captures already");
    capture *made = zeroed(sizeof *made);
    *made = (capture){.id = ++captures_begun,
                      .thread = current_thread(),
                      .mode = mode,
                      .origin = which,
                      .next = captures};
    captures = made;
    add_to_capture(made, which);
    return CUDA_SUCCESS;
}

/* The graph is a handle, and no more. */
ENTRY(NEEDS_CONTEXT, cuStreamEndCapture, handle, (CUstream handle, CUgraph *graph),
      (handle, graph)) {
    stream *which;
    CUresult error = find_stream(handle, false, &which);
    if (error)
        return error;
    capture *over = which->captured_by;
    if (!over)
        return complain(CUDA_ERROR_ILLEGAL_STATE, "the stream does not capture");
    if (over->origin != which)
        return spoil(over, CUDA_ERROR_STREAM_CAPTURE_UNMATCHED,
                     "the capture was begun on another stream");
    if (over->thread != current_thread() && over->mode != CU_STREAM_CAPTURE_MODE_RELAXED)
        return spoil(over, CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD, "another thread began it");
    bool spoilt = over->spoilt;
    *graph = spoilt ? NULL : (CUgraph)(uintptr_t)over->id;
    for (size_t i = 0; i < over->num_streams; i++)
        over->streams[i]->captured_by = NULL;
    capture **link = &captures;
    while (*link != over)
        link = &(*link)->next;
    *link = over->next;
    free_capture(over);
    return spoilt ? complain(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, "the capture was void")
                  : CUDA_SUCCESS;
}

ENTRY(NEEDS_INIT, cuGraphDestroy, 0, (CUgraph graph), (graph)) {
    (void)graph;
    return CUDA_SUCCESS;
}

static CUstreamCaptureStatus status_of(const stream *which) {
    if (!which->captured_by)
        return CU_STREAM_CAPTURE_STATUS_NONE;
    return which->captured_by->spoilt ? CU_STREAM_CAPTURE_STATUS_INVALIDATED
                                      : CU_STREAM_CAPTURE_STATUS_ACTIVE;
}

static CUresult get_status(CUstream handle, CUstreamCaptureStatus *status, cuuint64_t *id) {
    stream *which;
    CUresult error = find_stream(handle, false, &which);
    if (error)
        return error;
    if (implicit_capture(which))
        return complain(CUDA_ERROR_STREAM_CAPTURE_IMPLICIT,
                        "a blocking stream captures: what the legacy stream does is unknown");
    *status = status_of(which);
    if (id)
        *id = capture_id(which);
    return CUDA_SUCCESS;
}

ENTRY(NEEDS_CONTEXT, cuStreamIsCapturing, handle, (CUstream handle, CUstreamCaptureStatus *status),
      (handle, status)) {
    return get_status(handle, status, NULL);
}

ENTRY(NEEDS_CONTEXT, cuStreamGetCaptureInfo_v2, handle,
      (CUstream handle, CUstreamCaptureStatus *status, cuuint64_t *id, CUgraph *graph,
       const CUgraphNode **dependencies, size_t *count),
      (handle, status, id, graph, dependencies, count)) {
    if (graph)
        *graph = NULL;
    if (dependencies)
        *dependencies = NULL;
    if (count)
        *count = 0;
    return get_status(handle, status, id);
}

ENTRY(NEEDS_CONTEXT, cuStreamGetCaptureInfo_v3, handle,
      (CUstream handle, CUstreamCaptureStatus *status, cuuint64_t *id, CUgraph *graph,
       const CUgraphNode **dependencies, const CUgraphEdgeData **edges, size_t *count),
      (handle, status, id, graph, dependencies, edges, count)) {
    if (graph)
        *graph = NULL;
    if (dependencies)
        *dependencies = NULL;
    if (edges)
        *edges = NULL;
    if (count)
        *count = 0;
    return get_status(handle, status, id);
}

ENTRY(NEEDS_INIT, cuThreadExchangeStreamCaptureMode, 0, (CUstreamCaptureMode *mode), (mode)) {
    CUstreamCaptureMode before = own_mode;
    own_mode = *mode;
    *mode = before;
    return CUDA_SUCCESS;
}
