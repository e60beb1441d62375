/* What runs: a CTA at a time, of its warps one after another up to the next barrier. */
#ifndef CARD_MACHINE_H
#define CARD_MACHINE_H

#include <setjmp.h>
#include <stdint.h>

#include "memory.h"
#include "program.h"

enum { LANES = 32, ALL_LANES = -1 };
enum { INVALID_VALUE = 1, ILLEGAL_ADDRESS = 700, MISALIGNED_ADDRESS = 716, LAUNCH_FAILED = 719 };

typedef uint64_t lane_values[LANES];

/* A load between its issue and the first use of a register that it brings: counting.c */
typedef struct {
    const instruction *issued_by;
    uint64_t bytes;
    uint32_t round_trips; /* to host memory that have passed when it has come */
} load_in_flight;

/* cp.async between its issue and the wait that it lands at: shared.c */
typedef struct {
    uint32_t place, bytes; /* in shared memory */
    uint8_t data[16];
    uint32_t lane, group;
    uint64_t bytes_read;
    uint32_t round_trips;
} copy_in_flight;

typedef struct {
    uint32_t index;
    uint32_t live; /* lanes that have not ended */
    uint32_t next[LANES]; /* instruction of each */
    int32_t barrier;      /* that it waits at; -1: none */
    uint32_t barrier_threads;
    /* By number of a register. */
    lane_values *values;
    uint32_t *written;       /* lanes that ever wrote it */
    int32_t *brought_by;     /* first result of the load in flight that writes it; -1: none */
    load_in_flight *loads;   /* by their first results */
    copy_in_flight *copies;
    uint32_t num_copies, most_copies;
    uint32_t groups[LANES];  /* committed so far */
    /* Counted. */
    uint64_t instructions, barriers;
    uint64_t bytes_in_flight, most_bytes_in_flight;
    uint32_t round_trips; /* to host memory that it has waited for, one after the other */
} warp;

/* Of each byte of shared memory. An epoch is what lies between two barriers; the first is 1. */
typedef struct {
    uint32_t written_in, read_in; /* epochs; 0: never */
    uint16_t written_by, read_by; /* warps of that epoch */
    uint16_t pending;             /* a copy into it is under way */
} shared_byte;

typedef struct {
    const ptx_function *function;
    uint32_t grid[3], block[3], cta[3];
    uint32_t num_threads, num_warps;
    const uint8_t *parameters;
    int ordinal;
    warp *warps;
    uint8_t *shared;
    shared_byte *shared_state;
    uint32_t shared_bytes, dynamic_shared_at;
    uint32_t epoch;
    ptx_counters *counters;
    /* For what errors say. */
    const instruction *running;
    const warp *running_warp;
    int error;
    char *why;
    size_t why_bytes;
    jmp_buf failed;
} machine;

enum { SEVERAL_WARPS = UINT16_MAX };

/* Ends the launch. `lane` -1: the warp as a whole. */
_Noreturn void machine_fail(machine *m, int error, int lane, const char *format, ...)
    __attribute__((format(printf, 4, 5)));

/* registers.c: `read_source` gives the values of all lanes, in `space` or where they lie, of which
   those of `lanes` are such as the program wrote; narrowed to the type. */
const uint64_t *read_source(machine *m, warp *w, uint32_t lanes, uint32_t source, type as,
                            lane_values space);
void write_result(machine *m, warp *w, uint32_t lanes, uint32_t result, type as,
                  const lane_values values);
/* The lanes for which the guard of the running instruction holds. */
uint32_t guarded_lanes(machine *m, warp *w, uint32_t lanes);

/* Each runs the instruction `m->running` for these lanes, of which there is one at least. */
void compute(machine *m, warp *w, uint32_t lanes);
void exchange(machine *m, warp *w, uint32_t lanes);
void access_global(machine *m, warp *w, uint32_t lanes);
void access_shared(machine *m, warp *w, uint32_t lanes);

/* shared.c */
void begin_copies(machine *m, warp *w, uint32_t lanes);
void commit_copies(warp *w, uint32_t lanes);
void land_copies(machine *m, warp *w, uint32_t lanes);

/* counting.c */
typedef struct {
    uint64_t bytes, host_bytes; /* each byte of the warp's access once */
} access_bytes;
/* `bytes`: of each lane's access, of which it may read less. */
access_bytes count_access(machine *m, uint32_t lanes, const lane_values addresses, uint32_t bytes,
                          const uint32_t *bytes_moved, memory_access kind);
void count_load(warp *w, const instruction *issued, access_bytes brought);
void count_use(warp *w, uint64_t number);
void count_cta(machine *m); /* that has ended */

static inline uint64_t narrowed(uint64_t value, type as) {
    uint32_t unused = 64u - as.bits;
    return as.is_signed ? (uint64_t)((int64_t)(value << unused) >> unused)
                        : value << unused >> unused;
}

#endif
