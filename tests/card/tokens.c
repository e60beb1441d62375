/* See tokens.h. */

#include "tokens.h"

#include <ctype.h>
#include <stdlib.h>
#include <string.h>

static void pass_blanks(token_reader *reader) {
    const char *at = reader->next;
    for (;;) {
        if (*at == '\n') {
            reader->line++;
            at++;
        } else if (isspace((unsigned char)*at)) {
            at++;
        } else if (at[0] == '/' && at[1] == '/') {
            at += strcspn(at, "\n");
        } else if (at[0] == '/' && at[1] == '*') {
            const char *end = strstr(at + 2, "*/");
            end = end ? end + 2 : at + strlen(at);
            for (; at < end; at++)
                reader->line += *at == '\n';
        } else {
            break;
        }
    }
    reader->next = at;
}

static int continues_word(const char *at) {
    return isalnum((unsigned char)*at) || *at == '_' || *at == '$' || *at == '.' || *at == '%';
}

static void read_ahead(token_reader *reader) {
    pass_blanks(reader);
    const char *begin = reader->next, *at = begin;
    token found = {TOKEN_MARK, begin, 1, 0, reader->line};
    if (*at == 0) {
        found.kind = TOKEN_END;
        found.bytes = 0;
    } else if (isdigit((unsigned char)*at)) {
        char *end;
        found.kind = TOKEN_NUMBER;
        found.number = strtoull(begin, &end, 0);
        /* 0U; what a float or a wrong number leaves is taken along, and is no number. */
        for (at = end; isalnum((unsigned char)*at) || *at == '.'; at++)
            if (*at != 'U')
                found.kind = TOKEN_WORD;
        found.bytes = (size_t)(at - begin);
    } else if (*at == '"') {
        found.kind = TOKEN_STRING;
        at += 1 + strcspn(at + 1, "\"\n");
        found.bytes = (size_t)(at - begin) + (*at == '"');
    } else if (continues_word(at)) {
        found.kind = TOKEN_WORD;
        /* A label's colon is none of "shared::cta". */
        while (continues_word(at) || (at[0] == ':' && at[1] == ':'))
            at += *at == ':' ? 2 : 1;
        found.bytes = (size_t)(at - begin);
    }
    reader->next = begin + found.bytes;
    reader->ahead = found;
}

void tokens_begin(token_reader *reader, const char *text) {
    reader->next = text;
    reader->line = 1;
    read_ahead(reader);
}

token tokens_take(token_reader *reader) {
    token taken = reader->ahead;
    if (taken.kind != TOKEN_END)
        read_ahead(reader);
    return taken;
}

int token_is(token seen, const char *text) {
    return seen.bytes == strlen(text) && memcmp(seen.text, text, seen.bytes) == 0;
}

int tokens_accept(token_reader *reader, const char *text) {
    if (!token_is(reader->ahead, text))
        return 0;
    tokens_take(reader);
    return 1;
}

void tokens_skip_line(token_reader *reader, uint32_t line) {
    while (reader->ahead.kind != TOKEN_END && reader->ahead.line == line)
        tokens_take(reader);
}

void tokens_skip_past(token_reader *reader, const char *mark) {
    while (reader->ahead.kind != TOKEN_END && !tokens_accept(reader, mark))
        tokens_take(reader);
}
