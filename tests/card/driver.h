/* An imitated CUDA driver: what its parts know of each other.

   Work is queued on streams and runs late: when something waits for it, or when a query lets one
   operation run that may. What runs without having been ordered runs in an order that the seed
   picks. Every entry point holds one lock from its first line to its last. */
#ifndef CARD_DRIVER_H
#define CARD_DRIVER_H

/* Every version of a function is then declared under its own name. */
#define __CUDA_API_VERSION_INTERNAL
#include <cuda.h>

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "memory.h"
#include "ptx.h"

#define REASON_BYTES 512
#define MOST_DEVICES 8
#define ANY_ORDINAL (-1)

/* -- configuration.c: what card this is, what was asked of it, and what is to fail -- */

typedef struct {
    int32_t driver_version; /* 12080 for 12.8 */
    int32_t num_devices;
    int32_t compute_major, compute_minor;
    int32_t num_multiprocessors;
    int32_t num_copy_engines;
    int32_t integrated;
    int32_t pageable_memory_access;
    int32_t host_numa_id;
    int32_t refuses_overlap_flag; /* of batches: the only flag that there is */
    int32_t registering;          /* what cuMemHostRegister returns; 0: it works */
    int32_t pinning;              /* the same of cuMemHostAlloc */
    uint64_t registered_offset;   /* from a registered host address to the device's own for it */
    uint64_t device_bytes;
    uint64_t seed;
} card_configuration;

extern card_configuration configuration;

typedef enum { NEEDS_NOTHING, NEEDS_INIT, NEEDS_CONTEXT } call_needs;

/* Takes the lock, notes the call, and tells whether it is refused before it does anything. */
CUresult call_begin(call_needs needs, const char *name, uint64_t stream);
CUresult call_end(CUresult result);

/* Defines an entry point whose body, which follows, runs with the lock held. */
#define ENTRY(needs, name, stream, parameters, arguments)                                          \
    static CUresult do_##name parameters;                                                          \
    CUresult name parameters {                                                                     \
        CUresult refusal = call_begin(needs, #name, (uint64_t)(uintptr_t)(stream));                \
        return call_end(refusal == CUDA_SUCCESS ? do_##name arguments : refusal);                  \
    }                                                                                              \
    static CUresult do_##name parameters

/* New memory of zeros. There always is some: a test's machine has it, or the test ends. */
void *zeroed(size_t bytes);
/* Notes why the call under way fails, and returns the error. */
CUresult complain(CUresult error, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* The same of what was queued by a call that is over. */
void complain_of(const char *call, const char *why);
const char *current_call(void);
int current_thread(void);
uint64_t random_below(uint64_t bound);
/* The error that the operation that now begins to run is to end with; 0 for none. */
CUresult injected_into_operation(void);
void note_pageable_copy(void);
void note_launch(const char *function, const ptx_counters *counters);

/* -- contexts.c -- */

typedef struct stream stream;

typedef struct {
    int ordinal;
    int references;
    int ever_active;
    CUresult lost; /* the error of what ran there; every later call returns it */
    stream *legacy;
} context;

void contexts_reset(void);
context *current_context(void);
context *context_of(int ordinal);
void lose_context(context *of, CUresult error);

/* -- streams.c: the order of what runs -- */

typedef struct operation operation;
typedef struct capture capture;

struct operation {
    const char *call;
    bool is_work; /* a copy, a fill or a launch: what injections count */
    CUresult (*run)(operation *self, char *why, size_t why_bytes);
    void (*discard)(operation *self); /* frees it, whether it ran or not */
    const struct mark *waits_for;     /* NULL: for nothing but its stream */
    uint64_t position;                /* among all that was ever queued */
    operation *next;
};

struct stream {
    context *of;
    unsigned flags;
    int priority;
    int thread; /* whose default stream it is; 0: a stream like any other */
    bool destroyed;
    capture *captured_by;
    operation *first, *last;
    stream *next;
};

/* A place in a stream: where an event was recorded. Events and waits share it. */
typedef struct mark {
    int users;
    bool reached;
    double milliseconds; /* when it was */
    stream *on;          /* valid until it is reached */
    uint64_t position;
} mark;

void streams_reset(void);
stream *new_stream(context *of, unsigned flags, int priority);
/* The stream of a handle. `of_current`: it must be of the current context. */
CUresult find_stream(CUstream handle, bool of_current, stream **found);
/* Takes the operation. What a capturing stream is given belongs to its graph, and never runs. */
CUresult enqueue(stream *on, operation *made);
/* Runs what is queued on a stream up to this position, and what that needs. */
void run_up_to(stream *on, uint64_t position);
void drain(stream *which);
void drain_context(const context *of);
/* Runs one operation of those that may run, if there is any. */
void run_any(void);
void drop_queued(const context *of);
/* Those that were destroyed while they were busy. */
void free_drained_streams(void);

/* -- events.c -- */

void events_reset(void);

/* -- capture.c -- */

void captures_reset(void);
/* The error for a call that a capture forbids, which spoils that capture; 0 where none does. */
CUresult refused_by_capture(void);
/* The same for a call that would wait for this stream. */
CUresult refused_while_capturing(const stream *which);
/* What is queued on this stream belongs to a graph. An error where the stream can't be used. */
CUresult check_queueing(const stream *on);
bool is_capturing(const stream *which);
uint64_t capture_id(const stream *which); /* 0: it does not capture */
/* The stream waits for an event that was recorded in this capture: it captures, too. */
CUresult join_capture(stream *which, uint64_t id);
/* A stream that captures waits for an event of outside. */
CUresult refuse_isolated(stream *which);

/* -- modules.c, allocations.c -- */

void modules_reset(void);
void allocations_reset(void);
/* Whether any of these bytes of the host's lies in memory that the driver knows. */
bool reaches_known_memory(uint64_t host, uint64_t bytes);

#endif
