/* What each lane computes of its own registers. */

#include "machine.h"

/* What the source of this number is read as. */
static type source_type(const instruction *i, uint32_t source) {
    static const type word = {32, 0}, predicate = {1, 0};
    switch (i->operation) {
    case OP_MAD_WIDE:
        return source == 2 ? i->result_type : i->type;
    case OP_SHL:
    case OP_SHR:
        return source == 1 ? word : i->type;
    case OP_BFE:
        return source >= 1 ? word : i->type;
    case OP_BFI:
        return source >= 2 ? word : i->type;
    case OP_SELP:
    case OP_SETP:
        return source == 2 ? predicate : i->type;
    default:
        return i->type;
    }
}

static uint64_t high_product(uint64_t a, uint64_t b, type as) {
    if (as.bits < 64)
        return a * b >> as.bits;
    return as.is_signed ? (uint64_t)((__int128)(int64_t)a * (int64_t)b >> 64)
                        : (uint64_t)((unsigned __int128)a * b >> 64);
}

static int is_less(uint64_t a, uint64_t b, type as) {
    return as.is_signed ? (int64_t)a < (int64_t)b : a < b;
}

static int compares(uint64_t a, uint64_t b, type as, comparison how) {
    switch (how) {
    case COMPARE_EQ:
        return a == b;
    case COMPARE_NE:
        return a != b;
    case COMPARE_LT:
        return is_less(a, b, as);
    case COMPARE_LE:
        return !is_less(b, a, as);
    case COMPARE_GT:
        return is_less(b, a, as);
    default:
        return !is_less(a, b, as);
    }
}

static uint64_t combined(int holds, uint64_t with, combination how) {
    switch (how) {
    case WITH_AND:
        return (uint64_t)holds & with;
    case WITH_OR:
        return (uint64_t)holds | with;
    case WITH_XOR:
        return (uint64_t)holds ^ with;
    default:
        return (uint64_t)holds;
    }
}

static uint64_t shifted_right(uint64_t a, uint64_t count, type as) {
    if (as.is_signed)
        return (uint64_t)((int64_t)a >> (count > 63 ? 63 : count));
    return count > 63 ? 0 : a >> count;
}

/* A mask of `count` bits from `first` on, of those that a type has. */
static uint64_t bit_field(uint64_t first, uint64_t count, uint32_t bits) {
    if (first >= bits || count == 0)
        return 0;
    count = count > bits - first ? bits - first : count;
    return (count == 64 ? ~0ull : (1ull << count) - 1) << first;
}

static uint64_t extracted(uint64_t a, uint64_t first, uint64_t count, type as) {
    first &= 255;
    count &= 255;
    uint64_t field = bit_field(first, count, as.bits);
    uint64_t value = field ? (a & field) >> first : 0;
    uint64_t last = first + count - 1 < as.bits ? first + count - 1 : as.bits - 1u;
    if (!as.is_signed || count == 0 || !(a >> last & 1))
        return value;
    uint64_t have = first < as.bits ? last - first + 1 : 0;
    return have > 63 ? value : value | ~0ull << have;
}

static uint64_t inserted(uint64_t a, uint64_t b, uint64_t first, uint64_t count, type as) {
    uint64_t field = bit_field(first & 255, count & 255, as.bits);
    return field ? (b & ~field) | (a << (first & 255) & field) : b;
}

static uint64_t permuted(uint64_t a, uint64_t b, uint64_t selector) {
    uint64_t bytes = a | b << 32, made = 0;
    for (int i = 0; i < 4; i++) {
        uint64_t chosen = selector >> 4 * i & 15;
        uint64_t byte = bytes >> 8 * (chosen & 7) & 255;
        if (chosen & 8) /* its sign, eight times */
            byte = byte & 128 ? 255 : 0;
        made |= byte << 8 * i;
    }
    return made;
}

static uint64_t looked_up(uint64_t a, uint64_t b, uint64_t c, uint64_t table) {
    uint64_t made = 0;
    for (int row = 0; row < 8; row++)
        if (table >> row & 1)
            made |= (row & 4 ? a : ~a) & (row & 2 ? b : ~b) & (row & 1 ? c : ~c);
    return made;
}

static uint64_t reversed(uint64_t a, uint32_t bits) {
    uint64_t made = 0;
    for (uint32_t bit = 0; bit < bits; bit++)
        made |= (a >> bit & 1) << (bits - 1 - bit);
    return made;
}

static uint64_t funnel_count(uint64_t count, int wraps) {
    return wraps ? count & 31 : count > 32 ? 32 : count;
}

static uint64_t highest_bit(uint64_t a, type as) {
    if (as.is_signed && (int64_t)a < 0)
        a = ~a;
    return a ? 63u - (uint32_t)__builtin_clzll(a) : ~0ull;
}

static void divide(machine *m, uint32_t lanes, const uint64_t *a, const uint64_t *b,
                   lane_values out) {
    const instruction *i = m->running;
    for (int lane = 0; lane < LANES; lane++) {
        if (!(lanes >> lane & 1))
            continue;
        if (b[lane] == 0)
            machine_fail(m, LAUNCH_FAILED, lane, "a division by 0, whose result is not defined");
        int remainder = i->operation == OP_REM;
        if (!i->type.is_signed)
            out[lane] = remainder ? a[lane] % b[lane] : a[lane] / b[lane];
        else if (b[lane] == ~0ull) /* the least number by -1 is itself */
            out[lane] = remainder ? 0 : -a[lane];
        else
            out[lane] = (uint64_t)(remainder ? (int64_t)a[lane] % (int64_t)b[lane]
                                             : (int64_t)a[lane] / (int64_t)b[lane]);
    }
}

static void load_parameter(const machine *m, const instruction *i, lane_values out) {
    uint64_t value = 0;
    __builtin_memcpy(&value, m->parameters + i->sources[0].value, i->type.bits / 8);
    for (int lane = 0; lane < LANES; lane++)
        out[lane] = narrowed(value, i->type);
}

/* Values of several parts: the first is lowest. */
static void pack(machine *m, warp *w, uint32_t lanes) {
    const instruction *i = m->running;
    lane_values out = {0}, space;
    for (uint32_t part = 0; part < i->num_sources; part++) {
        const uint64_t *values = read_source(m, w, lanes, part, i->type, space);
        for (int lane = 0; lane < LANES; lane++)
            out[lane] |= values[lane] << part * i->type.bits;
    }
    write_result(m, w, lanes, 0, i->result_type, out);
}

static void unpack(machine *m, warp *w, uint32_t lanes) {
    const instruction *i = m->running;
    lane_values out, space;
    const uint64_t *values = read_source(m, w, lanes, 0, i->type, space);
    for (uint32_t part = i->num_results; part-- > 0;) {
        for (int lane = 0; lane < LANES; lane++)
            out[lane] = values[lane] >> part * i->result_type.bits;
        write_result(m, w, lanes, part, i->result_type, out);
    }
}

static void compare(machine *m, warp *w, uint32_t lanes, const uint64_t *a, const uint64_t *b,
                    const uint64_t *c) {
    const instruction *i = m->running;
    lane_values out[2];
    for (int lane = 0; lane < LANES; lane++) {
        int holds = compares(a[lane], b[lane], i->type, (comparison)i->mode);
        uint64_t with = i->combine ? c[lane] ^ i->negated : 0;
        out[0][lane] = combined(holds, with, (combination)i->combine);
        out[1][lane] = combined(!holds, with, (combination)i->combine);
    }
    for (uint32_t result = 0; result < i->num_results; result++)
        write_result(m, w, lanes, result, i->result_type, out[result]);
}

#define EACH_LANE(value)                                                                           \
    for (int lane = 0; lane < LANES; lane++)                                                       \
        out[lane] = (value);                                                                       \
    break

void compute(machine *m, warp *w, uint32_t lanes) {
    const instruction *i = m->running;
    type as = i->type;
    if (i->operation == OP_PACK) {
        pack(m, w, lanes);
        return;
    }
    if (i->operation == OP_UNPACK) {
        unpack(m, w, lanes);
        return;
    }
    lane_values spaces[4], out = {0};
    const uint64_t *sources[4] = {0};
    for (uint32_t s = 0; s < i->num_sources; s++)
        sources[s] = read_source(m, w, lanes, s, source_type(i, s), spaces[s]);
    const uint64_t *a = sources[0], *b = sources[1], *c = sources[2], *d = sources[3];
    switch (i->operation) {
    case OP_MOV:
    case OP_CVT:
        EACH_LANE(a[lane]);
    case OP_ADD_HALVES:
        EACH_LANE(((a[lane] + b[lane]) & 0xffff) | (((a[lane] >> 16) + (b[lane] >> 16)) << 16));
    case OP_ADD:
        EACH_LANE(a[lane] + b[lane]);
    case OP_SUB:
        EACH_LANE(a[lane] - b[lane]);
    case OP_MUL_LO:
    case OP_MUL_WIDE:
        EACH_LANE(a[lane] * b[lane]);
    case OP_MUL_HI:
        EACH_LANE(high_product(a[lane], b[lane], as));
    case OP_MAD_LO:
    case OP_MAD_WIDE:
        EACH_LANE(a[lane] * b[lane] + c[lane]);
    case OP_MAD_HI:
        EACH_LANE(high_product(a[lane], b[lane], as) + c[lane]);
    case OP_DIV:
    case OP_REM:
        divide(m, lanes, a, b, out);
        break;
    case OP_MIN:
        EACH_LANE(is_less(a[lane], b[lane], as) ? a[lane] : b[lane]);
    case OP_MAX:
        EACH_LANE(is_less(a[lane], b[lane], as) ? b[lane] : a[lane]);
    case OP_ABS:
        EACH_LANE((int64_t)a[lane] < 0 ? -a[lane] : a[lane]);
    case OP_NEG:
        EACH_LANE(-a[lane]);
    case OP_AND:
        EACH_LANE(a[lane] & b[lane]);
    case OP_OR:
        EACH_LANE(a[lane] | b[lane]);
    case OP_XOR:
        EACH_LANE(a[lane] ^ b[lane]);
    case OP_NOT:
        EACH_LANE(~a[lane]);
    case OP_CNOT:
        EACH_LANE(a[lane] == 0);
    case OP_LOP3:
        EACH_LANE(looked_up(a[lane], b[lane], c[lane], d[lane]));
    case OP_SHL:
        EACH_LANE(b[lane] > 63 ? 0 : a[lane] << b[lane]);
    case OP_SHR:
        EACH_LANE(shifted_right(a[lane], b[lane], as));
    case OP_SHF_L: /* the low half first */
        EACH_LANE((a[lane] | b[lane] << 32) << funnel_count(c[lane], i->mode) >> 32);
    case OP_SHF_R:
        EACH_LANE((a[lane] | b[lane] << 32) >> funnel_count(c[lane], i->mode));
    case OP_BFE:
        EACH_LANE(extracted(a[lane], b[lane], c[lane], as));
    case OP_BFI:
        EACH_LANE(inserted(a[lane], b[lane], c[lane], d[lane], as));
    case OP_PRMT:
        EACH_LANE(permuted(a[lane], b[lane], c[lane]));
    case OP_POPC:
        EACH_LANE((uint64_t)__builtin_popcountll(a[lane]));
    case OP_CLZ:
        EACH_LANE(a[lane] ? (uint64_t)__builtin_clzll(a[lane]) - (64u - as.bits) : as.bits);
    case OP_BREV:
        EACH_LANE(reversed(a[lane], as.bits));
    case OP_BFIND:
        EACH_LANE(highest_bit(a[lane], as));
    case OP_SELP:
        EACH_LANE(c[lane] ? a[lane] : b[lane]);
    case OP_LD_PARAM:
        load_parameter(m, i, out);
        break;
    default: /* OP_SETP */
        compare(m, w, lanes, a, b, c);
        return;
    }
    write_result(m, w, lanes, 0, i->result_type, out);
}
