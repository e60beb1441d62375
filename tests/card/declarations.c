/* From the text of a module to its functions: declarations, labels, the frame of all statements. */

#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "parser.h"

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
        parser_fail(state, type_name.line, "registers of the type %.*s are not known",
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
            char full[128];
            if (name.bytes > sizeof full - 16)
                parser_fail(state, name.line, "a name of more than %zu characters",
                            sizeof full - 16);
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
                bytes = size.kind == TOKEN_NUMBER ? element * (uint32_t)expect_number(state) : 0;
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
            parser_fail(state, line, "a parameter of a type that is not known");
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
            parser_fail(state, jump->line, "%s: there is no such label", jump->text);
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
        parser_fail(state, name.line, "out of memory");
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
    uint32_t outer_variables = state->num_variables, outer_bytes = state->shared_bytes;
    state->depth = 1;
    while (state->depth > 0) {
        if (reader->ahead.kind == TOKEN_END)
            parser_fail(state, reader->ahead.line, "the body of %s does not end", function->name);
        read_statement(state);
    }
    add_instruction(state, (instruction){.operation = OP_EXIT,
                                         .guard = -1,
                                         .line = reader->ahead.line,
                                         .text = copied(state, "}", 1)});
    join_labels(state);
    forget_names(state);
    function->static_shared_bytes = state->shared_bytes;
    while (state->num_variables > outer_variables) /* its own go with it */
        free(state->variables[--state->num_variables].name);
    state->shared_bytes = outer_bytes;
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
            parser_fail(state, word.line, "%.*s is not known", (int)word.bytes, word.text);
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
