/* The text of a module, word by word. */
#ifndef CARD_TOKENS_H
#define CARD_TOKENS_H

#include <stddef.h>
#include <stdint.h>

typedef enum {
    TOKEN_END,
    TOKEN_WORD,   /* names, opcodes, directives: may begin with . % $ and hold dots and :: */
    TOKEN_NUMBER,
    TOKEN_STRING,
    TOKEN_MARK,   /* one character of punctuation */
} token_kind;

typedef struct {
    token_kind kind;
    const char *text; /* in the module's text */
    size_t bytes;
    uint64_t number;
    uint32_t line; /* from 1 */
} token;

/* Reads one token ahead. */
typedef struct {
    const char *next; /* behind `ahead` */
    uint32_t line;
    token ahead;
} token_reader;

void tokens_begin(token_reader *reader, const char *text);
/* The token ahead, which is passed. */
token tokens_take(token_reader *reader);
int token_is(token seen, const char *text);
/* Passes the token ahead if it is this one. */
int tokens_accept(token_reader *reader, const char *text);
/* Passes what is left of the line of a token that was passed. */
void tokens_skip_line(token_reader *reader, uint32_t line);
/* Passes all up to this mark, and it. */
void tokens_skip_past(token_reader *reader, const char *mark);

#endif
