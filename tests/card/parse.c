/* From the text of a module to its functions. */

#include <ctype.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "program.h"
#include "tokens.h"

enum { MOST_OPERANDS = 6, DYNAMIC = -1 };

/* `.reg .b32 %r<55>`: registers %r0 to %r54; `.reg .b32 sum`: one. Known to the end of its braces. */
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

/* One operand as it is written: some values, in {} or [], or p|q. */
typedef struct {
    operand values[MOST_RESULTS];
    uint32_t count;
    int64_t offset;
    int is_address, is_negated;
} written_operand;

static _Noreturn void fail(parser *state, uint32_t line, const char *format, ...) {
    char reason[512];
    va_list values;
    va_start(values, format);
    vsnprintf(reason, sizeof reason, format, values);
    va_end(values);
    snprintf(state->why, state->why_bytes, "line %u: %s", line, reason);
    longjmp(state->failed, 1);
}

/* One more element behind `count` of them; capacity doubles at powers of two. */
static void *grown(parser *state, void *array, uint32_t count, size_t element_bytes) {
    if (count & (count - 1) || (count == 0 && array))
        return array;
    void *larger = realloc(array, (count ? 2 * (size_t)count : 1) * element_bytes);
    if (!larger)
        fail(state, state->reader.ahead.line, "out of memory");
    return larger;
}

static char *copied(parser *state, const char *text, size_t bytes) {
    char *copy = malloc(bytes + 1);
    if (!copy)
        fail(state, state->reader.ahead.line, "out of memory");
    memcpy(copy, text, bytes);
    copy[bytes] = 0;
    return copy;
}

static token expect(parser *state, const char *text) {
    token taken = tokens_take(&state->reader);
    if (!token_is(taken, text))
        fail(state, taken.line, "expected %s, got %.*s", text, (int)taken.bytes, taken.text);
    return taken;
}

static token expect_kind(parser *state, token_kind kind, const char *what) {
    token taken = tokens_take(&state->reader);
    if (taken.kind != kind)
        fail(state, taken.line, "expected %s, got %.*s", what, (int)taken.bytes, taken.text);
    return taken;
}

/* "%r12" of the range "%r"; -1: of none. */
static int64_t register_of(const parser *state, token name) {
    for (uint32_t i = state->num_ranges; i-- > 0;) {
        const register_range *range = &state->ranges[i];
        size_t bytes = strlen(range->prefix);
        if (name.bytes < bytes || memcmp(name.text, range->prefix, bytes) != 0)
            continue;
        if (range->count == 0 && name.bytes == bytes)
            return range->first;
        uint64_t number = 0;
        size_t at = bytes;
        for (; at < name.bytes && isdigit((unsigned char)name.text[at]); at++)
            number = 10 * number + (uint64_t)(name.text[at] - '0');
        if (at == name.bytes && at > bytes && number < range->count)
            return range->first + (int64_t)number;
    }
    return -1;
}

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
    fail(state, name.line, "%.*s is no register, parameter or variable that is known",
         (int)name.bytes, name.text);
}

static uint64_t read_number(parser *state) {
    int negative = tokens_accept(&state->reader, "-");
    uint64_t number = expect_kind(state, TOKEN_NUMBER, "a number").number;
    return negative ? -number : number;
}

static operand read_value(parser *state) {
    token ahead = state->reader.ahead;
    if (ahead.kind == TOKEN_WORD)
        return named_operand(state, tokens_take(&state->reader));
    return (operand){OPERAND_IMMEDIATE, read_number(state)};
}

static written_operand read_operand(parser *state) {
    token_reader *reader = &state->reader;
    written_operand read = {.count = 0};
    if (tokens_accept(reader, "[")) {
        read.is_address = 1;
        read.values[read.count++] = read_value(state);
        if (tokens_accept(reader, "+"))
            read.offset = (int64_t)read_number(state);
        expect(state, "]");
    } else if (tokens_accept(reader, "{")) {
        do {
            if (read.count == MOST_RESULTS)
                fail(state, reader->ahead.line, "a vector of more than %d", MOST_RESULTS);
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
        fail(state, line, "%s has no operands", made->text);
    if (first_source) {
        made->num_results = (uint8_t)written[0].count;
        memcpy(made->results, written[0].values, sizeof made->results);
    }
    for (uint32_t i = first_source; i < count; i++) {
        if (written[i].is_address && addresses < 2)
            made->offsets[addresses++] = written[i].offset;
        if (written[i].is_negated) {
            if (made->operation != OP_SETP || i != 3)
                fail(state, line, "%s: expected no negated operand", made->text);
            made->negated = 1;
        }
        for (uint32_t j = 0; j < written[i].count; j++) {
            if (made->num_sources == MOST_SOURCES)
                fail(state, line, "%s has too many operands", made->text);
            made->sources[made->num_sources++] = written[i].values[j];
        }
    }
    if (made->num_results < counts->least_results || made->num_results > counts->most_results ||
        made->num_sources < counts->least_sources || made->num_sources > counts->most_sources)
        fail(state, line, "%s: wrong number of operands", made->text);
    for (uint32_t i = 0; i < made->num_results; i++)
        if (made->results[i].kind != OPERAND_REGISTER && made->results[i].kind != OPERAND_SINK)
            fail(state, line, "%s: expected registers to write", made->text);
}

/* What only the operands tell. */
static void settle(parser *state, instruction *made) {
    uint32_t line = made->line;
    uint32_t bits = made->type.bits;
    if (made->operation == OP_MOV && (made->num_results > 1 || made->num_sources > 1)) {
        uint32_t parts = (uint32_t)made->num_results * made->num_sources;
        int packs = made->num_sources > 1;
        if ((packs && made->num_results > 1) || bits % parts || bits / parts < 8)
            fail(state, line, "%s: wrong number of parts", made->text);
        made->operation = packs ? OP_PACK : OP_UNPACK;
        type part = {(uint8_t)(bits / parts), 0};
        *(packs ? &made->type : &made->result_type) = part;
    }
    if (made->operation == OP_LD_PARAM) {
        made->sources[0].value += (uint64_t)made->offsets[0];
        if (made->sources[0].kind != OPERAND_IMMEDIATE ||
            made->sources[0].value + bits / 8 > state->function->parameter_bytes)
            fail(state, line, "%s: expected a place within the parameters", made->text);
    }
    if (made->operation == OP_CP_ASYNC) {
        if (made->sources[2].kind != OPERAND_IMMEDIATE)
            fail(state, line, "%s: expected a constant number of bytes", made->text);
        made->bytes = (uint32_t)made->sources[2].value;
        int wide = made->bytes == 16;
        if (!wide && (made->mode || (made->bytes != 4 && made->bytes != 8)))
            fail(state, line, "%s: expected 16 bytes%s", made->text, made->mode ? "" : ", 8 or 4");
    }
    if (made->operation == OP_LOP3 && made->sources[3].kind != OPERAND_IMMEDIATE)
        fail(state, line, "%s: expected a constant table", made->text);
    if (made->operation == OP_CP_ASYNC_WAIT && made->num_sources == 1 &&
        made->sources[0].kind != OPERAND_IMMEDIATE)
        fail(state, line, "%s: expected a constant number of groups", made->text);
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

static instruction *add_instruction(parser *state, instruction made) {
    ptx_function *function = state->function;
    function->code = grown(state, function->code, function->num_instructions, sizeof made);
    function->code[function->num_instructions] = made;
    return &function->code[function->num_instructions++];
}

static void read_guard(parser *state, instruction *made) {
    made->guard = -1;
    if (!tokens_accept(&state->reader, "@"))
        return;
    made->guard_negated = (uint8_t)tokens_accept(&state->reader, "!");
    token name = expect_kind(state, TOKEN_WORD, "a predicate");
    int64_t number = register_of(state, name);
    if (number < 0 || state->function->registers[number].bits != 1)
        fail(state, name.line, "%.*s is no predicate that is known", (int)name.bytes, name.text);
    made->guard = (int32_t)number;
}

static void read_instruction(parser *state) {
    token_reader *reader = &state->reader;
    instruction made = {.line = reader->ahead.line};
    const char *begin = reader->ahead.text;
    read_guard(state, &made);
    token opcode = expect_kind(state, TOKEN_WORD, "an instruction");
    char *name = copied(state, opcode.text, opcode.bytes);
    operand_counts counts;
    char reason[64];
    int known = decode_opcode(name, &made, &counts, reason, sizeof reason);
    free(name);
    if (known != 0) {
        size_t bytes = strcspn(begin, ";\n");
        fail(state, opcode.line, "the instruction %s: %.*s", reason, (int)bytes, begin);
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
            fail(state, made.line, "an instruction of more than %d operands", MOST_OPERANDS);
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

/* .reg .b32 %r<55>, sum; */
static void read_registers(parser *state) {
    token type_name = expect_kind(state, TOKEN_WORD, "a type");
    static const struct {
        const char *name;
        uint8_t bits;
    } types[] = {{".pred", 1}, {".b8", 8},   {".u8", 8},   {".s8", 8},   {".b16", 16},
                 {".u16", 16}, {".s16", 16}, {".b32", 32}, {".u32", 32}, {".s32", 32},
                 {".b64", 64}, {".u64", 64}, {".s64", 64}};
    uint8_t bits = 0;
    for (size_t i = 0; i < sizeof types / sizeof *types; i++)
        if (token_is(type_name, types[i].name))
            bits = types[i].bits;
    if (!bits)
        fail(state, type_name.line, "registers of the type %.*s are not known",
             (int)type_name.bytes, type_name.text);
    ptx_function *function = state->function;
    do {
        token name = expect_kind(state, TOKEN_WORD, "a register");
        uint32_t count = 0;
        if (tokens_accept(&state->reader, "<")) {
            count = (uint32_t)expect_kind(state, TOKEN_NUMBER, "a number").number;
            expect(state, ">");
        }
        state->ranges = grown(state, state->ranges, state->num_ranges, sizeof *state->ranges);
        state->ranges[state->num_ranges++] =
            (register_range){copied(state, name.text, name.bytes), count, function->num_registers,
                             state->depth};
        for (uint32_t i = 0; i < (count ? count : 1); i++) {
            char full[80];
            int bytes = count ? snprintf(full, sizeof full, "%.*s%u", (int)name.bytes, name.text, i)
                              : snprintf(full, sizeof full, "%.*s", (int)name.bytes, name.text);
            function->registers = grown(state, function->registers, function->num_registers,
                                        sizeof *function->registers);
            function->registers[function->num_registers++] =
                (register_declaration){copied(state, full, (size_t)bytes), bits};
        }
    } while (tokens_accept(&state->reader, ","));
    expect(state, ";");
}

/* What follows `.shared`: .align 16 .b8 name[4096]; without a size: what the launch adds. */
static void read_shared(parser *state) {
    uint32_t align = 1, element = 1;
    for (;;) {
        token word = expect_kind(state, TOKEN_WORD, "a variable");
        if (token_is(word, ".align")) {
            align = (uint32_t)expect_kind(state, TOKEN_NUMBER, "a number").number;
        } else if (word.text[0] == '.') {
            element = (uint32_t)strtoul(word.text + 2, NULL, 10) / 8;
        } else {
            shared_variable made = {copied(state, word.text, word.bytes), DYNAMIC};
            uint32_t bytes = element;
            if (tokens_accept(&state->reader, "[")) {
                token size = state->reader.ahead;
                bytes = size.kind == TOKEN_NUMBER ? element * (uint32_t)read_number(state) : 0;
                expect(state, "]");
            }
            if (bytes) {
                align = align < element ? element : align;
                made.place = (state->shared_bytes + align - 1) / align * align;
                state->shared_bytes = (uint32_t)made.place + bytes;
            }
            state->variables =
                grown(state, state->variables, state->num_variables, sizeof made);
            state->variables[state->num_variables++] = made;
            break;
        }
    }
    expect(state, ";");
}

static void read_parameters(parser *state) {
    ptx_function *function = state->function;
    while (tokens_accept(&state->reader, ".param")) {
        uint32_t bytes = 0, line = state->reader.ahead.line;
        token word = expect_kind(state, TOKEN_WORD, "a type");
        /* .u64 .ptr .global .align 1 name */
        for (; word.text[0] == '.'; word = expect_kind(state, TOKEN_WORD, "a parameter"))
            if (token_is(word, ".align"))
                expect_kind(state, TOKEN_NUMBER, "a number");
            else if (strchr("bus", word.text[1]) && isdigit((unsigned char)word.text[2]))
                bytes = (uint32_t)strtoul(word.text + 2, NULL, 10) / 8;
        if (!bytes || token_is(state->reader.ahead, "["))
            fail(state, line, "a parameter of a type that is not known");
        uint32_t offset = (function->parameter_bytes + bytes - 1) / bytes * bytes;
        function->parameters = grown(state, function->parameters, function->num_parameters,
                                     sizeof *function->parameters);
        function->parameters[function->num_parameters++] =
            (parameter){copied(state, word.text, word.bytes), offset, bytes};
        function->parameter_bytes = offset + bytes;
        if (!tokens_accept(&state->reader, ","))
            break;
    }
    expect(state, ")");
}

/* Of .reqntid and .maxntid: up to three numbers. */
static uint32_t read_product(parser *state) {
    uint32_t product = 1;
    do
        product *= (uint32_t)expect_kind(state, TOKEN_NUMBER, "a number").number;
    while (tokens_accept(&state->reader, ","));
    return product;
}

static void read_statement(parser *state) {
    token_reader *reader = &state->reader;
    token ahead = reader->ahead;
    if (tokens_accept(reader, "{")) {
        state->depth++;
    } else if (tokens_accept(reader, "}")) {
        while (state->num_ranges && state->ranges[state->num_ranges - 1].depth == state->depth)
            free(state->ranges[--state->num_ranges].prefix);
        state->depth--;
    } else if (tokens_accept(reader, ".reg")) {
        read_registers(state);
    } else if (tokens_accept(reader, ".shared")) {
        read_shared(state);
    } else if (tokens_accept(reader, ".loc")) {
        tokens_skip_line(reader, ahead.line);
    } else if (tokens_accept(reader, ".pragma")) {
        tokens_skip_past(reader, ";");
    } else if (ahead.kind == TOKEN_WORD && *reader->next == ':') {
        tokens_take(reader);
        expect(state, ":");
        state->labels = grown(state, state->labels, state->num_labels, sizeof *state->labels);
        state->labels[state->num_labels].name = copied(state, ahead.text, ahead.bytes);
        state->labels[state->num_labels++].place = state->function->num_instructions;
    } else if (!tokens_accept(reader, ";")) {
        read_instruction(state);
    }
}

static void join_labels(parser *state) {
    for (uint32_t i = 0; i < state->num_jumps; i++) {
        instruction *jump = &state->function->code[state->jumps[i].place];
        uint32_t l = 0;
        while (l < state->num_labels && strcmp(state->labels[l].name, state->jumps[i].name) != 0)
            l++;
        if (l == state->num_labels)
            fail(state, jump->line, "%s: there is no such label", jump->text);
        jump->target = state->labels[l].place;
    }
}

static void forget_names(parser *state) {
    while (state->num_ranges)
        free(state->ranges[--state->num_ranges].prefix);
    while (state->num_labels)
        free(state->labels[--state->num_labels].name);
    while (state->num_jumps)
        free(state->jumps[--state->num_jumps].name);
}

static void read_entry(parser *state) {
    token_reader *reader = &state->reader;
    token name = expect_kind(state, TOKEN_WORD, "a name");
    ptx_module *module = state->module;
    module->functions = grown(state, module->functions, module->num_functions,
                              sizeof *module->functions);
    ptx_function *function = calloc(1, sizeof *function);
    if (!function)
        fail(state, name.line, "out of memory");
    module->functions[module->num_functions++] = state->function = function;
    function->name = copied(state, name.text, name.bytes);
    if (tokens_accept(reader, "("))
        read_parameters(state);
    while (!tokens_accept(reader, "{")) {
        token word = expect_kind(state, TOKEN_WORD, "a body");
        if (token_is(word, ".reqntid") || token_is(word, ".maxntid")) {
            function->exactly = token_is(word, ".reqntid");
            function->threads = read_product(state);
        } else {
            tokens_skip_line(reader, word.line); /* .minnctapersm and other wishes */
        }
    }
    state->depth = 1;
    while (state->depth > 0) {
        if (reader->ahead.kind == TOKEN_END)
            fail(state, reader->ahead.line, "the body of %s does not end", function->name);
        read_statement(state);
    }
    add_instruction(state, (instruction){.operation = OP_EXIT,
                                         .guard = -1,
                                         .line = reader->ahead.line,
                                         .text = copied(state, "}", 1)});
    join_labels(state);
    forget_names(state);
    function->static_shared_bytes = state->shared_bytes;
}

static int read_module(parser *state, const char *text) {
    token_reader *reader = &state->reader;
    if (setjmp(state->failed) != 0)
        return -1;
    tokens_begin(reader, text);
    while (reader->ahead.kind != TOKEN_END) {
        token word = tokens_take(reader);
        if (token_is(word, ".entry"))
            read_entry(state);
        else if (token_is(word, ".shared"))
            read_shared(state);
        else if (token_is(word, ".section"))
            tokens_skip_past(reader, "}");
        else if (token_is(word, ".version") || token_is(word, ".target") ||
                 token_is(word, ".address_size") || token_is(word, ".file"))
            tokens_skip_line(reader, word.line);
        else if (!token_is(word, ".visible") && !token_is(word, ".extern") &&
                 !token_is(word, ".weak"))
            fail(state, word.line, "%.*s is not known", (int)word.bytes, word.text);
    }
    return 0;
}

ptx_module *ptx_load(const char *text, char *why, size_t why_bytes) {
    parser *state = calloc(1, sizeof *state);
    ptx_module *module = calloc(1, sizeof *module);
    if (!state || !module) {
        snprintf(why, why_bytes, "out of memory");
        free(state);
        free(module);
        return NULL;
    }
    state->module = module;
    state->why = why;
    state->why_bytes = why_bytes;
    int failed = read_module(state, text);
    forget_names(state);
    while (state->num_variables)
        free(state->variables[--state->num_variables].name);
    free(state->ranges);
    free(state->labels);
    free(state->jumps);
    free(state->variables);
    free(state);
    if (!failed)
        return module;
    ptx_unload(module);
    return NULL;
}

void ptx_unload(ptx_module *module) {
    for (uint32_t f = 0; module && f < module->num_functions; f++) {
        ptx_function *function = module->functions[f];
        for (uint32_t i = 0; i < function->num_parameters; i++)
            free(function->parameters[i].name);
        for (uint32_t i = 0; i < function->num_registers; i++)
            free(function->registers[i].name);
        for (uint32_t i = 0; i < function->num_instructions; i++)
            free(function->code[i].text);
        free(function->parameters);
        free(function->registers);
        free(function->code);
        free(function->name);
        free(function);
    }
    if (module)
        free(module->functions);
    free(module);
}

const ptx_function *ptx_find(const ptx_module *module, const char *name) {
    for (uint32_t i = 0; i < module->num_functions; i++)
        if (strcmp(module->functions[i]->name, name) == 0)
            return module->functions[i];
    return NULL;
}

int ptx_num_parameters(const ptx_function *function) { return (int)function->num_parameters; }

uint32_t ptx_parameter_bytes(const ptx_function *function, int index) {
    return function->parameters[index].bytes;
}

uint32_t ptx_static_shared_bytes(const ptx_function *function) {
    return function->static_shared_bytes;
}

uint32_t ptx_threads(const ptx_function *function) { return function->threads; }
