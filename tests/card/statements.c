/* From an instruction as it is written to the one that is run. */

#include <ctype.h>
#include <stdlib.h>
#include <string.h>

#include "parser.h"

enum { MOST_OPERANDS = 6 };

/* One operand as it is written: some values, in {} or [], or p|q. */
typedef struct {
    operand values[MOST_RESULTS];
    uint32_t count;
    int64_t offset;
    int is_address, is_negated;
} written_operand;

static int special_of(token name, operand *into) {
    static const char *const names[] = {
        "%tid.x", "%tid.y", "%tid.z", "%ntid.x", "%ntid.y", "%ntid.z", "%ctaid.x", "%ctaid.y",
        "%ctaid.z", "%nctaid.x", "%nctaid.y", "%nctaid.z", "%laneid", "%warpid", "%nwarpid",
        "%lanemask_eq", "%lanemask_lt", "%lanemask_le", "%lanemask_gt", "%lanemask_ge",
    };
    if (token_is(name, "WARP_SZ")) {
        *into = (operand){OPERAND_IMMEDIATE, 32};
        return 1;
    }
    for (uint64_t i = 0; i < sizeof names / sizeof *names; i++)
        if (token_is(name, names[i])) {
            *into = (operand){OPERAND_SPECIAL, i};
            return 1;
        }
    return 0;
}

static operand named_operand(parser *state, token name) {
    operand found;
    int64_t number = register_of(state, name);
    if (number >= 0)
        return (operand){OPERAND_REGISTER, (uint64_t)number};
    if (token_is(name, "_"))
        return (operand){OPERAND_SINK, 0};
    if (special_of(name, &found))
        return found;
    for (uint32_t i = 0; i < state->num_variables; i++)
        if (token_is(name, state->variables[i].name)) {
            int64_t place = state->variables[i].place;
            return place == DYNAMIC ? (operand){OPERAND_SPECIAL, SPECIAL_DYNAMIC_SHARED}
                                    : (operand){OPERAND_IMMEDIATE, (uint64_t)place};
        }
    for (uint32_t i = 0; i < state->function->num_parameters; i++)
        if (token_is(name, state->function->parameters[i].name))
            return (operand){OPERAND_IMMEDIATE, state->function->parameters[i].offset};
    parser_fail(state, name.line, "%.*s is no register, parameter or variable that is known",
                (int)name.bytes, name.text);
}

static operand read_value(parser *state) {
    token ahead = state->reader.ahead;
    if (ahead.kind == TOKEN_WORD)
        return named_operand(state, tokens_take(&state->reader));
    return (operand){OPERAND_IMMEDIATE, expect_number(state)};
}

static written_operand read_operand(parser *state) {
    token_reader *reader = &state->reader;
    written_operand read = {.count = 0};
    if (tokens_accept(reader, "[")) {
        read.is_address = 1;
        read.values[read.count++] = read_value(state);
        if (tokens_accept(reader, "+"))
            read.offset = (int64_t)expect_number(state);
        expect(state, "]");
    } else if (tokens_accept(reader, "{")) {
        do {
            if (read.count == MOST_RESULTS)
                parser_fail(state, reader->ahead.line, "a vector of more than %d", MOST_RESULTS);
            read.values[read.count++] = read_value(state);
        } while (tokens_accept(reader, ","));
        expect(state, "}");
    } else {
        read.is_negated = tokens_accept(reader, "!");
        read.values[read.count++] = read_value(state);
        if (tokens_accept(reader, "|"))
            read.values[read.count++] = read_value(state);
    }
    return read;
}

/* Which operands are results and which sources; those of vectors one by one. */
static void place_operands(parser *state, instruction *made, const operand_counts *counts,
                           const written_operand *written, uint32_t count) {
    uint32_t line = made->line, first_source = counts->most_results ? 1 : 0, addresses = 0;
    if (count < first_source)
        parser_fail(state, line, "%s has no operands", made->text);
    if (first_source) {
        made->num_results = (uint8_t)written[0].count;
        memcpy(made->results, written[0].values, sizeof made->results);
    }
    for (uint32_t i = first_source; i < count; i++) {
        if (written[i].is_address && addresses < 2)
            made->offsets[addresses++] = written[i].offset;
        if (written[i].is_negated) {
            if (made->operation != OP_SETP || i != 3)
                parser_fail(state, line, "%s: expected no negated operand", made->text);
            made->negated = 1;
        }
        for (uint32_t j = 0; j < written[i].count; j++) {
            if (made->num_sources == MOST_SOURCES)
                parser_fail(state, line, "%s has too many operands", made->text);
            made->sources[made->num_sources++] = written[i].values[j];
        }
    }
    if (made->num_results < counts->least_results || made->num_results > counts->most_results ||
        made->num_sources < counts->least_sources || made->num_sources > counts->most_sources)
        parser_fail(state, line, "%s: wrong number of operands", made->text);
    for (uint32_t i = 0; i < made->num_results; i++)
        if (made->results[i].kind != OPERAND_REGISTER && made->results[i].kind != OPERAND_SINK)
            parser_fail(state, line, "%s: expected registers to write", made->text);
}

/* What only the operands tell. */
static void settle(parser *state, instruction *made) {
    uint32_t line = made->line;
    uint32_t bits = made->type.bits;
    if (made->operation == OP_MOV && (made->num_results > 1 || made->num_sources > 1)) {
        uint32_t parts = (uint32_t)made->num_results * made->num_sources;
        int packs = made->num_sources > 1;
        if ((packs && made->num_results > 1) || bits % parts || bits / parts < 8)
            parser_fail(state, line, "%s: wrong number of parts", made->text);
        made->operation = packs ? OP_PACK : OP_UNPACK;
        type part = {(uint8_t)(bits / parts), 0};
        *(packs ? &made->type : &made->result_type) = part;
    }
    if (made->operation == OP_LD_PARAM) {
        made->sources[0].value += (uint64_t)made->offsets[0];
        if (made->sources[0].kind != OPERAND_IMMEDIATE ||
            made->sources[0].value + bits / 8 > state->function->parameter_bytes)
            parser_fail(state, line, "%s: expected a place within the parameters", made->text);
    }
    if (made->operation == OP_CP_ASYNC) {
        if (made->sources[2].kind != OPERAND_IMMEDIATE)
            parser_fail(state, line, "%s: expected a constant number of bytes", made->text);
        made->bytes = (uint32_t)made->sources[2].value;
        int wide = made->bytes == 16;
        if (!wide && (made->mode || (made->bytes != 4 && made->bytes != 8)))
            parser_fail(state, line, "%s: expected 16 bytes%s", made->text,
                        made->mode ? "" : ", 8 or 4");
    }
    if (made->operation == OP_LOP3 && made->sources[3].kind != OPERAND_IMMEDIATE)
        parser_fail(state, line, "%s: expected a constant table", made->text);
    if (made->operation == OP_CP_ASYNC_WAIT && made->num_sources == 1 &&
        made->sources[0].kind != OPERAND_IMMEDIATE)
        parser_fail(state, line, "%s: expected a constant number of groups", made->text);
}

/* The text of a statement in one line, without what its ends hold of blanks. */
static char *statement_text(parser *state, const char *begin, const char *end) {
    char *text = copied(state, begin, (size_t)(end - begin));
    size_t kept = 0;
    for (size_t i = 0; text[i]; i++)
        if (!isspace((unsigned char)text[i]))
            text[kept++] = text[i];
        else if (kept && text[kept - 1] != ' ')
            text[kept++] = ' ';
    text[kept] = 0;
    return text;
}

static void read_guard(parser *state, instruction *made) {
    made->guard = -1;
    if (!tokens_accept(&state->reader, "@"))
        return;
    made->guard_negated = (uint8_t)tokens_accept(&state->reader, "!");
    token name = expect_kind(state, TOKEN_WORD, "a predicate");
    int64_t number = register_of(state, name);
    if (number < 0 || state->function->registers[number].bits != 1)
        parser_fail(state, name.line, "%.*s is no predicate that is known", (int)name.bytes,
                    name.text);
    made->guard = (int32_t)number;
}

void read_instruction(parser *state) {
    token_reader *reader = &state->reader;
    instruction made = {.line = reader->ahead.line};
    const char *begin = reader->ahead.text;
    read_guard(state, &made);
    token opcode = expect_kind(state, TOKEN_WORD, "an instruction");
    char *name = copied(state, opcode.text, opcode.bytes);
    operand_counts counts;
    char reason[128];
    int known = decode_opcode(name, &made, &counts, reason, sizeof reason);
    free(name);
    if (known != 0) {
        size_t bytes = strcspn(begin, ";\n");
        parser_fail(state, opcode.line, "the instruction %s: %.*s", reason, (int)bytes, begin);
    }
    if (made.operation == OP_BRA) {
        token target = expect_kind(state, TOKEN_WORD, "a label");
        state->jumps = grown(state, state->jumps, state->num_jumps, sizeof *state->jumps);
        state->jumps[state->num_jumps].name = copied(state, target.text, target.bytes);
        state->jumps[state->num_jumps++].place = state->function->num_instructions;
    }
    written_operand written[MOST_OPERANDS];
    uint32_t count = 0;
    while (!token_is(reader->ahead, ";")) {
        if (count == MOST_OPERANDS)
            parser_fail(state, made.line, "an instruction of more than %d operands", MOST_OPERANDS);
        written[count++] = read_operand(state);
        if (!tokens_accept(reader, ","))
            break;
    }
    made.text = statement_text(state, begin, reader->ahead.text);
    instruction *kept = add_instruction(state, made);
    expect(state, ";");
    if (kept->operation == OP_NOTHING)
        return;
    place_operands(state, kept, &counts, written, count);
    settle(state, kept);
}
