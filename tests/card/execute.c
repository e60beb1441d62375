/* A launch: CTA by CTA, warps in turn from barrier to barrier, lanes where they stand. */

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "machine.h"

/* A kernel that takes more than this many instructions of a warp does not end. */
static const uint64_t MOST_INSTRUCTIONS = 1ull << 24;
enum { MOST_THREADS = 1024, MOST_BARRIERS = 16 };

void machine_fail(machine *m, int error, int lane, const char *format, ...) {
    char reason[384], who[64];
    va_list values;
    va_start(values, format);
    vsnprintf(reason, sizeof reason, format, values);
    va_end(values);
    uint32_t thread = m->running_warp->index * LANES + (uint32_t)(lane < 0 ? 0 : lane);
    uint32_t x = m->block[0], y = m->block[1];
    if (lane < 0)
        snprintf(who, sizeof who, "warp %u", m->running_warp->index);
    else
        snprintf(who, sizeof who, "thread (%u, %u, %u)", thread % x, thread / x % y,
                 thread / x / y);
    snprintf(m->why, m->why_bytes, "%s, by `%s` in line %u of %s, CTA (%u, %u, %u), %s", reason,
             m->running->text, m->running->line, m->function->name, m->cta[0], m->cta[1],
             m->cta[2], who);
    m->error = error;
    longjmp(m->failed, 1);
}

/* Runs for these lanes; returns where they go on. Lanes that go elsewhere are put there. */
static uint32_t branch(warp *w, const instruction *i, uint32_t *lanes, uint32_t taken,
                       uint32_t here) {
    if (taken == *lanes)
        return i->target;
    for (int lane = 0; lane < LANES; lane++)
        if (taken >> lane & 1)
            w->next[lane] = i->target;
    *lanes &= ~taken;
    return here + 1;
}

/* A barrier is of whole warps: no lane may be elsewhere. */
static void reach_barrier(machine *m, warp *w, uint32_t lanes) {
    const instruction *i = m->running;
    lane_values space;
    uint64_t number = read_source(m, w, lanes, 0, i->type, space)[__builtin_ctz(lanes)];
    uint64_t threads = i->num_sources < 2
                           ? (uint64_t)m->num_warps * LANES
                           : read_source(m, w, lanes, 1, i->type, space)[__builtin_ctz(lanes)];
    if (lanes != w->live)
        machine_fail(m, LAUNCH_FAILED, __builtin_ctz(w->live & ~lanes),
                     "lanes 0x%x of warp %u are not at the barrier", w->live & ~lanes, w->index);
    if (number >= MOST_BARRIERS || threads % LANES || threads == 0)
        machine_fail(m, LAUNCH_FAILED, -1, "no barrier %llu of %llu threads",
                     (unsigned long long)number, (unsigned long long)threads);
    w->barrier = (int32_t)number;
    w->barrier_threads = (uint32_t)threads;
    w->barriers++;
}

static void run_instruction(machine *m, warp *w, uint32_t lanes) {
    lane_values space;
    switch (m->running->operation) {
    case OP_LD_GLOBAL:
    case OP_ST_GLOBAL:
    case OP_RED_ADD:
        access_global(m, w, lanes);
        break;
    case OP_LD_SHARED:
    case OP_ST_SHARED:
        access_shared(m, w, lanes);
        break;
    case OP_CP_ASYNC:
        begin_copies(m, w, lanes);
        break;
    case OP_CP_ASYNC_COMMIT:
        commit_copies(w, lanes);
        break;
    case OP_CP_ASYNC_WAIT:
        land_copies(m, w, lanes);
        break;
    case OP_SHFL:
    case OP_VOTE:
    case OP_ACTIVEMASK:
        exchange(m, w, lanes);
        break;
    case OP_BAR_SYNC:
        reach_barrier(m, w, lanes);
        break;
    case OP_BAR_WARP:
        read_source(m, w, lanes, 0, (type){32, 0}, space);
        break;
    case OP_TRAP:
        machine_fail(m, LAUNCH_FAILED, __builtin_ctz(lanes), "the kernel traps");
    case OP_NOTHING:
        break;
    default:
        compute(m, w, lanes);
    }
}

/* The live lanes whose next instruction is the lowest go first, so that they meet the others. */
static uint32_t first_lanes(const warp *w, uint32_t *here, uint32_t *others) {
    uint32_t lanes = 0;
    *here = *others = UINT32_MAX;
    for (int lane = 0; lane < LANES; lane++) {
        if (!(w->live >> lane & 1) || w->next[lane] > *here)
            continue;
        if (w->next[lane] < *here)
            lanes = 0;
        *here = w->next[lane];
        lanes |= 1u << lane;
    }
    for (int lane = 0; lane < LANES; lane++)
        if (w->live & ~lanes & 1u << lane && w->next[lane] < *others)
            *others = w->next[lane];
    return lanes;
}

/* Up to a barrier or to its end. */
static void run_warp(machine *m, warp *w) {
    m->running_warp = w;
    while (w->live && w->barrier < 0) {
        uint32_t here, others;
        uint32_t lanes = first_lanes(w, &here, &others);
        /* In a row, until a lane goes elsewhere or others are met. */
        for (;;) {
            const instruction *i = m->running = &m->function->code[here];
            if (++w->instructions > MOST_INSTRUCTIONS)
                machine_fail(m, LAUNCH_FAILED, -1, "the kernel does not end");
            uint32_t active = guarded_lanes(m, w, lanes), before = lanes;
            if (i->operation == OP_BRA) {
                here = branch(w, i, &lanes, active, here);
            } else if (i->operation == OP_EXIT) {
                w->live &= ~active;
                lanes &= ~active;
                here++;
            } else {
                if (active)
                    run_instruction(m, w, active);
                here++;
            }
            int jumped = i->operation == OP_BRA && others != UINT32_MAX;
            if (lanes != before || jumped || here >= others || w->barrier >= 0)
                break;
        }
        for (int lane = 0; lane < LANES; lane++)
            if (lanes >> lane & 1)
                w->next[lane] = here;
    }
}

/* Lets those go on who wait at a barrier that all came to. Whether there is one. */
static int pass_barriers(machine *m) {
    uint32_t threads[MOST_BARRIERS] = {0}, round_trips[MOST_BARRIERS] = {0};
    for (uint32_t i = 0; i < m->num_warps; i++) {
        const warp *w = &m->warps[i];
        if (w->barrier < 0)
            continue;
        threads[w->barrier] += LANES;
        if (w->round_trips > round_trips[w->barrier])
            round_trips[w->barrier] = w->round_trips;
    }
    int passed = 0;
    for (uint32_t i = 0; i < m->num_warps; i++) {
        warp *w = &m->warps[i];
        if (w->barrier < 0 || threads[w->barrier] < w->barrier_threads)
            continue;
        w->round_trips = round_trips[w->barrier]; /* all go on when the last of them came */
        w->barrier = -1;
        passed = 1;
    }
    m->epoch += (uint32_t)passed;
    return passed;
}

static void begin_cta(machine *m) {
    uint32_t registers = m->function->num_registers;
    m->epoch = 1;
    memset(m->shared_state, 0, m->shared_bytes * sizeof *m->shared_state);
    for (uint32_t i = 0; i < m->num_warps; i++) {
        warp *w = &m->warps[i], kept = *w;
        uint32_t threads = m->num_threads - i * LANES;
        *w = (warp){.index = i,
                    .live = threads >= LANES ? (uint32_t)ALL_LANES : (1u << threads) - 1,
                    .barrier = -1,
                    .values = kept.values,
                    .written = kept.written,
                    .brought_by = kept.brought_by,
                    .loads = kept.loads,
                    .copies = kept.copies,
                    .most_copies = kept.most_copies};
        memset(w->written, 0, registers * sizeof *w->written);
        memset(w->brought_by, -1, registers * sizeof *w->brought_by);
    }
}

static void run_cta(machine *m) {
    begin_cta(m);
    do
        for (uint32_t i = 0; i < m->num_warps; i++)
            run_warp(m, &m->warps[i]);
    while (pass_barriers(m));
    uint32_t ended = 0, waiting = m->num_warps;
    for (uint32_t i = 0; i < m->num_warps; i++)
        if (m->warps[i].barrier < 0)
            ended++;
        else if (waiting == m->num_warps)
            waiting = i;
    if (ended < m->num_warps) {
        const warp *w = m->running_warp = &m->warps[waiting];
        m->running = &m->function->code[w->next[__builtin_ctz(w->live)] - 1];
        machine_fail(m, LAUNCH_FAILED, -1,
                     "barrier %d is not reached by all of %u threads: %u of %u warps have ended",
                     w->barrier, w->barrier_threads, ended, m->num_warps);
    }
    count_cta(m);
}

static void run_grid(machine *m) {
    for (m->cta[2] = 0; m->cta[2] < m->grid[2]; m->cta[2]++)
        for (m->cta[1] = 0; m->cta[1] < m->grid[1]; m->cta[1]++)
            for (m->cta[0] = 0; m->cta[0] < m->grid[0]; m->cta[0]++)
                run_cta(m);
}

static int make_warps(machine *m) {
    uint32_t registers = m->function->num_registers + 1;
    m->warps = calloc(m->num_warps, sizeof *m->warps);
    m->shared = calloc(m->shared_bytes + 1, 1);
    m->shared_state = calloc(m->shared_bytes + 1, sizeof *m->shared_state);
    if (!m->warps || !m->shared || !m->shared_state)
        return -1;
    for (uint32_t i = 0; i < m->num_warps; i++) {
        warp *w = &m->warps[i];
        w->values = calloc(registers, sizeof *w->values);
        w->written = calloc(registers, sizeof *w->written);
        w->brought_by = calloc(registers, sizeof *w->brought_by);
        w->loads = calloc(registers, sizeof *w->loads);
        if (!w->values || !w->written || !w->brought_by || !w->loads)
            return -1;
    }
    return 0;
}

static void free_machine(machine *m) {
    for (uint32_t i = 0; m->warps && i < m->num_warps; i++) {
        free(m->warps[i].values);
        free(m->warps[i].written);
        free(m->warps[i].brought_by);
        free(m->warps[i].loads);
        free(m->warps[i].copies);
    }
    free(m->warps);
    free(m->shared);
    free(m->shared_state);
    free(m);
}

static int refuse(char *why, size_t why_bytes, const char *reason) {
    snprintf(why, why_bytes, "%s", reason);
    return INVALID_VALUE;
}

int ptx_launch(const ptx_function *function, const uint32_t grid[3], const uint32_t block[3],
               void *const *parameters, uint32_t dynamic_shared_bytes, int ordinal,
               ptx_counters *counters, char *why, size_t why_bytes) {
    memset(counters, 0, sizeof *counters);
    uint64_t threads = (uint64_t)block[0] * block[1] * block[2];
    if (!grid[0] || !grid[1] || !grid[2])
        return refuse(why, why_bytes, "a grid without CTAs");
    if (!threads || threads > MOST_THREADS)
        return refuse(why, why_bytes, "a CTA has 1 to 1024 threads");
    if (function->exactly ? threads != function->threads
                          : function->threads && threads > function->threads)
        return refuse(why, why_bytes, "a CTA of other threads than the kernel was compiled for");
    uint32_t dynamic_at = (function->static_shared_bytes + 15) / 16 * 16;
    if ((uint64_t)dynamic_at + dynamic_shared_bytes > MOST_SHARED_BYTES)
        return refuse(why, why_bytes, "more shared memory than a CTA can have");

    machine *m = calloc(1, sizeof *m);
    uint8_t *packed = calloc(function->parameter_bytes + 1, 1);
    if (!m || !packed) {
        free(m);
        free(packed);
        return refuse(why, why_bytes, "out of memory");
    }
    for (uint32_t i = 0; i < function->num_parameters; i++)
        memcpy(packed + function->parameters[i].offset, parameters[i],
               function->parameters[i].bytes);
    m->function = function;
    memcpy(m->grid, grid, sizeof m->grid);
    memcpy(m->block, block, sizeof m->block);
    m->num_threads = (uint32_t)threads;
    m->num_warps = (m->num_threads + LANES - 1) / LANES;
    m->parameters = packed;
    m->ordinal = ordinal;
    m->shared_bytes = dynamic_shared_bytes ? dynamic_at + dynamic_shared_bytes
                                           : function->static_shared_bytes;
    m->dynamic_shared_at = dynamic_at;
    m->counters = counters;
    m->why = why;
    m->why_bytes = why_bytes;
    int error = 0;
    if (make_warps(m) != 0)
        error = refuse(why, why_bytes, "out of memory");
    else if (setjmp(m->failed) == 0)
        run_grid(m);
    else
        error = m->error;
    free(packed);
    free_machine(m);
    return error;
}
