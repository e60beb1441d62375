/* See parser.h. */

#include "parser.h"

#include <ctype.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void parser_fail(parser *state, uint32_t line, const char *format, ...) {
    char reason[512];
    va_list values;
    va_start(values, format);
    vsnprintf(reason, sizeof reason, format, values);
    va_end(values);
    snprintf(state->why, state->why_bytes, "line %u: %s", line, reason);
    longjmp(state->failed, 1);
}

void *grown(parser *state, void *array, uint32_t count, size_t element_bytes) {
    if (count & (count - 1) || (count == 0 && array))
        return array;
    void *larger = realloc(array, (count ? 2 * (size_t)count : 1) * element_bytes);
    if (!larger)
        parser_fail(state, state->reader.ahead.line, "out of memory");
    return larger;
}

char *copied(parser *state, const char *text, size_t bytes) {
    char *copy = malloc(bytes + 1);
    if (!copy)
        parser_fail(state, state->reader.ahead.line, "out of memory");
    memcpy(copy, text, bytes);
    copy[bytes] = 0;
    return copy;
}

token expect(parser *state, const char *text) {
    token taken = tokens_take(&state->reader);
    if (!token_is(taken, text))
        parser_fail(state, taken.line, "expected %s, got %.*s", text, (int)taken.bytes, taken.text);
    return taken;
}

token expect_kind(parser *state, token_kind kind, const char *what) {
    token taken = tokens_take(&state->reader);
    if (taken.kind != kind)
        parser_fail(state, taken.line, "expected %s, got %.*s", what, (int)taken.bytes, taken.text);
    return taken;
}

uint64_t expect_number(parser *state) {
    int negative = tokens_accept(&state->reader, "-");
    uint64_t number = expect_kind(state, TOKEN_NUMBER, "a number").number;
    return negative ? -number : number;
}

int64_t register_of(const parser *state, token name) {
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

instruction *add_instruction(parser *state, instruction made) {
    ptx_function *function = state->function;
    function->code = grown(state, function->code, function->num_instructions, sizeof made);
    function->code[function->num_instructions] = made;
    return &function->code[function->num_instructions++];
}
