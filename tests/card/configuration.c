/* What card this is, the calls that were made, and those that are to fail. */

#include "driver.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* -- what Python reads -- */

typedef struct {
    const char *name;
    uint64_t stream;
    int32_t thread;
    int32_t ordinal; /* of the device whose context was current; -1: none was */
    int32_t result;
} card_call;

typedef struct {
    char *function; /* a copy: its module may be unloaded */
    ptx_counters counters;
} card_launch;

typedef struct {
    uint64_t operations; /* work that ran: copies, fills, launches */
    uint64_t pageable_copies;
} card_counts;

card_configuration configuration;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static uint64_t random_state;
static card_counts counts;

typedef struct {
    void *items;
    size_t count, capacity;
} list;

static list calls, launches, complaints, injections;
static size_t call_under_way;

void *zeroed(size_t bytes) {
    void *memory = calloc(1, bytes ? bytes : 1);
    if (!memory)
        abort();
    return memory;
}

/* Grows by one item, which the caller fills. */
static void *append(list *to, size_t item_bytes) {
    if (to->count == to->capacity) {
        to->capacity = to->capacity ? 2 * to->capacity : 256;
        to->items = realloc(to->items, to->capacity * item_bytes);
        if (!to->items)
            abort();
    }
    return (char *)to->items + item_bytes * to->count++;
}

static card_call *call_at(size_t index) { return (card_call *)calls.items + index; }

int current_thread(void) {
    static atomic_int threads;
    static _Thread_local int number;
    if (number == 0)
        number = atomic_fetch_add(&threads, 1) + 1;
    return number;
}

const char *current_call(void) { return call_at(call_under_way)->name; }

uint64_t random_below(uint64_t bound) { /* xorshift64* */
    random_state ^= random_state >> 12;
    random_state ^= random_state << 25;
    random_state ^= random_state >> 27;
    return (random_state * 0x2545F4914F6CDD1DULL >> 33) % bound;
}

/* -- complaints -- */

void complain_of(const char *call, const char *why) {
    char *text = NULL;
    if (asprintf(&text, "%s: %s", call, why) >= 0)
        *(char **)append(&complaints, sizeof(char *)) = text;
}

CUresult complain(CUresult error, const char *format, ...) {
    char why[REASON_BYTES];
    va_list values;
    va_start(values, format);
    vsnprintf(why, sizeof why, format, values);
    va_end(values);
    complain_of(current_call(), why);
    return error;
}

/* -- what is to fail -- */

typedef struct {
    char name[64];
    uint64_t first, last; /* calls of it from now, counted from 1 */
    uint64_t seen;
    CUresult error;
} injection;

static uint64_t failing_operation; /* counted from 1 as they run; 0: none */
static CUresult operation_error;

static CUresult injected_into_call(const char *name) {
    CUresult error = CUDA_SUCCESS;
    for (size_t i = 0; i < injections.count; i++) {
        injection *each = (injection *)injections.items + i;
        if (strcmp(each->name, name) != 0)
            continue;
        each->seen++;
        if (each->seen >= each->first && each->seen <= each->last)
            error = each->error;
    }
    return error;
}

CUresult injected_into_operation(void) {
    counts.operations++;
    return counts.operations == failing_operation ? operation_error : CUDA_SUCCESS;
}

void note_pageable_copy(void) { counts.pageable_copies++; }

void note_launch(const char *function, const ptx_counters *counters) {
    char *name = strdup(function);
    if (!name)
        abort();
    *(card_launch *)append(&launches, sizeof(card_launch)) = (card_launch){name, *counters};
}

/* -- every call -- */

static bool initialised;

CUresult call_begin(call_needs needs, const char *name, uint64_t stream) {
    pthread_mutex_lock(&lock);
    const context *current = current_context();
    call_under_way = calls.count;
    *(card_call *)append(&calls, sizeof(card_call)) =
        (card_call){name, stream, current_thread(), current ? current->ordinal : -1, 0};
    CUresult injected = injected_into_call(name);
    if (injected != CUDA_SUCCESS)
        return complain(injected, "injected");
    if (strcmp(name, "cuInit") == 0)
        initialised = true;
    if (needs >= NEEDS_INIT && !initialised)
        return complain(CUDA_ERROR_NOT_INITIALIZED, "before cuInit");
    if (needs < NEEDS_CONTEXT)
        return CUDA_SUCCESS;
    if (!current)
        return complain(CUDA_ERROR_INVALID_CONTEXT, "no context is current to thread %d",
                        current_thread());
    if (current->lost)
        return complain(current->lost, "the context is lost");
    return CUDA_SUCCESS;
}

CUresult call_end(CUresult result) {
    free_drained_streams();
    call_at(call_under_way)->result = (int32_t)result;
    pthread_mutex_unlock(&lock);
    return result;
}

/* -- Python's door: each of these takes the lock itself -- */

#define LOCKED(...)                                                                                \
    do {                                                                                           \
        pthread_mutex_lock(&lock);                                                                 \
        __VA_ARGS__;                                                                               \
        pthread_mutex_unlock(&lock);                                                               \
    } while (0)

static void forget_what_was_noted(void) {
    for (size_t i = 0; i < complaints.count; i++)
        free(((char **)complaints.items)[i]);
    for (size_t i = 0; i < launches.count; i++)
        free(((card_launch *)launches.items)[i].function);
    calls.count = launches.count = complaints.count = injections.count = 0;
    counts = (card_counts){0};
    failing_operation = 0;
}

/* A new card: every handle and address of the one before is void. */
void card_reset(const card_configuration *wanted) {
    LOCKED({
        configuration = *wanted;
        random_state = wanted->seed * 0x9E3779B97F4A7C15ULL | 1;
        initialised = false;
        streams_reset();
        modules_reset();
        allocations_reset();
        contexts_reset();
        forget_what_was_noted();
    });
}

void card_inject(const char *name, uint64_t first, uint64_t last, int32_t error) {
    LOCKED({
        injection *made = append(&injections, sizeof *made);
        *made = (injection){.first = first, .last = last, .error = (CUresult)error};
        snprintf(made->name, sizeof made->name, "%s", name);
    });
}

/* The n-th operation from now on that runs, counted from 1. */
void card_inject_operation(uint64_t number, int32_t error) {
    LOCKED({
        failing_operation = counts.operations + number;
        operation_error = (CUresult)error;
    });
}

void card_clear_injections(void) {
    LOCKED({
        injections.count = 0;
        failing_operation = 0;
    });
}

uint64_t card_num_calls(void) {
    uint64_t count;
    LOCKED(count = calls.count);
    return count;
}

void card_get_calls(uint64_t first, uint64_t count, card_call *made) {
    LOCKED(memcpy(made, call_at(first), count * sizeof *made));
}

uint64_t card_num_launches(void) {
    uint64_t count;
    LOCKED(count = launches.count);
    return count;
}

void card_get_launches(uint64_t first, uint64_t count, card_launch *made) {
    LOCKED(memcpy(made, (card_launch *)launches.items + first, count * sizeof *made));
}

uint64_t card_num_complaints(void) {
    uint64_t count;
    LOCKED(count = complaints.count);
    return count;
}

void card_get_complaint(uint64_t index, char *text, uint64_t text_bytes) {
    LOCKED(snprintf(text, text_bytes, "%s", ((char **)complaints.items)[index]));
}

void card_get_counts(card_counts *now) { LOCKED(*now = counts); }

/* The host wrote to device memory, as only a test can. */
void card_mark_written(uint64_t host, uint64_t bytes) {
    LOCKED(memory_mark_written(host, bytes));
}
