/* A machine that executes PTX, which ptxas would be given: lane by lane, on memory of this
   process. */
#ifndef CARD_PTX_H
#define CARD_PTX_H

#include <stddef.h>
#include <stdint.h>

typedef struct ptx_module ptx_module;
typedef struct ptx_function ptx_function;

/* What one launch came to, in the order of the PTX: ptxas may move instructions. An access is one
   instruction of a warp that reaches global memory with one lane at least, a copy into shared
   memory included. */
typedef struct {
    uint64_t instructions;         /* that warps issued, those that a guard held back included */
    uint64_t accesses_by_width[5]; /* of lanes: of 1, 2, 4, 8, 16 bytes */
    uint64_t lines;                /* of 128 bytes that each access touched, added up */
    uint64_t accesses;
    uint64_t bytes_read, bytes_written;           /* of each access, those of several lanes once */
    uint64_t host_bytes_read, host_bytes_written; /* of these, in memory of the host */
    /* Loads are in flight from their issue until an instruction reads or writes a register that
       they bring, copies until a wait that they land at. Of each warp the most at any time, added
       up for a CTA as if all came to it at once; of the CTAs the most. */
    uint64_t most_bytes_in_flight;
    /* To memory of the host that a CTA waits for, one after the other. A warp issues in order: what
       it loads after a wait begins after it, whether it needs what came or not; a barrier waits for
       the last warp. Of the CTAs the most. */
    uint64_t host_round_trips;
    uint64_t barriers; /* that a warp of a CTA came to, at most */
} ptx_counters;

/* NULL, with the reason in `why`, for text that this machine does not know. */
ptx_module *ptx_load(const char *text, char *why, size_t why_bytes);
void ptx_unload(ptx_module *module);
const ptx_function *ptx_find(const ptx_module *module, const char *name);
int ptx_num_parameters(const ptx_function *function);
uint32_t ptx_parameter_bytes(const ptx_function *function, int index);
uint32_t ptx_static_shared_bytes(const ptx_function *function);
uint32_t ptx_threads(const ptx_function *function); /* of .reqntid or .maxntid; 0: not said */

/* Runs every CTA to its end, one after the other. 0 or the CUDA error that a card would report (700
   illegal address, 716 misaligned address, 719 launch failure, 1 invalid value), with the
   instruction, its line, CTA and thread in `why`. `parameters`: a pointer to the value of each. */
int ptx_launch(const ptx_function *function, const uint32_t grid[3], const uint32_t block[3],
               void *const *parameters, uint32_t dynamic_shared_bytes, int ordinal,
               ptx_counters *counters, char *why, size_t why_bytes);

#endif
