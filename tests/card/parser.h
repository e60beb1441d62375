/* Reading the text of a module: what its parts share. */
#ifndef CARD_PARSER_H
#define CARD_PARSER_H

#include <setjmp.h>

#include "program.h"
#include "tokens.h"

enum { DYNAMIC = -1 };

/* `.reg .b32 %r<55>`: registers %r0 to %r54; `.reg .b32 sum`: one. Known to the end of its
   braces. */
typedef struct {
    char *prefix;
    uint32_t count, first; /* count 0: one register, of just this name */
    int depth;
} register_range;

typedef struct {
    char *name;
    int64_t place; /* in shared memory of a CTA, or DYNAMIC */
} shared_variable;

typedef struct {
    char *name;
    uint32_t place; /* number of an instruction */
} label;

typedef struct {
    token_reader reader;
    ptx_module *module;
    ptx_function *function; /* that is read */
    register_range *ranges;
    shared_variable *variables;
    label *labels;
    label *jumps; /* instructions that go to the label of this name */
    uint32_t num_ranges, num_variables, num_labels, num_jumps;
    uint32_t shared_bytes;
    int depth;
    jmp_buf failed;
    char *why;
    size_t why_bytes;
} parser;

/* parser.c. Each of these ends the reading where it fails, with the reason in `why`. */
_Noreturn void parser_fail(parser *state, uint32_t line, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
/* Room for one more element behind `count` of them; capacity doubles at powers of two. */
void *grown(parser *state, void *array, uint32_t count, size_t element_bytes);
char *copied(parser *state, const char *text, size_t bytes);
token expect(parser *state, const char *text);
token expect_kind(parser *state, token_kind kind, const char *what);
uint64_t expect_number(parser *state); /* with a sign, perhaps */
/* "%r12" of the range "%r"; -1: of none. */
int64_t register_of(const parser *state, token name);
instruction *add_instruction(parser *state, instruction made);

/* statements.c */
void read_instruction(parser *state);

#endif
