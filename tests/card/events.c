/* Events: marks in streams, which other streams and the host wait for. */

#include "driver.h"

#include <stdlib.h>
#include <time.h>

typedef struct event event;

struct event {
    const context *of;
    unsigned flags;
    mark *latest;          /* NULL: never recorded, or in a capture */
    uint64_t recorded_in;  /* the capture that it was recorded in; 0: in none */
    event *next;
};

static event *events;

static void release(mark *which) {
    if (which && --which->users == 0)
        free(which);
}

void events_reset(void) {
    while (events) {
        event *each = events;
        events = each->next;
        release(each->latest);
        free(each);
    }
}

static CUresult find_event(CUevent handle, event **found) {
    for (event *each = events; each; each = each->next)
        if ((CUevent)each == handle) {
            *found = each;
            return each->of->lost;
        }
    return complain(CUDA_ERROR_INVALID_HANDLE, "%p is no event", (void *)handle);
}

ENTRY(NEEDS_CONTEXT, cuEventCreate, 0, (CUevent *made, unsigned flags), (made, flags)) {
    if (flags & ~(unsigned)(CU_EVENT_BLOCKING_SYNC | CU_EVENT_DISABLE_TIMING))
        return complain(CUDA_ERROR_INVALID_VALUE, "flags are 0x%x", flags);
    event *each = zeroed(sizeof *each);
    *each = (event){.of = current_context(), .flags = flags, .next = events};
    events = each;
    *made = (CUevent)each;
    return CUDA_SUCCESS;
}

/* Waits for it, and records of it that have not run, keep its marks. */
ENTRY(NEEDS_CONTEXT, cuEventDestroy_v2, 0, (CUevent handle), (handle)) {
    event *which;
    CUresult error = find_event(handle, &which);
    if (error)
        return error;
    event **link = &events;
    while (*link != which)
        link = &(*link)->next;
    *link = which->next;
    release(which->latest);
    free(which);
    return CUDA_SUCCESS;
}

/* -- what is queued -- */

typedef struct {
    operation base;
    mark *of;
} marking; /* a record, or a wait */

static CUresult reach(operation *self, char *why, size_t why_bytes) {
    (void)why, (void)why_bytes;
    mark *reached = ((marking *)self)->of;
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    reached->milliseconds = (double)now.tv_sec * 1e3 + (double)now.tv_nsec * 1e-6;
    return CUDA_SUCCESS;
}

static CUresult pass(operation *self, char *why, size_t why_bytes) {
    (void)self, (void)why, (void)why_bytes;
    return CUDA_SUCCESS;
}

/* A record that is dropped, since its context is lost, keeps nobody waiting. */
static void discard_record(operation *self) {
    mark *of = ((marking *)self)->of;
    of->reached = true;
    release(of);
    free(self);
}

static void discard_wait(operation *self) {
    release(((marking *)self)->of);
    free(self);
}

static marking *new_marking(mark *of) {
    marking *made = zeroed(sizeof *made);
    made->of = of;
    of->users++;
    return made;
}

static CUresult record(CUevent handle, CUstream on) {
    event *which;
    stream *where;
    CUresult error = find_event(handle, &which);
    if (!error)
        error = find_stream(on, true, &where);
    if (error)
        return error;
    if (which->of != where->of)
        return complain(CUDA_ERROR_INVALID_HANDLE,
                        "event %p is of device %d, the stream of device %d", (void *)handle,
                        which->of->ordinal, where->of->ordinal);
    mark *made = zeroed(sizeof *made);
    made->on = where;
    marking *queued = new_marking(made);
    queued->base = (operation){.run = reach, .discard = discard_record};
    made->users++;
    error = enqueue(where, &queued->base);
    if (error) {
        release(made);
        return error;
    }
    release(which->latest);
    which->latest = made;
    which->recorded_in = capture_id(where);
    if (!which->recorded_in)
        made->position = queued->base.position;
    return CUDA_SUCCESS;
}

ENTRY(NEEDS_CONTEXT, cuEventRecord, on, (CUevent handle, CUstream on), (handle, on)) {
    return record(handle, on);
}

ENTRY(NEEDS_CONTEXT, cuEventRecordWithFlags, on, (CUevent handle, CUstream on, unsigned flags),
      (handle, on, flags)) {
    if (flags)
        return complain(CUDA_ERROR_INVALID_VALUE, "flags are 0x%x", flags);
    return record(handle, on);
}

/* For the latest record at the time of the call; one that was never recorded holds nothing up.
   The stream may be of another context, current or not. */
ENTRY(NEEDS_CONTEXT, cuStreamWaitEvent, on, (CUstream on, CUevent handle, unsigned flags),
      (on, handle, flags)) {
    event *which;
    stream *where;
    CUresult error = find_event(handle, &which);
    if (!error)
        error = find_stream(on, false, &where);
    if (error)
        return error;
    if (flags)
        return complain(CUDA_ERROR_INVALID_VALUE, "flags are 0x%x", flags);
    if (which->recorded_in)
        return join_capture(where, which->recorded_in);
    if (is_capturing(where))
        return refuse_isolated(where);
    if (!which->latest)
        return CUDA_SUCCESS;
    marking *queued = new_marking(which->latest);
    queued->base =
        (operation){.run = pass, .discard = discard_wait, .waits_for = which->latest};
    return enqueue(where, &queued->base);
}

/* -- what the host asks -- */

static CUresult find_to_wait_for(CUevent handle, event **found) {
    CUresult error = find_event(handle, found);
    if (error)
        return error;
    if ((*found)->recorded_in)
        return complain(CUDA_ERROR_CAPTURED_EVENT, "event %p was recorded in a capture",
                        (void *)handle);
    return refused_by_capture();
}

static bool is_reached(const event *which) { return !which->latest || which->latest->reached; }

ENTRY(NEEDS_CONTEXT, cuEventQuery, 0, (CUevent handle), (handle)) {
    event *which;
    CUresult error = find_to_wait_for(handle, &which);
    if (error)
        return error;
    run_any();
    if (which->of->lost)
        return which->of->lost;
    return is_reached(which) ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
}

ENTRY(NEEDS_CONTEXT, cuEventSynchronize, 0, (CUevent handle), (handle)) {
    event *which;
    CUresult error = find_to_wait_for(handle, &which);
    if (error)
        return error;
    if (!is_reached(which))
        run_up_to(which->latest->on, which->latest->position);
    return which->of->lost;
}

static CUresult elapsed(float *milliseconds, CUevent start, CUevent end) {
    event *first, *last;
    CUresult error = find_event(start, &first);
    if (!error)
        error = find_event(end, &last);
    if (error)
        return error;
    if ((first->flags | last->flags) & CU_EVENT_DISABLE_TIMING)
        return complain(CUDA_ERROR_INVALID_HANDLE, "an event was made without timing");
    if (first->of != last->of)
        return complain(CUDA_ERROR_INVALID_HANDLE, "the events are of two devices");
    if (!first->latest || !last->latest)
        return complain(CUDA_ERROR_INVALID_HANDLE, "an event was never recorded");
    if (!first->latest->reached || !last->latest->reached)
        return CUDA_ERROR_NOT_READY;
    *milliseconds = (float)(last->latest->milliseconds - first->latest->milliseconds);
    return CUDA_SUCCESS;
}

ENTRY(NEEDS_CONTEXT, cuEventElapsedTime, 0, (float *milliseconds, CUevent start, CUevent end),
      (milliseconds, start, end)) {
    return elapsed(milliseconds, start, end);
}

ENTRY(NEEDS_CONTEXT, cuEventElapsedTime_v2, 0, (float *milliseconds, CUevent start, CUevent end),
      (milliseconds, start, end)) {
    return elapsed(milliseconds, start, end);
}
