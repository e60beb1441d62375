/* Shared memory of a CTA, and copies into it that are under way. */

#include <stdlib.h>
#include <string.h>

#include "machine.h"

static const type PLACE = {32, 0}, ADDRESS = {64, 0};

static void expect_place(machine *m, int lane, uint64_t place, uint32_t bytes) {
    if (place % bytes)
        machine_fail(m, MISALIGNED_ADDRESS, lane,
                     "%u bytes at 0x%llx of shared memory, which is no multiple", bytes,
                     (unsigned long long)place);
    if (place > m->shared_bytes || bytes > m->shared_bytes - place)
        machine_fail(m, ILLEGAL_ADDRESS, lane,
                     "%u bytes at 0x%llx are in no range: of shared memory the CTA has 0x%x bytes",
                     bytes, (unsigned long long)place, m->shared_bytes);
}

/* A byte may be read that was written by this warp, or by another before the last barrier. */
static void expect_readable(machine *m, const warp *w, int lane, uint32_t place, uint32_t bytes) {
    for (uint32_t at = place; at < place + bytes; at++) {
        shared_byte *byte = &m->shared_state[at];
        if (byte->pending)
            machine_fail(m, LAUNCH_FAILED, lane,
                         "read before wait_group: a copy to 0x%x of shared memory is under way",
                         at);
        if (byte->written_in == 0)
            machine_fail(m, ILLEGAL_ADDRESS, lane,
                         "the byte at 0x%x of shared memory was never written", at);
        if (byte->written_in == m->epoch && byte->written_by != w->index)
            machine_fail(m, LAUNCH_FAILED, lane,
                         "warp %u wrote 0x%x of shared memory, and no barrier came since",
                         byte->written_by, at);
        int other = byte->read_in == m->epoch && byte->read_by != w->index;
        byte->read_by = other ? SEVERAL_WARPS : (uint16_t)w->index;
        byte->read_in = m->epoch;
    }
}

/* A byte may be written that no other warp has read since the last barrier. */
static void expect_writable(machine *m, const warp *w, int lane, uint32_t place, uint32_t bytes) {
    for (uint32_t at = place; at < place + bytes; at++) {
        const shared_byte *byte = &m->shared_state[at];
        if (byte->pending)
            machine_fail(m, LAUNCH_FAILED, lane,
                         "written before wait_group: a copy to 0x%x of shared memory is under way",
                         at);
        if (byte->read_in == m->epoch && byte->read_by != w->index)
            machine_fail(m, LAUNCH_FAILED, lane,
                         "another warp read 0x%x of shared memory, and no barrier came since", at);
    }
}

static void mark_written(machine *m, const warp *w, uint32_t place, uint32_t bytes) {
    for (uint32_t at = place; at < place + bytes; at++) {
        m->shared_state[at].written_in = m->epoch;
        m->shared_state[at].written_by = (uint16_t)w->index;
    }
}

static void load(machine *m, warp *w, uint32_t lanes, const lane_values places) {
    const instruction *i = m->running;
    lane_values out[MOST_RESULTS];
    uint32_t element = i->type.bits / 8;
    for (int lane = 0; lane < LANES; lane++) {
        if (!(lanes >> lane & 1))
            continue;
        expect_place(m, lane, places[lane], i->bytes);
        expect_readable(m, w, lane, (uint32_t)places[lane], i->bytes);
        for (uint32_t e = 0; e < i->num_results; e++) {
            out[e][lane] = 0;
            memcpy(&out[e][lane], m->shared + places[lane] + e * element, element);
        }
    }
    for (uint32_t e = 0; e < i->num_results; e++)
        write_result(m, w, lanes, e, i->result_type, out[e]);
}

static void store(machine *m, warp *w, uint32_t lanes, const lane_values places) {
    const instruction *i = m->running;
    lane_values spaces[MOST_RESULTS];
    const uint64_t *values[MOST_RESULTS];
    uint32_t element = i->type.bits / 8, count = i->bytes / element;
    for (uint32_t e = 0; e < count; e++)
        values[e] = read_source(m, w, lanes, 1 + e, i->type, spaces[e]);
    for (int lane = 0; lane < LANES; lane++) {
        if (!(lanes >> lane & 1))
            continue;
        expect_place(m, lane, places[lane], i->bytes);
        expect_writable(m, w, lane, (uint32_t)places[lane], i->bytes);
        for (uint32_t e = 0; e < count; e++)
            memcpy(m->shared + places[lane] + e * element, &values[e][lane], element);
        mark_written(m, w, (uint32_t)places[lane], i->bytes);
    }
}

static void add_offset(const uint64_t *bases, int64_t offset, type as, lane_values into) {
    for (int lane = 0; lane < LANES; lane++)
        into[lane] = narrowed(bases[lane] + (uint64_t)offset, as);
}

void access_shared(machine *m, warp *w, uint32_t lanes) {
    lane_values places, space;
    add_offset(read_source(m, w, lanes, 0, PLACE, space), m->running->offsets[0], PLACE,
               places);
    if (m->running->operation == OP_LD_SHARED)
        load(m, w, lanes, places);
    else
        store(m, w, lanes, places);
}

static copy_in_flight *new_copy(machine *m, warp *w) {
    if (w->num_copies == w->most_copies) {
        uint32_t most = w->most_copies ? 2 * w->most_copies : 256;
        copy_in_flight *larger = realloc(w->copies, most * sizeof *larger);
        if (!larger)
            machine_fail(m, LAUNCH_FAILED, -1, "out of memory");
        w->copies = larger;
        w->most_copies = most;
    }
    return &w->copies[w->num_copies++];
}

/* What a copy reads is taken at once, and lands when it is waited for: hardware may take it at any
   time between. Bytes that it does not read become 0. */
void begin_copies(machine *m, warp *w, uint32_t lanes) {
    const instruction *i = m->running;
    lane_values places, addresses, spaces[3];
    add_offset(read_source(m, w, lanes, 0, PLACE, spaces[0]), i->offsets[0], PLACE, places);
    add_offset(read_source(m, w, lanes, 1, ADDRESS, spaces[1]), i->offsets[1], ADDRESS, addresses);
    const uint64_t *given = i->num_sources > 3
                                ? read_source(m, w, lanes, 3, (type){32, 0}, spaces[2]) : NULL;
    uint32_t moved[LANES] = {0}, readers = 0;
    char why[256];
    for (int lane = 0; lane < LANES; lane++) {
        if (!(lanes >> lane & 1))
            continue;
        moved[lane] = given ? (uint32_t)given[lane] : i->bytes;
        if (moved[lane] > i->bytes)
            machine_fail(m, LAUNCH_FAILED, lane, "a copy of %u bytes reads %u", i->bytes,
                         moved[lane]);
        expect_place(m, lane, places[lane], i->bytes);
        expect_writable(m, w, lane, (uint32_t)places[lane], i->bytes);
        if (addresses[lane] % i->bytes)
            machine_fail(m, MISALIGNED_ADDRESS, lane, "%u bytes at 0x%llx, which is no multiple",
                         i->bytes, (unsigned long long)addresses[lane]);
        copy_in_flight *copy = new_copy(m, w);
        *copy = (copy_in_flight){.place = (uint32_t)places[lane],
                                 .bytes = i->bytes,
                                 .lane = (uint32_t)lane,
                                 .group = w->groups[lane]};
        for (uint32_t at = copy->place; at < copy->place + i->bytes; at++)
            m->shared_state[at].pending = 1;
        if (moved[lane] == 0)
            continue;
        readers |= 1u << lane;
        const void *from = memory_reach(addresses[lane], moved[lane], MEMORY_READ, m->ordinal, why,
                                        sizeof why);
        if (!from)
            machine_fail(m, ILLEGAL_ADDRESS, lane, "read of %s", why);
        memcpy(copy->data, from, moved[lane]);
    }
    if (!readers)
        return;
    access_bytes brought = count_access(m, readers, addresses, i->bytes, moved, MEMORY_READ);
    /* The last of these copies stands for the bytes of all of them. */
    copy_in_flight *last = &w->copies[w->num_copies - 1];
    last->bytes_read = brought.bytes;
    last->round_trips = w->round_trips + (brought.host_bytes > 0);
    w->bytes_in_flight += brought.bytes;
    if (w->bytes_in_flight > w->most_bytes_in_flight)
        w->most_bytes_in_flight = w->bytes_in_flight;
}

void commit_copies(warp *w, uint32_t lanes) {
    for (int lane = 0; lane < LANES; lane++)
        w->groups[lane] += lanes >> lane & 1;
}

/* All groups of these lanes but so many of the last; without a number, what was not committed,
   too. */
void land_copies(machine *m, warp *w, uint32_t lanes) {
    const instruction *i = m->running;
    uint32_t kept = 0;
    for (uint32_t c = 0; c < w->num_copies; c++) {
        copy_in_flight *copy = &w->copies[c];
        int waits = lanes >> copy->lane & 1;
        if (i->num_sources == 1)
            waits = waits && copy->group + i->sources[0].value < w->groups[copy->lane];
        if (!waits) {
            w->copies[kept++] = *copy;
            continue;
        }
        memcpy(m->shared + copy->place, copy->data, copy->bytes);
        for (uint32_t at = copy->place; at < copy->place + copy->bytes; at++)
            m->shared_state[at].pending = 0;
        mark_written(m, w, copy->place, copy->bytes);
        w->bytes_in_flight -= copy->bytes_read;
        if (copy->round_trips > w->round_trips)
            w->round_trips = copy->round_trips;
    }
    w->num_copies = kept;
}
