/* What an execution came to. The order is that of the PTX: ptxas may move instructions. */

#include <string.h>

#include "machine.h"

enum { LINE_BYTES = 128, SLOTS = 64 };

/* Which of some numbers were met before: at most LANES of them. */
typedef struct {
    uint64_t numbers[SLOTS];
    uint8_t taken[SLOTS];
} number_set;

static int add_to(number_set *set, uint64_t number) {
    uint32_t slot = (uint32_t)(number * 0x9e3779b97f4a7c15ull >> 58);
    for (; set->taken[slot]; slot = (slot + 1) % SLOTS)
        if (set->numbers[slot] == number)
            return 0;
    set->taken[slot] = 1;
    set->numbers[slot] = number;
    return 1;
}

/* Accesses are aligned to their width, so that two of one width are the same bytes or none, and
   each lies in one line. */
access_bytes count_access(machine *m, uint32_t lanes, const lane_values addresses, uint32_t bytes,
                          const uint32_t *bytes_moved, memory_access kind) {
    ptx_counters *counters = m->counters;
    number_set words = {0}, lines = {0};
    access_bytes found = {0, 0};
    for (int lane = 0; lane < LANES; lane++) {
        if (!(lanes >> lane & 1))
            continue;
        uint64_t address = addresses[lane];
        counters->lines += (uint64_t)add_to(&lines, address / LINE_BYTES);
        if (!add_to(&words, address / bytes))
            continue;
        uint64_t moved = bytes_moved ? bytes_moved[lane] : bytes;
        found.bytes += moved;
        if (memory_of_device(address)->kind != MEMORY_DEVICE)
            found.host_bytes += moved;
    }
    counters->accesses++;
    counters->accesses_by_width[__builtin_ctz(bytes)] += (uint64_t)__builtin_popcount(lanes);
    if (kind == MEMORY_READ) {
        counters->bytes_read += found.bytes;
        counters->host_bytes_read += found.host_bytes;
    } else {
        counters->bytes_written += found.bytes;
        counters->host_bytes_written += found.host_bytes;
    }
    return found;
}

void count_load(warp *w, const instruction *issued, access_bytes brought) {
    int32_t first = -1;
    for (uint32_t e = 0; e < issued->num_results; e++) {
        if (issued->results[e].kind != OPERAND_REGISTER)
            continue;
        int32_t number = (int32_t)issued->results[e].value;
        first = first < 0 ? number : first;
        w->brought_by[number] = first;
    }
    if (first < 0)
        return;
    w->loads[first] = (load_in_flight){issued, brought.bytes,
                                       w->round_trips + (brought.host_bytes > 0)};
    w->bytes_in_flight += brought.bytes;
    if (w->bytes_in_flight > w->most_bytes_in_flight)
        w->most_bytes_in_flight = w->bytes_in_flight;
}

/* A warp issues in order: at the first use of what a load brings, all that follows waits for it. */
void count_use(warp *w, uint64_t number) {
    int32_t first = w->brought_by[number];
    if (first < 0)
        return;
    const load_in_flight *load = &w->loads[first];
    for (uint32_t e = 0; e < load->issued_by->num_results; e++)
        if (load->issued_by->results[e].kind == OPERAND_REGISTER)
            w->brought_by[load->issued_by->results[e].value] = -1;
    w->bytes_in_flight -= load->bytes;
    if (load->round_trips > w->round_trips)
        w->round_trips = load->round_trips;
}

/* Of one CTA, when it has ended. */
void count_cta(machine *m) {
    ptx_counters *counters = m->counters;
    uint64_t in_flight = 0, round_trips = 0, barriers = 0;
    for (uint32_t i = 0; i < m->num_warps; i++) {
        const warp *w = &m->warps[i];
        counters->instructions += w->instructions;
        in_flight += w->most_bytes_in_flight;
        round_trips = w->round_trips > round_trips ? w->round_trips : round_trips;
        barriers = w->barriers > barriers ? w->barriers : barriers;
    }
    if (in_flight > counters->most_bytes_in_flight)
        counters->most_bytes_in_flight = in_flight;
    if (round_trips > counters->host_round_trips)
        counters->host_round_trips = round_trips;
    if (barriers > counters->barriers)
        counters->barriers = barriers;
}
