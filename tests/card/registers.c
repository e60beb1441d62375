/* What lanes read and write: registers, constants and special registers. */

#include <string.h>

#include "machine.h"

static uint64_t special_value(const machine *m, const warp *w, uint64_t which, uint32_t lane) {
    uint32_t thread = w->index * LANES + lane, x = m->block[0], y = m->block[1];
    uint32_t bit = 1u << lane;
    switch ((special_register)which) {
    case SPECIAL_TID_X:
        return thread % x;
    case SPECIAL_TID_Y:
        return thread / x % y;
    case SPECIAL_TID_Z:
        return thread / x / y;
    case SPECIAL_LANEID:
        return lane;
    case SPECIAL_WARPID:
        return w->index;
    case SPECIAL_NWARPID:
        return m->num_warps;
    case SPECIAL_LANEMASK_EQ:
        return bit;
    case SPECIAL_LANEMASK_LT:
        return bit - 1;
    case SPECIAL_LANEMASK_LE:
        return bit | (bit - 1);
    case SPECIAL_LANEMASK_GT:
        return ~(bit | (bit - 1));
    case SPECIAL_LANEMASK_GE:
        return ~(bit - 1);
    case SPECIAL_DYNAMIC_SHARED:
        return m->dynamic_shared_at;
    default:
        if (which >= SPECIAL_NCTAID_X)
            return m->grid[which - SPECIAL_NCTAID_X];
        if (which >= SPECIAL_CTAID_X)
            return m->cta[which - SPECIAL_CTAID_X];
        return m->block[which - SPECIAL_NTID_X];
    }
}

static const uint64_t *read_register(machine *m, warp *w, uint32_t lanes, uint64_t number) {
    uint32_t unwritten = lanes & ~w->written[number];
    if (unwritten)
        machine_fail(m, LAUNCH_FAILED, __builtin_ctz(unwritten),
                     "register %s is read before it was written",
                     m->function->registers[number].name);
    count_use(w, number);
    return w->values[number];
}

const uint64_t *read_source(machine *m, warp *w, uint32_t lanes, uint32_t source, type as,
                            lane_values space) {
    operand from = m->running->sources[source];
    if (from.kind == OPERAND_REGISTER) {
        const uint64_t *values = read_register(m, w, lanes, from.value);
        if (!as.is_signed && m->function->registers[from.value].bits <= as.bits)
            return values;
        for (int lane = 0; lane < LANES; lane++)
            space[lane] = narrowed(values[lane], as);
        return space;
    }
    for (uint32_t lane = 0; lane < LANES; lane++)
        space[lane] = narrowed(from.kind == OPERAND_SPECIAL ? special_value(m, w, from.value, lane)
                                                            : from.value, as);
    return space;
}

void write_result(machine *m, warp *w, uint32_t lanes, uint32_t result, type as,
                  const lane_values values) {
    operand to = m->running->results[result];
    if (to.kind != OPERAND_REGISTER)
        return;
    type whole = {m->function->registers[to.value].bits, 0};
    uint64_t *into = w->values[to.value];
    count_use(w, to.value); /* what is on its way there comes first */
    w->written[to.value] |= lanes;
    if (lanes == (uint32_t)ALL_LANES)
        for (int lane = 0; lane < LANES; lane++)
            into[lane] = narrowed(narrowed(values[lane], as), whole);
    else
        for (int lane = 0; lane < LANES; lane++)
            if (lanes >> lane & 1)
                into[lane] = narrowed(narrowed(values[lane], as), whole);
}

uint32_t guarded_lanes(machine *m, warp *w, uint32_t lanes) {
    int32_t guard = m->running->guard;
    if (guard < 0)
        return lanes;
    const uint64_t *holds = read_register(m, w, lanes, (uint64_t)guard);
    uint32_t set = 0;
    for (int lane = 0; lane < LANES; lane++)
        set |= (uint32_t)holds[lane] << lane;
    return lanes & (m->running->guard_negated ? ~set : set);
}
