/* Streams: what is queued on them, and in which order it runs. */

#include "driver.h"

#include <stdlib.h>

static stream *streams; /* all that there are, and those destroyed that are still busy */
static uint64_t queued; /* operations, ever */

static void free_stream(stream *which) {
    while (which->first) {
        operation *each = which->first;
        which->first = each->next;
        each->discard(each);
    }
    free(which);
}

void streams_reset(void) {
    while (streams) {
        stream *each = streams;
        streams = each->next;
        free_stream(each);
    }
    events_reset();
    captures_reset();
}

stream *new_stream(context *of, unsigned flags, int priority) {
    stream *made = zeroed(sizeof *made);
    *made = (stream){.of = of, .flags = flags, .priority = priority, .next = streams};
    streams = made;
    return made;
}

static stream *default_stream_of_thread(context *of) {
    for (stream *each = streams; each; each = each->next)
        if (each->of == of && each->thread == current_thread())
            return each;
    stream *made = new_stream(of, CU_STREAM_DEFAULT, 0);
    made->thread = current_thread();
    return made;
}

CUresult find_stream(CUstream handle, bool of_current, stream **found) {
    context *current = current_context();
    if (handle == NULL || handle == CU_STREAM_LEGACY) {
        *found = current->legacy;
        return CUDA_SUCCESS;
    }
    if (handle == CU_STREAM_PER_THREAD) {
        *found = default_stream_of_thread(current);
        return CUDA_SUCCESS;
    }
    for (stream *each = streams; each; each = each->next) {
        if ((CUstream)each != handle || each->destroyed || each->thread || each == each->of->legacy)
            continue;
        *found = each;
        if (of_current && each->of != current)
            return complain(CUDA_ERROR_INVALID_HANDLE,
                            "stream %p is of device %d, while device %d's context is current",
                            (void *)handle, each->of->ordinal, current->ordinal);
        return each->of->lost;
    }
    return complain(CUDA_ERROR_INVALID_HANDLE, "%p is no stream", (void *)handle);
}

void free_drained_streams(void) {
    for (stream **link = &streams; *link;) {
        stream *each = *link;
        if (!each->destroyed || each->first || each->captured_by) {
            link = &each->next;
            continue;
        }
        *link = each->next;
        free_stream(each);
    }
}

/* -- what runs -- */

CUresult enqueue(stream *on, operation *made) {
    made->call = current_call();
    made->position = ++queued;
    CUresult error = check_queueing(on);
    if (error != CUDA_SUCCESS || is_capturing(on)) {
        made->discard(made);
        return error;
    }
    if (on->last && on->first)
        on->last->next = made;
    else
        on->first = made;
    on->last = made;
    return CUDA_SUCCESS;
}

/* Whether what is queued on one of them runs in order with what is queued on the other: of one
   context, the legacy stream and every stream that was not made non-blocking. */
static bool in_step(const stream *one, const stream *other) {
    if (one == other || one->of != other->of)
        return false;
    const stream *legacy = one->of->legacy;
    if (one != legacy && other != legacy)
        return false;
    return !((one->flags | other->flags) & CU_STREAM_NON_BLOCKING);
}

static bool may_run(const stream *which) {
    const operation *first = which->first;
    if (!first || (first->waits_for && !first->waits_for->reached))
        return false;
    for (const stream *each = streams; each; each = each->next)
        if (in_step(which, each) && each->first && each->first->position < first->position)
            return false;
    return true;
}

static void run_first(stream *which) {
    operation *first = which->first;
    char why[REASON_BYTES] = "injected";
    CUresult error = first->is_work ? injected_into_operation() : CUDA_SUCCESS;
    if (error == CUDA_SUCCESS)
        error = first->run(first, why, sizeof why);
    if (error != CUDA_SUCCESS)
        complain_of(first->call, why);
    which->first = first->next;
    first->discard(first);
    if (error != CUDA_SUCCESS)
        lose_context(which->of, error);
}

void run_up_to(stream *on, uint64_t position) {
    while (on->first && on->first->position <= position) {
        const operation *first = on->first;
        if (first->waits_for && !first->waits_for->reached)
            run_up_to(first->waits_for->on, first->waits_for->position);
        uint64_t before = first->position - 1;
        for (stream *each = streams; each; each = each->next)
            if (in_step(on, each))
                run_up_to(each, before);
        if (on->first == first) /* else the context was lost on the way */
            run_first(on);
    }
}

void drain(stream *which) { run_up_to(which, UINT64_MAX); }

void drain_context(const context *of) {
    for (stream *each = streams; each; each = each->next)
        if (each->of == of)
            drain(each);
}

void run_any(void) {
    uint64_t ready = 0;
    for (stream *each = streams; each; each = each->next)
        ready += may_run(each);
    if (ready == 0)
        return;
    uint64_t chosen = random_below(ready);
    for (stream *each = streams; each; each = each->next)
        if (may_run(each) && chosen-- == 0) {
            run_first(each);
            return;
        }
}

void drop_queued(const context *of) {
    for (stream *each = streams; each; each = each->next)
        while (each->of == of && each->first) {
            operation *dropped = each->first;
            each->first = dropped->next;
            dropped->discard(dropped);
        }
}

/* -- entry points -- */

static CUresult make_stream(CUstream *made, unsigned flags, int priority) {
    if (flags & ~(unsigned)CU_STREAM_NON_BLOCKING)
        return complain(CUDA_ERROR_INVALID_VALUE, "flags are 0x%x", flags);
    *made = (CUstream)new_stream(current_context(), flags, priority);
    return CUDA_SUCCESS;
}

ENTRY(NEEDS_CONTEXT, cuStreamCreate, 0, (CUstream *made, unsigned flags), (made, flags)) {
    return make_stream(made, flags, 0);
}

/* Priorities beyond the range are clamped to it. */
ENTRY(NEEDS_CONTEXT, cuStreamCreateWithPriority, 0,
      (CUstream *made, unsigned flags, int priority), (made, flags, priority)) {
    int clamped = priority > 0 ? 0 : priority < -5 ? -5 : priority;
    return make_stream(made, flags, clamped);
}

/* What is queued on it still runs. */
ENTRY(NEEDS_CONTEXT, cuStreamDestroy_v2, handle, (CUstream handle), (handle)) {
    stream *which;
    CUresult error = find_stream(handle, false, &which);
    if (error)
        return error;
    if (which == which->of->legacy || which->thread)
        return complain(CUDA_ERROR_INVALID_HANDLE, "a default stream can't be destroyed");
    which->destroyed = true;
    return CUDA_SUCCESS;
}

ENTRY(NEEDS_CONTEXT, cuStreamGetPriority, handle, (CUstream handle, int *priority),
      (handle, priority)) {
    stream *which;
    CUresult error = find_stream(handle, false, &which);
    if (!error)
        *priority = which->priority;
    return error;
}

ENTRY(NEEDS_CONTEXT, cuStreamGetFlags, handle, (CUstream handle, unsigned *flags),
      (handle, flags)) {
    stream *which;
    CUresult error = find_stream(handle, false, &which);
    if (!error)
        *flags = which->flags;
    return error;
}

ENTRY(NEEDS_CONTEXT, cuStreamGetCtx, handle, (CUstream handle, CUcontext *of), (handle, of)) {
    stream *which;
    CUresult error = find_stream(handle, false, &which);
    if (!error)
        *of = (CUcontext)which->of;
    return error;
}

ENTRY(NEEDS_CONTEXT, cuStreamQuery, handle, (CUstream handle), (handle)) {
    stream *which;
    CUresult error = find_stream(handle, false, &which);
    if (!error)
        error = refused_while_capturing(which);
    if (error)
        return error;
    run_any();
    if (which->of->lost)
        return which->of->lost;
    return which->first ? CUDA_ERROR_NOT_READY : CUDA_SUCCESS;
}

ENTRY(NEEDS_CONTEXT, cuStreamSynchronize, handle, (CUstream handle), (handle)) {
    stream *which;
    CUresult error = find_stream(handle, false, &which);
    if (!error)
        error = refused_while_capturing(which);
    if (error)
        return error;
    drain(which);
    return which->of->lost;
}
