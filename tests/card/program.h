/* A module of PTX as the machine runs it: registers numbered, operands decoded. */
#ifndef CARD_PROGRAM_H
#define CARD_PROGRAM_H

#include <stdint.h>

#include "ptx.h"

enum { MOST_RESULTS = 4, MOST_SOURCES = 6 };
enum {
    MOST_SHARED_BYTES = 227 * 1024, /* of a CTA on sm_90 and sm_100; sm_80 has 163 KiB */
    MOST_REGISTERS = 1 << 16,       /* of a function: of PTX, which has not dealt them out yet */
};

typedef enum {
    OPERAND_REGISTER,
    OPERAND_IMMEDIATE,
    OPERAND_SPECIAL, /* %tid.x and the like: a special_register */
    OPERAND_SINK,    /* _ : a result that nobody wants */
} operand_kind;

typedef enum {
    SPECIAL_TID_X, /* three axes each, in this order */
    SPECIAL_TID_Y,
    SPECIAL_TID_Z,
    SPECIAL_NTID_X,
    SPECIAL_NTID_Y,
    SPECIAL_NTID_Z,
    SPECIAL_CTAID_X,
    SPECIAL_CTAID_Y,
    SPECIAL_CTAID_Z,
    SPECIAL_NCTAID_X,
    SPECIAL_NCTAID_Y,
    SPECIAL_NCTAID_Z,
    SPECIAL_LANEID,
    SPECIAL_WARPID,
    SPECIAL_NWARPID,
    SPECIAL_LANEMASK_EQ,
    SPECIAL_LANEMASK_LT,
    SPECIAL_LANEMASK_LE,
    SPECIAL_LANEMASK_GT,
    SPECIAL_LANEMASK_GE,
    SPECIAL_DYNAMIC_SHARED, /* where the launch's shared memory begins */
} special_register;

typedef struct {
    operand_kind kind;
    uint64_t value; /* number of the register, its immediate, or special_register */
} operand;

typedef enum {
    /* computed lane by lane: compute.c */
    OP_MOV, OP_PACK, OP_UNPACK, OP_CVT, OP_ADD, OP_ADD_HALVES, OP_SUB, OP_MUL_LO, OP_MUL_HI,
    OP_MUL_WIDE, OP_MAD_LO, OP_MAD_HI, OP_MAD_WIDE, OP_DIV, OP_REM, OP_MIN, OP_MAX, OP_ABS, OP_NEG, OP_AND,
    OP_OR, OP_XOR, OP_NOT, OP_CNOT, OP_LOP3, OP_SHL, OP_SHR, OP_SHF_L, OP_SHF_R, OP_BFE, OP_BFI,
    OP_PRMT, OP_POPC, OP_CLZ, OP_BREV, OP_BFIND, OP_SETP, OP_SELP, OP_LD_PARAM,
    /* between the lanes of a warp: exchange.c */
    OP_SHFL, OP_VOTE, OP_ACTIVEMASK,
    /* memory: access.c, shared.c */
    OP_LD_GLOBAL, OP_ST_GLOBAL, OP_RED_ADD, OP_LD_SHARED, OP_ST_SHARED, OP_CP_ASYNC,
    OP_CP_ASYNC_COMMIT, OP_CP_ASYNC_WAIT,
    /* where a warp goes on: execute.c */
    OP_BRA, OP_EXIT, OP_BAR_SYNC, OP_BAR_WARP, OP_TRAP, OP_NOTHING,
} operation;

typedef enum { COMPARE_EQ, COMPARE_NE, COMPARE_LT, COMPARE_LE, COMPARE_GT, COMPARE_GE } comparison;
typedef enum { WITH_NOTHING, WITH_AND, WITH_OR, WITH_XOR } combination;
typedef enum { SHUFFLE_UP, SHUFFLE_DOWN, SHUFFLE_BUTTERFLY, SHUFFLE_INDEX } shuffle_mode;
typedef enum { VOTE_ALL, VOTE_ANY, VOTE_UNIFORM, VOTE_BALLOT } vote_mode;

typedef struct {
    uint8_t bits; /* 1 (a predicate), 8, 16, 32, 64 */
    uint8_t is_signed;
} type;

typedef struct {
    operation operation;
    type type;        /* that sources are read as; of memory: of one element */
    type result_type; /* that results are written as */
    uint8_t mode;     /* comparison, shuffle_mode, vote_mode; of shf: whether it wraps */
    uint8_t combine;  /* of setp: combination with a third source */
    uint8_t negated;  /* of setp: whether that is !%p */
    uint8_t num_results, num_sources;
    uint8_t guard_negated;
    int32_t guard; /* number of a predicate; -1: none */
    operand results[MOST_RESULTS];
    operand sources[MOST_SOURCES]; /* of memory: the address first */
    int64_t offsets[2]; /* added to the first and the second address among the sources */
    uint32_t bytes;     /* of one lane's access */
    uint32_t target;    /* of bra: number of an instruction */
    uint32_t line;      /* in the text of the module, from 1 */
    char *text;
} instruction;

typedef struct {
    char *name;
    uint8_t bits;
} register_declaration;

typedef struct {
    char *name;
    uint32_t offset, bytes; /* in the block of all parameters */
} parameter;

struct ptx_function {
    char *name;
    parameter *parameters;
    uint32_t num_parameters, parameter_bytes;
    register_declaration *registers;
    uint32_t num_registers;
    instruction *code; /* ends with OP_EXIT */
    uint32_t num_instructions;
    uint32_t static_shared_bytes;
    uint32_t threads;  /* of .reqntid or .maxntid */
    uint8_t exactly;   /* .reqntid */
};

struct ptx_module {
    ptx_function **functions;
    uint32_t num_functions;
};

typedef struct {
    uint8_t least_results, most_results, least_sources, most_sources;
} operand_counts;

/* Fills in what an opcode with its modifiers says: "ld.global.cg.v2.b64". 0, or -1 with the reason
   in `why`. `counts`: how many operands it has, those of vectors one by one. */
int decode_opcode(const char *opcode, instruction *into, operand_counts *counts, char *why,
                  size_t why_bytes);

#endif
