/* A machine that executes PTX: what ptxas would be given, lane by lane, on memory of this process. */
#ifndef CARD_PTX_H
#define CARD_PTX_H

#include <stddef.h>
#include <stdint.h>

typedef struct ptx_module ptx_module;
typedef struct ptx_function ptx_function;

/* What one launch came to. Counts are of warps' accesses unless said otherwise. */
typedef struct {
    uint64_t instructions;          /* executed, a warp each */
    uint64_t accesses_by_width[5];  /* of global memory, of a thread: 1, 2, 4, 8, 16 bytes */
    uint64_t lines;                 /* 128-byte lines that warps' accesses touched, each access's own */
    uint64_t accesses;              /* of global memory, of warps with a lane that is active */
    uint64_t bytes_read, bytes_written;
    uint64_t host_bytes_read, host_bytes_written; /* of these, in host memory */
    uint64_t most_bytes_in_flight;  /* of one CTA, between a load and the first use of what it brings */
    uint64_t host_round_trips;      /* longest chain of loads from host memory of one CTA, each of which
                                       needs what the one before brought */
    uint64_t barriers;              /* that one CTA came to, at most */
} ptx_counters;

/* NULL, with the reason in `why`, for text that this machine does not know. */
ptx_module *ptx_load(const char *text, char *why, size_t why_bytes);
void ptx_unload(ptx_module *module);
const ptx_function *ptx_find(const ptx_module *module, const char *name);
int ptx_num_parameters(const ptx_function *function);
uint32_t ptx_parameter_bytes(const ptx_function *function, int index);
uint32_t ptx_static_shared_bytes(const ptx_function *function);
uint32_t ptx_threads(const ptx_function *function); /* of .reqntid or .maxntid; 0: not said */

/* Runs every CTA to its end. 0 or the CUDA error that a card would report (700 illegal address, 716
   misaligned address, 719 launch failure, 1 invalid value), with the instruction, its line, CTA and
   thread in `why`. `parameters`: a pointer to the value of each. */
int ptx_launch(const ptx_function *function, const uint32_t grid[3], const uint32_t block[3],
               void *const *parameters, uint32_t dynamic_shared_bytes, int ordinal,
               ptx_counters *counters, char *why, size_t why_bytes);

#endif
