/* What lanes of a warp tell each other. */

#include "machine.h"

/* Waits for the lanes of a mask: all of them are here, or no hardware would say what comes. */
static void expect_lanes(machine *m, uint32_t lanes, uint32_t wanted, int lane) {
    if (!(wanted >> lane & 1))
        machine_fail(m, LAUNCH_FAILED, lane, "the lane is not in its own mask 0x%x", wanted);
    if (wanted & ~lanes)
        machine_fail(m, LAUNCH_FAILED, lane, "lanes 0x%x of the mask 0x%x are not here",
                     wanted & ~lanes, wanted);
}

/* shfl.sync.mode.b32 d|p, a, b, c, mask: the value `a` of the lane that `b` says, within the
   segment that `c` says. */
static void shuffle(machine *m, warp *w, uint32_t lanes) {
    const instruction *i = m->running;
    static const type word = {32, 0};
    lane_values spaces[4], out[2] = {0};
    const uint64_t *sources[4];
    for (uint32_t s = 0; s < 4; s++)
        sources[s] = read_source(m, w, lanes, s, word, spaces[s]);
    for (int lane = 0; lane < LANES; lane++) {
        if (!(lanes >> lane & 1))
            continue;
        expect_lanes(m, lanes, (uint32_t)sources[3][lane], lane);
        int by = (int)(sources[1][lane] & 31), clamp = (int)(sources[2][lane] & 31);
        int segment = (int)(sources[2][lane] >> 8 & 31);
        int least = lane & segment, most = least | (clamp & ~segment), from, within;
        switch ((shuffle_mode)i->mode) {
        case SHUFFLE_UP:
            from = lane - by;
            within = from >= most;
            break;
        case SHUFFLE_DOWN:
            from = lane + by;
            within = from <= most;
            break;
        case SHUFFLE_BUTTERFLY:
            from = lane ^ by;
            within = from <= most;
            break;
        default:
            from = least | (by & ~segment);
            within = from <= most;
        }
        from = within ? from : lane;
        if (!(lanes >> from & 1))
            machine_fail(m, LAUNCH_FAILED, lane, "lane %d, whose value is taken, is not here",
                         from);
        out[0][lane] = sources[0][from];
        out[1][lane] = (uint64_t)within;
    }
    write_result(m, w, lanes, 0, word, out[0]);
    if (i->num_results == 2)
        write_result(m, w, lanes, 1, (type){1, 0}, out[1]);
}

static void vote(machine *m, warp *w, uint32_t lanes) {
    const instruction *i = m->running;
    lane_values spaces[2], out = {0};
    const uint64_t *holds = read_source(m, w, lanes, 0, (type){1, 0}, spaces[0]);
    const uint64_t *masks = read_source(m, w, lanes, 1, (type){32, 0}, spaces[1]);
    for (int lane = 0; lane < LANES; lane++) {
        uint32_t wanted = (uint32_t)masks[lane], votes = 0;
        if (!(lanes >> lane & 1))
            continue;
        expect_lanes(m, lanes, wanted, lane);
        for (int other = 0; other < LANES; other++)
            votes |= (uint32_t)(holds[other] & (wanted >> other & 1)) << other;
        switch ((vote_mode)i->mode) {
        case VOTE_ALL:
            out[lane] = votes == wanted;
            break;
        case VOTE_ANY:
            out[lane] = votes != 0;
            break;
        case VOTE_UNIFORM:
            out[lane] = votes == 0 || votes == wanted;
            break;
        default:
            out[lane] = votes;
        }
    }
    write_result(m, w, lanes, 0, i->result_type, out);
}

void exchange(machine *m, warp *w, uint32_t lanes) {
    lane_values out;
    switch (m->running->operation) {
    case OP_SHFL:
        shuffle(m, w, lanes);
        break;
    case OP_VOTE:
        vote(m, w, lanes);
        break;
    default: /* OP_ACTIVEMASK */
        for (int lane = 0; lane < LANES; lane++)
            out[lane] = lanes;
        write_result(m, w, lanes, 0, m->running->result_type, out);
    }
}
