/* Global memory, as kernels reach it. */

#include <string.h>

#include "machine.h"

static const type ADDRESS = {64, 0};

/* Where a lane's bytes are in this process. */
static uint8_t *reach(machine *m, int lane, uint64_t address, uint32_t bytes, memory_access kind) {
    char why[256];
    if (address % bytes)
        machine_fail(m, MISALIGNED_ADDRESS, lane, "%u bytes at 0x%llx, which is no multiple", bytes,
                     (unsigned long long)address);
    uint8_t *found = memory_reach(address, bytes, kind, m->ordinal, why, sizeof why);
    if (!found)
        machine_fail(m, ILLEGAL_ADDRESS, lane, "%s of %s", kind == MEMORY_READ ? "read" : "write",
                     why);
    return found;
}

static void load(machine *m, warp *w, uint32_t lanes, const lane_values addresses) {
    const instruction *i = m->running;
    lane_values out[MOST_RESULTS];
    uint32_t element = i->type.bits / 8;
    for (int lane = 0; lane < LANES; lane++) {
        if (!(lanes >> lane & 1))
            continue;
        const uint8_t *from = reach(m, lane, addresses[lane], i->bytes, MEMORY_READ);
        for (uint32_t e = 0; e < i->num_results; e++) {
            out[e][lane] = 0;
            memcpy(&out[e][lane], from + e * element, element);
        }
    }
    access_bytes brought = count_access(m, lanes, addresses, i->bytes, NULL, MEMORY_READ);
    for (uint32_t e = 0; e < i->num_results; e++)
        write_result(m, w, lanes, e, i->result_type, out[e]);
    count_load(w, i, brought);
}

static void store(machine *m, warp *w, uint32_t lanes, const lane_values addresses) {
    const instruction *i = m->running;
    lane_values spaces[MOST_RESULTS];
    const uint64_t *values[MOST_RESULTS];
    uint32_t element = i->type.bits / 8, count = i->bytes / element;
    for (uint32_t e = 0; e < count; e++)
        values[e] = read_source(m, w, lanes, 1 + e, i->type, spaces[e]);
    for (int lane = 0; lane < LANES; lane++) {
        if (!(lanes >> lane & 1))
            continue;
        uint8_t *to = reach(m, lane, addresses[lane], i->bytes, MEMORY_WRITE);
        for (uint32_t e = 0; e < count; e++)
            memcpy(to + e * element, &values[e][lane], element);
    }
    count_access(m, lanes, addresses, i->bytes, NULL, MEMORY_WRITE);
}

/* Lane after lane: several may name one address. */
static void add_to(machine *m, warp *w, uint32_t lanes, const lane_values addresses) {
    const instruction *i = m->running;
    lane_values space, before = {0};
    const uint64_t *values = read_source(m, w, lanes, 1, i->type, space);
    for (int lane = 0; lane < LANES; lane++) {
        if (!(lanes >> lane & 1))
            continue;
        reach(m, lane, addresses[lane], i->bytes, MEMORY_READ);
        uint8_t *to = reach(m, lane, addresses[lane], i->bytes, MEMORY_WRITE);
        uint64_t sum = 0;
        memcpy(&sum, to, i->bytes);
        before[lane] = sum;
        sum += values[lane];
        memcpy(to, &sum, i->bytes);
    }
    count_access(m, lanes, addresses, i->bytes, NULL, MEMORY_WRITE);
    if (i->num_results)
        write_result(m, w, lanes, 0, i->result_type, before);
}

void access_global(machine *m, warp *w, uint32_t lanes) {
    lane_values addresses, space;
    const uint64_t *bases = read_source(m, w, lanes, 0, ADDRESS, space);
    for (int lane = 0; lane < LANES; lane++)
        addresses[lane] = bases[lane] + (uint64_t)m->running->offsets[0];
    if (m->running->operation == OP_LD_GLOBAL)
        load(m, w, lanes, addresses);
    else if (m->running->operation == OP_ST_GLOBAL)
        store(m, w, lanes, addresses);
    else
        add_to(m, w, lanes, addresses);
}
