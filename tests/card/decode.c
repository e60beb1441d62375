/* What the opcodes of PTX and their modifiers mean. What stands nowhere here is refused. */

#include <stdio.h>
#include <string.h>

#include "program.h"

enum { MOST_PARTS = 16, PART_BYTES = 24 };

/* "ld.global.cg.v2.b64" by its dots; each part is taken once, and none may be left. */
typedef struct {
    char names[MOST_PARTS][PART_BYTES];
    int count;
    uint32_t left;
} opcode_parts;

static int split(const char *opcode, opcode_parts *parts) {
    memset(parts, 0, sizeof *parts);
    while (*opcode) {
        size_t bytes = strcspn(opcode, ".");
        if (parts->count == MOST_PARTS || bytes >= PART_BYTES)
            return -1;
        memcpy(parts->names[parts->count], opcode, bytes);
        parts->left |= 1u << parts->count++;
        opcode += bytes + (opcode[bytes] == '.');
    }
    return 0;
}

static int take(opcode_parts *parts, const char *name) {
    for (int i = 0; i < parts->count; i++)
        if (parts->left >> i & 1 && strcmp(parts->names[i], name) == 0) {
            parts->left &= ~(1u << i);
            return 1;
        }
    return 0;
}

/* Which of the names, ended by NULL, comes next; -1: none. */
static int take_one_of(opcode_parts *parts, const char *const *names) {
    for (int i = 0; names[i]; i++)
        if (take(parts, names[i]))
            return i;
    return -1;
}

static void take_all(opcode_parts *parts, const char *const *names) {
    while (take_one_of(parts, names) >= 0) {
    }
}

static int take_type(opcode_parts *parts, type *into) {
    static const struct {
        const char *name;
        type type;
    } types[] = {
        {"pred", {1, 0}}, {"b8", {8, 0}},   {"u8", {8, 0}},   {"s8", {8, 1}},   {"b16", {16, 0}},
        {"u16", {16, 0}}, {"s16", {16, 1}}, {"b32", {32, 0}}, {"u32", {32, 0}}, {"s32", {32, 1}},
        {"b64", {64, 0}}, {"u64", {64, 0}}, {"s64", {64, 1}},
    };
    /* The first of those left: "cvt.u64.u32" has two, of which the first is the result's. */
    for (int i = 0; i < parts->count; i++)
        for (size_t t = 0; parts->left >> i & 1 && t < sizeof types / sizeof *types; t++)
            if (strcmp(parts->names[i], types[t].name) == 0) {
                parts->left &= ~(1u << i);
                *into = types[t].type;
                return 1;
            }
    return 0;
}

/* Operations of one type: so many results and sources, and bits of the result (0: of the type). */
typedef struct {
    const char *name;
    operation operation;
    uint8_t sources, result_bits;
} simple_opcode;

static const simple_opcode SIMPLE[] = {
    {"add", OP_ADD, 2, 0},   {"sub", OP_SUB, 2, 0},   {"div", OP_DIV, 2, 0},
    {"rem", OP_REM, 2, 0},   {"min", OP_MIN, 2, 0},   {"max", OP_MAX, 2, 0},
    {"abs", OP_ABS, 1, 0},   {"neg", OP_NEG, 1, 0},   {"and", OP_AND, 2, 0},
    {"or", OP_OR, 2, 0},     {"xor", OP_XOR, 2, 0},   {"not", OP_NOT, 1, 0},
    {"cnot", OP_CNOT, 1, 0}, {"lop3", OP_LOP3, 4, 0}, {"shl", OP_SHL, 2, 0},
    {"shr", OP_SHR, 2, 0},   {"bfe", OP_BFE, 3, 0},   {"bfi", OP_BFI, 4, 0},
    {"prmt", OP_PRMT, 3, 0}, {"popc", OP_POPC, 1, 32}, {"clz", OP_CLZ, 1, 32},
    {"brev", OP_BREV, 1, 0}, {"bfind", OP_BFIND, 1, 32}, {"selp", OP_SELP, 3, 0},
};

/* What caches are told changes no byte; nor does the scope of a plain access. */
static const char *const CACHING[] = {
    "ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc", "weak", "relaxed", "volatile", "cta", "gpu",
    "sys", "L1::evict_normal", "L1::evict_unchanged", "L1::evict_first", "L1::evict_last",
    "L1::no_allocate", "L2::evict_first", "L2::evict_last", "L2::evict_normal", "L2::cache_hint",
    "L2::64B", "L2::128B", "L2::256B", NULL,
};

static operand_counts counts_of(int results, int sources) {
    return (operand_counts){(uint8_t)results, (uint8_t)results, (uint8_t)sources, (uint8_t)sources};
}

static int decode_memory(opcode_parts *parts, instruction *into, operand_counts *counts) {
    static const char *const vectors[] = {"v2", "v4", NULL};
    static const char *const spaces[] = {"global", "shared", "shared::cta", "param", NULL};
    int load = take(parts, "ld");
    if (!load && !take(parts, "st"))
        return -1;
    int space = take_one_of(parts, spaces);
    if (space < 0 || !take_type(parts, &into->type) || into->type.bits == 1)
        return -1;
    if (space == 3) {
        into->operation = OP_LD_PARAM;
        *counts = counts_of(1, 1);
        return load ? 0 : -1;
    }
    int hint = 0;
    for (int i = 0; i < parts->count; i++)
        hint |= strcmp(parts->names[i], "L2::cache_hint") == 0;
    int elements = 2 * (take_one_of(parts, vectors) + 1);
    elements = elements ? elements : 1;
    take_all(parts, CACHING);
    into->bytes = (uint32_t)elements * into->type.bits / 8;
    if (into->bytes > 16)
        return -1;
    into->operation = space == 0 ? (load ? OP_LD_GLOBAL : OP_ST_GLOBAL)
                                 : (load ? OP_LD_SHARED : OP_ST_SHARED);
    *counts = load ? counts_of(elements, 1 + hint) : counts_of(0, 1 + elements + hint);
    return 0;
}

/* cp.async.cg.shared.global [to], [from], bytes{, bytes that are read}{, cache policy} */
/* A sum in memory: "red.global.gpu.relaxed.add.u64", or "atom" where what was there is wanted. */
static int decode_reduction(opcode_parts *parts, instruction *into, operand_counts *counts) {
    int wanted = take(parts, "atom");
    if ((!wanted && !take(parts, "red")) || !take(parts, "global") || !take(parts, "add") ||
        !take_type(parts, &into->type) || into->type.bits < 32)
        return -1;
    take_all(parts, CACHING);
    into->bytes = into->type.bits / 8u;
    into->operation = OP_RED_ADD;
    into->result_type = into->type;
    *counts = counts_of(wanted, 2);
    return 0;
}

static int decode_copy(opcode_parts *parts, instruction *into, operand_counts *counts) {
    if (!take(parts, "cp") || !take(parts, "async"))
        return -1;
    into->type = (type){64, 0};
    if (take(parts, "commit_group")) {
        into->operation = OP_CP_ASYNC_COMMIT;
        *counts = counts_of(0, 0);
    } else if (take(parts, "wait_group")) {
        into->operation = OP_CP_ASYNC_WAIT;
        *counts = counts_of(0, 1);
    } else if (take(parts, "wait_all")) {
        into->operation = OP_CP_ASYNC_WAIT;
        *counts = counts_of(0, 0);
    } else {
        if (!(take(parts, "shared") || take(parts, "shared::cta")) || !take(parts, "global"))
            return -1;
        into->mode = take(parts, "cg"); /* of 16 bytes alone */
        int hint = take(parts, "L2::cache_hint");
        take_all(parts, CACHING);
        into->operation = OP_CP_ASYNC;
        *counts = (operand_counts){0, 0, (uint8_t)(3 + hint), (uint8_t)(4 + hint)};
    }
    return 0;
}

static int decode_multiply(opcode_parts *parts, instruction *into, operand_counts *counts) {
    static const char *const halves[] = {"lo", "hi", "wide", NULL};
    static const operation multiply[] = {OP_MUL_LO, OP_MUL_HI, OP_MUL_WIDE};
    static const operation add_too[] = {OP_MAD_LO, OP_MAD_HI, OP_MAD_WIDE};
    int adds = take(parts, "mad");
    int half = adds || take(parts, "mul") ? take_one_of(parts, halves) : -1;
    if (half < 0 || !take_type(parts, &into->type) || into->type.bits < 16)
        return -1;
    into->result_type = into->type;
    if (half == 2) {
        if (into->type.bits == 64)
            return -1;
        into->result_type.bits = (uint8_t)(2 * into->type.bits);
    }
    into->operation = adds ? add_too[half] : multiply[half];
    *counts = counts_of(1, adds ? 3 : 2);
    return 0;
}

static int decode_compare(opcode_parts *parts, instruction *into, operand_counts *counts) {
    static const char *const names[] = {"eq", "ne", "lt", "le", "gt", "ge",
                                        "lo", "ls", "hi", "hs", NULL};
    static const char *const combinations[] = {"and", "or", "xor", NULL};
    if (!take(parts, "setp"))
        return -1;
    int compared = take_one_of(parts, names);
    into->combine = (uint8_t)(take_one_of(parts, combinations) + 1);
    if (compared < 0 || !take_type(parts, &into->type) || into->type.bits < 16)
        return -1;
    into->mode = (uint8_t)(compared < 6 ? compared : compared - 4); /* lo is lt, unsigned */
    into->operation = OP_SETP;
    into->result_type = (type){1, 0};
    int sources = into->combine ? 3 : 2;
    *counts = (operand_counts){1, 2, (uint8_t)sources, (uint8_t)sources};
    return 0;
}

static int decode_exchange(opcode_parts *parts, instruction *into, operand_counts *counts) {
    static const char *const shuffles[] = {"up", "down", "bfly", "idx", NULL};
    static const char *const votes[] = {"all", "any", "uni", "ballot", NULL};
    if (take(parts, "activemask")) {
        into->operation = OP_ACTIVEMASK;
        *counts = counts_of(1, 0);
    } else if (take(parts, "shfl")) {
        int mode = take(parts, "sync") ? take_one_of(parts, shuffles) : -1;
        if (mode < 0)
            return -1;
        into->operation = OP_SHFL;
        into->mode = (uint8_t)mode;
        *counts = (operand_counts){1, 2, 4, 4};
    } else if (take(parts, "vote")) {
        int mode = take(parts, "sync") ? take_one_of(parts, votes) : -1;
        if (mode < 0)
            return -1;
        into->operation = OP_VOTE;
        into->mode = (uint8_t)mode;
        *counts = counts_of(1, 2);
    } else {
        return -1;
    }
    if (!take_type(parts, &into->result_type))
        return -1;
    into->type = into->result_type;
    return 0;
}

static int decode_flow(opcode_parts *parts, instruction *into, operand_counts *counts) {
    into->type = (type){32, 0};
    *counts = counts_of(0, 0);
    if (take(parts, "bra")) {
        take(parts, "uni");
        into->operation = OP_BRA;
    } else if (take(parts, "ret") || take(parts, "exit")) {
        take(parts, "uni");
        into->operation = OP_EXIT;
    } else if (take(parts, "trap")) {
        into->operation = OP_TRAP;
    } else if (take(parts, "bar") || take(parts, "barrier")) {
        int warp = take(parts, "warp");
        take(parts, "cta");
        take(parts, "aligned");
        if (!take(parts, "sync"))
            return -1;
        into->operation = warp ? OP_BAR_WARP : OP_BAR_SYNC;
        *counts = (operand_counts){0, 0, 1, (uint8_t)(warp ? 1 : 2)};
    } else if (take(parts, "membar") || take(parts, "fence") || take(parts, "prefetch") ||
               take(parts, "nanosleep") || take(parts, "createpolicy")) {
        /* What they say of order, caches and time changes nothing here. */
        into->operation = OP_NOTHING;
        *counts = (operand_counts){0, MOST_RESULTS, 0, MOST_SOURCES};
        parts->left = 0;
    } else {
        return -1;
    }
    return 0;
}

static int decode_simple(opcode_parts *parts, instruction *into, operand_counts *counts) {
    if (take(parts, "mov")) {
        into->operation = OP_MOV; /* the parser makes a pack or an unpack of one with braces */
        *counts = (operand_counts){1, 4, 1, 4};
        int known = take_type(parts, &into->type);
        into->result_type = into->type;
        return known ? 0 : -1;
    }
    if (take(parts, "cvta")) {
        into->operation = OP_MOV;
        *counts = counts_of(1, 1);
        int known = take(parts, "to") && take(parts, "global") && take_type(parts, &into->type);
        into->result_type = into->type;
        return known ? 0 : -1;
    }
    if (take(parts, "cvt")) {
        into->operation = OP_CVT;
        *counts = counts_of(1, 1);
        return take_type(parts, &into->result_type) && take_type(parts, &into->type) ? 0 : -1;
    }
    if (take(parts, "shf")) {
        into->operation = take(parts, "l") ? OP_SHF_L : OP_SHF_R;
        if (into->operation == OP_SHF_R && !take(parts, "r"))
            return -1;
        into->mode = (uint8_t)take(parts, "wrap");
        int known = (into->mode || take(parts, "clamp")) && take_type(parts, &into->type);
        into->result_type = into->type;
        *counts = counts_of(1, 3);
        return known && into->type.bits == 32 ? 0 : -1;
    }
    if (take(parts, "s16x2") || take(parts, "u16x2")) { /* halves of a word, apart */
        into->operation = OP_ADD_HALVES;
        into->type = into->result_type = (type){32, 0};
        *counts = counts_of(1, 2);
        return take(parts, "add") ? 0 : -1;
    }
    for (size_t i = 0; i < sizeof SIMPLE / sizeof *SIMPLE; i++) {
        if (!take(parts, SIMPLE[i].name))
            continue;
        if (!take_type(parts, &into->type) || into->type.bits == 8)
            return -1;
        into->operation = SIMPLE[i].operation;
        if (into->type.bits == 1 && (into->operation < OP_AND || into->operation > OP_NOT))
            return -1;
        into->result_type = into->type;
        if (SIMPLE[i].result_bits)
            into->result_type = (type){SIMPLE[i].result_bits, 0};
        *counts = counts_of(1, SIMPLE[i].sources);
        return 0;
    }
    return -1;
}

int decode_opcode(const char *opcode, instruction *into, operand_counts *counts, char *why,
                  size_t why_bytes) {
    typedef int decoder(opcode_parts *, instruction *, operand_counts *);
    static decoder *const decoders[] = {decode_simple,  decode_multiply, decode_compare,
                                        decode_memory,  decode_reduction, decode_copy,     decode_exchange,
                                        decode_flow};
    opcode_parts parts;
    for (size_t i = 0; i < sizeof decoders / sizeof *decoders; i++) {
        if (split(opcode, &parts) != 0)
            break;
        instruction tried = *into;
        if (decoders[i](&parts, &tried, counts) == 0 && parts.left == 0) {
            if (tried.operation == OP_LD_GLOBAL || tried.operation == OP_LD_SHARED ||
                tried.operation == OP_LD_PARAM)
                tried.result_type = tried.type;
            *into = tried;
            return 0;
        }
    }
    snprintf(why, why_bytes, "%s is not known", opcode);
    return -1;
}
